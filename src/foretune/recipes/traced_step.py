"""A training step on fake tensors, and how fast this machine would compute it.

Fake tensors have shapes and no values: what torch would multiply, and keep for the backward pass,
is counted and not computed.
"""

from __future__ import annotations

import contextlib
import logging
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from foretune.errors import UserError
from foretune.models.products import linear, weight_gradient
from foretune.models.routing import route
from foretune.models.surgery import block_list
from foretune.run import Run
from foretune.training.learners.joint import Learner

MB = 2**20
MOST_ROWS = 2048  # of the matrices that are timed
SAME_ROWS = 256  # so many more or fewer are not timed apart
OPTIMISED = 2**22  # parameters of the update that is timed

Shape = Sequence[int]


def attention_flops(query: Shape, key: Shape, *_: Any, **__: Any) -> int:
    """Operations of two products, for (n, heads, L, d) queries and (n, heads, K, d) keys."""
    return 4 * math.prod(query) * key[-2]


def attention_backward_flops(_: Shape, query: Shape, key: Shape, *__: Any, **___: Any) -> int:
    """Operations of five products: torch computes the scores once more."""
    return 10 * math.prod(query) * key[-2]


def added_flops(_: Shape, a: Shape, b: Shape, *__: Any, **___: Any) -> int:
    """Operations of a product of (…, m, k) and (…, k, n) matrices that is added in place."""
    return 2 * math.prod(a) * b[-1]


FORMULAS = {
    # torch itself counts the attention of GPUs, and products that are not added in place
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
    torch.ops.aten.addmm_: added_flops,
    torch.ops.aten.baddbmm_: added_flops,
}


@dataclass(frozen=True, kw_only=True)
class Traced:
    """What one forward and backward pass would do.

    Args:
        flops: Name of a block or of the head → operations; "" for all of the model.
        kept_mb: Name of a block → memory kept for the backward pass; "" for what is outside.
    """

    flops: dict[str, float]
    kept_mb: dict[str, float]


def device_of(run: Run) -> str:
    """The type of the device that a run with this `device` will use."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    return (run.device or default).partition(":")[0]


def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """Name → transformer block.

    Raises:
        UserError: The model has no single list of blocks.
    """
    named = block_list(model)
    if named is None:
        raise UserError(
            f"{type(model).__name__} has no single list of layers to plan one by one: plan it "
            "without --layers, which loads it"
        )
    return {f"{named[0]}.{i}": block for i, block in enumerate(named[1])}


def to_fake(learner: Learner) -> None:
    """Makes the parameters and buffers of model and bank, on the meta device, fake ones on a CPU.

    Fake tensors choose the operations that a CPU runs; meta tensors would choose others.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        learner.model.to_empty(device="cpu")
        if learner.bank is not None:
            learner.bank.to_empty(device="cpu")
    tie = getattr(learner.model, "tie_weights", None)
    if callable(tie):  # each of the names of a tensor got one of its own
        tie()


def trace(
    learner: Learner, number: int, length: int, precision: str, *, predicts_tokens: bool
) -> Traced:
    """Runs a forward and a backward pass on fake tensors.

    Args:
        learner: Of a model with fake parameters, and its bank.
        number: Texts of the pass.
        length: Tokens of each.
        precision: "fp32" or "bf16" (autocast).
        predicts_tokens: Whether the loss is that of each token, over the vocabulary.

    Raises:
        UserError: The model needs values in order to be called.
    """
    model, bank = learner.model, learner.bank
    blocks = blocks_of(model)
    kept_mb = dict.fromkeys([*blocks, ""], 0.0)
    seen: dict[int, Tensor] = {}
    current = [""]
    owned = [*model.parameters(), *(() if bank is None else bank.parameters())]
    weights = set(map(id, owned))

    def keep(tensor: Tensor) -> Tensor:
        viewed = tensor if tensor._base is None else tensor._base  # a view keeps all of it
        if id(viewed) not in weights and id(viewed) not in seen:
            seen[id(viewed)] = viewed  # held, or another one could get its id
            kept_mb[current[0]] += viewed.numel() * viewed.element_size() / MB
        return tensor

    counter = FlopCounterMode(display=False, custom_mapping=FORMULAS)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_errors_unlogged())
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(_naming_block(blocks, current))
        if bank is not None:
            stack.enter_context(bank.attached())
        stack.enter_context(route((0,) * number))
        stack.enter_context(counter)
        ids = torch.zeros(number, length, dtype=torch.long)
        try:
            with (
                torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
                torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            ):
                output = model(input_ids=ids)
                if not predicts_tokens:
                    loss = next(iter(output.values())).float().sum()
                else:
                    loss = F.cross_entropy(output.logits.float().flatten(0, 1), ids.flatten())
            loss.backward()
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
            raise UserError(
                f"{type(model).__name__} cannot be planned without its weights ({reason}): plan it "
                "without --layers"
            ) from error
    counts = counter.get_flop_counts()
    root = type(model).__name__
    flops = {name: float(sum(counts.get(f"{root}.{name}", {}).values())) for name in blocks}
    return Traced(flops={**flops, "": float(counter.get_total_flops())}, kept_mb=kept_mb)


@contextlib.contextmanager
def _errors_unlogged() -> Iterator[None]:
    """Inside the block torch does not log the errors of fake tensors, which are raised as well."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _naming_block(blocks: dict[str, nn.Module], current: list[str]) -> Iterator[None]:
    """Inside the block `current` holds the name of the block that is called, or ""."""

    def enter(name: str) -> Callable[..., None]:
        return lambda *_: current.__setitem__(0, name)

    handles = [
        handle
        for name, block in blocks.items()
        for handle in (
            block.register_forward_pre_hook(enter(name)),
            block.register_forward_hook(enter("")),
        )
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def matrix_rate(learner: Learner, rows: int, device: str, precision: str) -> float:
    """Operations per second of the three products of a linear layer: forward, and two backward.

    The layer is as wide as the widest in the model's blocks.

    Args:
        learner: The model, and the bank: adapted layers may be multiplied by another library.
        rows: Tokens.
        device: Where the products run.
        precision: "fp32" or "bf16".
    """
    weights = {
        f"{name}.{part}".removesuffix(".weight"): p.shape
        for name, block in blocks_of(learner.model).items()
        for part, p in block.named_parameters()
        if p.dim() == 2
    }
    outputs, inputs = max(weights.values(), key=math.prod)
    rows = min(math.ceil(rows / SAME_ROWS) * SAME_ROWS, MOST_ROWS)
    adapted = set() if learner.bank is None else {*learner.bank.layer_names}
    sizes = [0, 0]  # of weights that are not adapted, and of those that are
    for name, shape in weights.items():
        sizes[name in adapted] += math.prod(shape)
    seconds = sum(
        size / sum(sizes) / _matrix_rate(rows, inputs, outputs, device, precision, bool(i))
        for i, size in enumerate(sizes)
        if size
    )
    return 1 / seconds


@cache
def _matrix_rate(
    rows: int, inputs: int, outputs: int, device: str, precision: str, adapted: bool
) -> float:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32

    def ones(height: int, width: int) -> Tensor:
        return torch.ones(height, width, dtype=dtype, device=device)

    x, gradient, weight = ones(rows, inputs), ones(rows, outputs), ones(outputs, inputs)

    def products() -> None:
        if adapted:
            linear(x, weight)
            linear(gradient, weight.T)
            weight_gradient(gradient, x)
        else:
            F.linear(x, weight)
            gradient @ weight
            gradient.T @ x

    return 6.0 * rows * inputs * outputs / _seconds(products, device)


@cache
def update_seconds(device: str) -> float:
    """Seconds per parameter of AdamW's update."""
    p = nn.Parameter(torch.ones(OPTIMISED, device=device))
    p.grad = torch.ones_like(p)
    return _seconds(torch.optim.AdamW([p], fused=True).step, device) / OPTIMISED


def _seconds(work: Callable[[], object], device: str) -> float:
    """Median time of three calls after one that does not count.

    On a CPU it is the processor's, which other work on the machine does not change.
    """

    def now() -> float:
        if device == "cpu":
            return time.process_time() / torch.get_num_threads()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    times = []
    for _ in range(4):
        start = now()
        work()
        times.append(now() - start)
    return statistics.median(times[1:])
