"""The blocks of a recipe: `model:`, `tasks:`, `retrain:`, `adapt:`, `spectrum:`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from foretune.run import Run

PLAIN = Run()


class Block(BaseModel):
    """Unknown keys are refused, and values are not bent into shape: `steps: yes` is no number."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ModelBlock(Block):
    """The model to begin with: a `name`, or a `file` of the user's that builds one.

    Args:
        name: "minilm", a local Hugging Face folder, or a hub id.
        file: A Python file with a function that returns an `nn.Module`.
        factory: That function's name.
        args: Its keyword arguments.
        trainable_layers: Train the last so many blocks (and the head) only; None: everything.
        trust_remote_code: Let the hub's repository run its own Python code here.
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
        rotate: Repeat i sets the i-th group of `unseen` tasks aside, so that after all turns each
            task has been an unseen one once.
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
    """A learning rate that is fixed, or several that are searched."""

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
        """The rates to try; empty: the method's own default."""
        if self.learning_rate is not None:
            return [self.learning_rate]
        return list(self.learning_rates or ())


class RetrainBlock(RatesBlock):
    """The methods that are compared, and the budget that each of them gets.

    Args:
        methods: Names, or one-key mappings of a name to its fields:
            `{peft-ml: {form: last-layer, as: peft-ml-last}}`. `as` is the name that is shown;
            `learning_rates` there is searched instead of the block's.
        search_steps: Steps of each trial of the search; None: all of them. A trial's base is
            adapted to the `adapt.search_tasks`, which it does not meet; the method then retrains
            on all seen tasks, unless rates of adapting are searched on them too.

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
        method: "lora", "head", "full" or another method to adapt with.
        lora: Fields of `peft.LoraConfig`, for `method: lora`.
        fields: Other fields of the method.
        search_tasks: Tasks on which several rates are searched; they are taken from the seen
            ones, a quarter of these at most, and no base that is tried on them met them.
        shots: Training rows (a class, where there are classes) of an unseen task; "all" for all.
        draws: Draws of the shots for each repeat.

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
        """The shots as the verbs take them: None for all rows."""
        return [None if shots == "all" else shots for shots in self.shots]

    @model_validator(mode="after")
    def _shots_are_positive(self) -> AdaptBlock:
        if any(shots != "all" and shots < 1 for shots in self.shots):
            raise ValueError("must have shots of at least 1 row (0 is always measured)")
        if self.lora is not None and self.method != "lora":
            raise ValueError(f"may have lora only with method: lora, not with {self.method}")
        return self


class SpectrumBlock(Block):
    """The rank that an unseen task needs: full adaptation, then its best low-rank parts.

    Args:
        shots: Training rows of each task.
        ranks: The ranks to try.
    """

    shots: int = Field(default=40, ge=1)
    ranks: list[int] = Field(default=[1, 2, 4, 8], min_length=1)
