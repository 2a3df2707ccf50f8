"""Which fusion is best on held-out rows of each task: routing, gate or a static merge.

Measured are the base with each task's head, each task's own fine-tuned model, the static merges,
and SMILE with either gate and each routing. Nothing is trained.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from foretune.errors import UserError
from foretune.fusion.activation_gate import RIDGE, set_gates
from foretune.fusion.advice import name_of
from foretune.fusion.average import Average
from foretune.fusion.finetuned import Source
from foretune.fusion.fused import Fused
from foretune.fusion.merging import merge
from foretune.fusion.sample_rows import Samples
from foretune.fusion.scoring import Batches, HeldOut, Measure, row_scores
from foretune.fusion.smile import SMILE
from foretune.fusion.task_arithmetic import TaskArithmetic
from foretune.fusion.ties import TIES
from foretune.methods import make

Routing = Literal["token", "sequence", "task"]
BASE, SEPARATE = "base", "separate models"


@dataclass(frozen=True)
class Candidate:
    """One row of the table.

    Args:
        name: Name in the table.
        method: The record of the fusion as a mapping; None for what is no fusion.
        scores: Task → one score per held-out row, higher is better.
    """

    name: str
    method: dict[str, Any] | None
    scores: Mapping[str, Sequence[float]]

    @property
    def mean(self) -> float:
        """Mean over the tasks of the mean over a task's rows."""
        return statistics.mean(statistics.mean(rows) for rows in self.scores.values())


@dataclass(frozen=True)
class Comparison:
    """What was measured.

    Args:
        measure: "accuracy"; "agreement" with each task's own model, where rows have no labels that
            the models know; or "log-likelihood", the mean per token in nats.
        candidates: Those that are no fusion, static merges, then SMILE.
        own_heads: Whether each task has its own head, so that every request names its task.
        notes: What could not be measured, and why.
    """

    measure: Measure
    candidates: Sequence[Candidate]
    own_heads: bool
    notes: Sequence[str] = field(default_factory=list)

    @property
    def best(self) -> Candidate:
        """The fusion of the highest mean; among equals the simplest."""
        return self.choose(is_named=self.own_heads)[0]

    @property
    def chosen(self) -> Candidate:
        """The simplest fusion that is within one standard error of the best."""
        return self.choose(is_named=self.own_heads)[1]

    def choose(self, *, is_named: bool) -> tuple[Candidate, Candidate]:
        """(the fusion of the highest mean, the simplest within one standard error of it).

        Args:
            is_named: Whether every request names its task, so that routing=task is possible.
        """
        # Told the task, experts need no gate: simpler than with one, though not than a merge.
        places = {None: 0, "task": 1, "token": 2, "sequence": 2}
        fusions = sorted(
            (
                c
                for c in self.candidates
                if c.method is not None and (is_named or c.method.get("routing") != "task")
            ),
            key=lambda c: places[(c.method or {}).get("routing")],
        )
        best = max(fusions, key=lambda candidate: candidate.mean)
        for candidate in fusions:
            difference, error = gap(best, candidate)
            if difference <= error:
                return best, candidate
        return best, best

    def to_dict(self) -> dict[str, Any]:
        """As JSON types, without the scores of single rows."""
        best, chosen = self.choose(is_named=self.own_heads)
        untold = self.choose(is_named=False)
        return {
            "measure": self.measure,
            "held_out_rows": {task: len(rows) for task, rows in best.scores.items()},
            "own_heads": self.own_heads,
            "candidates": [
                {
                    "name": candidate.name,
                    "method": candidate.method,
                    "mean": candidate.mean,
                    "tasks": {t: statistics.mean(r) for t, r in candidate.scores.items()},
                    "behind_best": list(gap(best, candidate)),
                }
                for candidate in self.candidates
            ],
            "best": best.name,
            "chosen": chosen.name,
            "best_untold": untold[0].name,
            "chosen_untold": untold[1].name,
            "notes": list(self.notes),
        }


def gap(a: Candidate, b: Candidate) -> tuple[float, float]:
    """By how much a's mean exceeds b's, and the standard error of that over the held-out rows.

    The rows are paired: both candidates scored the same ones.
    """
    variance = 0.0
    for task, rows in a.scores.items():
        differences = [x - y for x, y in zip(rows, b.scores[task], strict=True)]
        if len(differences) > 1:
            variance += statistics.variance(differences) / len(differences)
    return a.mean - b.mean, math.sqrt(variance) / len(a.scores)


def compare_fusions(
    base: Source,
    finetuned: Mapping[str, Source],
    samples: Samples,
    method: Any = None,
    *,
    tokenizer: Any = None,
    allow_unverified: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Comparison:
    """Score every fusion of some models on held-out rows of each task.

    Args:
        base: As for `foretune.fuse`.
        finetuned: As for `foretune.fuse`.
        samples: Rows that make gates, and rows that measure.
        method: A fusion's record: it takes the place of its kind's defaults. All of SMILE's gates
            and routings are measured with its ranks.
        tokenizer: Tokenizer of the texts, where the base's folder has none.
        allow_unverified: Whether to take adapters that do not record their base.
        progress: Called with the name of each candidate before it is measured.

    Raises:
        UserError: The models cannot be fused, or rows of this kind cannot be scored by them.
    """
    options = {"allow_unverified": allow_unverified}
    report = progress or (lambda name: None)
    report(BASE)
    untuned = merge(base, finetuned, {"name": BASE}, _nothing, **options)
    untuned.tokenizer = untuned.tokenizer or tokenizer
    held_out = HeldOut(untuned, samples.held_out)
    report(SEPARATE)
    separate, batches = _separate_models(base, finetuned, held_out, options)
    candidates = [
        Candidate(BASE, None, _scores(untuned, batches)),
        Candidate(SEPARATE, None, separate),
    ]
    own_heads = bool(untuned.heads)
    del untuned
    for static in (Average(), TaskArithmetic(), TIES()):
        record = method if type(method) is type(static) else static
        report(record.name)
        fused = record.fuse(base, finetuned, **options)
        candidates.append(Candidate(record.name, record.to_dict(), _scores(fused, batches)))
        del fused
    asked_smile = isinstance(method, SMILE)
    notes = list(samples.notes)
    try:
        for candidate in _smile(
            *(base, finetuned, samples, method if asked_smile else SMILE(), batches),
            {**options, "tokenizer": held_out.tokenizer},
            report,
        ):
            candidates.append(candidate)
    except UserError as error:
        if asked_smile:
            raise
        notes.append(f"smile was not measured: {error}")
    return Comparison(held_out.measure, candidates, own_heads, notes)


def method_of(candidate: Candidate) -> Any:
    """The record of a candidate that is a fusion."""
    return make(**(candidate.method or {}))


def _nothing(changes: list[Tensor]) -> Tensor:
    return torch.zeros_like(changes[0])


def _scores(fused: Fused, batches: Batches) -> dict[str, list[float]]:
    scores = {task: row_scores(fused, task, rows) for task, rows in batches.items()}
    fused.set_experts(None)
    return scores


def _separate_models(
    base: Source, finetuned: Mapping[str, Source], held_out: HeldOut, options: Mapping[str, Any]
) -> tuple[dict[str, list[float]], Batches]:
    """The scores of each task's own model, and the rows that were scored.

    Raises:
        UserError: A model is the base.
    """
    scores: dict[str, list[float]] = {}
    batches: dict[str, Any] = {}
    for task, source in finetuned.items():
        try:
            alone = Average().fuse(base, {task: source}, **options)
        except UserError as error:
            raise UserError(f"{task}: {error}") from error
        batches[task] = held_out.batches(task, alone.model)
        scores[task] = row_scores(alone, task, batches[task])
    return scores, batches


def _smile(
    base: Source,
    finetuned: Mapping[str, Source],
    samples: Samples,
    method: SMILE,
    batches: Batches,
    options: Mapping[str, Any],
    report: Callable[[str], None],
) -> Iterator[Candidate]:
    """SMILE with either gate and each routing; the experts are made once.

    Raises:
        UserError: The models cannot be fused by SMILE.
    """
    plain = dataclasses.replace(method, gate="weights", routing="token")
    fused = plain.fuse(base, finetuned, **options)
    is_two_stacks = bool(getattr(getattr(fused.model, "config", None), "is_encoder_decoder", False))
    by_gate: list[Routing] = ["token"] if is_two_stacks else ["token", "sequence"]

    def measured(gate: Literal["weights", "activations"], routing: Routing) -> Candidate:
        diff = plain.routing_use_diff or gate == "activations"
        record = dataclasses.replace(plain, gate=gate, routing=routing, routing_use_diff=diff)
        name = name_of(record.to_dict())
        report(name)
        fused.routing.granularity = routing
        return Candidate(name, record.to_dict(), _scores(fused, batches))

    yield from (measured("weights", routing) for routing in by_gate)
    by_task = measured("weights", "task")
    if not is_two_stacks:  # whose decoder has no input for a text alone
        fused.routing.granularity = "token"
        set_gates(fused, samples.gate, method.gate_k, RIDGE)
        yield from (measured("activations", routing) for routing in by_gate)
    yield by_task
