"""Linear layers on which an adapter would have no effect, or would not fit.

An adapter acts where its layer is called. torch's attention, and some mixers of state space models,
read a layer's weight without calling it; routers return tuples.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Conv1D

from foretune.models.calls import dummy_rows, eval_no_grad, forward_of
from foretune.models.digests import text_tower
from foretune.models.nested import tensors_in
from foretune.models.routing import routed

_FAILED = (ValueError, IndexError, TypeError, RuntimeError, AttributeError, NotImplementedError)


def unadaptable(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """Name → reason, of those of these layers that cannot carry an adapter.

    What a layer returns and whether it is called is tried out, on a few tokens where the model
    reads tokens. A layer that cannot be tried counts as adaptable.

    Args:
        model: A model.
        layers: Its linear layers and convolutions that might be adapted, by name.
    """
    reasons: dict[str, str] = {}
    for name, module in layers.items():
        if _fits(module) is False:
            reasons[name] = f"{type(module).__name__} does not return what a linear layer does"
    read: set[str] = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            read |= {f"{name}.out_proj" if name else "out_proj"}
    if getattr(getattr(model, "config", None), "vocab_size", None) is not None:
        with contextlib.suppress(*_FAILED):
            inputs = dummy_rows(model)
            read |= read_without_call(model, layers, lambda: model(**inputs))
    message = "the model reads its weight without calling it"
    reasons |= {name: message for name in layers if name in read}
    return reasons | frozen_reasons(model, layers)


def frozen_reasons(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Name → reason, of those of these modules that lie in the frozen encoder of a tower."""
    tower = text_tower(model)
    if tower is None:
        return {}
    inside = {id(module) for module in tower.encoder.modules()}
    message = "the encoder below a tower is frozen, and each text goes through it once"
    return {name: message for name in names if id(model.get_submodule(name)) in inside}


def _fits(module: nn.Module) -> bool | None:
    """Whether a layer returns a tensor of the shape that its kind returns; None where unknown."""
    if forward_of(module) in (nn.Linear.forward, nn.Conv1d.forward, Conv1D.forward):
        return True
    weight: Any = module.weight
    if isinstance(module, nn.Conv1d):
        length = 4 * module.kernel_size[0] * module.dilation[0]
        x = weight.new_zeros(2, module.in_channels, length)
        with torch.no_grad():
            shape = nn.Conv1d.forward(module, x).shape
    else:
        if isinstance(module, nn.Linear):  # a quantised weight has another shape and dtype
            size_in, size_out = module.in_features, module.out_features
        else:
            size_in, size_out = weight.shape
        x = weight.new_zeros(2, size_in)
        x, shape = x if x.is_floating_point() else x.float(), torch.Size((2, size_out))
    with eval_no_grad(module), torch.random.fork_rng(devices=[]):
        try:
            y = module(x)
        except _FAILED:
            return None
    return isinstance(y, Tensor) and y.shape == shape


def read_without_call(
    model: nn.Module, layers: Mapping[str, nn.Module], call: Callable[[], Any]
) -> set[str]:
    """Names of the layers whose weight the model reads in a call without calling the layer.

    Args:
        model: A model.
        layers: Layers of it, by name.
        call: Calls the model; called once, and once more if it does not call all of the layers.
    """
    called: set[str] = set()

    def hook(name: str) -> Callable[..., None]:
        return lambda *_: called.add(name)

    with contextlib.ExitStack() as stack:
        stack.enter_context(eval_no_grad(model))
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(routed(None, None))
        for name, layer in layers.items():
            stack.callback(layer.register_forward_pre_hook(hook(name)).remove)
        call()
        weights: dict[str, Any] = {n: m.weight for n, m in layers.items() if n not in called}
        weights = {n: w for n, w in weights.items() if w.is_leaf and w.is_floating_point()}
        if not weights:
            return set()
        stack.enter_context(_differentiable(list(weights.values())))
        outputs = [x.float().sum() for x in tensors_in(call()).values() if x.requires_grad]
        if not outputs:
            return set()
        total = torch.stack(outputs).sum()
        grads = torch.autograd.grad(total, list(weights.values()), allow_unused=True)
    return {name for name, grad in zip(weights, grads, strict=True) if grad is not None}


@contextlib.contextmanager
def _differentiable(weights: list[Tensor]) -> Iterator[None]:
    """Inside the block gradients are recorded, of these leaves too."""
    before = [w.requires_grad for w in weights]
    try:
        for w in weights:
            w.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for w, requires_grad in zip(weights, before, strict=True):
            w.requires_grad_(requires_grad)
