"""Early stopping, task by task: a task that no longer gains leaves the batches of its wave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from foretune.training.data import Pick
from foretune.training.learners.joint import Learner


@dataclass
class EarlyStopping:
    """Stops each slot that has not gained for `patience` validations, and keeps its best state.

    A slot without validation rows never stops, and keeps its last state.

    Args:
        learner: Whose slots.
        patience: Validations in a row without a better score.
    """

    learner: Learner
    patience: int
    stopped: dict[int, int] = field(default_factory=dict)  # slot → step at which it stopped
    _best: dict[int, float] = field(default_factory=dict)
    _states: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    _without_gain: dict[int, int] = field(default_factory=dict)

    def still(self, picks: Sequence[Pick]) -> list[Pick]:
        """The rows of the slots that go on."""
        return [pick for pick in picks if pick[0] not in self.stopped]

    def see(self, step: int, scores: Mapping[int, float]) -> None:
        """Takes notice of the validation scores after that step."""
        for slot, score in scores.items():
            if slot in self.stopped:
                continue
            if slot not in self._best or score > self._best[slot]:
                self._best[slot], self._without_gain[slot] = score, 0
                self._states[slot] = self.learner.slot_state(slot)
                continue
            self._without_gain[slot] += 1
            if self._without_gain[slot] >= self.patience:
                self.stopped[slot] = step

    def restore(self) -> None:
        """Puts every slot back into its best state."""
        for slot, state in self._states.items():
            self.learner.load_slot(slot, state)
