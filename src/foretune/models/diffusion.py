"""Denoisers of diffusers: folders of one model and of whole pipelines, and how they are called.

Of a pipeline (Stable Diffusion and its like) only the denoiser is trained. What surrounds it is
frozen: the text encoder, whose states of a prompt are the condition, the autoencoder, which turns
images into latents, and the noise schedule.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NotRequired

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import TypedDict

from foretune.errors import UserError
from foretune.files import CONFIG_FILE, PIPELINE_FILE
from foretune.formats import read_json
from foretune.models.pretrained import quiet

DENOISERS = ("transformer", "unet")  # names of a pipeline's denoiser
TIMES = ("timestep", "timesteps", "t", "time")  # names of the timestep among a model's arguments


class DiffusersConfig(TypedDict):
    """What is read of a config.json of diffusers."""

    _class_name: NotRequired[str | list[str]]
    _diffusers_version: NotRequired[str]


def is_diffusers(folder: Path) -> bool:
    """Whether a folder holds a model or a pipeline of diffusers."""
    if (folder / PIPELINE_FILE).is_file():
        return True
    config = folder / CONFIG_FILE
    return config.is_file() and "_class_name" in read_json(config, DiffusersConfig)


def load_denoiser(folder: Path, dtype: torch.dtype | str) -> nn.Module:
    """The model of a folder of diffusers, in eval mode; of a pipeline, its denoiser.

    A pipeline's denoiser has its folder as `foretune_pipeline`.

    Args:
        folder: A folder with config.json or model_index.json.
        dtype: Dtype of the weights; "auto" for the one that they were saved in.

    Raises:
        UserError: diffusers is not installed, knows no such model, or cannot read the weights; or
            the pipeline has no denoiser.
    """
    diffusers = _diffusers()
    place = folder
    if (folder / PIPELINE_FILE).is_file():
        place = next((folder / name for name in DENOISERS if (folder / name).is_dir()), folder)
        if place == folder:
            raise UserError(f"{folder} is a pipeline without a {' or '.join(DENOISERS)} to train")
    name = read_json(place / CONFIG_FILE, DiffusersConfig).get("_class_name")
    model_class = getattr(diffusers, str(name), None)
    if not (isinstance(model_class, type) and issubclass(model_class, diffusers.ModelMixin)):
        raise UserError(f"{place / CONFIG_FILE}: diffusers has no model {name!r}")
    options: dict[str, Any] = {} if dtype == "auto" else {"torch_dtype": dtype}
    try:
        with quiet():
            model: nn.Module = model_class.from_pretrained(  # type: ignore[attr-defined]
                str(place), use_safetensors=True, local_files_only=True, **options
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{place} cannot be read by diffusers: {_in_one_line(error)}") from error
    if place != folder:
        model.foretune_pipeline = str(folder.resolve())  # type: ignore[assignment]
    return model.eval()


def saves_itself(model: nn.Module) -> bool:
    """Whether the model is one of diffusers, which writes its own folder."""
    return "diffusers" in type(model).__module__.split(".")[0] and hasattr(model, "save_pretrained")


def check_arguments(model: nn.Module, columns: Collection[str]) -> tuple[str, ...]:
    """Which columns of the examples a denoiser takes beside the noisy array and the timestep.

    Args:
        model: The denoiser.
        columns: Names of the columns that every example has.

    Returns:
        Those that are arguments of its `forward`, in that order.

    Raises:
        UserError: It needs an argument that no column has.
    """
    arguments = _arguments(model)
    needed = [name for name, parameter in arguments.items() if parameter.default is parameter.empty]
    lacking = [name for name in needed if name not in columns]
    if lacking:
        raise UserError(
            f"{type(model).__name__} needs {' and '.join(lacking)} besides the noisy array and the "
            "timestep: give each row an array in a column of that name"
            + (
                ", or use a pipeline's folder as the model and give each row a text"
                if lacking == ["encoder_hidden_states"]
                else ""
            )
        )
    return tuple(name for name in arguments if name in columns)


def call(model: Any, noisy: Tensor, timesteps: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    """What a denoiser predicts, of the shape of the noisy arrays where it fits them.

    Args:
        model: Returns a tensor, or an output of diffusers that holds one as `sample`.
        noisy: (n, …) noisy arrays.
        timesteps: (n,).
        inputs: Further arguments by name, (n, …) each.
    """
    time = next((name for name in TIMES if name in _parameters(model)), None)
    if time is None:
        output = model(noisy, timesteps, **inputs)
    else:
        output = model(noisy, **{time: timesteps}, **inputs)
    sample: Tensor = output if isinstance(output, Tensor) else output.sample
    return sample


def _parameters(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(model.forward).parameters


def _arguments(model: nn.Module) -> dict[str, inspect.Parameter]:
    """The arguments of `forward` besides the noisy array and the timestep."""
    named = {
        name: parameter
        for name, parameter in _parameters(model).items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }
    others = list(named)[1:]
    time = next((name for name in TIMES if name in others), others[0] if others else "")
    return {name: named[name] for name in others if name != time}


@dataclass(frozen=True)
class Surroundings:
    """The frozen parts of a pipeline around its denoiser.

    Args:
        tokenizer: Of the text encoder; None for a pipeline without one.
        text_encoder: Its last hidden states are the condition; None likewise.
        autoencoder: Turns images into latents; None for a pipeline that works on pixels.
        schedule: The scheduler's config.
    """

    tokenizer: Any
    text_encoder: Any
    autoencoder: Any
    schedule: Mapping[str, Any]

    @torch.no_grad()
    def states_of(self, text: str) -> np.ndarray:
        """(tokens, d) states of a prompt, padded to the encoder's length as in the pipeline."""
        ids = self.tokenizer(
            text,
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        states: np.ndarray = self.text_encoder(ids)[0][0].float().numpy()
        return states

    @torch.no_grad()
    def latents_of(self, image: np.ndarray) -> np.ndarray:
        """(channels, h, w) latents of an image in −1..1: the mean, shifted and scaled."""
        pixels = torch.from_numpy(image)[None].to(self.autoencoder.dtype)
        config = self.autoencoder.config
        latents = self.autoencoder.encode(pixels).latent_dist.mean
        latents = latents - (getattr(config, "shift_factor", None) or 0.0)
        scaled: np.ndarray = (latents * config.scaling_factor)[0].float().numpy()
        return scaled


@lru_cache(maxsize=2)
def surroundings(folder: str) -> Surroundings:
    """The parts of a pipeline's folder that are not trained; those that it lacks are None.

    Raises:
        UserError: It has several text encoders, or a part cannot be read.
    """
    place = Path(folder)
    if (place / "text_encoder_2").is_dir():
        raise UserError(
            f"{folder} has several text encoders, whose states its denoiser takes in a way of its "
            "own: use the denoiser's folder as the model and give each row the arguments of its "
            "forward as arrays"
        )
    tokenizer = text_encoder = autoencoder = None
    try:
        with quiet():
            if (place / "text_encoder").is_dir():
                import transformers

                options = {"local_files_only": True}
                tokenizer = transformers.AutoTokenizer.from_pretrained(
                    str(place / "tokenizer"), **options
                )
                config = transformers.AutoConfig.from_pretrained(
                    str(place / "text_encoder"), **options
                )
                encoder_class = getattr(transformers, config.architectures[0])
                text_encoder = encoder_class.from_pretrained(
                    str(place / "text_encoder"), use_safetensors=True, **options
                ).eval()
            if (place / "vae").is_dir():
                autoencoder = load_denoiser(place / "vae", torch.float32)
    except (OSError, ValueError, RuntimeError, AttributeError) as error:
        raise UserError(f"{folder} cannot be read: {_in_one_line(error)}") from error
    schedule = read_json(place / "scheduler" / "scheduler_config.json", dict[str, Any])
    return Surroundings(tokenizer, text_encoder, autoencoder, schedule)


def channels_of(model: nn.Module) -> int | None:
    """The number of channels that a denoiser of diffusers reads; None where it does not say."""
    config: Any = getattr(model, "config", None)
    channels = getattr(config, "in_channels", None)
    return channels if isinstance(channels, int) else None


@cache
def _diffusers() -> Any:
    try:
        import diffusers
    except ImportError as error:
        raise UserError(
            "models of diffusers need diffusers: pip install 'foretune[diffusion]'"
        ) from error
    return diffusers


def _in_one_line(error: Exception) -> str:
    from foretune.printable import in_one_line

    return in_one_line(str(error))[:200]


def stacked(rows: Sequence[Mapping[str, Any]], name: str, repeats: int) -> Tensor:
    """(m, …) a column of n rows, each `repeats` times in a row: m = n · repeats; ints as int64.

    Raises:
        UserError: The rows differ in shape, or hold no numbers.
    """
    cells = [np.asarray(row[name]) for row in rows]
    if len({cell.shape for cell in cells}) > 1 or any(c.dtype.kind not in "iubf" for c in cells):
        shown = " and ".join(sorted({f"{cell.dtype} {cell.shape}" for cell in cells})[:3])
        raise UserError(f"{name} must be numbers of one shape in all rows, got {shown}")
    values = np.stack(cells)
    kind = np.int64 if values.dtype.kind in "iub" else np.float32
    return torch.from_numpy(values.astype(kind)).repeat_interleave(repeats, 0)
