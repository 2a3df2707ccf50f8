"""Finding and changing parts of a model: its head, its blocks, its linear layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList
from transformers import Conv1D, PreTrainedConfig, PreTrainedModel

from foretune.errors import UserError
from foretune.models.seeding import seed_generators

HEADS = ("classifier", "score", "classification_head")  # what transformers calls a task head
CLASSIFIERS = ("ForSequenceClassification", "ForImageClassification")
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


def head_modules(model: nn.Module) -> list[str]:
    """The names of the modules that each task has its own copy of.

    The head of a classifier of transformers is all that lies outside its base model; a plain module
    may set an attribute `head_modules`. Otherwise the head is the last linear layer, apart from
    poolers and language model heads.

    Raises:
        UserError: The model has no linear layer, or its `head_modules` names no module.
    """
    names = _declared_head(model)
    if names:
        return names
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
        and "pooler" not in name
        and "lm_head" not in name
    ]
    if not linear:
        raise UserError(
            f"{type(model).__name__} has no linear layer to serve as a head; set an attribute "
            "head_modules = [names] on it"
        )
    return linear[-1:]


def has_fresh_head(model: nn.Module) -> bool:
    """Whether the head is a task's own classifier, as opposed to the model's last layer."""
    return bool(_declared_head(model))


def _declared_head(model: nn.Module) -> list[str]:
    """The names of the head modules that the model declares; none where it declares no head.

    Raises:
        UserError: `head_modules` names no module.
    """
    declared = getattr(model, "head_modules", None)
    if isinstance(declared, (list, tuple)) and declared:
        modules = dict(model.named_modules())
        for name in declared:
            if name not in modules:
                raise UserError(
                    f'head_modules of {type(model).__name__} names "{name}", which is not a module '
                    f"of it; its top modules are {', '.join(n for n, _ in model.named_children())}"
                )
        return list(declared)
    heads = [name for name in HEADS if _has_parameters(getattr(model, name, None))]
    base_name = getattr(model, "base_model_prefix", "")
    if not isinstance(model, PreTrainedModel) or not isinstance(
        getattr(model, base_name, None), nn.Module
    ):
        return heads[:1]
    if not heads and not type(model).__name__.endswith(CLASSIFIERS):
        return []
    # DistilBERT's and ModernBERT's heads have two parts, DeBERTa's includes a pooler.
    return [n for n, part in model.named_children() if n != base_name and _has_parameters(part)]


def _has_parameters(module: Any) -> bool:
    return isinstance(module, nn.Module) and any(True for _ in module.parameters())


def is_in_head(model: nn.Module, name: str) -> bool:
    """Whether a parameter of this name belongs to the model's task head."""
    base_name = getattr(model, "base_model_prefix", "")
    if base_name and isinstance(getattr(model, base_name, None), nn.Module):
        return not name.startswith(f"{base_name}.")
    return name.startswith(tuple(f"{head}." for head in _declared_head(model)))


def reset_head(model: nn.Module, num_labels: int | None, seed: int) -> None:
    """Give a model a fresh head, in place.

    Module objects stay, their parameters are new. All layers of the head (RoBERTa's has two) are
    re-initialised.

    Args:
        model: A model with a task head.
        num_labels: Outputs of the new head; None keeps the number.
        seed: Random seed of the initialisation; the global generator is left unchanged.

    Raises:
        UserError: The model has no task head, or it has no linear layer.
    """
    if not has_fresh_head(model):
        raise UserError(f"{type(model).__name__} has no task head to reset")
    parts = [m for name in head_modules(model) for m in model.get_submodule(name).modules()]
    linear = [m for m in parts if isinstance(m, nn.Linear)]
    if not linear:
        raise UserError(f"the head of {type(model).__name__} has no linear layer to resize")
    if not all(layer.weight.is_floating_point() for layer in linear):
        raise UserError(
            f"the head of {type(model).__name__} is quantised, so it cannot be made anew: give the "
            "original (with quantize, which leaves heads as they are)"
        )
    with torch.random.fork_rng(devices=[]):
        seed_generators(seed)
        for module in parts:
            width = num_labels if module is linear[-1] else None
            if isinstance(module, nn.Linear):
                _reset_linear(module, width or module.out_features, _spread(model))
            elif callable(reset := getattr(module, "reset_parameters", None)):
                reset()
    config: Any = getattr(model, "config", None)
    if num_labels is not None and hasattr(config, "num_labels"):
        config.num_labels = num_labels
        model.num_labels = num_labels  # type: ignore[assignment]
    name_outputs(model, ())


def head_width(model: nn.Module) -> int | None:
    """Number of outputs of the model's head; None for a head without a linear layer."""
    parts = [m for name in head_modules(model) for m in model.get_submodule(name).modules()]
    return next((m.out_features for m in reversed(parts) if isinstance(m, nn.Linear)), None)


def match_head(model: nn.Module, num_labels: int | None, seed: int) -> None:
    """Give the model a fresh head if its width is not `num_labels`; None leaves it alone.

    Raises:
        UserError: The last layer of a plain module has a different number of outputs.
    """
    if num_labels is None:
        return
    width = head_width(model)
    if width == num_labels or width is None:
        return
    if not has_fresh_head(model):
        raise UserError(
            f"the last layer of {type(model).__name__} has {width} outputs where the tasks have "
            f"{num_labels} labels; make it {num_labels} wide, or set head_modules = [names] on the "
            "model so that the head can be replaced"
        )
    reset_head(model, num_labels, seed)


def name_outputs(model: nn.Module, labels: Sequence[object]) -> None:
    """Record the labels of the task head's first outputs; further outputs have no meaning.

    They stand in the attribute `head_labels`, and in the config of a model that has one.
    """
    if not has_fresh_head(model):
        return
    model.head_labels = tuple(None if v is None else str(v) for v in labels) or None  # type: ignore[assignment]
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "id2label"):
        return
    names = {i: f"LABEL_{i}" for i in range(config.num_labels)}
    config.id2label = names | {i: str(v) for i, v in enumerate(labels) if v is not None}
    config.label2id = {name: i for i, name in config.id2label.items()}


def head_labels(model: nn.Module) -> tuple[str | None, ...] | None:
    """The labels that the outputs of the model's head stand for, in order.

    They come from the attribute `head_labels` of the model, or from `id2label` of its config.

    Returns:
        One label for each output, None for an output without meaning; None where nothing names
        them: transformers' default names (LABEL_0, …) do not.
    """
    if not has_fresh_head(model):
        return None
    recorded = getattr(model, "head_labels", None)
    if recorded is None:
        recorded = named_labels(getattr(getattr(model, "config", None), "id2label", None))
    if not isinstance(recorded, (list, tuple)):
        return None
    width = head_width(model) or len(recorded)
    names = [None if v is None else str(v) for v in recorded]
    labels = [name for name in names if name is not None]
    if not labels or len(set(labels)) < len(labels) or len(names) > width:
        return None
    return (*names, *[None] * (width - len(names)))


def named_labels(id2label: Any) -> list[str | None] | None:
    """The labels that a config's `id2label` names, None for a default name (LABEL_0, …).

    Returns:
        None where it is not a mapping of the numbers from 0.
    """
    if not isinstance(id2label, Mapping) or set(id2label) != set(range(len(id2label))):
        return None
    names = [str(id2label[i]) for i in range(len(id2label))]
    return [None if name == f"LABEL_{i}" else name for i, name in enumerate(names)]


def _spread(model: nn.Module) -> float | None:
    """Standard deviation with which the model's config initialises weights, if it names one."""
    spread = getattr(getattr(model, "config", None), "initializer_range", None)
    return spread if isinstance(spread, float) else None


def _reset_linear(layer: nn.Linear, outputs: int, spread: float | None) -> None:
    """Re-initialise: normal with std `spread` and zero bias, or torch's default for None."""
    old = layer.weight
    fresh = nn.Linear(layer.in_features, outputs, bias=layer.bias is not None)
    if spread is not None:
        nn.init.normal_(fresh.weight, std=spread)
        if fresh.bias is not None:
            nn.init.zeros_(fresh.bias)
    fresh.to(device=old.device, dtype=old.dtype).requires_grad_(old.requires_grad)
    layer.weight, layer.bias, layer.out_features = fresh.weight, fresh.bias, outputs


def block_list(model: nn.Module) -> tuple[str, nn.ModuleList] | None:
    """(name, list) of the model's transformer blocks.

    Of several lists of modules that are not inside one another, it is one in the text decoder,
    where the model has one; of these one as long as the config's `num_hidden_layers`; of these the
    longest; of these the first.

    None for a model without one, and for an encoder-decoder, which has two.
    """
    config: Any = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        return None
    lists = _outermost_lists(model)
    if len(lists) > 1:
        lists = _in_decoder(model, lists) or lists
        depth = getattr(_text_config(config), "num_hidden_layers", None)
        lists = {n: blocks for n, blocks in lists.items() if len(blocks) == depth} or lists
    return max(lists.items(), key=lambda pair: len(pair[1]), default=None)


def _outermost_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Name → list of modules, without lists inside a list (experts) and empty ones.

    Lists of single layers, such as projections, count only where there are no others.
    """
    lists: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in lists)
        is_list = isinstance(module, nn.ModuleList) and not isinstance(module, ParametrizationList)
        if is_list and len(module) and not inside:
            lists[name] = module
    of_blocks = {n: m for n, m in lists.items() if any(map(_has_children, m))}
    return of_blocks or lists


def _has_children(module: nn.Module | None) -> bool:
    return module is not None and next(module.children(), None) is not None  # diffusers lists None


def _in_decoder(model: nn.Module, lists: dict[str, nn.ModuleList]) -> dict[str, nn.ModuleList]:
    """Those of the lists that are inside the model's text decoder."""
    decoder = model.get_decoder() if isinstance(model, PreTrainedModel) else None
    within = set() if decoder is None else set(decoder.modules())
    return {name: blocks for name, blocks in lists.items() if blocks in within}


def _text_config(config: Any) -> Any:
    """The config of the text decoder of a model of several kinds of input, else the config."""
    return config.get_text_config() if isinstance(config, PreTrainedConfig) else config


def skips_blocks(model: nn.Module) -> bool:
    """Whether the model leaves out some of its blocks at random while it trains (LayerDrop)."""
    return any(
        isinstance(value, float) and value > 0
        for module in model.modules()
        for name, value in vars(module).items()
        if name.endswith("layerdrop")
    )


def parameters_before(model: nn.Module, block_list_name: str) -> dict[str, nn.Parameter]:
    """The parameters registered before a list of blocks: embeddings and the like."""
    before: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        if name.startswith(f"{block_list_name}."):
            break
        before[name] = parameter
    return before


def first_moving_block(model: nn.Module, adapted: Iterable[str]) -> int | None:
    """The lowest block that trains or carries an adapter.

    Args:
        model: A model.
        adapted: Names of modules that carry adapters.

    Returns:
        Its index; 0 if something before the blocks moves, so that no prefix is frozen; the number
        of blocks if only what comes after them moves; None for a model without a single list of
        blocks.
    """
    named_blocks = block_list(model)
    if named_blocks is None:
        return None
    name, blocks = named_blocks
    adapted = list(adapted)
    if any(p.requires_grad for p in parameters_before(model, name).values()):
        return 0
    if not _modules_before(model, name).isdisjoint(adapted):
        return 0
    for i, block in enumerate(blocks):
        inside = f"{name}.{i}"
        if any(p.requires_grad for p in block.parameters()):
            return i
        if any(a == inside or a.startswith(f"{inside}.") for a in adapted):
            return i
    return len(blocks)


def _modules_before(model: nn.Module, block_list_name: str) -> set[str]:
    """Names of the modules registered before the blocks, without those that contain the blocks."""
    before: set[str] = set()
    for name, _ in model.named_modules():
        if name == block_list_name:
            break
        if name and not block_list_name.startswith(f"{name}."):
            before.add(name)
    return before


def freeze_lower(model: nn.Module, trainable_layers: int) -> None:
    """Freeze all that is registered before the blocks, and all but the last blocks.

    Args:
        model: A model with a list of blocks.
        trainable_layers: Number of last blocks that stay trainable.

    Raises:
        UserError: The model has no single list of blocks (`block_list`), a second one beside or
            behind it, which would stay trainable as a whole, or fewer blocks than that.
    """
    named_blocks = block_list(model)
    if named_blocks is None:
        raise UserError(
            f"trainable_layers={trainable_layers} needs a model with a single list of blocks, "
            f"which {type(model).__name__} does not have"
        )
    name, blocks = named_blocks
    lists = list(_outermost_lists(model))
    behind = [n for n in lists[lists.index(name) + 1 :] if not _in_head(model, n)]
    if behind:
        raise UserError(
            f"trainable_layers={trainable_layers} is ambiguous: {type(model).__name__} has "
            f"{name} and, behind it, {behind[0]}; leave trainable_layers out, or set "
            "requires_grad on a model of your own"
        )
    if not 0 <= trainable_layers <= len(blocks):
        raise UserError(
            f"trainable_layers must be between 0 and the {len(blocks)} blocks of "
            f"{type(model).__name__}, got {trainable_layers}"
        )
    frozen = {id(parameter) for parameter in parameters_before(model, name).values()}
    lower = blocks[: len(blocks) - trainable_layers]
    frozen |= {id(parameter) for block in lower for parameter in block.parameters()}
    names = [n for n, parameter in model.named_parameters() if id(parameter) in frozen]
    set_trainable(model, dict.fromkeys(names, False))


def set_trainable(model: nn.Module, trainable: Mapping[str, bool]) -> None:
    """Says of parameters whether they are trained.

    A quantised weight never is; its layer remembers whether an adapter belongs there.
    """
    parameters = dict(model.named_parameters())
    for name, is_trained in trainable.items():
        if parameters[name].is_floating_point():
            parameters[name].requires_grad_(is_trained)
        else:
            layer = model.get_submodule(name.rpartition(".")[0])
            layer.foretune_frozen = not is_trained  # type: ignore[assignment]


def takes_adapter(layer: Any) -> bool:
    """Whether a layer carries an adapter by default: its weight trains, or would in full."""
    if layer.weight.is_floating_point():
        return layer.weight.requires_grad
    return not getattr(layer, "foretune_frozen", False)


def _in_head(model: nn.Module, name: str) -> bool:
    """Whether a list is inside a declared head, or holds heads."""
    heads = _declared_head(model)
    return any(f"{name}.".startswith(f"{h}.") or h.startswith(f"{name}.") for h in heads)


def linear_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Name → layer for each linear layer: `nn.Linear`, transformers' `Conv1D`, `nn.Conv1d`."""
    kinds: tuple[Any, ...] = (nn.Linear, Conv1D, nn.Conv1d)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def batch_norms(model: nn.Module) -> dict[str, nn.Module]:
    """Name → layer of all batch normalisations, and of what else keeps statistics of batches."""
    return {
        name: m
        for name, m in model.named_modules()
        if isinstance(m, BATCH_NORMS) or (isinstance(m, INSTANCE_NORMS) and m.track_running_stats)
    }
