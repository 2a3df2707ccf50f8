"""`EpisodicLearner`: an inner loop adapts for a few steps, an outer update moves the base."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from foretune.adapters.bank import AdapterBank
from foretune.models.seeding import seed_generators
from foretune.run import Run
from foretune.tasks.task import Objective
from foretune.training.data import PerTaskSampler, Step, TaskData
from foretune.training.learners.joint import Learner
from foretune.training.optim import SlotAdamW
from foretune.training.process_group import pad_with_fillers
from foretune.training.scoring import score_slots
from foretune.training.sharding import place_like


class EpisodicLearner(Learner):
    """Each update adapts to the tasks of an episode and derives the base's gradient from that.

    With `inner_all=False` fresh adapters of the bank are trained on the frozen base, for all tasks
    of the episode at once. With `inner_all=True` the base's weights are trained (and the bank's
    heads, if there are any), and an episode has one task.

    Args:
        model: The base.
        objective: Losses and scores.
        bank: Adapters and heads of the inner steps; None when there are none.
        learning_rate: Learning rate of the base (outer AdamW).
        inner_learning_rate: Learning rate of the inner AdamW, which is reset in each episode.
        inner_steps: Updates of the inner loop, one batch each.
        inner_all: Whether the inner loop trains all weights of the base.
        query: True takes the gradient at the adapted weights on one more batch (FOMAML), False the
            difference between initial and adapted weights (Reptile).
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        *,
        bank: AdapterBank | None,
        learning_rate: float,
        inner_learning_rate: float,
        inner_steps: int,
        inner_all: bool,
        query: bool,
    ) -> None:
        super().__init__(model, objective, bank=bank, learning_rate=learning_rate)
        self.inner_learning_rate, self.inner_steps = inner_learning_rate, inner_steps
        self.inner_all, self.query = inner_all, query
        self.batches_per_update = inner_steps + query

    @override
    def start(self, run: Run) -> None:
        super().start(run)
        self.bank_optimizer = None  # the bank is reset in each episode

    @override
    def gradients(self, steps: Sequence[Step], seed: int = 0) -> dict[int, float]:
        before = [p.detach().clone() for p in self.base] if self.inner_all else []
        # The last episode of a task may be shorter than the others.
        inner = steps[: len(steps) - self.query]
        by_slot = self._adapt(inner, sorted(set(steps[0].slots)), seed)
        if self.query:
            by_slot = self.backward(steps[-1])
            if self.bank is not None:
                self.bank.zero_grad()
        elif self.inner_all and self._takes_part(by_slot):
            for p, start in zip(self.base, before, strict=True):
                p.grad = start - p.detach()
        elif self._takes_part(by_slot):
            self._reptile_gradient(sorted(by_slot), steps[0].num_slots)
        _restore(self.base, before)
        return by_slot

    def _takes_part(self, present: Collection[int]) -> bool:
        """Whether this process has a task of the episode, or a shard of the base it moves."""
        return bool(present) or self.sharded

    def _adapt(self, steps: Sequence[Step], present: Sequence[int], seed: int) -> dict[int, float]:
        """Runs the inner loop for the slots in `present`; leaves the adapted values in place."""
        inner: list[torch.optim.AdamW] = []
        slots: SlotAdamW | None = None
        if self.bank is not None:
            self.bank.reset(present, seed)
            slots = SlotAdamW(self.bank.parameters(), self.inner_learning_rate, weight_decay=0.0)
        if self.inner_all:
            inner = [
                torch.optim.AdamW(self.base, self.inner_learning_rate, weight_decay=0.0, fused=True)
            ]
        by_slot: dict[int, float] = {}
        # A shard cannot be frozen for a while: its gradient is computed, and dropped.
        with _frozen([] if self.inner_all or self.sharded else self.base):
            for step in steps if self._takes_part(present) else ():
                by_slot = self.backward(step)
                for optimizer in inner:
                    optimizer.step()
                    optimizer.zero_grad()
                if slots is not None and present:
                    slots.step_slots(present, grad_scale=step.num_slots)
        if self.sharded and not self.inner_all:
            for p in self.base:
                p.grad = None
        return by_slot

    @torch.no_grad()
    def _reptile_gradient(self, present: Sequence[int], num_slots: int) -> None:
        """Reptile's outer gradient after an inner loop on adapters: W − mean_t (W + s·B_t A_t).

        Only the part of the slots in `present`, unless the base is sharded; the mean is over
        `num_slots`.
        """
        assert self.bank is not None
        modules = dict(self.model.named_modules())
        for name in self.bank.layer_names:
            weight: Any = modules[name].weight
            if weight.requires_grad:
                share = len(present) / num_slots
                # The mean over no slot would not be zero, but not a number.
                gradient = -share * self.bank.mean_delta(name, present or [0])
                weight.grad = place_like(weight, self.sharded_over.sum(gradient))

    @override
    def score(self, data: TaskData, split: str, max_rows: int | None) -> dict[int, float]:
        """Scores each task after the inner loop on its own training examples."""
        scores: dict[int, float] = {}
        before = [p.detach().clone() for p in self.base] if self.inner_all else []
        # Four examples per task and inner step, always the same.
        sizes = [len(slot.train) for slot in data.slots]
        sampler = PerTaskSampler(sizes, 4, None, 0, data.keys)
        for group in self._scored_together(data):
            steps = []
            for i in range(self.inner_steps):
                picks = [pick for pick in sampler.picks(i) if pick[0] in group]
                step = data.step(picks, "train", train=True, seed=[0, i], budget=self.token_budget)
                steps.append(pad_with_fillers(step, data, self.sharded_over))
            with torch.enable_grad(), torch.random.fork_rng():
                seed_generators(0)
                self._adapt(steps, sorted(set(steps[0].slots)), seed=0)
            scores |= score_slots(
                self.model,
                data,
                split,
                max_rows,
                budget=self.token_budget,
                only=group,
                in_step_with=self.sharded_over,
            )
            _restore(self.base, before)
        return scores

    def _scored_together(self, data: TaskData) -> list[list[int]]:
        """The slots of each inner loop: all, or one after the other where it moves the base.

        On a sharded base all processes go through the tasks of all; a task of another process is
        an empty list.
        """
        if not self.inner_all:
            return [list(range(len(data)))]
        if self.partition is None or not self.sharded:
            return [[slot] for slot in range(len(data))]
        place = {slot: i for i, slot in enumerate(self.partition.slots)}
        return [[place[slot]] if slot in place else [] for slot in range(len(self.partition.data))]


@contextmanager
def _frozen(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Inside the block these parameters have no gradient."""
    try:
        for p in parameters:
            p.requires_grad_(False)
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)


@torch.no_grad()
def _restore(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    for p, value in zip(parameters, values, strict=bool(values)):
        p.copy_(value)
