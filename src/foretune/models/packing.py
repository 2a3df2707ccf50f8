"""Remove padding inside an unmodified model: the rows of a batch lie one after the other.

Padding leaves at the first block and comes back after the last one, so embeddings, poolers and
heads are called as ever and positions are the model's own. Inside the blocks only attention tells
rows apart: it is registered with transformers under a name of its own, gathers rows of like
lengths and takes their part of the model's own mask, whatever that mask is (causal, bidirectional,
sliding window). Everything else works token by token.

A model that cannot be packed is called once for each group of rows of like lengths instead.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache

from foretune.models.calls import agree, own_pass, replaced_forward
from foretune.models.grouped_calls import grouped_calls, lengths_of, rows_by_length
from foretune.models.routing import Rows, current_packing, current_rows, routed
from foretune.models.surgery import block_list

NAME = "foretune-packed"  # of the attention function, for transformers
WORTH = 0.9  # a batch in which this share of the positions are tokens is left as it is

logger = logging.getLogger("foretune")
_SAID: set[str] = set()


@dataclass(frozen=True)
class Group:
    """Rows of like lengths.

    Args:
        rows: (b,) their indices in the padded batch.
        length: The longest of them.
        take: (b · length,) place of each of their positions among all tokens; padding takes 0.
        padding: (p,) positions of the above that are padding.
    """

    rows: Tensor
    length: int
    take: Tensor
    padding: Tensor


@dataclass(frozen=True)
class Packing:
    """How the tokens of a padded batch lie one after the other, rows sorted by slot.

    Args:
        lengths: Tokens of each row, in the order of the padded batch.
        width: Length that the rows are padded to.
        order: Indices of the rows, in the order in which their tokens lie.
        device: Where the index tensors go.
    """

    lengths: tuple[int, ...]
    width: int
    order: tuple[int, ...]
    device: torch.device
    _kept: dict[int, Any] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def tokens(self) -> Tensor:
        """(N,) flat position in the padded batch of each token."""
        parts = [np.arange(self.lengths[i]) + i * self.width for i in self.order]
        return self._index(np.concatenate(parts))

    @cached_property
    def places(self) -> Tensor:
        """(n · width,) place of each padded position among the tokens; padding gets 0."""
        places = torch.zeros(len(self.lengths) * self.width, dtype=torch.long)
        places[self.tokens.cpu()] = torch.arange(len(self.tokens))
        return places.to(self.device)

    @cached_property
    def padding(self) -> Tensor:
        """(p,) flat positions of the padded batch that are padding."""
        lengths = np.array(self.lengths)[:, None]
        return self._index(np.flatnonzero(np.arange(self.width)[None, :] >= lengths))

    @cached_property
    def groups(self) -> list[Group]:
        """The rows, grouped by length for attention."""
        starts = dict(
            zip(self.order, np.cumsum([0, *(self.lengths[i] for i in self.order)]), strict=False)
        )
        found = []
        for rows in rows_by_length(self.lengths):
            lengths = np.array([self.lengths[i] for i in rows])
            columns = np.arange(lengths.max())[None, :]
            inside = columns < lengths[:, None]
            take = np.where(inside, np.array([starts[i] for i in rows])[:, None] + columns, 0)
            padding = np.flatnonzero(~inside)
            found.append(
                Group(
                    self._index(np.array(rows)),
                    int(lengths.max()),
                    self._index(take.ravel()),
                    self._index(padding),
                )
            )
        return found

    @cached_property
    def group_places(self) -> Tensor:
        """(N,) place of each token among the positions of all groups, one group after the other."""
        found = np.zeros(len(self.tokens), dtype=np.int64)
        start = 0
        for group in self.groups:
            take = group.take.cpu().numpy()
            real = np.ones(len(take), dtype=bool)
            real[group.padding.cpu().numpy()] = False
            found[take[real]] = np.flatnonzero(real) + start
            start += len(take)
        return self._index(found)

    @cached_property
    def group_padding(self) -> Tensor:
        """Positions of all groups, one after the other, that are padding."""
        starts = np.cumsum([0, *(len(g.take) for g in self.groups)])
        parts = [g.padding + int(s) for g, s in zip(self.groups, starts, strict=False)]
        return torch.cat(parts)

    @cached_property
    def group_take(self) -> Tensor:
        return torch.cat([group.take for group in self.groups])

    def rows(self, rows: Rows | None) -> Rows | None:
        """Which slot owns each token."""
        if rows is None:
            return None
        slots = tuple(rows.slots[i] for i in self.order)
        return Rows(slots, tuple(self.lengths[i] for i in self.order))

    def pack(self, x: Tensor) -> Tensor:
        """(n, width, …) → (1, N, …); a leading dimension of 1 stands for n equal rows."""
        if x.shape[0] != len(self.lengths):
            x = x.expand(len(self.lengths), *x.shape[1:])
        return _Move.apply(x.flatten(0, 1), self.tokens, self.places, self.padding, False)[None]

    def unpack(self, x: Tensor) -> Tensor:
        """(1, N, …) → (n, width, …), zero where there is padding."""
        flat = _Move.apply(x[0], self.places, self.tokens, self.padding, True)
        return flat.unflatten(0, (len(self.lengths), self.width))

    def packed_input(self, value: Any) -> Any:
        """What a block is given beside hidden states, with everything per token packed.

        The same tensor is packed once for all blocks.
        """
        if isinstance(value, Cache):  # one for generation would hold rows run together
            return None
        if isinstance(value, tuple):
            return tuple(self.packed_input(v) for v in value)
        if not isinstance(value, Tensor) or value.dim() < 2 or value.shape[1] != self.width:
            return value
        if value.shape[0] not in (1, len(self.lengths)):
            return value
        if id(value) not in self._kept:
            self._kept[id(value)] = (value, self.pack(value))  # held, so that the id stays its own
        return self._kept[id(value)][1]

    def masks(self, mask: Tensor | None) -> list[Tensor | None]:
        """The part of the model's mask (n or 1, heads or 1, width, width) for each group."""
        if mask is None:
            return [None] * len(self.groups)
        if id(mask) not in self._kept:
            self._kept[id(mask)] = (mask, [_part(mask, group) for group in self.groups])
        found: list[Tensor | None] = self._kept[id(mask)][1]
        return found

    def _index(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values.astype(np.int64)).to(self.device)


def _part(mask: Tensor, group: Group) -> Tensor | None:
    rows = mask if mask.shape[0] == 1 else mask.index_select(0, group.rows)
    queries = slice(None) if mask.shape[2] == 1 else slice(group.length)
    part = rows[:, :, queries, : group.length]
    return None if part.dtype == torch.bool and bool(part.all()) else part


class _Move(torch.autograd.Function):
    """y[i] = x[take[i]], where `back` is the other way round; no gradient at padding."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, take: Tensor, back: Tensor, padding: Tensor, pads: bool
    ) -> Tensor:
        ctx.save_for_backward(back, padding)
        ctx.pads = pads
        y = x.index_select(0, take)
        return y.index_fill_(0, padding, 0) if pads else y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        back, padding = ctx.saved_tensors
        gx = grads[0].index_select(0, back)
        return (gx if ctx.pads else gx.index_fill_(0, padding, 0)), None, None, None, None


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' own SDPA, called for each group of rows of like lengths.

    Args:
        module: The attention module.
        query: (1, heads, N, d) where padding is removed.
        key: (1, key heads, N, d).
        value: Likewise.
        attention_mask: The model's own, for the padded batch.
        **kwargs: Handed on.

    Returns:
        (1, N, heads, d), and no weights.
    """
    sdpa = AttentionInterface()["sdpa"]
    packing = current_packing()
    if packing is None:
        found: tuple[Tensor, None] = sdpa(module, query, key, value, attention_mask, **kwargs)
        return found
    gathered = [
        _Move.apply(
            x[0].transpose(0, 1),
            packing.group_take,
            packing.group_places,
            packing.group_padding,
            True,
        ).split([len(g.take) for g in packing.groups])
        for x in (query, key, value)
    ]
    outputs = []
    for i, (group, mask) in enumerate(
        zip(packing.groups, packing.masks(attention_mask), strict=True)
    ):
        q, k, v = (x[i].unflatten(0, (-1, group.length)).transpose(1, 2) for x in gathered)
        y, _ = sdpa(module, q, k, v, mask, **kwargs)
        outputs.append(y.flatten(0, 1))
    y = _Move.apply(
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

    Calls need `attention_mask` (n, L) with the padding on the right; others run as ever.

    Args:
        model: A model of transformers; for one that reads no tokens nothing changes.
        copied: Names of modules of which tasks have copies of their own.
        else_grouped: Group rows by length where padding cannot be removed, which takes as many
            calls of the model as there are groups; False leaves the padding.

    Yields:
        None when padding is removed or there is none to remove; else why it cannot be.
    """
    if getattr(getattr(model, "config", None), "vocab_size", None) is None or _done(model):
        yield None
        return
    reason = _obstacle(model, copied)
    if reason is None:
        with _PackedCalls(model).installed() as calls:
            if calls.verified():
                yield None
                return
        reason = f"{type(model).__name__} gives other results without padding"
    if not else_grouped:
        _say(f"padding is not removed: {reason}")
        yield reason
        return
    _say(f"padding is not removed, rows are grouped by length instead: {reason}")
    with grouped_calls(model):
        yield reason


def _say(text: str) -> None:
    """Warns, once in a process: every wave and every scoring comes here."""
    if text not in _SAID:
        _SAID.add(text)
        logger.warning(text)


def _done(model: nn.Module) -> bool:
    """Whether an outer `packed` has patched the model."""
    found = block_list(model)
    patched = [model, *(() if found is None else found[1])]
    return any(hasattr(module.forward, "packed") for module in patched)


def _obstacle(model: nn.Module, copied: Collection[str]) -> str | None:
    """What speaks against packing this model, as far as it can be seen without calling it."""
    found = block_list(model)
    name = type(model).__name__
    if found is None:
        return f"{name} has no single list of blocks"
    if not _configs(model):
        used = getattr(model.config, "_attn_implementation", None)
        return f'{name} uses the attention "{used}", not "sdpa"'
    modules = dict(model.named_modules())
    for other in copied:
        if other.startswith(f"{found[0]}.") and any(True for _ in modules[other].children()):
            return f"each task has a copy of {other}, which may hold attention"
    return None


def _configs(model: nn.Module) -> list[Any]:
    """The configurations that the model's attention modules look their implementation up in.

    `_attn_implementation` is private: transformers has no public getter.
    """
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    used = ("sdpa", NAME)  # the latter where another model that shares the configuration is packed
    return [c for c in configs.values() if getattr(c, "_attn_implementation", None) in used]


class _PackedCalls:
    """Patches the moving blocks of a model so that they see tokens without padding."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._packing: Packing | None = None  # of the call in progress
        self._served = 0
        self._off = False

    @contextlib.contextmanager
    def installed(self) -> Iterator[_PackedCalls]:
        found = block_list(self.model)
        assert found is not None
        # Blocks below are served by `frozen_prefix`, which has patched them.
        blocks = [b for b in found[1] if not hasattr(b.forward, "prefix")]
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
        """Whether the model gives the same for a few made-up rows with and without padding."""
        inputs = made_up_rows(self.model)
        served = self._served
        with own_pass(self.model), routed(None, None):
            try:
                short = self.model(**inputs)
            except (ValueError, IndexError, TypeError, RuntimeError, AttributeError):
                return False  # the blocks need more than hidden states
            if self._served == served:
                return False
            self._off = True
            whole = self.model(**inputs)
            self._off = False
        return agree(whole, short, inputs["attention_mask"])

    def _before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        lengths, width = lengths_of(kwargs)
        self._packing = None
        if self._off:
            return
        if lengths and sum(lengths) < WORTH * width * len(lengths):
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

        forward.packed = True  # type: ignore[attr-defined]
        with replaced_forward(block, forward):
            yield


def made_up_rows(model: nn.Module) -> dict[str, Tensor]:
    """Three short rows of unlike lengths, as a call of the model."""
    config: Any = model.config
    fill = getattr(config, "pad_token_id", None)
    vocabulary = [i for i in range(min(config.vocab_size, 64)) if i != fill]
    ids = torch.tensor(vocabulary).repeat(21)[:21].view(3, 7)
    mask = torch.tensor([[1] * 3 + [0] * 4, [1] * 7, [1] * 2 + [0] * 5])
    device = next(model.parameters()).device
    ids = torch.where(mask > 0, ids, fill or 0)
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
