"""FOMAML: move the base by the gradient at the weights that a few steps of fine-tuning reach.

Paper: Finn, Abbeel, Levine, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks",
ICML 2017, arXiv:1703.03400, in its first-order form (their §5.2; arXiv:1803.02999, §5).

    θ ← θ − ε · mean_t ∇L_t^query(U_t^k(θ))

    symbol    here          meaning
    θ         model         weights before the episode
    U_t^k(θ)                weights after k inner steps on the support batches of task t

The gradient is taken with respect to the adapted weights, on examples that the inner loop did not
see in this episode, and applied to θ by AdamW.

Deviations:
    - The inner loop is AdamW, as for Reptile, not plain gradient descent.
Silent in the paper:
    - The inner loop on adapters. With `inner="adapter"` the k steps train a fresh adapter on the
      frozen base, and the gradient is that of the base's weights with this adapter in place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from foretune.methods.episodic import EpisodicMethod

PAPER = {
    "title": "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks",
    "authors": "Chelsea Finn and Pieter Abbeel and Sergey Levine",
    "year": 2017,
    "venue": "ICML",
    "arxiv": "1703.03400",
}


@dataclass(frozen=True, kw_only=True)
class FOMAML(EpisodicMethod):
    """Move the base by the gradient at the weights that a few steps on each task reach.

    Args:
        learning_rate: Learning rate of the base (outer AdamW).
        inner_learning_rate: Learning rate of the inner AdamW.
        inner_steps: Inner updates, one batch each, before the batch that moves the base.
        inner: "all" trains all weights, one task per episode; "adapter" trains a fresh LoRA
            adapter per task, all tasks at once.
        lora: The adapter of `inner="adapter"`: a `peft.LoraConfig` or a mapping of its fields.
        average: Share of the updates, counted from the end, over which the base's weights are
            averaged; the learning rate then stays at its peak. 0 for off.
    """

    name: ClassVar[str] = "fomaml"
    label: ClassVar[str] = "FOMAML"
    paper: ClassVar[dict[str, Any] | None] = PAPER
    query: ClassVar[bool] = True
