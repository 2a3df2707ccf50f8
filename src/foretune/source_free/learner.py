"""`SourceFreeLearner` adapts to unlabelled examples; `add_imputer` trains MAPU's imputer."""

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
from foretune.models.seeding import seed_generators
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
PROBE_BATCH_SIZE = 64  # of the pass over all target examples


class SourceFreeLearner(Learner):
    """Trains the model's trainable parameters by a loss of its predictions and features.

    One task at a time: the loss compares examples of one target domain with each other.

    Args:
        model: A classifier; its trainable parameters are trained.
        objective: Computes its logits.
        learning_rate: Learning rate of the trainable parameters.
        loss: The source-free loss.
        bn: "frozen" normalises with the source's running statistics; otherwise batch norms use
            the statistics of the batch, and the running statistics follow the target.
        tuned_state: The keys of the model's state that may differ from the base's.
        factored: (r_out, r_in) of the layers that were factorised for this adaptation.
        method: The method's `to_dict()`.

    Raises:
        UserError: The loss needs features over time and the model does not name its module.
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
        self.probe = FeatureProbe(model, objective, sequence=loss.imputes)
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
                "patience needs target labels to choose the best state, and source-free "
                "adaptation has none; leave it out"
            )
        super().start(run)
        self.token_budget = None  # the diversity term needs the full batch at once
        self.steps = run.steps

    @override
    def stop(self) -> None:
        super().stop()
        self.data = None

    @override
    @contextlib.contextmanager
    def ready(self) -> Iterator[None]:
        """Neither packs nor skips anything: the classifier head needs its usual input."""
        yield

    @override
    def write(self, folder: Path, labels: Sequence[Any] | None) -> None:
        """Writes the adapted state: core.safetensors, core.json and README.md."""
        write_core(
            folder,
            self.model,
            self.tuned_state,
            factored=self.factored,
            method=self.method,
            metadata={"labels": self.source_labels},
        )

    @override
    def gradients(self, steps: Sequence[Step], seed: int = 0) -> dict[int, float]:
        step = steps[0]
        device = next(self.model.parameters()).device
        batch = step.chunks[0].to(device)
        self._refresh_loss(len(batch))
        for module in batch_norms(self.model).values():
            module.train(self.bn != "frozen")
        with self.autocast():
            outputs = self.probe(batch)
            imputed = self._imputed(batch) if self.loss.imputes else None
            indices = torch.tensor(step.rows, device=device)
            loss = self.loss(outputs, indices, self.updates / self.steps, imputed)
        loss.backward()
        self.updates += 1
        return {batch.slots[0]: float(loss.detach())}

    def _refresh_loss(self, batch_size: int) -> None:
        """Gives the loss the outputs for all target examples: once, or at every epoch's start."""
        assert self.data is not None
        count = len(self.data.slots[0].train)
        epoch_steps = math.ceil(count / batch_size)
        if self.updates and not (self.loss.refreshes and self.updates % epoch_steps == 0):
            return
        device = next(self.model.parameters()).device
        parts = []
        with eval_no_grad(self.model):
            for start in range(0, count, PROBE_BATCH_SIZE):
                picks = [(0, i) for i in range(start, min(start + PROBE_BATCH_SIZE, count))]
                step = self.data.step(picks, "train", train=False, seed=[0])
                parts.append(self.probe(step.chunks[0].to(device)))
        features, logits = [part.features for part in parts], [part.logits for part in parts]
        self.loss.refresh(Outputs(torch.cat(features), torch.cat(logits)))

    def _imputed(self, batch: Batch) -> Tensor:
        imputer: Any = self.model.imputer
        imputed: Tensor = imputer(self.probe(_masked(batch)).sequence)
        return imputed


class FeatureProbe:
    """Calls a classifier and captures the features that its last linear layer reads.

    Args:
        model: A classifier whose head is a linear layer, or ends in one.
        objective: Computes the logits of a batch.
        sequence: Whether to capture the features over time as well.

    Raises:
        UserError: The model does not name the module of its features over time.
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
                f"{type(model).__name__} has no attribute `temporal`; loss mapu needs it to name "
                "the module that outputs features over time (n, channels, T)"
            )
        self.temporal = None if name is None else model.get_submodule(name)

    def __call__(self, batch: Batch) -> Outputs:
        """The outputs for the batch, in the model's current mode."""
        features: list[Tensor] = []
        sequence: list[Tensor] = []
        hooks = [self.head.register_forward_pre_hook(lambda _, args: features.append(args[0]))]
        if self.temporal is not None:
            hooks.append(self.temporal.register_forward_hook(lambda _, __, y: sequence.append(y)))
        try:
            logits = self.objective.logits(self.model, batch)
        finally:
            for hook in hooks:
                hook.remove()
        return Outputs(_example_features(features[0], batch), logits, *sequence)


def _masked(batch: Batch) -> Batch:
    """The batch with one stretch of time masked in every window."""
    return replace(batch, inputs={**batch.inputs, "x": mask_patches(batch.inputs["x"])})


def _example_features(features: Tensor, batch: Batch) -> Tensor:
    """(n, d) features per example: those of its last token where the head reads all tokens.

    Raises:
        UserError: The features have another shape.
    """
    if features.dim() == 2:
        return features
    mask = batch.inputs.get("attention_mask")
    if features.dim() == 3 and mask is not None:
        return features[torch.arange(len(features)), mask.sum(1) - 1]
    raise UserError(
        f"the head reads features of shape {tuple(features.shape)}; source-free losses need "
        "(n, d), or (n, tokens, d) with an attention mask"
    )


class ImputerLearner(Learner):
    """Trains `model.imputer` to predict the features of masked windows; all else is frozen."""

    def __init__(self, model: nn.Module, objective: Any, *, learning_rate: float) -> None:
        super().__init__(model, objective, learning_rate=learning_rate)
        self.probe = FeatureProbe(model, objective, sequence=True)

    @override
    def gradients(self, steps: Sequence[Step], seed: int = 0) -> dict[int, float]:
        imputer: Any = self.model.imputer
        batch = steps[0].chunks[0].to(next(imputer.parameters()).device)
        masked = _masked(batch)
        with eval_no_grad(self.model):
            target, masked_sequence = self.probe(batch).sequence, self.probe(masked).sequence
        assert target is not None
        loss = F.mse_loss(imputer(masked_sequence), target)
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
    """Adds an imputer trained on the source as `model.imputer`, which loss "mapu" needs.

    Args:
        model: A classifier of windows with an attribute `temporal`; its weights do not change.
        tasks: Source examples, with an objective.
        run: Random seed, steps and batch size.
        learning_rate: Learning rate of the imputer.
        progress: Called after every update.

    Returns:
        The history: mean squared error by step.

    Raises:
        UserError: The model has no attribute `temporal`.
    """
    assert tasks.objective is not None
    objective = tasks.objective.fit(tasks)
    data = TaskData.of(tasks, objective)
    probe = FeatureProbe(model, objective, sequence=True)
    first = data.step([(0, 0)], "train", train=False, seed=[0]).chunks[0]
    with eval_no_grad(model):
        sequence = probe(first).sequence
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
    was_trainable = {p: p.requires_grad for p in model.parameters()}
    model.requires_grad_(False)
    seed_generators(seed)
    model.imputer = Imputer(channels)
    try:
        yield
    finally:
        for p, trainable in was_trainable.items():
            p.requires_grad_(trainable)
        model.imputer.requires_grad_(False)
