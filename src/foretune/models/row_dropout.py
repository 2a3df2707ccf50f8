"""Dropout that depends on a row's task, step and content alone.

torch draws the masks of a whole batch from one stream, so a row's mask depends on the rows before
it and on the padding: a task's result would depend on the tasks that it shares a batch with, and on
how the batch is split. Here a hash decides about each element instead:

    symbol   here       is
    k        keys       of a row: a hash of the seed of its task and step, and of its content
    c                   coordinates of an element in its row: token, head, channel …
    j        draws      number of the draw in the forward pass of the model
    u        bits       hash(k, c, j), uniform over 64 bits; the element stays if u is at least the
                        p-quantile

Equal rows of a task share their masks within a step. What all rows share, such as the embeddings of
relative positions or the choice to skip a layer, is drawn once per step.
"""

from __future__ import annotations

import contextlib
import contextvars
import inspect
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointError
from typing_extensions import override

from foretune.errors import UserError
from foretune.models.calls import output_tensors
from foretune.models.digests import moving_buffers
from foretune.models.nested import tensors_in, with_tensors
from foretune.models.random_functions import DROPOUT, REPLACED
from foretune.models.routing import current_packing, current_rows, route
from foretune.models.row_hash import content_hash, hashed_bits, mixed, wrapped

NOT_CONTENT = (
    "attention_mask",
    "position_ids",
    "cache_position",
)  # they follow from the ids and their padding
FRAMES = 12  # as many frames up the stack tell two calls of the same function apart

MOST = 2**22  # random bits are drawn for this many elements at a time, which bounds the memory

RECOMPUTED = (
    "the model recomputes dropout in the backward pass with torch.utils.checkpoint (or computes it "
    "without gradients), where its masks would differ: leave that to "
    "Run(gradient_checkpointing=True), or turn the dropout off (eval() for a part that is frozen)"
)

Site = tuple[Any, ...]
logger = logging.getLogger("foretune")
_WARNED: set[str] = set()


class RowDropout:
    """Lets a model that trains draw its dropout row by row.

    Args:
        model: A model.
        tries: Whether the model's first call is preceded by two of copies of its first row, which
            show where its draws depend on rows and whether they depend on the rest of the batch.

    Attributes:
        drew: Whether the model has drawn anything; None before its first call in training.
    """

    def __init__(self, model: nn.Module, *, tries: bool = True) -> None:
        self.model, self.tries = model, tries
        self.drew: bool | None = None
        self._row_dims: dict[Site, int | None] = {}  # by the place in the code that draws
        self._shapes: dict[Site, list[tuple[int, ...]]] | None = None  # while these are looked for
        self._expected: list[Tensor] = []  # outputs for copies of the first row of the first call

    @contextlib.contextmanager
    def seeded(self, seeds: Mapping[int, int], shared_seed: int) -> Iterator[None]:
        """Inside the block the model's calls draw from these seeds.

        Args:
            seeds: Seed of each slot; it stands for a task and a step.
            shared_seed: Seed of what all rows of the step share.
        """
        tokens: list[contextvars.Token[_Call | None]] = []

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs = {str(i): v for i, v in enumerate(args)} | kwargs
            num_rows = _num_rows(inputs)
            call = None
            if num_rows and self.model.training:
                if self.drew is None:
                    self.drew = False
                    if self.tries:
                        self._try_copies(len(args), inputs, num_rows)
                call = self._call(inputs, num_rows, seeds, shared_seed)
            tokens.append(_CALL.set(call))

        def after(_: nn.Module, __: Any, output: Any) -> None:
            if tokens:
                _CALL.reset(tokens.pop())
            if self._expected and not tokens and self._shapes is None:
                self._compare(output)

        # First of the hooks: the calls of copies would end what packing and cached prefixes, which
        # are set up by hooks of their own, have prepared for the batch.
        hooks = [
            self.model.register_forward_pre_hook(before, with_kwargs=True, prepend=True),
            self.model.register_forward_hook(after, always_call=True),
        ]
        try:
            with _Mode():
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def row_dim(self, shape: Sequence[int], num_rows: int) -> int | None:
        """The dimension of `shape`, which is being drawn, that runs over rows; None for none."""
        self.drew = True
        site = _site()
        if self._shapes is not None:
            self._shapes.setdefault(site, []).append(tuple(shape))
        guess = next((i for i, size in enumerate(shape[:2]) if size == num_rows), 0)
        return self._row_dims.get(site, guess)

    def _call(
        self, inputs: Mapping[str, Any], num_rows: int, seeds: Mapping[int, int], shared_seed: int
    ) -> _Call:
        """The draws of a call with these arguments."""
        mask = inputs.get("attention_mask")
        mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        content = [
            v if len(v) == num_rows else v.transpose(0, 1)
            for path, v in tensors_in(inputs).items()
            if path[0] not in NOT_CONTENT and num_rows in v.shape[:2]
        ]
        config: Any = getattr(self.model, "config", None)
        fills = [getattr(config, name, None) for name in ("pad_token_id", "eos_token_id")]
        device = next(self.model.parameters()).device
        keys = torch.zeros(num_rows, dtype=torch.long, device=device)
        if content:
            keys = content_hash(content, mask, [-100, *(f for f in fills if isinstance(f, int))])
        rows = current_rows()
        slots = [-1] * num_rows if rows is None else rows.slots
        row_seeds = [wrapped(seeds.get(slot, shared_seed)) for slot in slots]
        keys = mixed(keys + torch.tensor(row_seeds, device=keys.device))
        shared = mixed(torch.tensor([wrapped(shared_seed)], device=keys.device))
        return _Call(self, keys, shared, has_gradients=torch.is_grad_enabled())

    @torch.no_grad()
    def _try_copies(self, num_args: int, inputs: Mapping[str, Any], num_rows: int) -> None:
        """Finds the dimension of each draw that runs over rows: three copies of one, then two."""
        rows = current_rows()
        shapes, output = [], None
        # Statistics of batch norms.
        buffers = [(b, b.clone()) for _, b in moving_buffers(self.model)]
        device = next(self.model.parameters()).device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            for copies in (3, 2):
                self._shapes = {}

                def first_row(_: Any, x: Tensor, copies: int = copies) -> Tensor:
                    if num_rows not in x.shape[:2]:
                        return x
                    index = torch.zeros(copies, dtype=torch.long, device=x.device)
                    return x.index_select(x.shape[:2].index(num_rows), index)

                try:
                    few = with_tensors(inputs, first_row)
                    args = [few.pop(str(i)) for i in range(num_args)]
                    with route(None if rows is None else [rows.slots[0]] * copies):
                        output = self.model(*args, **few)
                except (ValueError, IndexError, TypeError, RuntimeError, AttributeError):
                    output = None  # it takes more than rows
                shapes.append(self._shapes)
                self._shapes = None
        for buffer, value in buffers:
            if not torch.equal(buffer, value):  # a write would make digests be computed again
                buffer.copy_(value)
        for site in shapes[0].keys() & shapes[1].keys():
            first, second = shapes[0][site][0], shapes[1][site][0]
            if len(first) == len(second):
                varying = [i for i in range(len(first)) if first[i] != second[i]]
                self._row_dims[site] = varying[0] if varying else None
        if self.drew and num_rows > 1 and output is not None:
            self._expected = output_tensors(output)

    def _compare(self, output: Any) -> None:
        """Warns unless the first row of the first call is the same as without the other rows."""
        expected, self._expected = self._expected, []
        outputs = [] if output is None else output_tensors(output)
        for copies, batch in zip(expected, outputs, strict=False):
            if not (copies.dim() == batch.dim() > 1 and len(copies) == 2):
                continue
            a, b = copies[0].float(), batch[0].detach().float()
            b = b[tuple(slice(n) for n in a.shape)]
            tolerance = 1e-3 if batch.dtype == torch.float32 else 5e-2
            if a.shape == b.shape and (a - b).abs().max() > tolerance * a.abs().max():
                _warn_once(
                    f"{type(self.model).__name__} draws random numbers that depend on the whole "
                    "batch: in training a task's result depends on the tasks beside it and on "
                    "token_budget; turn its dropout off to prevent that"
                )
                return


@dataclass
class _Call:
    """The draws of one call of the model.

    Args:
        dropout: What the model draws with.
        keys: (n,) key of each row.
        shared: (1,) key of what the rows share.
        is_part: Whether the rows are a part of the batch; these are padded even if it is packed.
        has_gradients: Whether gradients are recorded where the call begins.
        draws: Number of draws so far.
        row_dims: For each draw, by its number, the dimension that runs over rows.
    """

    dropout: RowDropout
    keys: Tensor
    shared: Tensor
    is_part: bool = False
    has_gradients: bool = False
    draws: int = 0
    row_dims: dict[int, int | None] = field(default_factory=dict)

    def drawn(self, shape: Sequence[int], function: Callable[[Tensor], Tensor]) -> Tensor:
        """An elementwise function of 64 random bits (int64) for each element of this shape."""
        self.draws += 1
        shape, n = tuple(shape), len(self.keys)
        packing = None if self.is_part else current_packing()
        if packing is not None and (tokens := _token_dims(shape, sum(packing.lengths))):
            keys, places = self.keys[packing.row_of_token], packing.place_of_token
            bits = hashed_bits(keys, shape[tokens:], self.draws, places)
            return function(bits).view(shape)
        if self.keys is self.shared:
            return self._drawn_for_table(shape, function)
        if self.draws not in self.row_dims:  # else a block is recomputed
            self.row_dims[self.draws] = self.dropout.row_dim(shape, n)
        dim = self.row_dims[self.draws]
        if dim is None or not shape or shape[dim] % n:
            return function(hashed_bits(self.shared, shape, self.draws)).view(shape)
        # tokens or heads may be run together with the rows
        together = () if shape[dim] == n else (shape[dim] // n,)
        sizes = (*shape[:dim], *together, *shape[dim + 1 :])
        rows = max(1, MOST // max(1, math.prod(sizes)))
        parts = [function(hashed_bits(k, sizes, self.draws)) for k in self.keys.split(rows)]
        return torch.cat(parts).movedim(0, dim).reshape(shape)

    def _drawn_for_table(
        self, shape: tuple[int, ...], function: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Like `drawn`, for a table (1, m, …) of which longer rows read more around its middle."""
        size = shape[1]
        places = torch.arange(size, device=self.shared.device) - size // 2
        bits = hashed_bits(self.shared.expand(size), shape[2:], self.draws, places)
        return function(bits).view(shape)


_CALL: contextvars.ContextVar[_Call | None] = contextvars.ContextVar("foretune_draws", default=None)


class _Mode(TorchFunctionMode):
    """While active, random functions inside a call of a model draw as the call says."""

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call, kwargs = _CALL.get(), kwargs or {}
        replacement = None if call is None else REPLACED.get(func)
        if call is None or replacement is None or kwargs.get("generator") is not None:
            return func(*args, **kwargs)
        kwargs = {"x" if name == "input" else name: v for name, v in kwargs.items()}
        drawn: Any = call.drawn
        if func in DROPOUT and call.has_gradients and not torch.is_grad_enabled():
            drawn = _refuse  # torch.utils.checkpoint(use_reentrant=True), which will not notice
        if func is F.multi_head_attention_forward:
            with self:
                return replacement(drawn, *args, **kwargs)
        return replacement(drawn, *args, **kwargs)


@contextlib.contextmanager
def only_known_recomputation() -> Iterator[None]:
    """A context for the backward pass of calls whose dropout was drawn row by row.

    Raises:
        UserError: Something recomputes dropout that does not know of it: masks would differ.
    """
    try:
        yield
    except CheckpointError as error:
        raise UserError(RECOMPUTED) from error


def _refuse(*_: Any) -> Tensor:
    raise UserError(RECOMPUTED)


def draws_of_parts() -> Callable[[Any], AbstractContextManager[None]]:
    """A factory of contexts for a module that is called for some of the rows at a time.

    It takes the index of a part's rows, None for what is computed for no row but is shared. All
    parts repeat the same draws, so that a row's draws do not depend on the number of parts.
    """
    call = _CALL.get()
    if call is None:
        return lambda _: contextlib.nullcontext()
    start = call.draws

    @contextlib.contextmanager
    def part_of(rows: Any) -> Iterator[None]:
        keys = call.shared if rows is None else call.keys[rows]
        part = replace(call, keys=keys, is_part=True, draws=start)
        token = _CALL.set(part)
        try:
            yield
        finally:
            _CALL.reset(token)
            call.draws = max(call.draws, part.draws)

    return part_of


def captured_draws() -> Callable[[], AbstractContextManager[None]]:
    """A factory of contexts that repeat all draws from here on, for recomputing a block."""
    call = _CALL.get()
    if call is None:
        return contextlib.nullcontext
    start = call.draws

    @contextlib.contextmanager
    def again() -> Iterator[None]:
        repeated = replace(call, draws=start, has_gradients=False)
        token = _CALL.set(repeated)
        try:
            with _Mode():
                yield
        finally:
            _CALL.reset(token)
            call.draws = max(call.draws, repeated.draws)

    return again


def _token_dims(shape: tuple[int, ...], num_tokens: int) -> int:
    """Leading dimensions of a shape (N, …), (1, N, …) or (1, 1, N, …) of tokens; 0 for others."""
    dim = next((i for i, size in enumerate(shape) if size != 1), None)
    return 0 if dim is None or shape[dim] != num_tokens else dim + 1


def _num_rows(inputs: Mapping[str, Any]) -> int | None:
    """The number of rows of a call; None for a call without tensors."""
    rows = current_rows()
    if rows is not None:
        return len(rows.slots)
    return next((len(v) for v in tensors_in(inputs).values() if v.dim()), None)


def _site() -> Site:
    """What tells the places in the model's code apart from which a random function is called."""
    frame: Any = inspect.currentframe()
    site: list[Any] = []
    while frame is not None and len(site) < FRAMES:
        site.append((frame.f_code, frame.f_lineno))
        frame = frame.f_back
    return tuple(site)


def _warn_once(text: str) -> None:
    if text not in _WARNED:
        _WARNED.add(text)
        logger.warning(text)
