"""`ForecastLearner`: trains the parameters of one task and writes only these."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import nn
from typing_extensions import override

from foretune.forecasting import DELTA_FILE, FORMAT, RECORD_FILE
from foretune.formats import stamped
from foretune.tasks.task import Objective
from foretune.training.learners.joint import Learner


class ForecastLearner(Learner):
    """The joint learner of one task's prompts, adapters and other trained parameters.

    Args:
        model: The pretrained model with prompts and adapters added.
        objective: Losses and scores.
        learning_rate: Learning rate of AdamW.
        not_decayed: Parameters with one of these in their names have no weight decay.
        freeze_bn: Freeze the running statistics of batch norms.
        trained_names: Names of the trained parameters, which differ between tasks.
        base_fingerprint: Fingerprint of the pretrained model.
        method: The method's record as a mapping.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        *,
        learning_rate: float,
        not_decayed: Sequence[str],
        freeze_bn: bool,
        trained_names: Sequence[str],
        base_fingerprint: str,
        method: Mapping[str, Any],
    ) -> None:
        super().__init__(
            model,
            objective,
            learning_rate=learning_rate,
            not_decayed=not_decayed,
            frozen_statistics=freeze_bn,
        )
        self.names = list(trained_names)
        if not freeze_bn:
            self.names += [name for name, _ in model.named_buffers()]
        self.record = {"method": dict(method), "base_fingerprint": base_fingerprint}

    @override
    def write(self, folder: Path, labels: Sequence[Any] | None) -> None:
        """Write the trained tensors and the fingerprint of the base, for `load_adapted`."""
        state = self.model.state_dict()
        tensors = {name: state[name].contiguous().clone() for name in self.names}
        safetensors.torch.save_file(tensors, str(folder / DELTA_FILE))
        text = json.dumps(stamped(self.record, FORMAT), indent=1) + "\n"
        (folder / RECORD_FILE).write_text(text, encoding="utf-8")
