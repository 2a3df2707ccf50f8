"""Compute once what the frozen bottom of a model makes of each text, and keep it.

Where the embeddings and the lowest blocks neither train nor carry adapters, their output for a text
is the same in every step, every task and every run on that bottom. `FrozenPrefix` lets a model start
at its lowest moving block.

Dropout in the frozen bottom is off by construction. The model's own forward still looks up the
embeddings and builds the masks, which is cheap; its result is discarded.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from foretune.errors import UserError
from foretune.models.routing import current_rows, route
from foretune.models.surgery import block_list, parameters_before

ROWS = 16  # missing rows are computed in batches of this many …
STEP = 8  # … padded to a multiple of this length, see `FrozenPrefix._compute`
SKIPPED_CONFIG = frozenset(
    "_name_or_path architectures dtype id2label label2id num_labels problem_type torch_dtype "
    "transformers_version use_cache".split()
)


def first_moving_block(model: nn.Module, adapted: Iterable[str]) -> int | None:
    """The lowest block that trains or carries an adapter.

    Args:
        model: A model.
        adapted: Names of modules that carry adapters.

    Returns:
        Its index; 0 where something before the blocks moves, so that no prefix is frozen; the
        number of blocks where only what comes after them moves; None for a model without one list
        of blocks.
    """
    found = block_list(model)
    if found is None:
        return None
    name, blocks = found
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
    """Names of the modules registered before the blocks, those that hold the blocks left out."""
    before: set[str] = set()
    for name, _ in model.named_modules():
        if name == block_list_name:
            break
        if not block_list_name.startswith(f"{name}.") and name:
            before.add(name)
    return before


class PrefixCache:
    """The states of texts after a frozen bottom.

    Args:
        max_bytes: Beyond it states are computed but no longer kept.
    """

    def __init__(self, max_bytes: int = 2 * 2**30) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.verified = False
        self._states: dict[bytes, Tensor] = {}

    def __len__(self) -> int:
        return len(self._states)

    def get(self, key: bytes) -> Tensor | None:
        return self._states.get(key)

    def put(self, key: bytes, states: Tensor) -> None:
        """Keeps (L, d) states unless the budget is spent."""
        size = states.numel() * states.element_size()
        if key not in self._states and self.num_bytes + size <= self.max_bytes:
            self._states[key] = states
            self.num_bytes += size


_CACHES: OrderedDict[str, PrefixCache] = OrderedDict()
_MOST_CACHES = 2  # a third bottom pushes out the one that was asked for longest ago


def prefix_cache(model: nn.Module, first_block: int) -> PrefixCache:
    """The cache of this model's bottom, the same object for all models with an equal bottom.

    Args:
        model: A model; the content of its parameters is hashed.
        first_block: The lowest block that is not part of the bottom.
    """
    key = _fingerprint(model, first_block)
    cache = _CACHES.setdefault(key, PrefixCache())
    _CACHES.move_to_end(key)
    while len(_CACHES) > _MOST_CACHES:
        _CACHES.popitem(last=False)
    return cache


def _fingerprint(model: nn.Module, first_block: int) -> str:
    name, blocks = _blocks(model)
    digest = hashlib.blake2b(digest_size=16)
    config: Any = getattr(model, "config", None)
    fields = config.to_dict() if hasattr(config, "to_dict") else {}
    kept = {k: v for k, v in fields.items() if k not in SKIPPED_CONFIG}
    device = next(model.parameters()).device
    digest.update(json.dumps([first_block, str(device), kept], default=str).encode())
    digest.update(repr(blocks[:first_block]).encode())
    tensors = [*parameters_before(model, name).values()]
    for block in blocks[:first_block]:
        tensors += [*block.parameters(), *block.buffers()]
    for tensor in tensors:
        plain = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(memoryview(plain.numpy()))
    return digest.hexdigest()


def _blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    found = block_list(model)
    if found is None:
        raise UserError(f"{type(model).__name__} has no list of blocks, so no frozen prefix")
    return found


class _Reached(Exception):  # noqa: N818
    """The forward pass has come to the end of the bottom."""

    def __init__(self, output: Any) -> None:
        self.output = output


class FrozenPrefix:
    """While installed, a model starts at `first_block`; what lies below is looked up.

    A call that it cannot serve (left padding, hidden states or a key-value cache asked for, inputs
    other than token ids) runs as if nothing were installed. So does every call of a model whose
    blocks turn out to hand on more than hidden states: the first rows are computed both ways and
    compared.

    Args:
        model: The model; nothing below `first_block` may change while this is installed.
        first_block: What `first_moving_block` said; with None or 0 nothing is ever patched.
        cache: Where states are kept, usually from `prefix_cache`.

    Example:
        with FrozenPrefix(model, first_block, prefix_cache(model, first_block)):
            train(model)
    """

    def __init__(
        self, model: nn.Module, first_block: int | None, cache: PrefixCache | None = None
    ) -> None:
        self.model = model
        self.first_block = first_block or 0
        self.cache = cache or PrefixCache()
        self.usable = self.first_block > 0
        self._states: Tensor | None = None  # of the forward pass in progress
        self._direct = False  # run the real blocks, whatever is installed
        self._in_tuple = False  # whether the blocks return 1-tuples
        self._undo: list[Any] = []

    def __enter__(self) -> FrozenPrefix:
        self.install()
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def install(self) -> None:
        """Patches the model; a second call changes nothing."""
        if not self.usable or self._undo:
            return
        _, blocks = _blocks(self.model)
        for i, block in enumerate(blocks[: self.first_block]):
            self._patch(block, last=i == self.first_block - 1)
        before = self.model.register_forward_pre_hook(self._before, with_kwargs=True)
        after = self.model.register_forward_hook(self._after, always_call=True)
        self._undo += [before.remove, after.remove]

    def remove(self) -> None:
        """Leaves the model as it was before `install`."""
        while self._undo:
            self._undo.pop()()
        self._states = None

    def _patch(self, block: nn.Module, *, last: bool) -> None:
        real = block.forward
        own = "forward" in vars(block)

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._direct or self._states is None:
                output = real(*args, **kwargs)
                if last and self._direct:
                    raise _Reached(output)
                return output
            hidden = self._states if last else (*args, *kwargs.values())[0]
            return (hidden,) if self._in_tuple else hidden

        def undo() -> None:
            if own:
                block.forward = real  # type: ignore[method-assign]
            else:
                del block.forward

        block.forward = forward  # type: ignore[method-assign]
        self._undo.append(undo)

    def _before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._states = None
        if self._direct or not self.usable:
            return
        inputs = _token_inputs(args, kwargs)
        if inputs is None:
            return
        if not self.cache.verified and not self._verify(inputs):
            self.usable = False
            return
        self._states = self._look_up(inputs)

    def _after(self, *_: Any) -> None:
        if not self._direct:
            self._states = None

    def _look_up(self, inputs: Mapping[str, np.ndarray]) -> Tensor:
        """(n, L, d) states of a batch, from the cache or computed now; zero where it is padded."""
        mask = inputs["attention_mask"]
        lengths = mask.sum(1)
        columns = np.stack([v for k, v in inputs.items() if k != "attention_mask"], 1)
        columns = np.ascontiguousarray(columns, dtype=np.int32)
        kind = f"{tuple(inputs)}{_precision(self.model)}".encode()
        keys = [kind + columns[i, :, :n].tobytes() for i, n in enumerate(lengths)]
        states = {key: found for key in keys if (found := self.cache.get(key)) is not None}
        missing = {key: i for i, key in enumerate(keys) if key not in states}
        by_length: dict[int, list[tuple[bytes, int]]] = {}
        for key, i in missing.items():
            by_length.setdefault(self._padded(int(lengths[i])), []).append((key, i))
        for length, rows in sorted(by_length.items()):
            for start in range(0, len(rows), ROWS):
                chunk = rows[start : start + ROWS]
                computed = self._compute(inputs, [i for _, i in chunk], length)
                for (key, i), row in zip(chunk, computed, strict=False):
                    states[key] = row[: lengths[i]].clone()
                    self.cache.put(key, states[key])
        padded = pad_sequence([states[key] for key in keys], batch_first=True)
        return nn.functional.pad(padded, (0, 0, 0, mask.shape[1] - padded.shape[1]))

    def _padded(self, length: int) -> int:
        """The length that a row is padded to; a function of its own length alone."""
        most = getattr(getattr(self.model, "config", None), "max_position_embeddings", None)
        rounded = -(-length // STEP) * STEP
        return rounded if most is None else max(length, min(rounded, most))

    def _compute(self, inputs: Mapping[str, np.ndarray], rows: list[int], length: int) -> Tensor:
        """(ROWS, length, d) states of these rows by the real blocks; rows beyond are a filler.

        The batch always has the same number of rows and a row's own length decides its padding, so
        a row's states do not depend, in the last bit, on the rows that happened to be missing with
        it. Otherwise a resumed run, which starts with an empty cache, would drift from one that was
        never killed.
        """
        filled = (rows * ROWS)[:ROWS]
        device = next(self.model.parameters()).device
        batch = {}
        for name, values in inputs.items():
            cut = np.zeros((ROWS, length), dtype=np.int64)
            width = min(length, values.shape[1])
            cut[:, :width] = values[filled, :width]
            batch[name] = torch.from_numpy(cut).to(device)
        with self._real_blocks(), route(None):
            try:
                self.model(**batch)
            except _Reached as reached:
                output = reached.output
        self._in_tuple = isinstance(output, tuple)
        states: Tensor = output[0] if isinstance(output, tuple) else output
        return states

    @contextlib.contextmanager
    def _real_blocks(self) -> Iterator[None]:
        """The unpatched model, in eval mode and without gradients."""
        training = [m for m in self.model.modules() if m.training]
        self.model.eval()
        self._direct = True
        try:
            with torch.inference_mode(False), torch.no_grad():
                yield
        finally:
            self._direct = False
            for module in training:
                module.training = True

    def _verify(self, inputs: Mapping[str, np.ndarray], most: int = 4) -> bool:
        """Whether the model gives the same for the first rows with and without the short cut."""
        raise NotImplementedError


def _token_inputs(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, np.ndarray] | None:
    """Token ids, mask and segment ids of a call, (n, L) each; None for a call that needs the blocks."""
    raise NotImplementedError


def _precision(model: nn.Module) -> str:
    """What the states' rounding depends on beside the weights."""
    device = next(model.parameters()).device.type
    return str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else ""
