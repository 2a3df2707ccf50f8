"""The joint step on a GPU, in bf16: absolute times, share of the chip's matrix rate, peak memory.

python benchmarks/speed/gpu.py

RoBERTa-base and a decoder of Llama's shape with 0.5 B parameters, random weights, 10 and 50 tasks.
`ours` is measured with rows of one length (one batched product over tasks) and of unlike lengths
(one product after the other, and torch's grouped_mm in their place), as it is and compiled.
Without CUDA it says so and measures nothing; `--device cpu --quick` tries its logic on a CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
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

KEY = ("model", "tasks", "lengths", "variant", "device")
LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    parser = timing.parser(__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rows", type=int, default=8, help="of each task in a step")
    parser.add_argument("--length", type=int, default=128)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("gpu.py: no CUDA device here, nothing measured")
        return
    timing.begin(options)
    name = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    rate = matrix_rate(options.device, 256 if options.quick else 8192)
    results = timing.Results("gpu", KEY, options, device=name, matrix_flops_per_second=rate)
    for size in ("tiny",) if options.quick else ("roberta-base", "llama-0.5b"):
        for num_tasks in (3,) if options.quick else (10, 50):
            for lengths in ("equal", "unlike"):
                for variant in variants_of(lengths, compiled=not options.quick):
                    cell = {"model": size, "tasks": num_tasks, "lengths": lengths,
                            "variant": variant, "device": name}  # fmt: skip
                    if not results.has(**cell):
                        results.add({**cell, **measure(options, cell, rate)})


def variants_of(lengths: str, *, compiled: bool) -> list[str]:
    found = ["floor", "ours", *(["ours, compiled"] if compiled else [])]
    return found if lengths == "equal" else [*found, "ours, grouped_mm"]


def measure(options: argparse.Namespace, cell: dict[str, Any], rate: float) -> dict[str, Any]:
    model = model_of(cell["model"]).to(options.device)
    vocabulary = model.config.vocab_size
    length = 8 if options.quick else options.length
    lengths = [length] if cell["lengths"] == "equal" else [length, length // 4, length // 2]
    tasks = systems.made_up_tasks(cell["tasks"], options.rows, lengths, vocabulary)
    systems.LORA["target_modules"] = LLAMA if "llama" in cell["model"] else systems.TARGETS
    adapters = cell["variant"] != "floor"
    learner = systems.learner(model, cell["tasks"], adapters=adapters, lora=systems.LORA)
    learner.autocast = lambda: torch.autocast(options.device, torch.bfloat16)
    if learner.bank is not None:
        learner.bank.to(options.device)
        learner.start(systems.RUN)
    step = systems.joint_step(tasks)
    with contextlib.ExitStack() as stack:
        if cell["variant"] == "ours, grouped_mm":
            stack.enter_context(grouped_products())
        stack.enter_context(learner.ready())
        if cell["variant"] == "ours, compiled":
            model.compile()
        try:
            found = timed(lambda: learner.update([step], systems.RUN, 1.0), options)
        except Exception as error:  # a variant that this machine cannot run is a result too
            return {"not_run": f"{type(error).__name__}: {str(error)[:200]}"}
    linear = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2 and "emb" not in n)
    flops = 6 * linear * step.num_tokens
    return {
        "tokens": step.num_tokens,
        **found,
        "flops_per_second": round(flops / found["seconds"]),
        "share_of_matrix_rate": round(flops / found["seconds"] / rate, 3),
    }


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


def model_of(size: str) -> Any:
    if size != "llama-0.5b":
        return systems.encoder(size)
    config = LlamaConfig(
        vocab_size=32000, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16,
        num_key_value_heads=4, intermediate_size=4864, use_cache=False,
    )  # fmt: skip
    return LlamaModel(config).train()


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
