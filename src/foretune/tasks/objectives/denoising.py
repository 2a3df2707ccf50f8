"""`Denoising`: predict the noise in a noisy array, the training objective of diffusion models.

Ho, Jain, Abbeel, "Denoising Diffusion Probabilistic Models", NeurIPS 2020, arXiv:2006.11239:
x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) ε and the loss ‖ε − ε_θ(x_t, t)‖² (eq. 14). The schedules are those of
diffusers, under the same names.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from foretune.errors import UserError
from foretune.models.routing import route
from foretune.run import check_int, check_one_of
from foretune.tasks.batch import Batch
from foretune.tasks.objectives.regression import check_arrays, stack
from foretune.tasks.task import Objective, TaskCollection

SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")


@dataclass(frozen=True, kw_only=True)
class Denoising(Objective):
    """Predict the noise that was added to an array `x`, such as an image (channels, h, w).

    The model is called as model(noisy, t) and returns an array of the shape of x, or an output of
    diffusers that holds one. The values of x should lie between −1 and 1. In training the timestep
    t and the noise of an example are drawn from the run's seed, so that two methods under one seed
    see the same ones; an example is scored at `score_draws` timesteps spread over the schedule,
    with noise that depends only on the example. The loss is the mean squared error over the
    elements, the score its negative.

    Args:
        num_steps: Number of timesteps of the noise schedule.
        schedule: Shape of the noise schedule: "linear", "scaled_linear" (linear in the roots) or
            "squaredcos_cap_v2" (cosine).
        score_draws: Number of timesteps at which an example is scored.
    """

    num_steps: int = 1000
    schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    score_draws: int = 4

    kind: ClassVar[str] = "denoising"
    metric: ClassVar[str] = "negative denoising loss"
    head: ClassVar[str] = "none"

    def __post_init__(self) -> None:
        check_int("num_steps", self.num_steps, 1)
        check_int("score_draws", self.score_draws, 1)
        check_one_of("schedule", self.schedule, SCHEDULES)

    @override
    def fit(self, tasks: TaskCollection) -> Self:
        """Checks that all examples have an `x` of the same shape; there is nothing to learn."""
        check_arrays(tasks, ("x",))
        self.scheduler()
        return self

    @override
    def encode(self, example: Mapping[str, Any], task: str) -> dict[str, Any]:
        x = np.asarray(example["x"], dtype=np.float32)
        return {"x": x, "seed": zlib.crc32(x.tobytes())}

    @override
    def sample(self, row: Mapping[str, Any], rng: np.random.Generator) -> Mapping[str, Any]:
        """The example with the timestep and the noise that this step trains on."""
        noise = rng.standard_normal((1, *row["x"].shape), dtype=np.float32)
        return {**row, "t": rng.integers(self.num_steps, size=1), "noise": noise}

    @override
    def collate(self, rows: Sequence[Mapping[str, Any]], slots: Sequence[int]) -> Batch:
        """Stacks x (n, …), noise (n, k, …) and t (n, k); k is 1 in training, else `score_draws`."""
        drawn = [row if "t" in row else self._scoring_draws(row) for row in rows]
        inputs = {
            "x": stack([row["x"] for row in rows]),
            "noise": torch.from_numpy(np.stack([row["noise"] for row in drawn])),
            "t": torch.from_numpy(np.stack([row["t"] for row in drawn])),
        }
        return Batch(inputs, tuple(slots), len(rows), {})

    def _scoring_draws(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The timesteps (k,), stratified over the schedule, and noise (k, …) to score a row at."""
        rng = np.random.default_rng(row["seed"])
        fractions = (np.arange(self.score_draws) + rng.random(self.score_draws)) / self.score_draws
        noise = rng.standard_normal((self.score_draws, *row["x"].shape), dtype=np.float32)
        return {"t": (fractions * self.num_steps).astype(np.int64), "noise": noise}

    @override
    def losses(self, model: Any, batch: Batch) -> Tensor:
        x, noise, t = (batch.inputs[name] for name in ("x", "noise", "t"))
        n, k = t.shape
        clean = x[:, None].expand_as(noise).flatten(0, 1)
        target, timesteps = noise.flatten(0, 1), t.flatten()
        noisy = self.scheduler().add_noise(clean, target, timesteps)
        with route(tuple(slot for slot in batch.slots for _ in range(k))):
            output = model(noisy, timesteps)
        predicted = output if isinstance(output, Tensor) else output.sample
        if predicted.shape != target.shape:
            raise UserError(
                f"the model returns shape {tuple(predicted.shape[1:])} for an array of shape "
                f"{tuple(target.shape[1:])}; it must return the noise, in the shape of x"
            )
        return (predicted.float() - target).square().reshape(n, -1).mean(1)

    @override
    def scores(self, model: Any, batch: Batch) -> Tensor:
        return -self.losses(model, batch)

    def scheduler(self) -> Any:
        """The noise schedule as a `DDPMScheduler` of diffusers.

        Raises:
            UserError: diffusers is not installed.
        """
        return _scheduler(self.num_steps, self.schedule)

    @override
    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "num_steps": self.num_steps,
            "schedule": self.schedule,
            "score_draws": self.score_draws,
        }


@cache
def _scheduler(num_steps: int, schedule: str) -> Any:
    try:
        from diffusers import DDPMScheduler
    except ImportError as error:
        raise UserError(
            "objective denoising needs diffusers: pip install 'foretune[diffusion]'"
        ) from error
    # The betas are those of 1,000 steps; with fewer, each step must add more to end in noise.
    scale = 1000 / num_steps
    return DDPMScheduler(
        num_train_timesteps=num_steps,
        beta_start=min(1e-4 * scale, 0.5),
        beta_end=min(0.02 * scale, 0.999),
        beta_schedule=schedule,
    )
