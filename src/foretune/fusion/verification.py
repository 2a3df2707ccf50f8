"""Does the model call its layers with experts, or does it read their weights behind their back?

Some modules take the weight of a linear layer and multiply by themselves (the time step of Mamba,
`nn.MultiheadAttention`, torch's fused encoder layer): experts in such a layer would be ignored.
So each fused model is run once with NaN in place of what its layers show to the outside, where the
layers themselves still compute with their weights. NaN in the output gives such a module away.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from foretune.errors import UserError
from foretune.fusion.mixture import LowRankExperts, Routing, TaskHeads, expert_layers


def verify(
    model: nn.Module, routing: Routing, report: dict[str, Any], batch: Mapping[str, Any] | None
) -> None:
    """Check a fused model: now if an input for it is known, else when it is called first.

    Args:
        model: A fused model.
        routing: Shared by its layers with experts.
        report: The model's report, in which `verified` is set.
        batch: What the model can be called with; None for an input that it may accept.

    Raises:
        UserError: The model reads a layer's weights instead of calling the layer.
    """
    for inputs in [batch] if batch is not None else _inputs(model):
        with _answering(model, routing):
            try:
                _not_a_number(model, (), inputs)
            except Exception:  # not an input of this model after all
                continue
        _check(model, routing, report, (), inputs)
        return
    verify_on_first_call(model, routing, report)


def verify_on_first_call(model: nn.Module, routing: Routing, report: dict[str, Any]) -> None:
    """Check a fused model with the inputs of its first call, before it answers."""
    report["verified"] = False

    def check_once(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        handle.remove()
        if not report["verified"]:  # a copy of the model keeps the hook
            _check(model, routing, report, args, kwargs)

    handle = model.register_forward_pre_hook(check_once, with_kwargs=True)


def _check(
    model: nn.Module,
    routing: Routing,
    report: dict[str, Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> None:
    layers = expert_layers(model)
    with _answering(model, routing):
        clean = _not_a_number(model, args, kwargs)

        def is_read(poisoned: Sequence[LowRankExperts]) -> bool:
            for layer in poisoned:
                layer.poisoned = True
            try:
                return _not_a_number(model, args, kwargs) != clean
            except Exception:  # torch's fused kernels refuse some weights
                return True
            finally:
                for layer in poisoned:
                    layer.poisoned = False

        names = []
        if is_read(list(layers.values())):
            names = [name for name, layer in layers.items() if is_read([layer])] or list(layers)
    if names:
        ends = sorted({name.rpartition(".")[2] for name in names})
        raise UserError(
            f"{type(model).__name__} reads the weight of {names[0]} instead of calling the "
            f"layer, so its experts would be ignored; exclude_modules={ends} leaves it as in the "
            "base"
        )
    report["verified"] = True


def _inputs(model: nn.Module) -> Iterator[Mapping[str, Any]]:
    """Inputs that a model of transformers may accept."""
    if not isinstance(model, transformers.PreTrainedModel):
        return
    config: Any = model.config
    if model.main_input_name == "pixel_values":
        channels, size = getattr(config, "num_channels", 3), getattr(config, "image_size", 224)
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        yield {"pixel_values": torch.ones(1, channels, height, width, device=model.device)}
    else:
        yield {key: value.to(model.device) for key, value in model.dummy_inputs.items()}


@contextmanager
def _answering(model: nn.Module, routing: Routing) -> Iterator[None]:
    """Inside the block the model is in eval mode, and answers with all experts and some head."""
    modes = {module: module.training for module in model.modules()}
    weights, mask = routing.weights, routing.mask
    heads = [module for module in model.modules() if isinstance(module, TaskHeads)]
    selected = [head.selected for head in heads]
    model.eval()
    routing.weights = torch.full((len(routing.names),), 1 / len(routing.names))
    for head in heads:
        head.selected = head.selected or 0
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        routing.weights, routing.mask = weights, mask
        for head, index in zip(heads, selected, strict=True):
            head.selected = index


def _not_a_number(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[int]:
    """How many entries of each tensor of a model's output are NaN; the inputs are left alone."""
    args, kwargs = _copied((args, dict(kwargs)))  # a cache would be filled
    with torch.no_grad(), torch.random.fork_rng():
        return [int(tensor.isnan().sum()) for tensor in _tensors(model(*args, **kwargs))]


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()  # of a part of a larger graph no copy can be made
    if isinstance(value, dict):
        return {key: _copied(part) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)([_copied(part) for part in value])
    return copy.deepcopy(value)


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        yield from _tensors(tuple(output.values()))
    elif isinstance(output, (tuple, list)):
        for part in output:
            yield from _tensors(part)
