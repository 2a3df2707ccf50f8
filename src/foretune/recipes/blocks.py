"""The blocks of a recipe: `model:`, `tasks:`, `retrain:`, `adapt:`, `spectrum:`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, create_model, model_validator

from foretune.errors import UserError
from foretune.run import Run
from foretune.tasks.sources import Source

B = TypeVar("B", bound="Block")

# Fields of `Run` that are keys of neither `retrain:` nor `adapt:`. Precision and device hold for
# the whole recipe, the seed is the number of the repeat, and the folder with what may happen to it
# comes from the key `out` and the command line.
RUN_FIELDS_OF_THE_RECIPE = ("seed", "precision", "device", "out", "resume", "overwrite")
# Retraining mixes tasks in a step; adapting trains each task by itself, in waves, and with AdamW.
RUN_FIELDS_OF_RETRAIN = ("tasks_per_step", "optimizer")
RUN_FIELDS_OF_ADAPT = ("tasks_per_wave",)
# What is tried where a recipe does not say how to adapt.
ADAPT_METHODS = ("head", "lora", "basis")

MethodItem = str | dict[str, dict[str, Any] | None]


class Block(BaseModel):
    """A block of keys: unknown ones are errors, values are not coerced (`yes` is not a number)."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


def with_fields_of(
    record: type, *, without: Sequence[str] = (), renamed: Mapping[str, str] | None = None
) -> Callable[[type[B]], type[B]]:
    """A class decorator that appends the fields of a dataclass to a block.

    Names, types, defaults and order are those of the dataclass, so that a new field of it is a key
    of the block at once. Code reads these keys from the record that the block is turned into.

    Args:
        record: The dataclass.
        without: Fields that are not keys of the block.
        renamed: Field → key for keys of another name.
    """
    types = get_type_hints(record)
    keys = renamed or {}

    def append_fields(block: type[B]) -> type[B]:
        fields: dict[str, Any] = {
            keys.get(field.name, field.name): (types[field.name], _default_of(field))
            for field in dataclasses.fields(record)
            if field.name not in without
        }
        return create_model(
            block.__name__,
            __base__=block,
            __module__=block.__module__,
            __doc__=block.__doc__,
            **fields,
        )

    return append_fields


def _default_of(field: dataclasses.Field[Any]) -> Any:
    """The default of a dataclass field as pydantic writes it; `...` for a required field."""
    if field.default_factory is not dataclasses.MISSING:
        return Field(default_factory=field.default_factory)
    return ... if field.default is dataclasses.MISSING else field.default


class ModelBlock(Block):
    """The input model: a `name`, a Python `file` that builds one, or a `tower` on arrays.

    Args:
        name: "minilm", "smollm2", a local Hugging Face folder, a GGUF file, or a hub id.
        tower: Widths of the hidden layers of a small new network. With `name` it reads the
            embeddings of texts by that model, which is frozen; without, the arrays of the rows.
        file: A Python file with a function that returns an `nn.Module`.
        factory: The name of that function.
        args: Its keyword arguments.
        trainable_layers: Number of last blocks that are trained besides the head; None: all.
        chat_template: A file with the chat template for rows with `messages`; None: the tokenizer's
            own.
        trust_remote_code: Whether a hub repository may run its own Python code.
    """

    name: str | None = None
    tower: list[Annotated[int, Field(ge=1, le=65536)]] | None = Field(default=None, min_length=1)
    file: str | None = None
    factory: str = "build"
    args: dict[str, Any] = Field(default_factory=dict)
    trainable_layers: int | None = Field(default=None, ge=0)
    chat_template: str | None = None
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def _one_origin(self) -> ModelBlock:
        if self.file is not None and self.tower is not None:
            raise ValueError(
                "may have tower or file, not both: a file's own layers are what is trained"
            )
        if (self.name is None and self.tower is None) == (self.file is None):
            raise ValueError(
                "needs either name (minilm, smollm2, a folder, a GGUF file, a hub id) or file (a "
                ".py file), or for arrays a tower such as [64, 64]"
            )
        if self.tower is not None and self.trainable_layers is not None:
            raise ValueError(
                "may have tower or trainable_layers, not both: below a tower the whole encoder is "
                "frozen, so that each text is computed once"
            )
        if self.chat_template is not None and (self.name is None or self.tower is not None):
            raise ValueError("may have chat_template only beside the name of a language model")
        if self.file is None and self.args:
            raise ValueError("may have args only beside file")
        return self

    def __str__(self) -> str:
        origin = self.name or self.file
        if self.tower is None:
            return str(origin)
        widths = ", ".join(map(str, self.tower))
        return f"a tower of {widths} on {origin or 'the arrays'}"

    def check_serves(self, objective: Block) -> None:
        """Checks that a tower serves the objective.

        Raises:
            UserError: It does not.
        """
        kind, scoring = (getattr(objective, name, None) for name in ("kind", "scoring"))
        if self.tower is None or kind == "classification" or scoring == "bi-encoder":
            return
        if kind == "regression" and self.name is None:
            return
        shown = kind if scoring is None else f"{kind} with scoring {scoring}"
        raise UserError(
            "tower serves classification, choice with scoring bi-encoder, and regression of arrays "
            f"(without name); for {shown} leave it out"
        )


@with_fields_of(Source, renamed={"turn": "rotate"})  # which turn it is depends on the repeat
class _SourceBlock(Block):
    """The fields of `Source`."""


class TasksBlock(_SourceBlock):
    """The data: the fields of `foretune.tasks.sources.Source`, documented there.

    Args:
        rotate: Repeat i sets aside the i-th group of `unseen` tasks, so that after all turns each
            task has been unseen once.
    """

    unseen: int | list[str | int] | str | None = None  # YAML reads the name of a task 7 as a number
    rotate: bool = False


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


@with_fields_of(Run, without=RUN_FIELDS_OF_THE_RECIPE + RUN_FIELDS_OF_ADAPT)
class _RetrainRunBlock(RatesBlock):
    """The methods of retraining and the fields of their `Run`."""

    methods: list[MethodItem] = Field(min_length=1)


class RetrainBlock(_RetrainRunBlock):
    """The methods to compare, and the budget of each.

    Args:
        methods: Names, or one-key mappings of a name to its fields:
            `{peft-ml: {form: last-layer, as: peft-ml-last-layer}}`. `as` is the displayed name;
            `learning_rates` there replaces that of the block; `search: {penalty: [0, 0.1]}` tries
            several values of other fields, with each learning rate.
        search_steps: Steps of each trial; None for `steps`: the best trial is then the base. The
            base of a trial is scored after adapting it to the repeat's held-out tasks.

    The other fields are those of `foretune.Run`.
    """

    search_steps: int | None = Field(default=None, ge=1)


@with_fields_of(Run, without=RUN_FIELDS_OF_THE_RECIPE + RUN_FIELDS_OF_RETRAIN)
class _AdaptRunBlock(RatesBlock):
    """The methods of adapting and the fields of their `Run`."""

    methods: list[MethodItem] | None = Field(default=None, min_length=1)
    method: str | None = None
    lora: dict[str, Any] | None = None
    fields: dict[str, Any] = Field(default_factory=dict)


class AdaptBlock(_AdaptRunBlock):
    """How each base is adapted to the unseen tasks.

    Where it is searched, held-out seen tasks choose the method, its learning rate and the number of
    steps, from 0 to `steps`, for each base and each number of shots. It is fixed by `method` with
    at most one learning rate, or by a `learning_rate` alone.

    Args:
        methods: The adapt methods to choose among: names, or one-key mappings of a name to its
            fields. None beside `method` and rates: "head", "lora" and "basis".
        method: A single method; with several `learning_rates` these and the steps are searched.
        lora: Fields of `peft.LoraConfig`, for the method "lora".
        fields: Other fields of `method`.
        search_tasks: Number of seen tasks that are held out of the retrainings of a repeat and
            choose: at most a quarter of all.
        shots: Training examples per unseen task (per class for classification); "all" for all.
        draws: Draws of the shots in each repeat.

    The other fields are those of `foretune.Run`.
    """

    search_tasks: int = Field(default=32, ge=1)
    shots: list[int | Literal["all"]] = Field(default=[8, 40], min_length=1)
    draws: int = Field(default=1, ge=1)

    @property
    def row_counts(self) -> list[int | None]:
        """The shots with None for all examples, as the verbs take them."""
        return [None if shots == "all" else shots for shots in self.shots]

    @property
    def items(self) -> list[MethodItem]:
        """The methods to choose among, or the only one."""
        if self.methods is not None:
            return self.methods
        if self.method is None and not self.rates:
            return [*ADAPT_METHODS]
        return [{self.method or "lora": self.fields}]

    @property
    def searches(self) -> bool:
        """Whether held-out tasks choose how to adapt."""
        no_method = self.method is None and not self.rates
        return self.methods is not None or no_method or len(self.rates) > 1

    @model_validator(mode="after")
    def _shots_are_positive(self) -> AdaptBlock:
        if any(shots != "all" and shots < 1 for shots in self.shots):
            raise ValueError("must have shots of at least 1 row (0 is always measured)")
        if len({*self.shots}) < len(self.shots):
            raise ValueError(f"must have shots that differ, got {self.shots}")
        return self

    @model_validator(mode="after")
    def _keys_agree(self) -> AdaptBlock:
        if self.methods is not None and self.method is not None:
            raise ValueError("may have method (fixed) or methods (searched), not both")
        if self.fields and self.method is None:
            raise ValueError("may have fields only beside method")
        names = [item if isinstance(item, str) else next(iter(item), "") for item in self.items]
        if self.lora is not None and "lora" not in names:
            raise ValueError(f"may have lora only with the method lora, not with {names[0]}")
        if not self.searches:
            return self
        if self.steps < 1:  # type: ignore[attr-defined]
            raise ValueError("must have steps of at least 1: 0 to that many are tried")
        if self.patience is not None:  # type: ignore[attr-defined]
            raise ValueError("may have patience only with one method and rate: steps are searched")
        for key in ("warmup", "schedule"):
            if getattr(self, key) != getattr(Run, key):
                raise ValueError(
                    f"may have {key} only with one method and rate: where steps are searched, the "
                    "rate is constant"
                )
        return self


class ForgettingBlock(Block):
    """General texts and benchmarks, by which is seen what a language model has lost.

    Args:
        source: Rows with `text`; None for none.
        max_rows: The first so many are scored.
        max_tokens: Longer texts lose their end.
        benchmarks: Tasks of lm-eval: their names, or paths of task files.
        max_examples: Examples that are scored of each benchmark; None for all.
        adapters: Adapters of unseen tasks, per base, that are scored too.
    """

    source: str | None = None
    max_rows: int = Field(default=200, ge=2)
    benchmarks: list[str] = []
    max_examples: int | None = Field(default=200, ge=2)
    max_tokens: int = Field(default=128, ge=2)
    adapters: int = Field(default=4, ge=0)


class SpectrumBlock(Block):
    """The rank that an unseen task needs: LoRA at several ranks, and full fine-tuning.

    Args:
        shots: Training examples per task.
        ranks: LoRA ranks to try.
    """

    shots: int = Field(default=40, ge=1)
    ranks: list[int] = Field(default=[1, 2, 4, 8], min_length=1)
