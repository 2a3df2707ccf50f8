"""Batches that mix tasks: whether a model keeps their rows apart, and what to do where it does not.

Before the first batch that mixes tasks is trusted, part of it is run with random adapters: once
for each of two tasks alone and once mixed, with two different numbers of rows. From the shapes each
adapted layer learns where the rows are in its inputs (`RowDims`); the outputs of the mixed batch
must be those of each task alone. A model that fails is called once per task and its outputs are put
together: slower, and right.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from foretune.adapters.head_copies import HeadCopies
from foretune.adapters.layers import LoRALayer, SparseLayer, replaced_by
from foretune.adapters.probe_rows import difference_of, probe_rows, probe_sizes, without_padding
from foretune.errors import UserError
from foretune.models.calls import eval_no_grad, replaced_forward, same_values
from foretune.models.grouped_calls import PackedForward
from foretune.models.layout import RowSlots
from foretune.models.nested import Path, tensors_in, with_tensors
from foretune.models.routing import current_rows, routed, unpacked
from foretune.models.row_dims import UnknownRowsError
from foretune.models.seeding import seed_generators
from foretune.models.unadaptable import read_without_call

ENTRIES = (
    *("get_image_features", "get_text_features"),
    *("get_context_features", "get_response_features"),
)  # what is called besides `forward`
STRENGTHS = (0.5, 0.1, 0.03)  # of the random adapters, as a share of the weights
LEAST_DIFFERENCE = 0.1  # between tasks, relative, that stands out from rounding to half precision
MIXES = "it mixes the rows of a batch"

logger = logging.getLogger("foretune")
_WARNED: set[str] = set()
_INSIDE: contextvars.ContextVar[bool] = contextvars.ContextVar("foretune_inside", default=False)

Part = LoRALayer | SparseLayer | HeadCopies
Call = Callable[..., Any]


class MixedCalls:
    """The calls of one model in batches that mix tasks.

    Args:
        model: The model.
        parts: Name → adapters or head copies of each adapted module.
        modules: Name → module.
    """

    def __init__(
        self, model: nn.Module, parts: Mapping[str, Part], modules: Mapping[str, nn.Module]
    ) -> None:
        self.model, self.parts, self.modules = model, parts, modules
        self._entries: dict[str, _Entry] = {}
        self._settled = False
        self._complete: set[str] = set()  # methods after whose first call all layers were checked

    def settle(self) -> str | None:
        """Further calls are neither checked nor split; returns why any would have to be split."""
        self._settled = True
        reasons = [entry.obstacle for entry in self._entries.values() if entry.obstacle]
        return reasons[0] if reasons else None

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Inside the block, calls of the model are checked, and made task by task if need be."""
        with contextlib.ExitStack() as stack:
            real: Call = self.model.forward
            forward = self._checked("forward", self.model, real)
            # Packing recognises its patch by the type.
            stack.enter_context(
                replaced_forward(
                    self.model,
                    PackedForward(forward) if isinstance(real, PackedForward) else forward,
                )
            )
            for name in ENTRIES:
                if callable(method := getattr(type(self.model), name, None)):
                    bound = method.__get__(self.model)
                    setattr(self.model, name, self._checked(name, bound, bound))
                    stack.callback(delattr, self.model, name)
            yield

    def _checked(self, name: str, again: Call, real: Call) -> Call:
        """The call that replaces `real`.

        Args:
            name: Name of the method.
            again: Calls the same method with its hooks.
            real: The method.
        """

        @functools.wraps(real)  # `generate` asks for the signature
        def call(*args: Any, **kwargs: Any) -> Any:
            rows = current_rows()
            if _INSIDE.get() or rows is None:
                return real(*args, **kwargs)
            token = _INSIDE.set(True)
            try:
                if len(rows.present) > 1:
                    output = self._mixed(name, again, real, args, kwargs, rows)
                else:
                    output = real(*args, **kwargs)
                if name not in self._complete and not self._settled:
                    self._check_all_called(lambda: again(*args, **kwargs))
                    self._complete.add(name)
                return output
            finally:
                _INSIDE.reset(token)

        return call

    def _check_all_called(self, call: Call) -> None:
        """Checks that the model has called each adapted layer whose weight it reads.

        Raises:
            UserError: It has not, so the adapter would have no effect.
        """
        uncalled = {
            name: self.modules[name]
            for name, part in self.parts.items()
            if not isinstance(part, HeadCopies) and not part.rows.called and not part.off
        }
        for name in sorted(read_without_call(self.model, uncalled, call) if uncalled else ()):
            raise UserError(
                f"{name} cannot carry an adapter: {type(self.model).__name__} reads its weight "
                "without calling it; leave it out with exclude_modules"
            )

    def _mixed(
        self, name: str, again: Call, real: Call, args: Any, kwargs: Any, rows: RowSlots
    ) -> Any:
        """The output of a call whose rows are of several tasks.

        Raises:
            UnknownRowsError: A layer does not know which task its rows belong to.
        """
        entry = self._entries.get(name)
        if entry is None and self._settled:
            return real(*args, **kwargs)
        if entry is None:
            entry = self._entries[name] = _Entry(self, again, args, kwargs, rows)
            real = again  # whose hooks have since seen the probe's rows
        if entry.obstacle is None:
            try:
                return real(*args, **kwargs)
            except UnknownRowsError as error:
                if self._settled:
                    raise
                entry.refuse(str(error))
        return entry.one_by_one(args, kwargs, rows)


class _Entry:
    """A method of the model by which it is called, and what was learnt of it at its first call.

    Attributes:
        obstacle: Why tasks cannot share a call; None where they can.
    """

    def __init__(
        self, calls: MixedCalls, call: Call, args: Any, kwargs: Any, rows: RowSlots
    ) -> None:
        # Not the calls themselves: a cycle would keep the bank until Python looks for cycles.
        self.model, self.parts, self.modules = calls.model, calls.parts, calls.modules
        self.call, self.name = call, type(calls.model).__name__
        self.obstacle: str | None = None
        self._input_dims = _input_dims((args, kwargs), len(rows.slots))
        self._output_dims: dict[tuple[Path, int], int] = {}
        if not self._input_dims:
            raise UserError(
                f"the route has {len(rows.slots)} rows, but {self.name} was called without a "
                "tensor of as many rows: pass the rows along the first dimension"
            )
        reason = self._probe(args, kwargs, len(rows.slots))
        if reason is not None:
            self._check_rows_can_be_split(args, kwargs, len(rows.slots))
            self.refuse(reason)

    def refuse(self, reason: str) -> None:
        """From now on, each task is computed on its own; says so once per process."""
        self.obstacle = reason
        text = f"{self.name} is called for each task of a batch on its own: {reason}"
        if text not in _WARNED:
            _WARNED.add(text)
            logger.warning(text)

    def _probe(self, args: Any, kwargs: Any, num_rows: int) -> str | None:
        """Why tasks cannot share a call of this method; None if they can.

        Raises:
            UserError: The model cannot be called with part of the rows.
        """
        heads = [p for p in self.parts.values() if isinstance(p, HeadCopies) and p.inner]
        if heads:
            with contextlib.suppress(UserError):
                if self._try_mixed(args, kwargs, num_rows) is None:
                    return None
            for head in heads:  # the reason may lie in a head that is run once for all tasks
                head.inner = {}
        return self._try_mixed(args, kwargs, num_rows)

    def _try_mixed(self, args: Any, kwargs: Any, num_rows: int) -> str | None:
        """Why tasks cannot share a call; None if they can.

        In half precision a deep model amplifies rounding, by strong adapters more than by weak
        ones. There, a row must not change with the rows beside it in a batch of the same size, and
        must be much nearer to its own task's output than to the other task's.
        """
        halves = (torch.bfloat16, torch.float16)
        rounds = any(p.dtype in halves for p in self.model.parameters())
        reason: str | None = None
        for strength in STRENGTHS if rounds else STRENGTHS[:1]:
            reason = self._try_strength(strength, args, kwargs, num_rows, rounds)
            if reason != MIXES:
                break
        return reason

    def _try_strength(
        self, strength: float, args: Any, kwargs: Any, num_rows: int, rounds: bool
    ) -> str | None:
        few, many = probe_sizes(num_rows)
        with self._random_adapters(strength) as stand_ins:
            outputs, shapes = [], []
            row_dims = [dims for part in stand_ins.values() for dims in part.row_dims]
            with unpacked():
                for size, slot in ((few, 0), (many, 0), (many, 1)):
                    outputs.append(self._rows_of(args, kwargs, range(size), [slot] * size))
                    shapes.append([dims.take_calls() for dims in row_dims])
            self._learn_output_dims(outputs[0], outputs[1], few, many)
            for dims, *calls in zip(row_dims, *shapes[:2], strict=True):
                reason = dims.learn(*calls)
                if reason is not None:
                    return reason
            difference = difference_of(*outputs[1:]) if rounds else 0.0
            if rounds and strength < STRENGTHS[0] and difference < LEAST_DIFFERENCE:
                return MIXES  # or not: too weak to tell
            if rounds:  # in a batch of the same size, where rounding is the same
                alike = self._rows_of(args, kwargs, [0] * many, [0] * many)
                if not self._agrees(alike, outputs[1:], [0] * many, [0] * many, None):
                    return MIXES
            tolerance = max(0.03, 0.15 * difference) if rounds else None
            for probe in range(4):
                order, owners = probe_rows(many, probe)
                try:
                    with unpacked() if probe else contextlib.nullcontext():
                        mixed = self._rows_of(args, kwargs, order, owners)
                except UnknownRowsError as error:
                    return str(error)
                if not self._agrees(mixed, outputs[1:], order, owners, tolerance):
                    return MIXES
        for name, part in self.parts.items():
            for dims, probed in zip(part.row_dims, stand_ins[name].row_dims, strict=True):
                dims.learnt |= probed.learnt
        return None

    @contextlib.contextmanager
    def _random_adapters(self, strength: float) -> Iterator[dict[str, Part]]:
        """Inside the block, random adapters of two slots stand in for those of the bank."""
        generator = torch.Generator().manual_seed(0)
        stand_ins = {
            name: part.stand_in(self.modules[name], generator, strength)
            for name, part in self.parts.items()
        }
        with replaced_by({part: stand_ins[name] for name, part in self.parts.items()}):
            yield stand_ins

    def _rows_of(
        self, args: Any, kwargs: Any, index: Iterable[int], slots: Sequence[int] | None
    ) -> dict[Path, Tensor]:
        """The tensors that the model returns for these rows of a call, modulo their number.

        Raises:
            UserError: The model cannot be called with them.
            OutOfMemoryError: The device has too little memory.
        """
        (path, _), dim = next(iter(self._input_dims.items()))
        num_rows = tensors_in((args, kwargs))[path].shape[dim]
        call = self._select((args, kwargs), [i % num_rows for i in index])
        try:
            return self._outputs(call, slots)
        except torch.OutOfMemoryError:
            raise
        except (ValueError, IndexError, TypeError, RuntimeError) as error:
            raise self._inseparable(f"it fails ({error})") from error

    def _outputs(self, call: Any, slots: Sequence[int] | None) -> dict[Path, Tensor]:
        args, kwargs = call
        rows = None if slots is None else RowSlots(tuple(slots))
        device = next(self.model.parameters()).device
        devices = [device] if device.type == "cuda" else []
        with (
            eval_no_grad(self.model),
            torch.random.fork_rng(devices=devices),
            torch.autocast(device.type, enabled=False),
            routed(rows, None),
        ):
            seed_generators(0)
            outputs = tensors_in(self.call(*args, **kwargs))
        return {path: without_padding(x, kwargs) for path, x in outputs.items()}

    def _select(self, call: Any, index: Sequence[int]) -> Any:
        """The same arguments for these rows only."""

        def rows_of(path: Path, x: Tensor) -> Tensor:
            dim = self._input_dims.get((path, x.dim()))
            return x if dim is None else x.index_select(dim, torch.tensor(index, device=x.device))

        return with_tensors(call, rows_of)

    def _learn_output_dims(
        self, few: Mapping[Path, Tensor], many: Mapping[Path, Tensor], num_few: int, num_many: int
    ) -> None:
        """Learns along which dimension the rows lie in each of the model's outputs."""
        for path, x in few.items():
            y = many.get(path)
            if y is None or x.dim() != y.dim():
                continue
            differing = [d for d in range(x.dim()) if x.shape[d] != y.shape[d]]
            if len(differing) == 1:
                (d,) = differing
                if x.shape[d] * num_many == y.shape[d] * num_few and x.shape[d] % num_few == 0:
                    self._output_dims[path, x.dim()] = d

    def _agrees(
        self,
        mixed: Mapping[Path, Tensor],
        alone: Sequence[Mapping[Path, Tensor]],
        order: Sequence[int],
        owners: Sequence[int],
        tolerance: float | None,
    ) -> bool:
        """Whether a mixed batch gives each row what it gets where all rows are of its slot.

        Args:
            mixed: The outputs of the mixed batch.
            alone: The outputs for each of two slots.
            order: The rows of the mixed batch, as indices of those of `alone`.
            owners: The slot of each row of the mixed batch.
            tolerance: As for `same_values`.
        """
        compared = False
        for path, x in mixed.items():
            dim = self._output_dims.get((path, x.dim()))
            if dim is None or not x.is_floating_point():
                continue
            for slot in sorted(set(owners)):
                places = [i for i, owner in enumerate(owners) if owner == slot]
                part = _rows(x, dim, len(owners), places)
                reference = _rows(alone[slot][path], dim, len(owners), [order[i] for i in places])
                if not same_values(part, reference, tolerance):
                    return False
            compared = True
        return compared

    def _check_rows_can_be_split(self, args: Any, kwargs: Any, num_rows: int) -> None:
        """Checks that the base gives about the same for part of the rows as for all of them.

        A model that mixes rows gives other values; one whose arguments are cut along another
        dimension than their rows gives nothing alike.

        Raises:
            UserError: It does not, so a batch cannot be split by task.
        """
        complete = self._outputs((args, kwargs), None)
        size = probe_sizes(num_rows)[0]
        index = [i % num_rows for i in range(size)]
        compared = False
        for path, x in self._rows_of(args, kwargs, index, None).items():
            dim = self._output_dims.get((path, x.dim()))
            y = complete.get(path)
            if dim is None or y is None or y.dim() != x.dim() or not x.is_floating_point():
                continue
            if y.shape[dim] % num_rows or not same_values(x, _rows(y, dim, num_rows, index), 0.3):
                raise self._inseparable("it gives other outputs")
            compared = True
        if not compared:
            raise self._inseparable("none of its outputs has rows")

    def _inseparable(self, what: str) -> UserError:
        return UserError(
            f"{self.name} cannot compute a part of the rows of a batch: {what}, so tasks cannot be "
            "told apart in its batches: adapt one task at a time (tasks_per_wave=1)"
        )

    def one_by_one(self, args: Any, kwargs: Any, rows: RowSlots) -> Any:
        """The output of a call, computed for each task on its own and put together.

        Raises:
            UserError: The rows of an argument or an output cannot be told apart.
        """
        call = (args, kwargs)
        for path, x in tensors_in(call).items():
            dim = self._input_dims.get((path, x.dim()))
            if dim is not None and x.shape[dim] != len(rows.slots):
                raise UserError(
                    f"{self.name} was called with a tensor of {x.shape[dim]} rows where the route "
                    f"has {len(rows.slots)}"
                )
        if any(isinstance(value, Cache) for value in (*args, *kwargs.values())):
            raise UserError(f"{self.name} cannot use a KV cache in a batch that mixes tasks")
        outputs = []
        for slot, index in rows.places.items():
            part_args, part_kwargs = self._select(call, index.tolist())
            with routed(RowSlots((slot,) * len(index)), None):
                outputs.append(self.call(*part_args, **part_kwargs))
        return self._joined(outputs, [len(index) for index in rows.places.values()], rows)

    def _joined(self, outputs: Sequence[Any], counts: Sequence[int], rows: RowSlots) -> Any:
        """The outputs of all tasks as one, in the order of the batch; None for one without rows."""
        tensors = [tensors_in(output) for output in outputs]
        back = torch.argsort(torch.cat(list(rows.places.values())))

        def joined(path: Path, x: Tensor) -> Tensor | None:
            dim = self._output_dims.get((path, x.dim()))
            if dim is None:
                return None
            parts = [t[path].unflatten(dim, (n, -1)) for t, n in zip(tensors, counts, strict=True)]
            return torch.cat(parts, dim).index_select(dim, back.to(x.device)).flatten(dim, dim + 1)

        return with_tensors(outputs[0], joined)


def _input_dims(call: Any, num_rows: int) -> dict[tuple[Path, int], int]:
    """(path, number of dimensions) → the dimension of the rows, of each argument that has rows."""
    dims = {}
    for path, x in tensors_in(call).items():
        matching = [d for d in range(x.dim()) if x.shape[d] == num_rows]
        if matching:
            dims[path, x.dim()] = matching[0]
    return dims


def _rows(x: Tensor, dim: int, num_rows: int, index: Sequence[int]) -> Tensor:
    """These rows of x, whose `num_rows` rows lie along `dim`."""
    return x.unflatten(dim, (num_rows, -1)).index_select(dim, torch.tensor(index, device=x.device))
