"""`SourceFreeLearner`: adapt to rows without labels. `add_imputer`: what MAPU takes along."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from foretune.errors import UserError
from foretune.models.calls import eval_no_grad
from foretune.models.surgery import batch_norms, head_modules
from foretune.run import Run
from foretune.source_free.core_state import write_core
from foretune.source_free.imputer import Imputer
from foretune.source_free.losses import Outputs, SourceFreeLoss, mask_patches
from foretune.source_free.unlabelled import Unlabelled
from foretune.tasks.batch import Batch
from foretune.tasks.task import TaskCollection
from foretune.training.data import PooledSampler, Step, TaskData
from foretune.training.learners.joint import Learner
from foretune.training.loop import Progress, fit
from foretune.training.process_group import Partition

BatchNorm = Literal["stats", "frozen", "affine"]
ROWS = 64  # of a look at all target rows


class SourceFreeLearner(Learner):
    """Moves what the model lets train by a loss of its own predictions and features.

    One task at a time: the loss compares rows of one target domain with each other.

    Args:
        model: A classifier; its trainable parameters are trained.
        objective: Gives its logits.
        learning_rate: Of them.
        loss: What is asked of the predictions.
        bn: "frozen": batch normalisation works with the source's statistics; otherwise with those
            of the batch, and the running ones follow the target.
        tuned_state: Names in the model's state that may differ from the base's.
        factored: (r_out, r_in) of the layers that were put into Tucker form for this.
        method: The method's record as a mapping.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Unlabelled,
        *,
        learning_rate: float,
        loss: SourceFreeLoss,
        bn: BatchNorm = "stats",
        tuned_state: Sequence[str] = (),
        factored: Mapping[str, Any] | None = None,
        method: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(model, objective, learning_rate=learning_rate)
        self.source_labels = list(objective.labels)
        self.tuned_state, self.factored = list(tuned_state), dict(factored or {})
        self.method = dict(method or {})
        self.look = Look(model, objective, sequence=loss.imputes)
        self.loss, self.bn = loss, bn
        self.updates, self.steps = 0, 1
        self.data: TaskData | None = None

    @override
    def place(self, device: torch.device, partition: Partition) -> None:
        super().place(device, partition)
        self.data = partition.data

    @override
    def start(self, run: Run) -> None:
        if run.patience:
            raise UserError(
                "patience chooses a state by labels of the target, which source-free adaptation "
                "has not: leave it out"
            )
        super().start(run)
        self.token_budget = None  # diversity is of the whole batch
        self.steps = run.steps

    @override
    @contextlib.contextmanager
    def ready(self) -> Iterator[None]:
        """Nothing is packed or left out: the classifier's input must come as it is."""
        yield

    @override
    def write(self, folder: Path, labels: Sequence[Any] | None) -> None:
        """Writes what adapting changed: core.safetensors, core.json and README.md."""
        write_core(
            folder,
            self.model,
            self.tuned_state,
            factored=self.factored,
            method=self.method,
            about={"labels": self.source_labels},
        )

    @override
    def gradients(self, steps: Sequence[Step], seed: int = 0) -> dict[int, float]:
        step = steps[0]
        device = next(self.model.parameters()).device
        batch = step.chunks[0].to(device)
        self._see(len(batch))
        for module in batch_norms(self.model).values():
            module.train(self.bn != "frozen")
        with self.autocast():
            outputs = self.look(batch)
            imputed = self._imputed(batch) if self.loss.imputes else None
            rows = torch.tensor(step.rows, device=device)
            loss = self.loss(outputs, rows, self.updates / self.steps, imputed)
        loss.backward()
        self.updates += 1
        return {batch.slots[0]: float(loss.detach())}

    def _see(self, batch_size: int) -> None:
        """Shows the loss all target rows, at the start and, where it wants that, every epoch."""
        assert self.data is not None
        count = len(self.data.slots[0].train)
        epoch = math.ceil(count / batch_size)
        if self.updates and not (self.loss.refreshes and self.updates % epoch == 0):
            return
        device = next(self.model.parameters()).device
        found = []
        with eval_no_grad(self.model):
            for start in range(0, count, ROWS):
                picks = [(0, i) for i in range(start, min(start + ROWS, count))]
                part = self.data.step(picks, "train", train=False, seed=[0])
                found.append(self.look(part.chunks[0].to(device)))
        self.loss.see(
            Outputs(torch.cat([o.features for o in found]), torch.cat([o.logits for o in found]))
        )

    def _imputed(self, batch: Batch) -> Tensor:
        imputer: Any = self.model.imputer
        masked = replace(batch, inputs={**batch.inputs, "x": mask_patches(batch.inputs["x"])})
        imputed: Tensor = imputer(self.look(masked).sequence)
        return imputed


class Look:
    """Calls a classifier and says what its last layer read.

    Args:
        model: Its head is a linear layer, or ends in one.
        objective: Makes logits of a batch.
        sequence: Whether the features over time are asked for as well.

    Raises:
        UserError: The model does not say where its features over time are.
    """

    def __init__(self, model: nn.Module, objective: Any, *, sequence: bool = False) -> None:
        self.model, self.objective = model, objective
        linear = [
            m
            for name in head_modules(model)
            for m in model.get_submodule(name).modules()
            if isinstance(m, nn.Linear)
        ]
        self.head = linear[-1]
        name = getattr(model, "temporal", None) if sequence else None
        if sequence and name is None:
            raise UserError(
                f"{type(model).__name__} has no attribute `temporal`, the name of the module whose "
                "output is the sequence of features (n, channels, T): loss mapu needs it"
            )
        self.temporal = None if name is None else model.get_submodule(name)

    def __call__(self, batch: Batch) -> Outputs:
        features: list[Tensor] = []
        sequence: list[Tensor] = []
        hooks = [self.head.register_forward_pre_hook(lambda _, given: features.append(given[0]))]
        if self.temporal is not None:
            hooks.append(self.temporal.register_forward_hook(lambda _, __, y: sequence.append(y)))
        try:
            logits = self.objective.logits(self.model, batch)
        finally:
            for hook in hooks:
                hook.remove()
        return Outputs(_of_rows(features[0], batch), logits, *sequence)


def _of_rows(features: Tensor, batch: Batch) -> Tensor:
    """(n, d): features of a row, of its last token where the head reads every token."""
    if features.dim() == 2:
        return features
    mask = batch.inputs.get("attention_mask")
    if features.dim() == 3 and mask is not None:
        return features[torch.arange(len(features)), mask.sum(1) - 1]
    raise UserError(
        f"the head reads features of shape {tuple(features.shape)}; it needs (rows, channels), or "
        "(rows, tokens, channels) of a text"
    )


class ImputerLearner(Learner):
    """Trains `model.imputer` to fill in masked stretches; the rest of the model is fixed."""

    def __init__(self, model: nn.Module, objective: Any, *, learning_rate: float) -> None:
        super().__init__(model, objective, learning_rate=learning_rate)
        self.look = Look(model, objective, sequence=True)

    @override
    def gradients(self, steps: Sequence[Step], seed: int = 0) -> dict[int, float]:
        imputer: Any = self.model.imputer
        batch = steps[0].chunks[0].to(next(imputer.parameters()).device)
        masked = replace(batch, inputs={**batch.inputs, "x": mask_patches(batch.inputs["x"])})
        with eval_no_grad(self.model):
            wanted, given = self.look(batch).sequence, self.look(masked).sequence
        assert wanted is not None
        loss = F.mse_loss(imputer(given), wanted)
        loss.backward()
        return {batch.slots[0]: float(loss.detach())}


def add_imputer(
    model: nn.Module,
    tasks: TaskCollection,
    run: Run,
    *,
    learning_rate: float = 1e-3,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Gives a model an imputer trained on the source, as `model.imputer`; needed by loss "mapu".

    Args:
        model: A classifier of windows with an attribute `temporal`; nothing else of it changes.
        tasks: Source rows, with an objective.
        run: Seed, steps, batch size.
        learning_rate: Of the imputer.
        progress: Called after every update.

    Returns:
        The history: mean squared error by step.
    """
    assert tasks.objective is not None
    objective = tasks.objective.fit(tasks)
    data = TaskData.of(tasks, objective)
    look = Look(model, objective, sequence=True)
    first = data.step([(0, 0)], "train", train=False, seed=[0]).chunks[0]
    with eval_no_grad(model):
        sequence = look(first).sequence
    assert sequence is not None
    with torch.random.fork_rng(), _only_imputer_trains(model, sequence.shape[1], run.seed):
        learner = ImputerLearner(model, objective, learning_rate=learning_rate)
        sizes = [len(slot.train) for slot in data.slots]
        sampler = PooledSampler(sizes, run.batch_size, run.seed)
        record = fit(learner, data, sampler, run, validate=False, progress=progress)
    history: list[dict[str, Any]] = record["history"]
    return history


@contextlib.contextmanager
def _only_imputer_trains(model: nn.Module, channels: int, seed: int) -> Iterator[None]:
    wanted = {p: p.requires_grad for p in model.parameters()}
    model.requires_grad_(False)
    torch.manual_seed(seed)
    model.imputer = Imputer(channels)
    try:
        yield
    finally:
        for p, trained in wanted.items():
            p.requires_grad_(trained)
        model.imputer.requires_grad_(False)
