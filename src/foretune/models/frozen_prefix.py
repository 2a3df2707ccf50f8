"""Compute the output of a model's frozen prefix once for each text, and cache it.

Where the embeddings and the lowest blocks neither train nor carry adapters, their output for a
text is the same in every step, task and run with that prefix. `FrozenPrefix` lets a model start at
its lowest moving block: the first one that trains or carries adapters.

What the prefix reads is recorded in a call of the model. Nothing of it may train or carry adapters,
wherever in the model it is registered; the states are cached under a digest of it; and the model is
called both ways before it is served. A model that fails is left as it is, and a warning says why.

Dropout in the frozen prefix is off by construction. The model's own forward still looks up the
embeddings and builds the masks, which is cheap; its result is discarded.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from foretune.models.calls import agree, dummy_rows, eval_no_grad, replaced_forward
from foretune.models.prefix_cache import PrefixCache, prefix_cache
from foretune.models.prefix_reads import recorded_reads
from foretune.models.reading import note_asked, note_computed
from foretune.models.routing import route, routed
from foretune.models.surgery import block_list, first_moving_block, skips_blocks

__all__ = [
    "FrozenPrefix",
    "PrefixCache",
    "PrefixForward",
    "first_moving_block",
    "frozen_prefix",
    "prefix_cache",
]

ERRORS = (
    *(AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError),
)  # what a model raises whose blocks pass on more than hidden states
# Missing rows are computed in batches of so many, see `FrozenPrefix._compute`; on a CPU of about so
# many tokens, from which on more at once take no less time per row.
ROWS, CPU_TOKENS = 16, 64
STEP = 8  # rows are padded to a multiple of this length
MASK = "attention_mask"
TOKEN_INPUTS = ("input_ids", MASK, "token_type_ids")

logger = logging.getLogger("foretune")
_WARNED: set[str] = set()


@contextlib.contextmanager
def frozen_prefix(model: nn.Module, adapted: Iterable[str]) -> Iterator[None]:
    """Inside the block the model starts at its lowest moving block, if there are frozen ones below.

    Args:
        model: A model.
        adapted: Names of modules that carry adapters.
    """
    first = first_moving_block(model, adapted)
    if not first:
        yield
        return
    with FrozenPrefix(model, first, adapted=adapted) as prefix:
        if prefix.obstacle is not None:
            _warn_once(
                f"the frozen blocks of {type(model).__name__} are computed in every step: "
                f"{prefix.obstacle}"
            )
        yield


def served_share(model: nn.Module) -> float:
    """The share of a model's blocks that an installed prefix serves from its cache."""
    named_blocks = block_list(model)
    blocks = [] if named_blocks is None else list(named_blocks[1])
    served = sum(isinstance(vars(block).get("forward"), PrefixForward) for block in blocks)
    return served / len(blocks) if blocks else 0.0


class _Reached(Exception):  # noqa: N818
    """The forward pass has reached the end of the prefix."""

    def __init__(self, output: Any) -> None:
        self.output = output


class FrozenPrefix:
    """While installed, a model starts at `first_block`; the states below it come from a cache.

    A call that it cannot serve (left padding, hidden states or a key-value cache requested, inputs
    other than token ids) runs as if nothing were installed. So does every call of a model that has
    an `obstacle`.

    Args:
        model: The model; nothing below `first_block` may change while this is installed.
        first_block: The result of `first_moving_block`; with None or 0 nothing is ever patched.
        cache: Cache of the states; None for the one of all models with an equal prefix.
        adapted: Names of modules that carry adapters.

    Attributes:
        obstacle: Why the model cannot be served; None if it can, or has no frozen block.

    Example:
        with FrozenPrefix(model, first_block):
            train(model)
    """

    def __init__(
        self,
        model: nn.Module,
        first_block: int | None,
        cache: PrefixCache | None = None,
        *,
        adapted: Iterable[str] = (),
    ) -> None:
        self.model = model
        self.first_block = first_block or 0
        self.cache = PrefixCache() if cache is None else cache
        self.shared = cache is None
        self.adapted = frozenset(adapted)
        self.obstacle: str | None = None
        self._states: Tensor | None = None  # of the forward pass in progress
        self._busy = False  # an internal pass is in progress, which must not be served
        self._stop = False  # … and it ends after the prefix
        self._rest: tuple[None, ...] | None = None  # what follows the states in a block's tuple
        self._patches: contextlib.ExitStack | None = None  # while installed

    def __enter__(self) -> FrozenPrefix:
        self.install()
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def install(self) -> None:
        """Patch the model; a second call changes nothing.

        Raises:
            RuntimeError: A prefix that reaches above this one is installed already.
        """
        named_blocks = block_list(self.model)
        if named_blocks is None or not self.first_block or self._patches is not None:
            return
        if getattr(_config(self.model), "vocab_size", None) is None:
            return  # only tokens are served
        name, blocks = named_blocks
        outer = blocks[0].forward
        if isinstance(outer, PrefixForward):  # it serves the blocks, and must not serve too many
            if outer.prefix.first_block > self.first_block:
                raise RuntimeError(f"block {self.first_block} moves inside a frozen prefix")
            return
        with contextlib.ExitStack() as patches:
            for i, block in enumerate(blocks[: self.first_block]):
                forward = PrefixForward(self, block.forward, last=i == self.first_block - 1)
                patches.enter_context(replaced_forward(block, forward))
            before = self.model.register_forward_pre_hook(self._before, with_kwargs=True)
            after = self.model.register_forward_hook(self._after, always_call=True)
            patches.callback(before.remove)
            patches.callback(after.remove)
            self._patches = patches.pop_all()
        self.obstacle = self._find_obstacle(name)
        if self.obstacle is not None:
            self.remove()

    def remove(self) -> None:
        """Restore the model as it was before `install`."""
        if self._patches is not None:
            self._patches.close()
            self._patches = None
        self._states = None

    def output_of(
        self, real: Callable[..., Any], last: bool, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The output of a frozen block, or cached (n, L, d) states while these are served.

        Raises:
            _Reached: The block is the last of the prefix, and the pass ends after it.
        """
        if self._states is None:
            output = real(*args, **kwargs)
            if last and self._stop:
                raise _Reached(output)
            return output
        hidden = self._states if last else (*args, *kwargs.values())[0]
        return hidden if self._rest is None else (hidden, *self._rest)

    def _before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._busy:
            return
        self._states = None
        inputs = _token_inputs(args, kwargs)
        if inputs is not None and not getattr(_config(self.model), "output_hidden_states", False):
            note_asked(len(inputs["input_ids"]))
            self._states = self._look_up(inputs)

    def _after(self, *_: Any) -> None:
        if not self._busy:
            self._states = None

    def _look_up(self, inputs: Mapping[str, np.ndarray]) -> Tensor:
        """(n, L, d) states of a batch, from the cache or computed now; zero where it is padded."""
        mask = inputs["attention_mask"]
        lengths = mask.sum(1)
        columns = np.stack([v for k, v in inputs.items() if k != "attention_mask"], 1)
        columns = np.ascontiguousarray(columns, dtype=np.int32)
        kind = f"{sorted(inputs)}{_precision(self.model)}".encode()
        keys = [kind + columns[i, :, :n].tobytes() for i, n in enumerate(lengths)]
        states = {key: row for key in keys if (row := self.cache.get(key)) is not None}
        by_length: dict[int, dict[bytes, int]] = {}
        for i, key in enumerate(keys):
            if key not in states:
                by_length.setdefault(self._padded(int(lengths[i])), {})[key] = i
        with self._unserved() if by_length else contextlib.nullcontext():
            for length, missing in sorted(by_length.items()):
                rows = list(missing.items())
                together = self._together(length)
                for start in range(0, len(rows), together):
                    chunk = rows[start : start + together]
                    computed = self._compute(inputs, [i for _, i in chunk], length)
                    for (key, _), row in zip(chunk, computed, strict=True):
                        states[key] = row
                        self.cache.put(key, row)
        padded = pad_sequence([states[key] for key in keys], batch_first=True)
        return nn.functional.pad(padded, (0, 0, 0, mask.shape[1] - padded.shape[1]))

    def _padded(self, length: int) -> int:
        """The length that a row is padded to; depends on its own length only."""
        most = getattr(_config(self.model), "max_position_embeddings", None)
        rounded = -(-length // STEP) * STEP
        return rounded if most is None else max(length, min(rounded, most))

    def _together(self, length: int) -> int:
        """How many rows of this padded length are computed at once; more would be filled up."""
        on_cpu = next(self.model.parameters()).device.type == "cpu"
        return max(1, CPU_TOKENS // length) if on_cpu else ROWS

    def _compute(
        self, inputs: Mapping[str, np.ndarray], rows: list[int], length: int
    ) -> list[Tensor]:
        """(L, d) states of each of these rows, computed by the real blocks; called in `_unserved`.

        The number of rows in the batch, filled up by repetition, and a row's padding depend on its
        length only, so its states are bitwise independent of which other rows were missing from
        the cache. Otherwise a resumed run, which starts with an empty cache, would drift from an
        uninterrupted one.
        """
        together = self._together(length)
        filled = (rows * together)[:together]
        cut = {name: values[filled, :length] for name, values in inputs.items()}
        cut = {k: np.pad(v, ((0, 0), (0, length - v.shape[1]))) for k, v in cut.items()}
        fill = getattr(_config(self.model), "pad_token_id", None)
        cut["input_ids"] = np.where(cut["attention_mask"] > 0, cut["input_ids"], fill or 0)
        lengths = inputs["attention_mask"].sum(1)[rows]
        served, self._states, self._stop = self._states, None, True
        device = next(self.model.parameters()).device
        try:
            with route(None), note_computed(together, device):
                output = self._bottom(self._tensors(cut))
                states = output[0] if isinstance(output, tuple) else output
                if isinstance(
                    output, tuple
                ):  # tensors that follow are left out, as if not asked for
                    self._rest = tuple(value for value in output[1:] if value is None)
                # copies, so that a short row does not keep its whole batch alive
                return [row[:n].clone() for row, n in zip(states, lengths, strict=False)]
        finally:
            self._states, self._stop = served, False

    def _bottom(self, batch: Mapping[str, Tensor]) -> Any:
        """The output of the last frozen block.

        Raises:
            RuntimeError: The model did not call its blocks.
        """
        try:
            self.model(**batch)
        except _Reached as reached:
            return reached.output
        raise RuntimeError("the model did not call its blocks")

    def _tensors(self, inputs: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
        device = next(self.model.parameters()).device
        return {k: torch.from_numpy(v.astype(np.int64)).to(device) for k, v in inputs.items()}

    @contextlib.contextmanager
    def _unserved(self) -> Iterator[None]:
        """Inside the block calls are not served; the model is in eval mode, without gradients."""
        busy, self._busy = self._busy, True
        try:
            with eval_no_grad(self.model):
                yield
        finally:
            self._busy = busy

    def _find_obstacle(self, block_list_name: str) -> str | None:
        """Why this model cannot be served; chooses the cache if it can.

        Dummy rows are computed both ways and compared, as are the cached and the fresh states of
        one of them, if an equal prefix has been here before.
        """
        if skips_blocks(self.model):
            return "it skips blocks at random (layerdrop)"
        inputs = {k: v.cpu().numpy() for k, v in dummy_rows(self.model).items()}
        # A row's dtype and rounding depend on autocast, under which the calls that are served run.
        with self._unserved(), routed(None, None):
            try:
                with recorded_reads(self.model, block_list_name) as reads:
                    fresh = self._compute(inputs, [0], self._padded(int(inputs[MASK][0].sum())))
            except ERRORS:
                return "they cannot be computed from token ids alone"
            moving = [name for name, tensor in reads.tensors.items() if tensor.requires_grad]
            moving += [name for name in reads.modules if name in self.adapted]
            if moving:
                return f"they read {moving[0]}, which is trained"
            if self.shared:
                self.cache = prefix_cache(self.model, self.first_block, reads.tensors)
            if self._agrees(inputs, fresh[0]):
                return None
            return "their hidden states alone do not give the model's output"

    def _agrees(self, inputs: Mapping[str, np.ndarray], first: Tensor) -> bool:
        """Whether the model gives the same output for these rows with and without the cache.

        Args:
            inputs: Arguments of a call.
            first: (L, d) the states of the first row, computed now.
        """
        batch = self._tensors(inputs)
        reference = self.model(**batch)
        try:
            self._states = self._look_up(inputs)
            change = (self._states[0, : len(first)] - first).abs().max()
            if change > 1e-4 * first.abs().max():
                return False  # cached for a model that differs in what is no tensor
            output = self.model(**batch)
        except ERRORS:
            return False
        finally:
            self._states = None
        exact = first.dtype in (torch.float32, torch.float64)
        return agree(reference, output, batch[MASK], tolerance=1e-4 if exact else 5e-2)


class PrefixForward:
    """The `forward` of a block that a frozen prefix serves, recognised by its type.

    Args:
        prefix: The prefix that serves the block.
        real: The block's forward before the prefix was installed.
        last: Whether the block is the last of the prefix.
    """

    def __init__(self, prefix: FrozenPrefix, real: Callable[..., Any], last: bool) -> None:
        self.prefix, self.real, self.last = prefix, real, last

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The output of the block, from the cache where the prefix serves this call."""
        return self.prefix.output_of(self.real, self.last, args, kwargs)


def _token_inputs(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, np.ndarray] | None:
    """Ids, mask and segment ids of a call, (n, L) each; None for a call that cannot be served."""
    if len(args) > 1 or (args and "input_ids" in kwargs):
        return None
    present = {k: v for k, v in kwargs.items() if v is not None and v is not False}
    if args:
        present["input_ids"] = args[0]
    ids = present.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point():
        return None
    if not present.keys() <= {*TOKEN_INPUTS, "labels", "return_dict"}:
        return None
    present.setdefault("attention_mask", torch.ones_like(ids))
    tensors = {name: present[name] for name in TOKEN_INPUTS if name in present}
    if any(t.shape != ids.shape for t in tensors.values()):
        return None
    arrays = {name: t.detach().cpu().numpy() for name, t in tensors.items()}
    mask = arrays["attention_mask"]
    on_the_right = mask == (np.arange(mask.shape[1]) < mask.sum(1)[:, None])
    return arrays if mask.size and mask[:, 0].all() and on_the_right.all() else None


def _warn_once(text: str) -> None:
    """Warn once per process: each wave and each scoring pass calls this."""
    if text not in _WARNED:
        _WARNED.add(text)
        logger.warning(text)


def _config(model: nn.Module) -> Any:
    return getattr(model, "config", None)


def _precision(model: nn.Module) -> str:
    """The autocast dtype, on which the rounding of the states depends; empty without autocast."""
    device = next(model.parameters()).device.type
    return str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else ""
