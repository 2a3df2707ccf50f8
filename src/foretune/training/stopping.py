"""Early stopping per task: a task that no longer improves leaves the batches of its wave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from foretune.training.data import Pick
from foretune.training.learners.joint import Learner


@dataclass
class EarlyStopping:
    """Stops each slot that has not improved for `patience` validations, and keeps its best state.

    A slot without validation examples never stops, and keeps its last state.

    Args:
        learner: The learner that trains the slots.
        patience: Consecutive validations without a better score after which a slot stops.
        stopped: Step at which each stopped slot has stopped.
    """

    learner: Learner
    patience: int
    stopped: dict[int, int] = field(default_factory=dict)
    _best: dict[int, float] = field(default_factory=dict)
    _states: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    _num_failures: dict[int, int] = field(default_factory=dict)

    def active(self, picks: Sequence[Pick]) -> list[Pick]:
        """The picks of the slots that have not stopped."""
        return [pick for pick in picks if pick[0] not in self.stopped]

    def update(self, step: int, scores: Mapping[int, float]) -> None:
        """Records the validation scores after `step` and stops the slots whose patience is over."""
        for slot, score in scores.items():
            if slot in self.stopped:
                continue
            if slot not in self._best or score > self._best[slot]:
                self._best[slot], self._num_failures[slot] = score, 0
                self._states[slot] = self.learner.slot_state(slot)
                continue
            self._num_failures[slot] += 1
            if self._num_failures[slot] >= self.patience:
                self.stopped[slot] = step

    def restore(self) -> None:
        """Loads the best state of each slot."""
        for slot, state in self._states.items():
            self.learner.load_slot(slot, state)
