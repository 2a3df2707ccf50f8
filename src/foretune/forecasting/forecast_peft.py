"""Forecast-PEFT: adapt a pretrained trajectory forecaster by prompts and small adapters.

Paper: Wang et al., "Forecast-PEFT: Parameter-Efficient Fine-Tuning for Pre-trained Motion
Forecasting Models", 2024, arXiv:2407.19564.

The pretrained Forecast-MAE keeps its encoder and decoder: forecasting is its pretext task with all
histories visible and all futures hidden. The trained parameters:

    symbol  here                        meaning
    CEP     forecaster.prompt_scene     prompts of each encoder block (section 3.3)
    MCP     forecaster.prompt_mode      prompts of each of the K modes, in the decoder
    A1 A2   adapter_attn, adapter_mlp   beside attention and MLP of each block, rank r
            *bias*, *norm*              in the whole model
            future_pred, decoder_embed  prediction layer and decoder input

    x ← x + drop(attention(n1 x) + A1(n1 x));   x ← x + drop(mlp(n2 x) + A2(n2 x))

Deviations:
    - the up-projections of the adapters start at zero, so that training starts at the pretrained
      function; the authors' code reinitialises all linear layers after zeroing the adapters
    - the second adapter is inside the dropped branch; theirs is outside
    - all modes go through the decoder in one call; theirs loops over K calls
    - `freeze_bn`: running statistics of the lane encoder are frozen; theirs keep moving
    - the winning mode is the one with the smallest average displacement over the observed steps
Silent in the paper:
    - which parameters count as "bias": all of them, as in the authors' code, including those of
      attention, embeddings and batch norms
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from typing_extensions import TypedDict, override

from foretune.errors import UserError
from foretune.forecasting import DELTA_FILE, FORMAT, RECORD_FILE
from foretune.formats import damage_named, read_json, read_tensors
from foretune.run import Run, check_bool, check_int, check_one_of, check_positive
from foretune.training.methods import AdaptMethod

if TYPE_CHECKING:
    from torch import nn

    from foretune.forecasting.model import ForecastMAE
    from foretune.tasks.task import Objective
    from foretune.training.learners.joint import Learner

TRAINED = ("prompt", "adapter", "bias", "norm", "future_pred", "decoder_embed")
NOT_DECAYED = ("prompt", "bias", "norm")


@dataclass(frozen=True, kw_only=True)
class ForecastPEFT(AdaptMethod):
    """Train prompts and parallel adapters on a frozen Forecast-MAE, separately for each task.

    Args:
        modes: Number of forecast futures K.
        prompts: Prompt tokens per encoder block, and per mode.
        adapter_rank: Inner width r of the adapters; 0 for none.
        train: "parts", or "all" for the whole model (with `adapter_rank` 0 the paper's
            Forecast-FT).
        learning_rate: Learning rate of AdamW; prompts, biases and norms have no weight decay.
        freeze_bn: Freeze the running statistics of batch norms.

    Raises:
        UserError: A value is out of range.
    """

    modes: int = 6
    prompts: int = 50
    adapter_rank: int = 64
    train: Literal["parts", "all"] = "parts"
    learning_rate: float = 1e-3
    freeze_bn: bool = True

    name: ClassVar[str] = "forecast-peft"
    label: ClassVar[str] = "Forecast-PEFT"
    paper: ClassVar[dict[str, Any] | None] = {
        "title": "Forecast-PEFT: Parameter-Efficient Fine-Tuning for Pre-trained Motion "
        "Forecasting Models",
        "authors": [
            "Jifeng Wang",
            "Kaouther Messaoud",
            "Yuejiang Liu",
            "Juergen Gall",
            "Alexandre Alahi",
        ],
        "year": 2024,
        "arxiv": "2407.19564",
        "venue": "arXiv",
    }

    def __post_init__(self) -> None:
        check_int("modes", self.modes, 1)
        check_int("prompts", self.prompts, 1)
        check_int("adapter_rank", self.adapter_rank, 0)
        check_one_of("train", self.train, ("parts", "all"))
        check_positive("learning_rate", self.learning_rate)
        check_bool("freeze_bn", self.freeze_bn)

    @override
    def learner(
        self, model: nn.Module, objective: Objective, keys: Sequence[str], run: Run
    ) -> Learner:
        """A learner of the task's parameters; adds the prompts and adapters to the model in place.

        Raises:
            UserError: The objective is not `Forecast`, or the model is not a pretrained
                Forecast-MAE.
        """
        from foretune.adapters.fingerprint import fingerprint
        from foretune.forecasting.forecasters import check_pretrained
        from foretune.forecasting.learner import ForecastLearner

        if objective.kind != "forecast":
            raise UserError(
                f"forecast-peft needs tasks with the objective Forecast, got {objective.kind}"
            )
        forecaster = check_pretrained(model)
        base_fingerprint = fingerprint(model)
        self.install(forecaster)
        return ForecastLearner(
            model,
            objective,
            learning_rate=self.learning_rate,
            not_decayed=NOT_DECAYED,
            freeze_bn=self.freeze_bn,
            trained_names=self.trained_names(model),
            base_fingerprint=base_fingerprint,
            method=self.to_dict(),
        )

    def install(self, model: ForecastMAE) -> None:
        """Add prompts and adapters to a pretrained model in place, and freeze the other weights."""
        from foretune.forecasting.forecasters import add_prompts

        add_prompts(model, modes=self.modes, prompts=self.prompts, adapter_rank=self.adapter_rank)
        trained = set(self.trained_names(model))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)

    def trained_names(self, model: nn.Module) -> list[str]:
        """Names of the trained parameters, which differ between tasks."""
        names = [name for name, _ in model.named_parameters()]
        if self.train == "all":
            return names
        return [name for name in names if any(part in name for part in TRAINED)]


class Record(TypedDict):
    """The fields of `RECORD_FILE` that are read back."""

    method: dict[str, Any]
    base_fingerprint: str


def load_adapted(folder: Path | str, base: ForecastMAE) -> ForecastMAE:
    """A copy of the base with the trained parameters of one task, in eval mode.

    Args:
        folder: Folder of one task, as `ForecastLearner.write` writes it.
        base: The pretrained model that was adapted; it is not changed.

    Raises:
        UserError: The folder holds no adapted forecaster, a file in it is broken, or it was
            adapted from another base.
    """
    import copy

    from foretune.adapters.fingerprint import fingerprint
    from foretune.methods import make

    folder = Path(folder)
    if not (folder / RECORD_FILE).is_file():
        raise UserError(f"{folder} holds no adapted forecaster: {RECORD_FILE} is missing")
    record = read_json(folder / RECORD_FILE, Record, FORMAT)
    tensors = read_tensors(folder / DELTA_FILE)
    with damage_named(folder / RECORD_FILE):
        method = make(**record["method"])
    base_fingerprint = record["base_fingerprint"]
    if fingerprint(base) != base_fingerprint:
        raise UserError(
            f"{folder} was adapted from another base: its fingerprint is {base_fingerprint[:12]}, "
            f"that of the given base is {fingerprint(base)[:12]}"
        )
    model = copy.deepcopy(base)
    with damage_named(folder / RECORD_FILE):
        method.install(model)
    mismatched = set(tensors) ^ set(method.trained_names(model))
    mismatched -= {name for name, _ in model.named_buffers()}
    if mismatched:
        raise UserError(
            f"{folder / DELTA_FILE} does not fit {RECORD_FILE}: {min(mismatched)} is in only one "
            "of them"
        )
    with damage_named(folder / DELTA_FILE):
        model.load_state_dict(tensors, strict=False)
    return model.eval()
