"""`Pruned`: what `prune` returns, and how it is saved."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from foretune.claims import output_folder
from foretune.errors import ForetuneError, UserError
from foretune.method import Method
from foretune.models.loading import save_base
from foretune.printable import in_one_line
from foretune.pruning import FORMAT, PLAN_FILE
from foretune.pruning.plan import Plan, loads_in_transformers, save_for_foretune
from foretune.pruning.statistics import ExpertStatistics
from foretune.training.record import environment


@dataclass
class Pruned:
    """The result of `prune`.

    Args:
        model: The pruned model.
        tokenizer: Its tokenizer, saved with it; None for none.
        method: The method's record.
        plan: Block name → which of its experts were kept, merged or dropped.
        size: "before" and "after": number of parameters, and of experts per block.
        cost: Tokens read, and seconds of collecting statistics and of pruning.
        statistics: Block name → its statistics on the task's examples.
        scores: Held-out losses, where the caller measured them; saved in experts.json.
    """

    model: nn.Module
    tokenizer: Any
    method: Method
    plan: Plan
    size: dict[str, Any]
    cost: dict[str, Any]
    statistics: dict[str, ExpertStatistics] = field(repr=False)
    scores: dict[str, Any] = field(default_factory=dict)

    @property
    def loads_with(self) -> str:
        """Who loads the saved folder: "transformers" if a config describes it, or "foretune"."""
        return "transformers" if loads_in_transformers(self.model, self.plan) else "foretune"

    def record(self) -> dict[str, Any]:
        """The content of experts.json."""
        return {
            "format": FORMAT,
            "loads_with": self.loads_with,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "method": self.method.to_dict(),
            "size": self.size,
            "cost": self.cost,
            "scores": self.scores,
            "blocks": {name: block.to_dict() for name, block in self.plan.items()},
            "environment": environment(),
        }

    def save(self, folder: Path | str, *, overwrite: bool = False) -> Path:
        """Write a model folder with experts.json, completely or not at all.

        Returns:
            The folder. `AutoModelForCausalLM.from_pretrained` loads it where `loads_with` is
            "transformers"; `foretune.load_model(folder, head="causal-lm")` loads either kind.

        Raises:
            UserError: The folder is not empty and `overwrite` is not set, or it is set and the
                folder holds no pruned model.
        """
        folder = Path(folder)
        with output_folder(folder, "prune", overwrite=overwrite, at_once=True) as part:
            if self.loads_with == "transformers":
                save_base(self.model, self.tokenizer, part)
            else:
                save_for_foretune(self.model, part)
                if self.tokenizer is not None:
                    self.tokenizer.save_pretrained(part)
            (part / PLAN_FILE).write_text(plan_text(self), "utf-8")
            self._check_saved(part)
        return folder

    def _check_saved(self, part: Path) -> None:
        """Checks that the folder gives the model back: all tensors, bit for bit.

        Raises:
            ForetuneError: It does not, or cannot be loaded.
        """
        from foretune.models.loading import load_model
        from foretune.models.pretrained import quiet

        saved_class: Any = type(self.model)
        try:
            if self.loads_with == "transformers":
                with quiet():
                    loaded = saved_class.from_pretrained(part, dtype=self.model.dtype)
            else:
                dtype: Any = self.model.dtype
                loaded, _ = load_model(part, head="causal-lm", dtype=dtype)
        except (UserError, OSError, ValueError, RuntimeError) as error:
            reason = in_one_line(str(error))
            raise ForetuneError(
                f"the pruned model is not saved, because it does not load again: {reason}"
            ) from error
        check_same(self.model, loaded)


def plan_text(pruned: Pruned) -> str:
    """The text of experts.json."""
    return json.dumps(pruned.record(), indent=1) + "\n"


def check_same(model: nn.Module, loaded: nn.Module) -> None:
    """Checks that a model is the one that was saved, bit for bit.

    Raises:
        ForetuneError: A tensor differs or is missing.
    """
    state = loaded.state_dict()
    for name, tensor in model.state_dict().items():
        if name not in state or not torch.equal(state[name].cpu(), tensor.cpu()):
            raise ForetuneError(
                f"the pruned model is not saved: {name} is not the same when it is loaded again"
            )
