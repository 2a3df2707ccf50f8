"""`Basis`: the adapters of the seen tasks as a Gaussian around their mean, in few directions.

    d_t = μ + Σ_k z_tk P_k + what lies outside the span,        z_t ~ N(0, I)

    symbol   here         shape      meaning
    d_t                   (…)        what task t changes: the parameters of its heads and, of each
                                     adapted layer, the core C_t
    C_t                   (q, p)     Uᵀ ΔW_t Vᵀ of the layer's change ΔW_t = s·B_t A_t
    U        left         (out, q)   the leading left singular vectors of all ΔW_t side by side
    V        right        (p, in)    the leading right singular vectors of all ΔW_t one below the
                                     other (U, C, V: a truncated HOSVD)
    μ        mean         (…)        mean of the seen tasks
    P_k      directions   (k, …)     principal directions, times the standard deviations along them

All is computed from the factors of the changes and from inner products of tasks. Heads and changes
of weights are scaled to the same total variance before the directions are chosen, and scaled back:
their units do not decide which directions are left out.

With A = V and B = U C the adapter of a task is a LoRA adapter of rank p, and linear in z.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from foretune.adapters.task_adapters import TaskAdapters
from foretune.errors import UserError
from foretune.linalg.principal import leading_rows, principal_directions

NUM_FOLDS = 5  # parts of the seen tasks, each of which is compared with the span of the others


@dataclass(frozen=True, eq=False)
class Basis:
    """A Gaussian description of adapters. A part is a layer, or a parameter of a head.

    Args:
        mean: μ of each part by its full name: (q, p) of a layer, the shape of a head's parameter.
        directions: P of each part, (k, …).
        left: U of each layer, (out, q), orthonormal columns.
        right: V of each layer, (p, in), orthonormal rows; kernels of convolutions are flattened.
        spread: Root mean square over tasks of what lies outside the span of the other tasks: of
            the norm of a layer's change, of each number of a head's parameter. A parameter of a
            head without `mean` means something else in each task; its spread is the root mean
            square of its numbers.
        scale: Factor of each part of `mean` by which layers and heads have the same variance.
        heads: Names of the head modules.
        labels: Labels that the outputs of the heads stand for; empty where they have none.
        seen: (tasks, k) z of the seen tasks.
        explained: Share of the seen tasks' variance along each direction.
        in_span: Share of the variance of seen tasks that lies in the span of the others.
    """

    mean: Mapping[str, Tensor]
    directions: Mapping[str, Tensor]
    left: Mapping[str, Tensor]
    right: Mapping[str, Tensor]
    spread: Mapping[str, float]
    scale: Mapping[str, float]
    heads: Sequence[str]
    labels: Sequence[str]
    seen: Tensor
    explained: Sequence[float]
    in_span: float

    @property
    def kind(self) -> str:
        """What it describes: "lora", "head" or "both"."""
        describes_heads = any(part not in self.left for part in self.mean)
        return "both" if self.left and describes_heads else "lora" if self.left else "head"

    @property
    def rank(self) -> int:
        """Number of directions."""
        return int(self.seen.shape[1])

    @classmethod
    def of(
        cls,
        adapters: TaskAdapters,
        *,
        max_rank: int = 16,
        max_lora_rank: int = 16,
        labels: Sequence[str] | None = (),
    ) -> Basis | None:
        """The basis of the adapters of several tasks.

        Args:
            adapters: Adapters of one base and one configuration.
            max_rank: Number of directions at most; there is at least one more task.
            max_lora_rank: Largest p and q.
            labels: Labels that the outputs of the heads stand for in all tasks; empty where they
                have none. None where they stand for other labels in other tasks: then heads have
                neither mean nor directions.

        Returns:
            The basis; None where there are fewer than two adapters, or all are the same.
        """
        if adapters.num_tasks < 2:
            return None
        left, right = _frames(adapters, max_lora_rank)
        parts = dict(_layer_parts(adapters, left, right))
        spread = {}
        for name, values in _head_parameters(adapters):
            if labels is None:
                spread[name] = float(values.square().mean()) ** 0.5
            else:
                parts[name] = _Part(values, torch.zeros(len(values), dtype=values.dtype))
        sample = _Sample.of(parts, left)
        if sample is None:
            return None
        mean, unit, deviations = principal_directions(sample.rows, max_rank)
        outside, total = sample.outside_the_others(max_rank)
        for name, energy in outside.items():
            numel = 1 if name in left else parts[name].values[0].numel()
            spread[name] = (energy / numel) ** 0.5 / sample.scale[name]
        return cls(
            mean={name: value[0] for name, value in sample.split(mean[None]).items()},
            directions=sample.split(unit * deviations[:, None]),
            left=left,
            right=right,
            spread=spread,
            scale=sample.scale,
            heads=tuple(adapters.heads),
            labels=tuple(labels or ()),
            seen=((sample.rows - mean) @ (unit / deviations[:, None]).T).float(),
            explained=(deviations.square() / sample.variance).tolist(),
            in_span=1 - sum(outside.values()) / total,
        )

    def share_in_span(self, adapters: TaskAdapters) -> Tensor:
        """(tasks,) share of each adapter's squared distance from the mean that lies in the span.

        Args:
            adapters: Adapters of other tasks, of the same layers and heads.
        """
        parts = dict(_layer_parts(adapters, self.left, self.right))
        values = {name: part.values for name, part in parts.items()}
        values |= dict(_head_parameters(adapters))
        scaled = {n: self.scale[n] * (values[n] - mean) for n, mean in self.mean.items()}
        rows = torch.cat([value.flatten(1) for value in scaled.values()], 1)
        directions = [self.scale[n] * self.directions[n].double().flatten(1) for n in self.mean]
        unit = nn.functional.normalize(torch.cat(directions, 1))
        squares = rows.square().sum(1)
        for name, part in parts.items():
            squares += self.scale[name] ** 2 * part.lost
        return ((rows @ unit.T).square().sum(1) / squares.clamp_min(1e-30)).float()

    def summary(self) -> dict[str, Any]:
        """Its kind, and the shares of variance that it explains, as JSON types."""
        explained = [float(share) for share in self.explained]
        return {"kind": self.kind, "explained": explained, "in_span": float(self.in_span)}

    def check_fits(self, model: nn.Module) -> None:
        """Checks that the model has these layers and heads, in these shapes.

        Raises:
            UserError: It does not; the message names the first that differs.
        """
        modules = dict(model.named_modules())
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        for name, module in modules.items():
            if isinstance(module, nn.Linear):  # a quantised weight has another shape
                shapes[f"{name}.weight"] = (module.out_features, module.in_features)
        for name, mean in self.mean.items():
            if name in self.left:
                shape = sorted((len(self.left[name]), self.right[name].shape[1]))
                rows, *others = shapes.get(f"{name}.weight", (0,))
                fits = sorted((rows, math.prod(others))) == shape
            else:
                fits = shapes.get(name) == tuple(mean.shape)
            if not fits:
                raise UserError(f"{type(model).__name__} has no {name} of that shape")

    def __deepcopy__(self, memo: dict[int, Any]) -> Basis:
        """Copies of a model share its basis, which never changes."""
        return self


@dataclass(frozen=True, eq=False)
class _Part:
    """What the tasks change of one part.

    Args:
        values: (tasks, …), the coordinates.
        lost: (tasks,), the squared norm of what the coordinates leave out.
    """

    values: Tensor
    lost: Tensor


@dataclass(frozen=True, eq=False)
class _Sample:
    """The scaled coordinates of all parts, one task per row.

    Args:
        parts: The parts.
        scale: Factor of each.
        rows: (tasks, coordinates).
        variance: Total variance, with what the coordinates leave out.
    """

    parts: Mapping[str, _Part]
    scale: Mapping[str, float]
    rows: Tensor
    variance: float

    @classmethod
    def of(cls, parts: Mapping[str, _Part], layers: Mapping[str, Tensor]) -> _Sample | None:
        """The sample of these parts; None if nothing in it varies."""
        variances = {name: _variance(part) for name, part in parts.items()}
        if not any(variances.values()):
            return None
        total = {
            is_layer: sum(v for name, v in variances.items() if (name in layers) == is_layer)
            for is_layer in (True, False)
        }
        scale = {name: (total[name in layers] or 1.0) ** -0.5 for name in parts}
        rows = torch.cat([scale[n] * part.values.flatten(1) for n, part in parts.items()], 1)
        variance = sum(scale[name] ** 2 * v for name, v in variances.items())
        return cls(parts, scale, rows, variance)

    def split(self, rows: Tensor) -> dict[str, Tensor]:
        """(n, coordinates) as values (n, …) of each part, without the scale."""
        sizes = [part.values[0].numel() for part in self.parts.values()]
        return {
            name: (block / self.scale[name]).view(-1, *self.parts[name].values.shape[1:]).float()
            for name, block in zip(self.parts, rows.split(sizes, 1), strict=True)
        }

    def outside_the_others(self, max_rank: int) -> tuple[dict[str, float], float]:
        """How far tasks are from the span of the others, each fold left out in turn.

        Returns:
            The mean squared distance of each part from the span, and the mean squared distance
            from the mean over all parts, both scaled.
        """
        num_tasks = len(self.rows)
        fold = torch.arange(num_tasks) % min(NUM_FOLDS, num_tasks)
        rest, centred = torch.empty_like(self.rows), torch.empty_like(self.rows)
        for i in range(int(fold.max()) + 1):
            mean, unit, _ = principal_directions(self.rows[fold != i], max_rank)
            centred[fold == i] = self.rows[fold == i] - mean
            rest[fold == i] = centred[fold == i] - centred[fold == i] @ unit.T @ unit
        lost = {
            name: self.scale[name] ** 2 * float(part.lost.mean())
            for name, part in self.parts.items()
        }
        sizes = [part.values[0].numel() for part in self.parts.values()]
        outside = {
            name: lost[name] + float(block.square().sum()) / num_tasks
            for name, block in zip(self.parts, rest.split(sizes, 1), strict=True)
        }
        return outside, sum(lost.values()) + float(centred.square().sum()) / num_tasks


def _variance(part: _Part) -> float:
    centred = part.values - part.values.mean(0)
    return float(centred.square().sum() + part.lost.sum()) / (len(part.values) - 1)


def _frames(
    adapters: TaskAdapters, max_lora_rank: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """U and V of each layer that any of the adapters changes."""
    left, right = {}, {}
    for layer in adapters.layers:
        a, b = (factor.double() for factor in adapters.factors(layer))
        v = leading_rows((_root(b.mT @ b) @ a).flatten(0, 1), max_lora_rank)
        u = leading_rows((_root(a @ a.mT) @ b.mT).flatten(0, 1), max_lora_rank).T
        if v.numel():
            left[layer], right[layer] = u.float().contiguous(), v.float()
    return left, right


def _layer_parts(
    adapters: TaskAdapters, left: Mapping[str, Tensor], right: Mapping[str, Tensor]
) -> Iterator[tuple[str, _Part]]:
    """(layer, its part) of each layer with U and V."""
    for layer, u in left.items():
        a, b = (factor.double() for factor in adapters.factors(layer))
        cores = (u.double().T @ b) @ (a @ right[layer].double().T)
        squares = ((b.mT @ b) * (a @ a.mT)).sum((1, 2))  # ‖B A‖² = ⟨BᵀB, A Aᵀ⟩
        yield layer, _Part(cores, (squares - cores.square().sum((1, 2))).clamp_min(0))


def _head_parameters(adapters: TaskAdapters) -> Iterator[tuple[str, Tensor]]:
    """(full name, (tasks, …) float64) of each parameter of the heads."""
    for head in adapters.heads:
        for name, copies in adapters.copies(head).items():
            yield f"{head}.{name}", copies.double()


def _root(gram: Tensor) -> Tensor:
    """(tasks, r, r) R with RᵀR = gram, from the eigenvectors: the Gram matrix may be singular."""
    squares, vectors = torch.linalg.eigh(gram)
    return squares.clamp_min(0).sqrt()[..., None] * vectors.mT
