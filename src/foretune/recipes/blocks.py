"""The blocks of a recipe: `model:`, `tasks:`, `retrain:`, `adapt:`, `spectrum:`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from foretune.run import Run

PLAIN = Run()


class Block(BaseModel):
    """A block of keys: unknown ones are errors, values are not coerced (`yes` is not a number)."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ModelBlock(Block):
    """The input model: a `name`, or a Python `file` that builds one.

    Args:
        name: "minilm", a local Hugging Face folder, or a hub id.
        file: A Python file with a function that returns an `nn.Module`.
        factory: The name of that function.
        args: Its keyword arguments.
        trainable_layers: Number of last blocks that are trained besides the head; None: all.
        trust_remote_code: Whether a hub repository may run its own Python code.
    """

    name: str | None = None
    file: str | None = None
    factory: str = "build"
    args: dict[str, Any] = Field(default_factory=dict)
    trainable_layers: int | None = Field(default=None, ge=0)
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def _one_origin(self) -> ModelBlock:
        if (self.name is None) == (self.file is None):
            raise ValueError("needs either name (minilm, a folder, a hub id) or file (a .py file)")
        if self.file is None and self.args:
            raise ValueError("may have args only beside file")
        return self


class TasksBlock(Block):
    """The data: the fields of `foretune.tasks.sources.Source`, documented there.

    Args:
        rotate: Repeat i sets aside the i-th group of `unseen` tasks, so that after all turns each
            task has been unseen once.
    """

    source: str
    task_column: str = "task"
    group_column: str | None = None
    unseen: int | list[str | int] | str | None = None
    rotate: bool = False
    validation: float = 0.1
    test: float = 0.2
    min_rows: int = 1
    max_tasks: int | None = None
    max_rows: int | None = None
    num_candidates: int = 20
    candidate_pool: int | None = None
    candidates_from: Literal["others", "own"] = "others"
    candidate_seed: int = 0
    columns: dict[str, str] = Field(default_factory=dict)
    seed: int = 0


class RatesBlock(Block):
    """One fixed learning rate, or several that are searched."""

    learning_rate: float | None = Field(default=None, gt=0)
    learning_rates: list[float] | None = Field(default=None, min_length=1)

    @model_validator(mode="after")
    def _one_of_two(self) -> RatesBlock:
        if self.learning_rate is not None and self.learning_rates is not None:
            raise ValueError(
                "may have learning_rate (fixed) or learning_rates (searched), not both"
            )
        if any(rate <= 0 for rate in self.learning_rates or ()):
            raise ValueError("must have learning_rates above 0")
        return self

    @property
    def rates(self) -> list[float]:
        """The learning rates to try; empty for the method's default."""
        if self.learning_rate is not None:
            return [self.learning_rate]
        return list(self.learning_rates or ())


class RetrainBlock(RatesBlock):
    """The methods to compare, and the budget of each.

    Args:
        methods: Names, or one-key mappings of a name to its fields:
            `{peft-ml: {form: last-layer, as: peft-ml-last}}`. `as` is the displayed name;
            `learning_rates` there replaces that of the block.
        search_steps: Steps of each trial of the learning-rate search; None for `steps`. The base of
            a trial is adapted to the `adapt.search_tasks`, on which it is not retrained; the method
            then retrains on all seen tasks, unless they also choose the adapt learning rate.

    The other fields are those of `foretune.Run`.
    """

    methods: list[str | dict[str, dict[str, Any] | None]] = Field(min_length=1)
    steps: int = PLAIN.steps
    tasks_per_step: int | None = PLAIN.tasks_per_step
    batch_size: int = PLAIN.batch_size
    warmup: float = PLAIN.warmup
    schedule: Literal["linear", "cosine", "constant"] = PLAIN.schedule
    weight_decay: float = PLAIN.weight_decay
    max_grad_norm: float | None = PLAIN.max_grad_norm
    eval_every: int | None = PLAIN.eval_every
    eval_rows: int | None = PLAIN.eval_rows
    optimizer: Literal["adamw", "adamw-8bit"] = PLAIN.optimizer
    token_budget: int | None = PLAIN.token_budget
    gradient_checkpointing: bool = PLAIN.gradient_checkpointing
    search_steps: int | None = Field(default=None, ge=1)


class AdaptBlock(RatesBlock):
    """How each base is adapted to the unseen tasks.

    Args:
        method: "lora", "head", "full" or another adapt method.
        lora: Fields of `peft.LoraConfig`, for `method: lora`.
        fields: Other fields of the method.
        search_tasks: Number of tasks on which learning rates are searched: at most a quarter of the
            seen tasks, held out of the retraining of every base that is scored on them.
        shots: Training examples per unseen task (per class for classification); "all" for all.
        draws: Draws of the shots in each repeat.

    The other fields are those of `foretune.Run`.
    """

    method: str = "lora"
    lora: dict[str, Any] | None = None
    fields: dict[str, Any] = Field(default_factory=dict)
    steps: int = PLAIN.steps
    batch_size: int = PLAIN.batch_size
    warmup: float = PLAIN.warmup
    schedule: Literal["linear", "cosine", "constant"] = PLAIN.schedule
    weight_decay: float = PLAIN.weight_decay
    max_grad_norm: float | None = PLAIN.max_grad_norm
    token_budget: int | None = PLAIN.token_budget
    gradient_checkpointing: bool = PLAIN.gradient_checkpointing
    tasks_per_wave: int | None = PLAIN.tasks_per_wave
    patience: int | None = PLAIN.patience
    eval_every: int | None = PLAIN.eval_every
    eval_rows: int | None = PLAIN.eval_rows
    search_tasks: int = Field(default=8, ge=1)
    shots: list[int | Literal["all"]] = Field(default=[8, 40], min_length=1)
    draws: int = Field(default=1, ge=1)

    @property
    def row_counts(self) -> list[int | None]:
        """The shots with None for all examples, as the verbs take them."""
        return [None if shots == "all" else shots for shots in self.shots]

    @model_validator(mode="after")
    def _shots_are_positive(self) -> AdaptBlock:
        if any(shots != "all" and shots < 1 for shots in self.shots):
            raise ValueError("must have shots of at least 1 row (0 is always measured)")
        if self.lora is not None and self.method != "lora":
            raise ValueError(f"may have lora only with method: lora, not with {self.method}")
        return self


class SpectrumBlock(Block):
    """The rank that an unseen task needs: LoRA at several ranks, and full fine-tuning.

    Args:
        shots: Training examples per task.
        ranks: LoRA ranks to try.
    """

    shots: int = Field(default=40, ge=1)
    ranks: list[int] = Field(default=[1, 2, 4, 8], min_length=1)
