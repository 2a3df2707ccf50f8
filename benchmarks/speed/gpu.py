"""The joint step on a GPU, in bf16: absolute times, share of the chip's matrix rate, peak memory.

python benchmarks/speed/gpu.py

RoBERTa-base and a decoder of Llama's shape with 0.5 B parameters, random weights, 10 and 50 tasks:
plain fine-tuning, ours and a peft loop; rows of one length (one batched product over tasks) and of
unlike lengths (one product after the other), and torch's grouped_mm in their place; adapting on a
frozen base in bf16 and in NF4; compiled. What matters most comes first. It ends itself after
`--minutes` (9), each row is saved at once, and what is missing is measured when it is run again.
Without CUDA it says so and measures nothing; `--device cpu --quick` tries its logic on a CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import systems
import timing
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaModel

from foretune.adapters import lora
from foretune.adapters.lora import Layout
from foretune.models.loading import load_base

KEY = ("model", "tasks", "lengths", "variant", "device")
LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# What is measured first: (lengths, variant).
PLAIN = [("equal", "floor"), ("equal", "ours"), ("equal", "peft loop"), ("unlike", "floor"),
         ("unlike", "ours")]  # fmt: skip
GROUPED = [("equal", "ours, grouped_mm"), ("unlike", "ours, grouped_mm")]
ADAPT = [("equal", "adapt"), ("equal", "adapt, nf4")]
COMPILED = [("equal", "floor, compiled"), ("equal", "ours, compiled"), ("unlike", "ours, compiled")]
SHAPES = {
    "llama-0.5b": {"vocab_size": 32000, "hidden_size": 1024, "num_hidden_layers": 24,
                   "num_attention_heads": 16, "num_key_value_heads": 4, "intermediate_size": 4864},
    "llama-tiny": {"vocab_size": 100, "hidden_size": 64, "num_hidden_layers": 2,
                   "num_attention_heads": 2, "intermediate_size": 64},
}  # fmt: skip


class OutOfTimeError(BaseException):
    """The minutes are over; not an Exception, so that no variant takes it for its own failure."""


def main() -> None:
    parser = timing.parser(__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rows", type=int, default=8, help="of each task in a step")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--minutes", type=float, default=9.0, help="after which it ends itself")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("gpu.py: no CUDA device here, nothing measured")
        return
    timing.begin(options)
    signal.signal(signal.SIGALRM, _out_of_time)
    # Once more every few seconds, should something on the way have swallowed the first one.
    signal.setitimer(signal.ITIMER_REAL, 60 * options.minutes, 5)
    try:
        measure_all(options)
    except OutOfTimeError:
        print(f"gpu.py: {options.minutes:g} minutes are over; run it again for what is missing")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _out_of_time(*_: object) -> None:
    raise OutOfTimeError


def measure_all(options: argparse.Namespace) -> None:
    """Every cell that is not in the result file, the most telling ones first."""
    name = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    rate = matrix_rate(options.device, 256 if options.quick else 8192)
    results = timing.Results("gpu", KEY, options, device=name, matrix_flops_per_second=rate)
    sizes = ("tiny", "llama-tiny") if options.quick else ("roberta-base", "llama-0.5b")
    parts = [(PLAIN, sizes), (GROUPED, sizes), (ADAPT, sizes[1:]), (COMPILED, sizes)]
    for variants, of_sizes in parts[:-1] if options.quick else parts:
        for size in of_sizes:
            for num_tasks in (3,) if options.quick else (10, 50):
                for lengths, variant in variants:
                    cell = {"model": size, "tasks": num_tasks, "lengths": lengths,
                            "variant": variant, "device": name}  # fmt: skip
                    if not results.has(**cell):
                        results.add({**cell, **measure(options, cell, rate)})


def measure(options: argparse.Namespace, cell: dict[str, Any], rate: float) -> dict[str, Any]:
    """The seconds of a step, or why this machine cannot make one."""
    free(options.device)
    try:
        with prepared(options, cell) as (work, num_tokens, linear, factor):
            found = timed(work, options)
    except Exception as error:  # a variant that this machine cannot run is a result too
        return {"not_run": f"{type(error).__name__}: {str(error)[:200]}"}
    flops = factor * linear * num_tokens
    return {
        "tokens": num_tokens,
        **found,
        "flops_per_second": round(flops / found["seconds"]),
        "share_of_matrix_rate": round(flops / found["seconds"] / rate, 3),
    }


@contextlib.contextmanager
def prepared(
    options: argparse.Namespace, cell: dict[str, Any]
) -> Iterator[tuple[Callable[[], object], int, int, int]]:
    """(a step, its tokens, parameters of the base's linear layers, operations of each per token).

    A frozen base takes no gradient of its weights: four operations in place of six.
    """
    variant, device = cell["variant"], options.device
    model = model_of(cell["model"], device)
    linear = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2 and "emb" not in n)
    length = 8 if options.quick else options.length
    lengths = [length] if cell["lengths"] == "equal" else [length, length // 4, length // 2]
    vocabulary = model.config.vocab_size
    tasks = systems.made_up_tasks(cell["tasks"], options.rows, lengths, vocabulary)
    if cell["model"] in SHAPES:  # it has no pooler to leave out
        systems.LORA.pop("exclude_modules", None)
        systems.LORA["target_modules"] = LLAMA
    else:
        systems.LORA |= {"target_modules": systems.TARGETS, "exclude_modules": ["pooler.dense"]}
    step = systems.joint_step(tasks)
    adapts = variant.startswith("adapt")
    if variant == "peft loop":
        yield peft_loop(model, tasks, device), step.num_tokens, linear, 6
        return
    if adapts:
        model = reloaded(model, "nf4" if "nf4" in variant else None).to(device)
    has_bank = not variant.startswith("floor")
    learner = systems.learner(
        model, cell["tasks"], adapters=has_bank, train_base=not adapts, lora=systems.LORA
    )
    if not adapts:
        learner.autocast = lambda: torch.autocast(device, torch.bfloat16)
    if learner.bank is not None:
        learner.bank.to(device)
        learner.start(systems.RUN)
    with contextlib.ExitStack() as stack:
        if variant == "ours, grouped_mm":
            stack.enter_context(grouped_products())
        stack.enter_context(learner.ready())
        if variant.endswith("compiled"):
            model.compile()
        work = functools.partial(learner.update, [step], systems.RUN, 1.0)
        yield work, step.num_tokens, linear, 4 if adapts else 6


def peft_loop(model: Any, tasks: list[list[dict[str, Any]]], device: str) -> Callable[[], None]:
    """One peft adapter a task, one task after the other, gradients added up, one fused AdamW."""
    made = systems.peft_model(model, len(tasks)).to(device)
    batches = [
        {name: tensor.to(device) for name, tensor in systems.inputs_of(rows).items()}
        for rows in tasks
    ]
    optimizer = torch.optim.AdamW(made.parameters(), lr=systems.RATE, fused=True)

    def step() -> None:
        for i, inputs in enumerate(batches):
            systems.select_task(made, i)
            with torch.autocast(device, torch.bfloat16):
                loss = systems.losses_of(made, inputs).mean() / len(batches)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def reloaded(model: Any, quantize: Any) -> Any:
    """The same base from a folder, in bf16 or in NF4."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        del model
        base, _ = load_base(folder, dtype=torch.bfloat16, quantize=quantize)
    return base.train()


def free(device: str) -> None:
    """Gives back what the last cell held."""
    torch.compiler.reset()
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def timed(work: Callable[[], object], options: argparse.Namespace) -> dict[str, Any]:
    """Median wall-clock seconds of a step after three that do not count, and peak memory."""
    cuda = options.device == "cuda"
    found = []
    for i in range(options.repeats + 3):
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        work()
        if cuda:
            torch.cuda.synchronize()
        if i >= 3:
            found.append(time.perf_counter() - start)
    peak = round(torch.cuda.max_memory_allocated() / 2**20) if cuda else None
    return {"repeats": options.repeats, "seconds": statistics.median(found), "peak_mb": peak}


def matrix_rate(device: str, n: int) -> float:
    """FLOP/s of a product of square bf16 matrices."""
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    best = float("inf")
    for _ in range(10):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        a @ a
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return round(2 * n**3 / best)


def model_of(size: str, device: str) -> Any:
    """A model of that size with random weights, made on the device."""
    with torch.device(device):
        if size not in SHAPES:
            return systems.encoder(size)
        return LlamaModel(LlamaConfig(**SHAPES[size], use_cache=False)).train()


@contextlib.contextmanager
def grouped_products() -> Iterator[None]:
    """foretune's products of segments replaced by torch.nn.functional.grouped_mm."""

    def ends(layout: Layout, like: Tensor) -> Tensor:
        counts = torch.tensor(layout.counts, device=like.device)
        return counts.cumsum(0).to(torch.int32)

    def shrink(x: Tensor, w: Tensor, layout: Layout) -> Tensor:
        return F.grouped_mm(x, w.transpose(1, 2), offs=ends(layout, x)).flatten()

    def add_expanded_(y: Tensor, h: Tensor, w: Tensor, layout: Layout, scale: float) -> None:
        h = h.view(len(y), -1)
        y.add_(F.grouped_mm(h, w, offs=ends(layout, h)), alpha=scale)

    def outer(h: Tensor, x: Tensor, layout: Layout) -> Tensor:
        return F.grouped_mm(h.view(len(x), -1).T, x, offs=ends(layout, x))

    own = lora.shrink, lora.add_expanded_, lora.outer
    lora.shrink, lora.add_expanded_, lora.outer = shrink, add_expanded_, outer
    try:
        yield
    finally:
        lora.shrink, lora.add_expanded_, lora.outer = own


if __name__ == "__main__":
    main()
