"""Remove padding inside an unmodified model: the rows of a batch are concatenated.

Padding is removed before the first block and restored after the last one, so embeddings, poolers
and heads are called as usual and positions are the model's own. Inside the blocks only attention
tells rows apart: an attention function registered with transformers gathers rows of similar length
and slices the model's own mask for them, whatever that mask is (causal, bidirectional, sliding
window). Everything else works token by token.

A model that cannot be packed is called once per group of rows of similar length instead.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from foretune.models.calls import agree, dummy_rows, eval_no_grad, replaced_forward
from foretune.models.frozen_prefix import PrefixForward
from foretune.models.grouped_calls import PackedForward, grouped_calls, lengths_of
from foretune.models.layout import MoveTokens, Packing
from foretune.models.routing import current_packing, current_rows, routed, stays_padded
from foretune.models.row_dropout import draws_of_parts
from foretune.models.surgery import block_list, skips_blocks

NAME = "foretune-packed"  # of the attention function registered with transformers
DENSE = 0.9  # a batch in which at least this share of the positions are tokens stays padded

logger = logging.getLogger("foretune")
_WARNED: set[str] = set()


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The SDPA of transformers, called for each group of rows of similar length.

    Args:
        module: The attention module.
        query: (1, heads, N, d) where padding is removed.
        key: (1, key heads, N, d).
        value: (1, key heads, N, d).
        attention_mask: The model's own mask of the padded batch.
        **kwargs: Passed on to SDPA.

    Returns:
        (1, N, heads, d), and None for the attention weights.
    """
    sdpa = AttentionInterface()["sdpa"]
    packing = current_packing()
    if packing is None:
        padded: tuple[Tensor, None] = sdpa(module, query, key, value, attention_mask, **kwargs)
        return padded
    gathered = [
        MoveTokens.apply(
            x[0].transpose(0, 1),
            packing.group_take,
            packing.group_places,
            packing.group_padding,
            True,
        ).split([len(g.take) for g in packing.groups])
        for x in (query, key, value)
    ]
    outputs, part_of = [], draws_of_parts()
    for i, (group, mask) in enumerate(
        zip(packing.groups, packing.masks(attention_mask), strict=True)
    ):
        q, k, v = (x[i].unflatten(0, (-1, group.length)).transpose(1, 2) for x in gathered)
        with part_of(group.rows):
            y, _ = sdpa(module, q, k, v, mask, **kwargs)
        outputs.append(y.flatten(0, 1))
    y = MoveTokens.apply(
        torch.cat(outputs), packing.group_places, packing.group_take, packing.group_padding, False
    )
    return y[None], None


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, AttentionMaskInterface()["sdpa"])


@contextlib.contextmanager
def packed(
    model: nn.Module, copied: Collection[str] = (), *, else_grouped: bool = True
) -> Iterator[str | None]:
    """Inside the block the model computes nothing for padding.

    Only calls with an `attention_mask` (n, L) that pads on the right are packed.

    Args:
        model: A model of transformers; one that reads no tokens is left alone.
        copied: Names of modules that are copied per task.
        else_grouped: Group rows by length where padding cannot be removed, with one call of the
            model per group; False leaves the padding.

    Yields:
        None if padding is removed or there is none to remove; else why it cannot be removed.
    """
    if getattr(getattr(model, "config", None), "vocab_size", None) is None or _is_packed(model):
        yield None
        return
    reason = _obstacle(model, copied)
    if reason is None:
        with _PackedCalls(model).installed() as calls:
            if calls.verified():
                yield None
                return
        reason = f"{type(model).__name__} gives different results without padding"
    if not else_grouped:
        _warn_once(f"padding is not removed: {reason}")
        yield reason
        return
    _warn_once(f"padding is not removed, rows are grouped by length instead: {reason}")
    with grouped_calls(model):
        yield reason


def _warn_once(text: str) -> None:
    """Warn once per process: each wave and each scoring pass calls this."""
    if text not in _WARNED:
        _WARNED.add(text)
        logger.warning(text)


def _is_packed(model: nn.Module) -> bool:
    """Whether an outer `packed` has patched the model."""
    named_blocks = block_list(model)
    patched = [model, *(() if named_blocks is None else named_blocks[1])]
    return any(isinstance(module.forward, PackedForward) for module in patched)


def _obstacle(model: nn.Module, copied: Collection[str]) -> str | None:
    """Why this model cannot be packed, as far as can be told without calling it."""
    named_blocks = block_list(model)
    name = type(model).__name__
    if named_blocks is None:
        return f"{name} has no single list of blocks"
    if not _configs(model):
        used = getattr(model.config, "_attn_implementation", None)
        return f'{name} uses the attention "{used}", not "sdpa"'
    if skips_blocks(model):
        return f"{name} skips blocks at random (layerdrop)"
    modules = dict(model.named_modules())
    for module_name in copied:
        inside = module_name.startswith(f"{named_blocks[0]}.")
        if inside and any(True for _ in modules[module_name].children()):
            return f"each task has a copy of {module_name}, which may contain attention"
    return None


def _configs(model: nn.Module) -> list[Any]:
    """The configurations in which the model's attention modules look up their implementation.

    `_attn_implementation` is private: transformers has no public getter.
    """
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    used = ("sdpa", NAME)  # NAME where another model that shares the configuration is packed
    return [c for c in configs.values() if getattr(c, "_attn_implementation", None) in used]


class _PackedCalls:
    """Patches a model's blocks above the frozen prefix so that they see tokens without padding."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._packing: Packing | None = None  # of the call in progress
        self._served = 0
        self._off = False

    @contextlib.contextmanager
    def installed(self) -> Iterator[_PackedCalls]:
        """Inside the block the model is patched."""
        named_blocks = block_list(self.model)
        assert named_blocks is not None
        # The frozen blocks are served by `frozen_prefix`, which has patched them.
        blocks = [b for b in named_blocks[1] if not isinstance(b.forward, PrefixForward)]
        configs = _configs(self.model)
        with contextlib.ExitStack() as stack:
            for i, block in enumerate(blocks):
                stack.enter_context(self._patched(block, i == 0, i == len(blocks) - 1))
            for config in configs:
                used = config._attn_implementation
                stack.callback(setattr, config, "_attn_implementation", used)
                config._attn_implementation = NAME
            before = self.model.register_forward_pre_hook(self._before, with_kwargs=True)
            after = self.model.register_forward_hook(self._after, always_call=True)
            stack.callback(before.remove)
            stack.callback(after.remove)
            yield self

    def verified(self) -> bool:
        """Whether the model gives the same output for dummy rows with and without padding."""
        inputs = dummy_rows(self.model)
        served = self._served
        with eval_no_grad(self.model), routed(None, None):
            try:
                output = self.model(**inputs)
            except (ValueError, IndexError, TypeError, RuntimeError, AttributeError):
                return False  # the blocks need more than hidden states
            if self._served == served:
                return False
            self._off = True
            reference = self.model(**inputs)
            self._off = False
        return agree(reference, output, inputs["attention_mask"])

    def _before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        lengths, width = lengths_of(kwargs)
        self._packing = None
        if self._off or stays_padded():
            return
        if lengths and sum(lengths) < DENSE * width * len(lengths):
            rows = current_rows()
            slots = [0] * len(lengths) if rows is None else rows.slots
            order = sorted(range(len(lengths)), key=lambda i: slots[i])
            device = kwargs["attention_mask"].device
            self._packing = Packing(tuple(lengths), width, tuple(order), device)

    def _after(self, *_: Any) -> None:
        self._packing = None

    @contextlib.contextmanager
    def _patched(self, block: nn.Module, first: bool, last: bool) -> Iterator[None]:
        real = block.forward

        def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            packing = self._packing
            if packing is None:
                return real(hidden, *args, **kwargs)
            self._served += 1
            hidden = packing.pack(hidden) if first else hidden
            args = tuple(packing.packed_input(a) for a in args)
            kwargs = {
                k: v if k == "attention_mask" else packing.packed_input(v)
                for k, v in kwargs.items()
            }
            with routed(packing.rows(current_rows()), packing):
                output = real(hidden, *args, **kwargs)
            if not last:
                return output
            if isinstance(output, tuple):
                return (packing.unpack(output[0]), *output[1:])
            return packing.unpack(output)

        with replaced_forward(block, PackedForward(forward)):
            yield
