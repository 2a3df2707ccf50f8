"""Checkpoints of the authors of Forecast-MAE (arXiv:2308.09882), read as a model of ours.

Both have the same layers. Theirs differ in names, keep queries, keys and values of an attention in
one matrix, and pointwise layers as convolutions of kernel size 1.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foretune.errors import UserError
from foretune.forecasting.config import ForecastMAEConfig
from foretune.forecasting.model import ForecastMAE
from foretune.printable import in_one_line

NAMES = (  # (pattern of theirs, ours)
    (r"^(hist|future)_embed\.embed\.proj\.", r"\1_embed.proj."),
    (r"^(hist|future)_embed\.levels\.(\d+)\.blocks\.(\d+)\.", r"\1_embed.levels.\2.\3."),
    (r"^(hist|future)_embed\.levels\.(\d+)\.downsample\.", r"\1_embed.downsamples.\2."),
    (r"^(hist|future)_embed\.norm(\d+)\.", r"\1_embed.norms.\2."),
    (r"\.attn\.rel_pos_bias$", ".attn.rpb"),  # as natten has named it since 0.17
)


def read_checkpoint(file: Path, *, num_heads: int = 8) -> ForecastMAE:
    """A pretrained Forecast-MAE from a checkpoint of the authors' code.

    Args:
        file: A Lightning checkpoint (`state_dict`, names beginning with `net.`), or a state dict.
        num_heads: Attention heads, which no tensor shows; the released model has 8.

    Raises:
        UserError: The file cannot be read without running code, or is of another model.
    """
    tensors = _tensors(file)
    try:
        config = ForecastMAEConfig(
            width=len(tensors["norm.weight"]),
            encoder_depth=_depth(tensors, "blocks"),
            decoder_depth=_depth(tensors, "decoder_blocks"),
            num_heads=num_heads,
            history_steps=len(tensors["history_pred.bias"]) // 2,
            future_steps=len(tensors["future_pred.bias"]) // 2,
            lane_points=len(tensors["lane_pred.bias"]) // 2,
        )
    except KeyError as error:
        raise UserError(
            f"{file} is no pretrained Forecast-MAE: it has no {error.args[0]}; its first tensors "
            f"are {', '.join(list(tensors)[:3])}"
        ) from None
    model = ForecastMAE(config)
    state = model.state_dict()
    for name, expected in state.items():
        if name not in tensors or tensors[name].numel() != expected.numel():
            shape = tuple(tensors[name].shape) if name in tensors else "nothing"
            raise UserError(
                f"{file} is no Forecast-MAE of width {config.width}: {name} should have shape "
                f"{tuple(expected.shape)}, got {shape}"
            )
    extra = sorted(set(tensors) - set(state))
    if extra:
        raise UserError(f"{file} holds {extra[0]}, which a pretrained Forecast-MAE does not have")
    model.load_state_dict(
        {name: tensors[name].reshape(value.shape) for name, value in state.items()}
    )
    return model.eval()


def _tensors(file: Path) -> dict[str, Tensor]:
    """The tensors by our names.

    Raises:
        UserError: The file holds no tensors, or more than tensors.
    """
    if not file.is_file():
        raise UserError(f"no checkpoint {file}")
    try:
        content: Any = torch.load(file, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{file} holds Python objects beside tensors, which are not loaded: save its tensors "
            'alone, torch.save({"state_dict": torch.load(FILE, weights_only=False)["state_dict"]}, '
            "NEW)"
        ) from error
    except (
        *(RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError),
    ) as error:
        raise UserError(f"cannot read {file}: {in_one_line(str(error))[:160]}") from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not all(isinstance(v, Tensor) for v in content.values()):
        raise UserError(f"{file} is no state dict: names with a tensor each are read")
    tensors: dict[str, Tensor] = {}
    for key, tensor in content.items():
        name = str(key).removeprefix("net.")
        for pattern, ours in NAMES:
            name = re.sub(pattern, ours, name)
        joint = re.fullmatch(r"(.*\.attn)\.in_proj_(weight|bias)", name)
        if joint is None:
            tensors[name] = tensor
            continue
        for part, value in zip("qkv", tensor.chunk(3), strict=True):
            tensors[f"{joint[1]}.{part}_proj.{joint[2]}"] = value
    return tensors


def _depth(tensors: Mapping[str, Tensor], name: str) -> int:
    """The number of blocks of that name.

    Raises:
        KeyError: There is none.
    """
    numbers = [int(m[1]) for key in tensors if (m := re.match(rf"{name}\.(\d+)\.", key))]
    if not numbers:
        raise KeyError(name)
    return max(numbers) + 1
