"""`Run`: how to train, as opposed to what (the tasks) and by which rule (the method)."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any, Literal

from foretune.errors import UserError

DEVICE = r"(cpu|cuda|mps|xpu|npu|hpu)(:\d+)?"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """Seed, budget, precision and folder of one training run.

    Every method that is given the same `Run` sees `steps` batches of
    `tasks_per_step * batch_size` examples, whatever it does with them, so two methods under one
    `Run` have equal budgets by construction.

    Args:
        seed: Seeds the order of the examples, fresh adapters and heads, and dropout.
        steps: Batches drawn in all. A method that needs several for one update of the model
            (Reptile, FOMAML) makes fewer updates.
        tasks_per_step: Tasks in one batch; None for all of them (the joint step), 1 for round
            robin. A task that is absent from a step does not move.
        batch_size: Examples of each task in one batch.
        warmup: Share of the updates over which the learning rate rises linearly from zero.
        schedule: "linear" (falls to zero at the end), "cosine" (likewise) or "constant".
        weight_decay: Decoupled weight decay of AdamW.
        max_grad_norm: Clips the norm of the gradient of all that the update moves; None for off.
        eval_every: Batches between two validations; the best validated state is what a run
            returns. None: ten times a run. 0: never, the last state is returned.
        eval_rows: Validation rows of each task that are scored each time, evenly spread over them;
            None for all.
        precision: "fp32" or "bf16" (autocast).
        optimizer: Of the base: "adamw", or "adamw-8bit", whose state takes a quarter of the memory
            (bitsandbytes). Adapters have the former in any case.
        token_budget: Tokens in one forward and backward pass. A batch with more is split and the
            gradients of its parts are added up: less memory, the same result. None: as many as
            keep the widest activation under 32 MB on a CPU, all of them on other devices.
        device: "cpu", "cuda", "cuda:1", "mps" …; None takes what accelerate finds.
        gradient_checkpointing: Keep of each transformer block its input alone and compute the rest
            again in the backward pass: less memory, a third more time, the same result.
        tasks_per_wave: Unseen tasks that are adapted at the same time; None for as many as have
            room, with gradients and optimiser state, in half of the memory that is free.
        patience: An unseen task stops adapting when so many validations in a row brought no better
            score on its own validation rows, and keeps its best state; a task without such rows
            goes on. None: no task stops early.
        out: Folder for checkpoints and results; None keeps everything in memory.
        resume: Continue from the newest checkpoint in `out` if there is one.
        overwrite: Empty `out` first if something is in it.

    Raises:
        UserError: A value is out of range; the message names it.
    """

    seed: int = 0
    steps: int = 200
    tasks_per_step: int | None = None
    batch_size: int = 4
    warmup: float = 0.1
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    weight_decay: float = 0.01
    max_grad_norm: float | None = 1.0
    eval_every: int | None = None
    eval_rows: int | None = 32
    precision: Literal["fp32", "bf16"] = "fp32"
    optimizer: Literal["adamw", "adamw-8bit"] = "adamw"
    token_budget: int | None = None
    device: str | None = None
    gradient_checkpointing: bool = False
    tasks_per_wave: int | None = None
    patience: int | None = None
    out: Path | None = None
    resume: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.out is not None:
            object.__setattr__(self, "out", Path(self.out))
        check_int("seed", self.seed, 0)
        check_int("steps", self.steps, 1)
        check_int("tasks_per_step", self.tasks_per_step, 1, optional=True)
        check_int("batch_size", self.batch_size, 1)
        check_int("eval_every", self.eval_every, 0, optional=True)
        check_int("eval_rows", self.eval_rows, 1, optional=True)
        check_int("token_budget", self.token_budget, 1, optional=True)
        check_int("tasks_per_wave", self.tasks_per_wave, 1, optional=True)
        check_int("patience", self.patience, 1, optional=True)
        if self.weight_decay is None:
            raise UserError("weight_decay must be a number not below 0, got None; 0 is off")
        check_at_least("weight_decay", self.weight_decay, 0)
        check_at_least("max_grad_norm", self.max_grad_norm, 1e-12)
        check_fraction("warmup", self.warmup)
        check_one_of("schedule", self.schedule, ("linear", "cosine", "constant"))
        check_bool("gradient_checkpointing", self.gradient_checkpointing)
        known = isinstance(self.device, str) and re.fullmatch(DEVICE, self.device)
        if self.device is not None and not known:
            raise UserError(
                f"device must be cpu, cuda, cuda:1, mps or the like, got {self.device!r}"
            )
        check_one_of("optimizer", self.optimizer, ("adamw", "adamw-8bit"))
        check_one_of("precision", self.precision, ("fp32", "bf16"))

    def replace(self, **changes: Any) -> Run:
        """The same run with some fields changed."""
        return dataclasses.replace(self, **changes)

    def one_task_a_batch(self, num_tasks: int) -> Run:
        """The run that sees as many examples in batches of one task."""
        together = min(self.tasks_per_step or num_tasks, num_tasks)
        every = None if self.eval_every is None else self.eval_every * together
        return self.replace(tasks_per_step=1, steps=self.steps * together, eval_every=every)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able fields; `Run(**run.to_dict())` gives the run back."""
        fields = dataclasses.asdict(self)
        fields["out"] = None if self.out is None else str(self.out)
        return fields


def check_at_least(name: str, value: Any, least: float) -> None:
    """Raises UserError unless `value` is None or a number not below `least`."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= least:
        raise UserError(f"{name} must be a number not below {least:g}, got {value!r}")


def check_int(name: str, value: Any, least: int, *, optional: bool = False) -> None:
    """Raises UserError unless `value` is a whole number not below `least`, or an allowed None."""
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"{name} must be a whole number not below {least}, got {value!r}")


def check_ints(name: str, value: Any) -> Any:
    """A whole number above 0, several of them as a tuple, or None; raises UserError for others."""
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        return value
    several = tuple(value) if isinstance(value, (list, tuple)) else ()
    if not several or any(isinstance(v, bool) or not isinstance(v, int) or v < 1 for v in several):
        raise UserError(f"{name} must be a whole number above 0 or a list of them, got {value!r}")
    return several


def check_list(name: str, value: Any) -> list[Any]:
    """A list or tuple as a list; raises UserError for all else."""
    if not isinstance(value, (list, tuple)):
        raise UserError(f"{name} must be a list, got {value!r}")
    return list(value)


def check_bool(name: str, value: Any) -> None:
    """Raises UserError unless `value` is true or false."""
    if not isinstance(value, bool):
        raise UserError(f"{name} must be true or false, got {value!r}")


def check_positive(name: str, value: Any) -> None:
    """Raises UserError unless `value` is a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise UserError(f"{name} must be a number above 0, got {value!r}")


def check_fraction(name: str, value: Any) -> None:
    """Raises UserError unless `value` is a number from 0 to 1."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise UserError(f"{name} is a share between 0 and 1, got {value!r}")


def check_one_of(name: str, value: Any, known: tuple[str, ...]) -> None:
    """Raises UserError unless `value` is one of `known`."""
    if value not in known:
        raise UserError(f"{name} must be one of {', '.join(known)}; got {value!r}")
