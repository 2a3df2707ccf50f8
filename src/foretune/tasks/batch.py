"""`Batch`: what an objective collates and a model consumes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Batch:
    """Examples of one or many tasks, stacked.

    Args:
        inputs: Tensors by name, as the objective's losses and scores read them.
        slots: The slot of each example's task, in the order of the examples.
        num_tokens: Tokens (one per example for arrays) that the model reads, padding not counted.
        extra: Values on the host that the objective needs later (index maps, lengths).
    """

    inputs: dict[str, torch.Tensor]
    slots: tuple[int, ...]
    num_tokens: int
    extra: dict[str, Any]

    def __len__(self) -> int:
        return len(self.slots)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device`."""
        moved = {k: v.to(device, non_blocking=True) for k, v in self.inputs.items()}
        return replace(self, inputs=moved)
