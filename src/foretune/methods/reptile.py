"""Reptile: move the base towards the weights that a few steps of fine-tuning reach.

Paper: Nichol, Achiam, Schulman, "On First-Order Meta-Learning Algorithms", 2018, arXiv:1803.02999.

    θ ← θ + ε · mean_t (U_t^k(θ) − θ)                        (batched form of their Algorithm 2)

    symbol    here          meaning
    θ         model         weights before the episode
    U_t^k(θ)                weights after k inner steps on task t

θ − mean_t U_t^k(θ) is passed to AdamW as the gradient, as in the code of Block et al.
(arXiv:2410.22264), with the sign that makes it a step towards the adapted weights; their vision
code has the opposite sign.

Silent in the paper:
    - The inner loop on adapters. With `inner="adapter"` the k steps train a fresh adapter on the
      frozen base, and the displacement is the product that it adds to each weight, s·B_t A_t.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from foretune.methods.episodic import EpisodicMethod

PAPER = {
    "title": "On First-Order Meta-Learning Algorithms",
    "authors": "Alex Nichol and Joshua Achiam and John Schulman",
    "year": 2018,
    "arxiv": "1803.02999",
}


@dataclass(frozen=True, kw_only=True)
class Reptile(EpisodicMethod):
    """Move the base towards the weights that a few steps on each task reach.

    Args:
        learning_rate: Learning rate of the base (outer AdamW).
        inner_learning_rate: Learning rate of the inner AdamW.
        inner_steps: Inner updates before the base moves, one batch each.
        inner: "all" trains all weights, one task per episode; "adapter" trains a fresh LoRA
            adapter per task, all tasks at once.
        lora: The adapter of `inner="adapter"`: a `peft.LoraConfig` or a mapping of its fields.
        average: Share of the updates, counted from the end, over which the base's weights are
            averaged; the learning rate then stays at its peak. 0 for off.
    """

    name: ClassVar[str] = "reptile"
    label: ClassVar[str] = "Reptile"
    paper: ClassVar[dict[str, Any] | None] = PAPER
    query: ClassVar[bool] = False
