"""Forecast-PEFT: a pretrained trajectory forecaster is adapted by prompts and small adapters.

Paper: Wang et al., "Forecast-PEFT: Parameter-Efficient Fine-Tuning for Pre-trained Motion
Forecasting Models", 2024, arXiv:2407.19564.

The pretrained Forecast-MAE keeps encoder and decoder, and to forecast is its pretext task with all
histories visible and all futures hidden. What is new, and what of the old is trained:

    symbol  here                     trained
    CEP     forecaster.prompt_scene  prompts of each encoder block (section 3.3)
    MCP     forecaster.prompt_mode   prompts of each of K modes, in the decoder
    A1 A2   adapter_attn, _mlp       beside attention and MLP of each block, rank r
            *bias*, *norm*           of the whole model
            future_pred, decoder_embed

    x ← x + drop(attention(n1 x) + A1(n1 x));   x ← x + drop(mlp(n2 x) + A2(n2 x))

Deviations:
    - the up-projections of the adapters begin at zero, so that training starts at the pretrained
      function; the authors' code draws all linear layers anew after it has zeroed the adapters
    - the second adapter is dropped with its branch; theirs is outside of it
    - all modes go through the decoder in one call; theirs are a loop of K calls
    - `freeze_bn`: running statistics of the lane encoder stay; theirs go on moving
    - the winner among the modes is the one nearest on average over the observed steps
Silent in the paper:
    - which parameters the word "bias" takes in: as in the authors' code all of them, those of
      attention, embeddings and batch norms as well
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from typing_extensions import override

from foretune.errors import UserError
from foretune.run import Run, check_bool, check_int, check_one_of, check_positive
from foretune.training.methods import AdaptMethod

if TYPE_CHECKING:
    from torch import nn

    from foretune.forecasting.model import ForecastMAE
    from foretune.tasks.task import Objective
    from foretune.training.learners.joint import Learner

TRAINED = ("prompt", "adapter", "bias", "norm", "future_pred", "decoder_embed")
NOT_DECAYED = ("prompt", "bias", "norm")
RECORD_FILE, DELTA_FILE = "forecast_peft.json", "forecast_peft.safetensors"


@dataclass(frozen=True, kw_only=True)
class ForecastPEFT(AdaptMethod):
    """Prompts and parallel adapters on a frozen Forecast-MAE, for each task.

    Args:
        modes: Futures that are forecast (K).
        prompts: Prompt tokens of each encoder block, and of each mode.
        adapter_rank: Inner width of the adapters (r); 0 for none.
        train: "parts", or "all" for the whole model (with `adapter_rank` 0 the paper's
            Forecast-FT).
        learning_rate: Of AdamW; prompts, biases and norms do not decay.
        freeze_bn: Keep the running statistics of batch norms.
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
        """Puts the new parts into the model, in place, and trains what is to be trained."""
        from foretune.adapters.fingerprint import fingerprint
        from foretune.forecasting.forecasters import check_pretrained
        from foretune.forecasting.learner import ForecastLearner

        if objective.kind != "forecast":
            raise UserError(
                f"forecast-peft adapts to scenes with the objective Forecast, got {objective.kind}"
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
        """Puts the new parts into a pretrained model, in place, and freezes what stays."""
        from foretune.forecasting.forecasters import add_prompts

        add_prompts(model, modes=self.modes, prompts=self.prompts, adapter_rank=self.adapter_rank)
        wanted = set(self.trained_names(model))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in wanted)

    def trained_names(self, model: nn.Module) -> list[str]:
        """The names of the parameters that differ from task to task."""
        names = [name for name, _ in model.named_parameters()]
        if self.train == "all":
            return names
        return [name for name in names if any(part in name for part in TRAINED)]


def load_adapted(folder: Path | str, base: ForecastMAE) -> ForecastMAE:
    """A copy of the base with the task that was saved in a folder.

    Args:
        folder: Of one task.
        base: The pretrained model that it was adapted from; it is not changed.

    Raises:
        UserError: No such folder, another base, or a file that does not fit.
    """
    import copy

    import safetensors.torch

    from foretune.adapters.fingerprint import fingerprint
    from foretune.methods import make

    folder = Path(folder)
    if not (folder / RECORD_FILE).is_file():
        raise UserError(f"{folder} holds no adapted forecaster: {RECORD_FILE} is missing")
    try:
        about = json.loads((folder / RECORD_FILE).read_text("utf-8"))
        tensors = safetensors.torch.load_file(folder / DELTA_FILE)
        method = make(**about["method"])
        wanted = about["base_fingerprint"]
    except (OSError, KeyError, TypeError, ValueError, safetensors.SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"cannot load the forecaster in {folder}: {reason}") from error
    if fingerprint(base) != wanted:
        raise UserError(
            f"{folder} was adapted from another base: its fingerprint is {wanted[:12]}, this "
            f"base's is {fingerprint(base)[:12]}"
        )
    model = copy.deepcopy(base)
    method.install(model)
    strange = set(tensors) ^ set(method.trained_names(model))
    strange -= {name for name, _ in model.named_buffers()}
    if strange:
        raise UserError(f"{folder / DELTA_FILE} does not fit its {RECORD_FILE}: {min(strange)}")
    model.load_state_dict(tensors, strict=False)
    return model.eval()
