"""Models of transformers: config, weights and tokenizer, with one line for whatever goes wrong."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
from transformers import PreTrainedModel

from foretune.entry_points import entry_point
from foretune.errors import UserError
from foretune.files import CONFIG_FILE, FUSED, TOKENIZER_CONFIG_FILE
from foretune.formats import shortened
from foretune.models.base_record import check_fingerprint
from foretune.models.checkpoint import check_files, check_fit, check_numbers, how_to_convert
from foretune.models.digests import text_tower
from foretune.models.environment import variable
from foretune.models.precision import Precision
from foretune.models.quantised import load_quantised, prepare_quantised
from foretune.models.seeding import seed_generators
from foretune.models.surgery import is_in_head, name_outputs
from foretune.models.tower_classes import TOWER_TYPES, TOWERS
from foretune.models.trusted_code import HOW

LOADERS = {
    "experts.json": "foretune.pruning.plan:load_pruned",
}
"""Marker file in a folder → loader of such models, which returns None where transformers can."""
TOKENIZER_FILES = (
    *("tokenizer.json", TOKENIZER_CONFIG_FILE, "vocab.txt", "vocab.json", "merges.txt"),
    *("spiece.model", "spm.model", "tokenizer.model", "sentencepiece.bpe.model"),
)
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
MOST = {"layers?$|blocks?$|experts$|depth$|groups$": 10_000, "labels$": 1_000_000}
"""The end of a config's key → the largest number of modules or names that it may ask for."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside the block transformers prints no progress bars or warnings."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(50)  # nothing below critical
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def user_errors(where: str) -> Iterator[None]:
    """Turn whatever transformers raises for a missing or damaged model into one line.

    Raises:
        UserError: The model could not be loaded.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # a config may hold anything, and so may the errors that it causes
        reason = reason_of(error)
        if "trust_remote_code" in str(error):
            raise UserError(
                f'model "{where}" needs Python code of its own (auto_map in {CONFIG_FILE}), which '
                f"is executed only with {HOW}"
            ) from error
        place = Path(where) / CONFIG_FILE if Path(where).is_dir() else None
        if "use_safetensors" in str(error) and place is None:
            raise UserError(f"{where} has no safetensors file: {how_to_convert(where)}") from error
        if isinstance(error, MemoryError) or ("alloc" in reason and "memory" in reason):
            named = place or f"the config of {where}"
            raise UserError(
                f"{named} describes a model larger than the memory: {reason}"
            ) from error
        if isinstance(error, (OSError, ImportError, safetensors.SafetensorError)) or place is None:
            hint = (
                ""
                if place
                else ' Give a folder, a GGUF file, "minilm", "smollm2", or a hub id while online.'
            )
            raise UserError(f'cannot load model "{where}": {reason}.{hint}') from error
        raise UserError(
            f"{place} does not describe a model that transformers can build: {reason}"
        ) from error


def reason_of(error: Exception) -> str:
    """The reason in at most 300 characters; with the type of an error that has few words."""
    text = " ".join(str(error).split())[:300].rstrip(".")
    says_enough = isinstance(error, (OSError, ImportError, ValueError, safetensors.SafetensorError))
    return text if says_enough and text else f"{type(error).__name__}: {text}"


def read_config(where: str, trusted: bool) -> Any:
    """The config of a model folder or hub id, once the files beside it are checked.

    Raises:
        UserError: The files are not acceptable, or the config asks for code that may not be run.
    """
    if all((Path(where) / name).exists() for name in FUSED):
        raise UserError(f"{where} is a fused model: load it with foretune.load_fused")
    check_files(where)
    fields, _ = transformers.PreTrainedConfig.get_config_dict(where)
    _check_counts(where, fields)
    for name, kernel in _kernels(fields):
        if not trusted:
            raise UserError(
                f"{CONFIG_FILE} of {where} names code of the hub as its {name} ({kernel}): allow "
                f"it with {HOW}, or remove {name} from the file"
            )
    return transformers.AutoConfig.from_pretrained(where, trust_remote_code=trusted)


def _check_counts(where: str, fields: Any) -> None:
    """Checks that a config does not ask for so many modules that building them never ends.

    Raises:
        UserError: It does.
    """
    for name, value in fields.items() if isinstance(fields, dict) else ():
        for ending, most in MOST.items():
            if isinstance(value, int) and value > most and re.search(ending, name):
                raise UserError(
                    f"{CONFIG_FILE} of {where} is damaged: {name} is {shortened(value)}, above "
                    f"{most}"
                )
        _check_counts(where, value)
    if isinstance(fields, dict) and isinstance(used := fields.get("num_experts_per_tok"), int):
        numbers = [n for key in EXPERTS if isinstance(n := fields.get(key), int) and n > 0]
        if numbers and not 1 <= used <= max(numbers):
            raise UserError(
                f"{CONFIG_FILE} of {where} is damaged: num_experts_per_tok is {shortened(used)}, "
                f"and there are {max(numbers)} experts"
            )


def _kernels(fields: Any) -> Iterator[tuple[str, str]]:
    """(key, repository) of the hub's kernels that a config names: they are code."""
    for name, value in fields.items() if isinstance(fields, dict) else ():
        if name.endswith("implementation") and "/" in str(value):
            yield name, str(value)
        yield from _kernels(value)


def build(
    auto: Any,
    where: str,
    config: Any,
    trusted: bool,
    seed: int,
    dtype: torch.dtype | str = torch.float32,
    quantize: str | None = None,
    *,
    fresh_head: bool,
) -> Any:
    """The model of a folder or hub id, in eval mode.

    Raises:
        UserError: The weights do not fit the config, or cannot be quantised.
    """
    load = functools.partial(_load, auto, where, trusted, seed, fresh_head)
    is_tower = getattr(config, "model_type", None) in TOWER_TYPES
    if is_tower and dtype not in (torch.float32, "auto"):
        raise UserError(f"{where} is a tower, which computes in float32: leave dtype out")
    if quantize is None:
        return load(config=config, dtype=dtype)
    markers = [file for file in LOADERS if (Path(where) / file).is_file()]
    if markers or is_tower:
        reason = f"{where} is a pruned model" if markers else f"{where} is a tower"
        raise UserError(f"{reason}, which is not quantised: leave quantize out")
    return load_quantised(load, config, where, Precision(dtype, quantize))


def _load(
    auto: Any,
    where: str,
    trusted: bool,
    seed: int,
    fresh_head: bool,
    *,
    config: Any,
    dtype: torch.dtype | str,
    **options: Any,
) -> Any:
    """As `build`; the options are arguments of `from_pretrained`.

    Raises:
        UserError: The weights do not fit the config.
    """
    for marker_file, loader in LOADERS.items():
        if (Path(where) / marker_file).is_file():
            model = entry_point(loader)(auto, config, Path(where), dtype)
            if model is not None:
                return model.eval()
    # transformers would ask a service on the hub to convert a repository of pickled weights.
    no_conversion = variable("DISABLE_SAFETENSORS_CONVERSION", "1")
    with quiet(), no_conversion, torch.random.fork_rng(devices=[]):
        seed_generators(seed)
        model, info = auto.from_pretrained(
            where,
            config=config,
            dtype=dtype,
            trust_remote_code=trusted,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **options,
        )
    prepare_quantised(model)
    if getattr(model, "peft_config", None):
        raise UserError(f"{where} is an adapter, not a model: give the model it was trained on")
    if (tower := text_tower(model)) is not None:
        tower.encoder.requires_grad_(False)  # transformers makes all that it loads trainable
    check_fit(where, model, info, fresh_head=fresh_head)
    if getattr(config, "quantization_config", None) is None and Path(where).is_dir():
        check_numbers(Path(where))
    for name, p in model.named_parameters():
        if p.is_floating_point() and p.numel() and not all(x.isfinite() for x in p.aminmax()):
            raise UserError(f"{where} holds NaN or infinite numbers in {name}")
    if fresh_head and any(is_in_head(model, name) for name in info["missing_keys"]):
        name_outputs(model, ())
    is_as_saved = type(model).__name__ in (getattr(config, "architectures", None) or ())
    is_whole = not info["missing_keys"] | info["mismatched_keys"]
    if is_as_saved and is_whole and not options:  # the original of a quantised model was checked
        check_fingerprint(Path(where), model)
    return model.eval()


def saved_class(where: str, config: Any, trusted: bool) -> Any:
    """The class that a model was saved from.

    Raises:
        UserError: The config names something else, or a class of another kind of model.
    """
    names = getattr(config, "architectures", None)
    if not names:
        return transformers.AutoModel
    name = names[0] if isinstance(names, list) else names
    model_class = getattr(transformers, name, None) if isinstance(name, str) else None
    model_class = model_class or TOWERS.get(str(name))
    if model_class is None and trusted and getattr(config, "auto_map", None):
        return transformers.AutoModel
    if not (isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)):
        raise UserError(
            f"architectures in {Path(where) / CONFIG_FILE} names {shortened(name)}, which is not a "
            "model of transformers"
        )
    if not isinstance(config, model_class.config_class or object):
        raise UserError(
            f"{Path(where) / CONFIG_FILE} is of a {config.model_type}, but its architectures names "
            f"{name}"
        )
    return model_class


def load_tokenizer(where: str, trusted: bool, *, reads_text: bool = True) -> Any:
    """The tokenizer; None if the model comes without one, or with one that is not needed.

    Raises:
        UserError: There are files of a tokenizer, and it cannot be loaded.
    """
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(where, trust_remote_code=trusted)
        tokenizer("a", truncation=True)  # some settings are only read now
    except Exception as error:  # whatever a damaged file makes transformers and tokenizers raise
        files = [name for name in TOKENIZER_FILES if (Path(where) / name).is_file()]
        if not files or not reads_text:
            return None
        raise UserError(
            f"cannot load the tokenizer of {where} ({', '.join(files)}): {reason_of(error)}"
        ) from error
    # without its files a tokenizer class may still load, with special tokens only
    return tokenizer if len(tokenizer) > len(tokenizer.all_special_ids) else None
