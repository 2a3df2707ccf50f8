"""`plan_layers`: a training step layer by layer, from the shapes of a model that is not loaded.

Time is the operations of a traced step, divided by the rate of matrix products that is measured on
this machine.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from foretune.adapters.bank import AdapterBank
from foretune.errors import UserError
from foretune.models.surgery import is_in_head
from foretune.recipes.traced_step import (
    MB,
    blocks_of,
    device_of,
    matrix_rate,
    to_fake,
    trace,
    update_seconds,
)
from foretune.run import Run
from foretune.tasks.task import Objective, TaskCollection
from foretune.training.data import TaskData, sampler_for
from foretune.training.learners.joint import Learner
from foretune.training.methods import AdaptMethod, RetrainMethod
from foretune.training.token_budget import default_token_budget

WEIGHT_BYTES = 4  # retraining holds and trains float32, whatever it computes in
GRADIENT_BYTES = 4
MOMENT_BYTES = {"adamw": 8, "adamw-8bit": 2}
START_BYTES = 12  # a weight at the start of an inner loop, and the moments of its optimiser
SAMPLED_STEPS = 3  # of which a step's tokens are the mean


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part of a model in a training step.

    Args:
        name: Such as "embedding", "32 LlamaDecoderLayer" or "adapters of 10 tasks".
        parameters: Parameters of all its layers, or of the adapters of all tasks.
        weights_mb: Memory of these.
        training_mb: Memory of gradients and optimiser state.
        kept_mb: What a forward pass keeps for the backward pass.
        flops: Floating-point operations of a step, forward and backward; those of adapters are
            counted in their layers.
        seconds: Time of these, and of the optimiser's update.
    """

    name: str
    parameters: int
    weights_mb: float
    training_mb: float
    kept_mb: float
    flops: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one of several processes has with a base that is sharded over them (FSDP2).

    Args:
        processes: Their number.
        memory_mb: Its shard, its tasks' adapters, the largest layer and all outside the layers
            unsharded, and what its tokens keep.
        received_mb: What it receives in a step: the weights twice, for the forward and for the
            backward pass, and the gradients once.
        seconds: Time of its part of a step, without the transfer.
    """

    processes: int
    memory_mb: float
    received_mb: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """A training step by its parts.

    Args:
        tokens: Tokens of a step.
        tokens_at_once: Tokens of one forward and backward pass.
        precision: "fp32" or "bf16".
        rate: Measured operations per second of this machine's matrix products.
        parts: The parts.
        share: What each of several processes has; None for a single process.
    """

    tokens: int
    tokens_at_once: int
    precision: str
    rate: float
    parts: list[Part]
    share: Share | None

    @property
    def seconds(self) -> float:
        """Time of a step in one process."""
        return sum(part.seconds for part in self.parts)

    @property
    def memory_mb(self) -> float:
        """Memory of a step in one process."""
        return sum(part.weights_mb + part.training_mb + part.kept_mb for part in self.parts)


@dataclass(frozen=True, kw_only=True)
class _Step:
    """A step's texts, and what they and parameters cost.

    Args:
        tokens: Tokens of a step.
        number: Texts of one forward and backward pass.
        length: Tokens of each of these.
        state_bytes: Gradient and optimiser state of a parameter of the base.
        rate: Operations per second.
        update_seconds: Of each trained parameter.
        recomputed: Whether layers are computed again in the backward pass.
    """

    tokens: int
    number: int
    length: int
    state_bytes: int
    rate: float
    update_seconds: float
    recomputed: bool

    def part(
        self, name: str, modules: Sequence[nn.Module], flops: float = 0.0, kept_mb: float = 0.0
    ) -> Part:
        """These modules, which take so many operations in a pass."""
        parameters = list(dict.fromkeys(p for m in modules for p in m.parameters()))
        size = sum(p.numel() for p in parameters)
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        flops *= self.tokens / (self.number * self.length)
        return Part(
            name=name,
            parameters=size,
            weights_mb=size * WEIGHT_BYTES / MB,
            training_mb=trained * self.state_bytes / MB,
            kept_mb=kept_mb,
            flops=flops,
            seconds=flops / self.rate + trained * self.update_seconds,
        )


def plan_layers(
    learner: Learner,
    tasks: TaskCollection,
    method: RetrainMethod | AdaptMethod,
    run: Run,
    processes: int = 1,
) -> LayerPlan:
    """Plans a training step of a model on the meta device; its parameters become fake tensors.

    Args:
        learner: Of the model, with a bank of one slot, or None.
        tasks: All tasks that are trained at the same time, with a bound objective.
        method: What made the learner.
        run: The run, with the batches that the method needs.
        processes: Processes over which the base would be sharded.

    Raises:
        UserError: The model has no single list of blocks, needs values in order to be called, or
            reads no texts.
    """
    model, objective = learner.model, tasks.objective
    assert objective is not None  # `set_up` sets it
    if objective.tokenizer is None:
        raise UserError("--layers plans models that read texts: plan this one without --layers")
    blocks = blocks_of(model)
    to_fake(learner)
    step = _step(learner, tasks, objective, method, run)
    predicts = objective.head in ("causal-lm", "seq2seq")
    traced = trace(learner, step.number, step.length, run.precision, predicts_tokens=predicts)
    embedding, rest, head = _outside(model, blocks)
    parts = [step.part("embedding", embedding)]
    for kind, names in _kinds(blocks).items():
        flops = sum(traced.flops[name] for name in names)
        kept_mbs = [traced.kept_mb[name] for name in names]
        kept_mb = sum(kept_mbs)
        if step.recomputed:
            # The layers' inputs are kept, and all of the one that is computed again.
            width = blocks_width(model)
            flops *= 4 / 3
            kept_mb = len(names) * step.number * step.length * width * WEIGHT_BYTES / MB + max(
                kept_mbs
            )
        parts.append(step.part(kind, [blocks[name] for name in names], flops, kept_mb))
    in_blocks = sum(traced.flops[name] for name in blocks)
    parts.append(step.part("norms and the like", rest))
    parts.append(step.part("head and loss", head, traced.flops[""] - in_blocks, traced.kept_mb[""]))
    share = None
    adapters = None if learner.bank is None else _adapters(learner.bank, len(tasks), run, step)
    if processes > 1:
        share = _share(parts, blocks, adapters, len(tasks), step, processes)
    return LayerPlan(
        tokens=step.tokens,
        tokens_at_once=min(step.number * step.length, step.tokens),
        precision=run.precision,
        rate=step.rate,
        parts=parts if adapters is None else [*parts, adapters],
        share=share,
    )


def _step(
    learner: Learner,
    tasks: TaskCollection,
    objective: Objective,
    method: RetrainMethod | AdaptMethod,
    run: Run,
) -> _Step:
    """What the first steps read, on average."""
    device = device_of(run)
    budget = run.token_budget or (default_token_budget(learner.model) if device == "cpu" else None)
    data, repeat = TaskData.of(tasks, objective), learner.batches_per_update
    sampler = sampler_for(data, run, pooled=method.pooled, batches_per_update=repeat)
    picked = [sampler.picks(number) for number in range(min(SAMPLED_STEPS, run.steps))]
    steps = [data.step(p, "train", train=True, seed=[run.seed], budget=budget) for p in picked]
    at_once = max(chunk.num_tokens for step in steps for chunk in step.chunks)
    texts = [
        len(ids)
        for slot, row in picked[0]
        for ids in objective.token_ids(data.row(slot, "train", row))
    ]
    length = min(at_once, max(1, round(statistics.mean(texts))))
    number = max(1, round(at_once / length))
    inner = START_BYTES if getattr(learner, "inner_all", False) else 0
    return _Step(
        tokens=round(statistics.mean(step.num_tokens for step in steps)),
        number=number,
        length=length,
        state_bytes=GRADIENT_BYTES + MOMENT_BYTES[run.optimizer] + inner,
        rate=matrix_rate(learner, number * length, device, run.precision),
        update_seconds=update_seconds(device),
        recomputed=run.gradient_checkpointing,
    )


def _adapters(bank: AdapterBank, num_tasks: int, run: Run, step: _Step) -> Part:
    """The adapters and heads of all tasks, of which a step moves those of its tasks."""
    size = bank.parameters_per_slot * num_tasks
    moved = min(run.tasks_per_step or num_tasks, num_tasks) / num_tasks
    return Part(
        name=f"adapters of {num_tasks} task{'s' * (num_tasks > 1)}",
        parameters=size,
        weights_mb=size * WEIGHT_BYTES / MB,
        training_mb=size * (GRADIENT_BYTES + MOMENT_BYTES["adamw"]) / MB,
        kept_mb=0.0,
        flops=0.0,
        seconds=size * moved * step.update_seconds,
    )


def _share(
    base: Sequence[Part],
    blocks: dict[str, nn.Module],
    adapters: Part | None,
    num_tasks: int,
    step: _Step,
    processes: int,
) -> Share:
    """What each process has; tasks and tokens are split as evenly as they can be."""
    sizes = [sum(p.numel() for p in block.parameters()) for block in blocks.values()]
    total = sum(part.weights_mb for part in base)
    outside = total - sum(sizes) * WEIGHT_BYTES / MB
    memory = sum(part.weights_mb + part.training_mb for part in base) / processes
    memory += max(sizes) * WEIGHT_BYTES / MB + outside  # these are whole while they are computed
    seconds = sum(part.seconds for part in base) / processes
    if adapters is not None:
        portion = math.ceil(num_tasks / processes) / num_tasks
        memory += portion * (adapters.weights_mb + adapters.training_mb)
        seconds += portion * adapters.seconds
    passes = step.tokens / processes / (step.number * step.length)
    memory += sum(part.kept_mb for part in base) * min(1.0, passes)
    gradients = total if any(part.training_mb for part in base) else 0.0
    received = (1 - 1 / processes) * math.ceil(passes) * (2 * total + gradients)
    return Share(processes=processes, memory_mb=memory, received_mb=received, seconds=seconds)


def _kinds(blocks: dict[str, nn.Module]) -> dict[str, list[str]]:
    """The names of the blocks of each kind: of one class, with the same shapes and training."""
    kinds: dict[tuple[Any, ...], list[str]] = {}
    for name, block in blocks.items():
        shapes = [(n, tuple(p.shape), p.requires_grad) for n, p in block.named_parameters()]
        trains = any(p.requires_grad for p in block.parameters())
        label = f"{type(block).__name__}{'' if trains else ', frozen'}"
        kinds.setdefault((label, *shapes), []).append(name)
    numbered = [(f"{len(names)} {label}", names) for (label, *_), names in kinds.items()]
    labels = [label for label, _ in numbered]
    return {
        label if labels.count(label) == 1 else f"{label} from {names[0]}": names
        for label, names in numbered
    }


def _outside(
    model: nn.Module, blocks: dict[str, nn.Module]
) -> tuple[list[nn.Module], list[nn.Module], list[nn.Module]]:
    """(embedding, rest, head) outside the blocks; no parameter is in two of them."""
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    output: Any = getattr(model, "get_output_embeddings", lambda: None)()
    placed = {p for block in [embedding, *blocks.values()] for p in block.parameters()}
    rest: list[nn.Module] = []
    head: list[nn.Module] = []
    for name, module in model.named_modules():
        direct = set(module.parameters(recurse=False))
        if direct - placed:
            is_head = module is output or is_in_head(model, f"{name}.weight")
            (head if is_head else rest).append(module)
            placed |= direct
    return [embedding], rest, head


def blocks_width(model: nn.Module) -> int:
    """Numbers per token that go from one block to the next."""
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    return int(getattr(model.config, "hidden_size", embedding.weight.shape[-1]))
