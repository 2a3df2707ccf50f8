"""`Run`: how to train, as opposed to on what (the tasks) and by which rule (the method)."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from foretune.errors import UserError, did_you_mean

MAX_SEED = 2**32 - 1  # every generator takes it, and the loop may multiply it
DEVICE = r"(cpu|cuda|mps|xpu|npu|hpu)(:\d+)?"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """Seed, budget, precision and folder of one training run.

    Every method sees `steps` batches of `tasks_per_step * batch_size` examples, whatever it does
    with them, so two methods with the same `Run` have equal budgets by construction.

    Args:
        seed: Random seed of the order of the examples, fresh adapters and heads, and dropout.
        steps: Total number of batches; adapting may take 0. A method that needs several per update
            of the model (Reptile, FOMAML) makes fewer updates, the last with fewer batches if need
            be.
        tasks_per_step: Tasks per batch; None for all of them (the joint step), 1 for round robin.
            The adapter of a task that is absent from a step does not move.
        batch_size: Examples of each task per batch.
        warmup: Fraction of the updates over which the learning rate rises linearly from zero.
        schedule: "linear" (falls to zero at the end), "cosine" (likewise) or "constant".
        weight_decay: Decoupled weight decay of AdamW.
        max_grad_norm: Clips the norm of the gradient of everything that an update moves; None for
            no clipping.
        eval_every: Batches between two validations; a run returns its best validated state. None:
            ten validations per run. 0: no validation, the last state is returned.
        eval_rows: Validation examples of each task that are scored each time, evenly spread over
            them; None for all.
        precision: "fp32" or "bf16" (autocast).
        optimizer: Optimiser of the base: "adamw", or "adamw-8bit", whose state takes a quarter of
            the memory (bitsandbytes). Adapters always use the former.
        token_budget: Tokens per forward and backward pass. A larger batch is split and the
            gradients of its parts are added up: less memory, the same result. None: on a CPU as
            many as keep the widest activation under 32 MB, elsewhere no limit.
        device: "cpu", "cuda", "cuda:1", "mps" …; None for the device that accelerate chooses.
        gradient_checkpointing: Store only the input of each transformer block and recompute the
            rest in the backward pass: less memory, a third more time, the same result.
        tasks_per_wave: Unseen tasks that are adapted at the same time; None for as many as fit,
            with gradients and optimiser state, into half of the free memory, at most 1,000.
        patience: A retraining ends after this many validations in a row without a better score.
            An unseen task stops adapting likewise, by its validation examples, and keeps its best
            state; a task without validation examples does not stop. None: all take all steps.
        out: Folder for checkpoints and results; None keeps everything in memory.
        resume: Continue from the newest checkpoint in `out` if there is one.
        overwrite: Empty `out` first if it is not empty.

    Raises:
        UserError: A value is out of range; the message names the field.
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
        check_seed("seed", self.seed)
        check_int("steps", self.steps, 0)
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
        if self.device is not None:
            check_device_name("device", self.device)
        check_one_of("optimizer", self.optimizer, ("adamw", "adamw-8bit"))
        check_one_of("precision", self.precision, ("fp32", "bf16"))

    def replace(self, **changes: Any) -> Run:
        """The same run with some fields changed."""
        return dataclasses.replace(self, **changes)

    def one_task_per_batch(self, num_tasks: int) -> Run:
        """The run that sees as many examples in batches of one task each."""
        factor = min(self.tasks_per_step or num_tasks, num_tasks)
        eval_every = None if self.eval_every is None else self.eval_every * factor
        return self.replace(tasks_per_step=1, steps=self.steps * factor, eval_every=eval_every)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON types; `Run(**run.to_dict())` is an equal run."""
        fields = dataclasses.asdict(self)
        fields["out"] = None if self.out is None else str(self.out)
        return fields


def run_fields(run: Any) -> dict[str, Any]:
    """The fields of a `Run`, as a mapping; a mapping of fields is checked and returned.

    Raises:
        UserError: It is neither, or a `Run` has no such field.
    """
    if isinstance(run, Run):
        return run.to_dict()
    if not isinstance(run, Mapping):
        raise UserError(f"a run is a Run, or a mapping of its fields; got {run!r}")
    field_names = [f.name for f in dataclasses.fields(Run)]
    for name in run:
        if name not in field_names:
            raise UserError(f'a Run has no field "{name}".{did_you_mean(name, field_names)}')
    Run(**run)
    return dict(run)


def check_at_least(name: str, value: Any, least: float) -> None:
    """Checks that `value` is None or a number not below `least`.

    Raises:
        UserError: It is neither.
    """
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= least:
        raise UserError(f"{name} must be a number not below {least:g}, got {value!r}")


def check_device_name(name: str, value: Any) -> None:
    """Checks that a value names a device, whether or not it is there.

    Raises:
        UserError: It does not.
    """
    if not isinstance(value, str) or not re.fullmatch(DEVICE, value):
        raise UserError(f"{name} must be cpu, cuda, cuda:1, mps or the like, got {value!r}")


def check_int(name: str, value: Any, least: int, *, optional: bool = False) -> None:
    """Checks that `value` is a whole number not below `least`, or None where that is allowed.

    Raises:
        UserError: It is neither.
    """
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"{name} must be a whole number not below {least}, got {value!r}")


def check_seed(name: str, value: Any) -> None:
    """Checks that `value` is a whole number from 0 to 2³² - 1, which every generator takes.

    Raises:
        UserError: It is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_SEED:
        raise UserError(f"{name} must be a whole number from 0 to {MAX_SEED}, got {value!r}"[:200])


def check_ints(name: str, value: Any) -> Any:
    """Checks for None, a positive whole number or a list of them; returns a list as a tuple.

    Raises:
        UserError: `value` is neither.
    """
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        return value
    numbers = tuple(value) if isinstance(value, (list, tuple)) else ()
    if not numbers or any(isinstance(v, bool) or not isinstance(v, int) or v < 1 for v in numbers):
        raise UserError(f"{name} must be a whole number above 0 or a list of them, got {value!r}")
    return numbers


def check_list(name: str, value: Any) -> list[Any]:
    """Checks that `value` is a list or tuple; returns it as a list.

    Raises:
        UserError: It is neither.
    """
    if not isinstance(value, (list, tuple)):
        raise UserError(f"{name} must be a list, got {value!r}")
    return list(value)


def check_bool(name: str, value: Any) -> None:
    """Checks that `value` is true or false.

    Raises:
        UserError: It is neither.
    """
    if not isinstance(value, bool):
        raise UserError(f"{name} must be true or false, got {value!r}")


def check_positive(name: str, value: Any) -> None:
    """Checks that `value` is a finite number above 0.

    Raises:
        UserError: It is not.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise UserError(f"{name} must be a number above 0, got {value!r}")


def check_strength(name: str, value: Any) -> None:
    """Checks that `value` is a finite number not below 0.

    Raises:
        UserError: It is not.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise UserError(f"{name} must be a number not below 0, got {value!r}")


def check_fraction(name: str, value: Any) -> None:
    """Checks that `value` is a number from 0 to 1.

    Raises:
        UserError: It is not.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise UserError(f"{name} is a share between 0 and 1, got {value!r}")


def check_one_of(name: str, value: Any, options: tuple[str, ...]) -> None:
    """Checks that `value` is one of `options`.

    Raises:
        UserError: It is not.
    """
    if value not in options:
        raise UserError(f"{name} must be one of {', '.join(options)}; got {value!r}")
