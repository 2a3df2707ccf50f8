"""`Denoising`: predict the noise in a noisy array, the training objective of diffusion models.

    prediction     noisy array x_t              what the model predicts
    epsilon        √ᾱ_t x_0 + √(1 − ᾱ_t) ε      ε                            (Ho et al., eq. 14)
    v_prediction   √ᾱ_t x_0 + √(1 − ᾱ_t) ε      √ᾱ_t ε − √(1 − ᾱ_t) x_0      (Salimans, Ho, app. D)
    flow           (1 − σ_t) x_0 + σ_t ε        ε − x_0                      (Liu et al., eq. 1)

The loss is the mean squared error. The schedules ᾱ are those of diffusers, under the same names;
σ_t = (t + 1) / num_steps.

Ho, Jain, Abbeel, "Denoising Diffusion Probabilistic Models", NeurIPS 2020, arXiv:2006.11239.
Salimans, Ho, "Progressive Distillation for Fast Sampling of Diffusion Models", ICLR 2022,
arXiv:2202.00512. Liu, Gong, Liu, "Flow Straight and Fast: Learning to Generate and Transfer Data
with Rectified Flow", ICLR 2023, arXiv:2209.03003.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import override

from foretune.errors import UserError
from foretune.models import diffusion
from foretune.models.routing import route
from foretune.run import check_int, check_one_of
from foretune.tasks.batch import Batch
from foretune.tasks.example import SPLITS
from foretune.tasks.objectives.classification import LEARNT
from foretune.tasks.objectives.regression import check_arrays, stack
from foretune.tasks.task import Objective, TaskCollection

SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
PREDICTIONS = ("epsilon", "v_prediction", "flow")
CONDITION = "encoder_hidden_states"


@dataclass(frozen=True, kw_only=True)
class Denoising(Objective):
    """Predict the noise that was added to an array `x`, such as an image (channels, h, w).

    The model is called with the noisy arrays and the timesteps and returns arrays of the shape of
    x, or an output of diffusers that holds them. Columns of the rows that are named like further
    arguments of its `forward` (`encoder_hidden_states`, `class_labels`) are passed to it. With a
    pipeline's folder as the model, `text` is read by the pipeline's text encoder, images become
    latents by its autoencoder, and its schedule takes the place of the fields below. The values of
    x should lie between −1 and 1, where they are no latents. In training the timestep
    t and the noise of an example are drawn from the run's seed, so that two methods under one seed
    see the same ones; an example is scored at `score_draws` timesteps spread over the schedule,
    with noise that depends only on the example. The loss is the mean squared error over the
    elements, the score its negative.

    Args:
        num_steps: Number of timesteps of the noise schedule.
        schedule: Shape of the noise schedule: "linear", "scaled_linear" (linear in the roots) or
            "squaredcos_cap_v2" (cosine).
        score_draws: Number of timesteps at which an example is scored.
        prediction: What the model predicts: "epsilon" (the noise), "v_prediction" or "flow".
        columns: The columns that all examples have, learnt by `fit`.
        partial: Those that only some of them have, learnt by `fit`.
        inputs: Those that the model takes, learnt by `bind`.
        pipeline: Folder of the model's pipeline, learnt by `bind`; None for none.
        channels: Number of channels that the model reads, learnt by `bind`.
    """

    num_steps: int = 1000
    schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    score_draws: int = 4
    prediction: Literal["epsilon", "v_prediction", "flow"] = "epsilon"
    columns: tuple[str, ...] = field(default=(), repr=False, metadata=LEARNT)
    partial: tuple[str, ...] = field(default=(), repr=False, metadata=LEARNT)
    inputs: tuple[str, ...] = field(default=(), repr=False, metadata=LEARNT)
    pipeline: str | None = field(default=None, repr=False, metadata=LEARNT)
    channels: int | None = field(default=None, repr=False, metadata=LEARNT)

    kind: ClassVar[str] = "denoising"
    metric: ClassVar[str] = "negative denoising loss"
    head: ClassVar[str] = "none"

    def __post_init__(self) -> None:
        check_int("num_steps", self.num_steps, 1)
        check_int("score_draws", self.score_draws, 1)
        check_one_of("schedule", self.schedule, SCHEDULES)
        check_one_of("prediction", self.prediction, PREDICTIONS)

    @override
    def fit(self, tasks: TaskCollection) -> Self:
        """Checks that all examples have an `x` of the same shape; learns which columns all have."""
        check_arrays(tasks, ("x",))
        rows = [row for task in tasks for split in SPLITS for row in task.split(split)]
        shared = set.intersection(*(set(row) for row in rows)) if rows else set()
        self.scheduler()
        partial = {name for row in rows for name in row} - shared
        return dataclasses.replace(
            self,
            columns=tuple(sorted(shared - {"x"})),
            partial=tuple(sorted(partial)),
            inputs=(),
            pipeline=None,
            channels=None,
        )

    @override
    def bind(self, model: nn.Module) -> Self:
        """The objective with what the model takes beside the noisy array.

        Raises:
            UserError: The model needs an argument that the rows do not have, or the parts of its
                pipeline cannot be read.
        """
        pipeline = getattr(model, "foretune_pipeline", None)
        columns = set(self.columns) - {"text"}
        changes: dict[str, Any] = {"pipeline": pipeline, "channels": diffusion.channels_of(model)}
        if pipeline is not None:
            around = diffusion.surroundings(pipeline)
            if "text" in self.columns and around.text_encoder is not None:
                columns.add(CONDITION)
            changes |= _settings_of(around.schedule)
        changes["inputs"] = diffusion.check_arguments(model, columns)
        for name in diffusion.check_arguments(model, {*columns, *self.partial}):
            if name not in columns:
                raise UserError(
                    f"only some rows have {name}, which {type(model).__name__} takes: give it to "
                    "all of them or to none"
                )
        return dataclasses.replace(self, **changes)

    @override
    def encode(self, example: Mapping[str, Any], task: str) -> dict[str, Any]:
        x = np.asarray(example["x"], dtype=np.float32)
        inputs = {name: example[name] for name in self.inputs if name in example}
        if self.pipeline is not None:
            around = diffusion.surroundings(self.pipeline)
            if around.autoencoder is not None and len(x) != self.channels:
                x = around.latents_of(x)
            if CONDITION in self.inputs and CONDITION not in example:
                inputs[CONDITION] = around.states_of(str(example["text"]))
        return {"x": x, "seed": zlib.crc32(x.tobytes()), **inputs}

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
        draws = inputs["t"].shape[1]
        inputs |= {name: diffusion.stacked(rows, name, draws) for name in self.inputs}
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
        noisy, target, timesteps = self.noised(clean, noise.flatten(0, 1), t.flatten())
        inputs = {name: batch.inputs[name] for name in self.inputs}
        with route(tuple(slot for slot in batch.slots for _ in range(k))):
            predicted = diffusion.call(model, noisy, timesteps, inputs)
        if predicted.shape != target.shape:
            raise UserError(
                f"the model returns shape {tuple(predicted.shape[1:])} for an array of shape "
                f"{tuple(target.shape[1:])}; it must return the noise, in the shape of x"
            )
        return (predicted.float() - target).square().reshape(n, -1).mean(1)

    @override
    def scores(self, model: Any, batch: Batch) -> Tensor:
        return -self.losses(model, batch)

    def noised(self, clean: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(noisy arrays, what the model is to predict, the timesteps that it is told).

        Args:
            clean: (n, …) arrays.
            noise: (n, …) standard normal.
            t: (n,) timesteps from 0 to num_steps − 1.
        """
        if self.prediction == "flow":
            sigma = ((t + 1) / self.num_steps).to(clean).view(-1, *[1] * (clean.dim() - 1))
            return (1 - sigma) * clean + sigma * noise, noise - clean, t + 1
        scheduler = self.scheduler()
        noisy = scheduler.add_noise(clean, noise, t)
        if self.prediction == "v_prediction":
            return noisy, scheduler.get_velocity(clean, noise, t), t
        return noisy, noise, t

    def scheduler(self) -> Any:
        """The noise schedule as a `DDPMScheduler` of diffusers.

        Raises:
            UserError: diffusers is not installed.
        """
        if self.pipeline is None:
            return _scheduler(self.num_steps, self.schedule, self.prediction)
        return _pipeline_scheduler(self.pipeline)

    @override
    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "num_steps": self.num_steps,
            "schedule": self.schedule,
            "score_draws": self.score_draws,
            "prediction": self.prediction,
        }


def _settings_of(schedule: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that a pipeline's scheduler sets.

    Raises:
        UserError: Its model predicts something else than the three.
    """
    prediction = schedule.get("prediction_type", "epsilon")
    if str(schedule.get("_class_name", "")).startswith("FlowMatch"):
        prediction = "flow"
    if prediction not in PREDICTIONS:
        raise UserError(
            f"the pipeline's scheduler predicts {prediction!r}; {', '.join(PREDICTIONS)} are read"
        )
    return {"num_steps": schedule.get("num_train_timesteps", 1000), "prediction": prediction}


@cache
def _pipeline_scheduler(folder: str) -> Any:
    from diffusers import DDPMScheduler

    return DDPMScheduler.from_config(dict(diffusion.surroundings(folder).schedule))


@cache
def _scheduler(num_steps: int, schedule: str, prediction: str) -> Any:
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
        prediction_type="v_prediction" if prediction == "v_prediction" else "epsilon",
    )
