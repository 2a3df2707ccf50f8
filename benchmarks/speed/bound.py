"""How near a joint step is to what its adapters must compute and move on this machine.

python benchmarks/speed/bound.py                  # one thread
python benchmarks/speed/bound.py --threads 2

    floor          plain full fine-tuning, as torch multiplies
    same products  the floor with its layers multiplied by the library that ours uses
    ours           PEFT-ML's joint step
    limit          the same products, and in addition the longer of two times: the adapters'
                   operations at the rate of a layer's products, and the bytes that the
                   adapters must move at the rate of a copy of 256 MB
"""

from __future__ import annotations

import argparse
import statistics

import systems
import timing
import torch
from torch import nn

from foretune.models import products

KEY = ("model", "tasks", "batch", "length", "threads")
COPIED = 2**26  # floats: 256 MB, more than a cache holds
UPDATE = 28  # bytes a parameter: AdamW reads it, its gradient and two moments, and writes three


def main() -> None:
    parser = timing.parser(__doc__)
    parser.add_argument("--cells", default="minilm:10x1x64,minilm:50x1x64,minilm:10x4x128")
    options = parser.parse_args()
    timing.begin(options)
    results = timing.Results("bound", KEY, options)
    for text in ("tiny:3x2x8",) if options.quick else options.cells.split(","):
        size, numbers = text.split(":")
        tasks, batch, length = map(int, numbers.split("x"))
        cell = {"model": size, "tasks": tasks, "batch": batch, "length": length,
                "threads": options.threads}  # fmt: skip
        if not results.has(**cell):
            results.add({**cell, **measure(options, size, tasks, batch, length)})


def measure(
    options: argparse.Namespace, size: str, num_tasks: int, batch: int, length: int
) -> dict[str, object]:
    tasks = systems.made_up_tasks(num_tasks, batch, [length], systems.SIZES[size]["vocab_size"])
    ours = systems.learner(systems.encoder(size), num_tasks)
    step = systems.joint_step(tasks, ours.model)
    tokens = num_tasks * batch * length
    shapes = adapted_shapes(ours)
    wide, narrow = max(shapes)
    x, gy, weight = torch.ones(tokens, narrow), torch.ones(tokens, wide), torch.ones(wide, narrow)
    source = torch.ones(COPIED)
    target = torch.ones(COPIED)

    def products_of_a_layer() -> None:
        products.linear(x, weight)
        products.linear(gy, weight.T)
        products.weight_gradient(gy, x)

    variants = {
        "floor": systems.floor(systems.encoder(size), tasks),
        "same products": systems.floor(systems.in_our_products(systems.encoder(size)), tasks),
        "copy": lambda: target.copy_(source),
        "layer": products_of_a_layer,
    }
    with systems.ready(ours) as (update,):
        variants["ours"] = lambda: update(step)
        times = timing.interleaved(variants, options.repeats)
    rank = int(systems.LORA["r"])
    flops = sum(6 * rank * tokens * (p + q) for q, p in shapes)  # two products forward, four back
    slots = num_tasks * rank * sum(p + q for q, p in shapes)
    # x and y forward (y twice: read and written), gy, gx (twice) and x backward; the factors are
    # read in both passes, and their gradients written
    moved = sum(4 * tokens * (4 * p + 3 * q) for q, p in shapes) + slots * (12 + UPDATE)
    copy_rate = 8 * COPIED / statistics.median(times["copy"])
    rate = 6 * tokens * wide * narrow / statistics.median(times["layer"])
    times["limit"] = [t + max(flops / rate, moved / copy_rate) for t in times["same products"]]
    return {
        "tokens": tokens,
        "repeats": options.repeats,
        "seconds": timing.seconds(times),
        "adapters_gflop": round(flops / 1e9, 2),
        "adapters_gb": round(moved / 1e9, 2),
        "gflop_per_second": round(rate / 1e9, 1),
        "gb_per_second": round(copy_rate / 1e9, 1),
        "to_floor": timing.ratio(times, "ours", "floor"),
        "to_same_products": timing.ratio(times, "ours", "same products"),
        "limit_to_same_products": timing.ratio(times, "limit", "same products"),
        "to_limit": timing.ratio(times, "ours", "limit"),
    }


def adapted_shapes(learner: systems.Learner) -> list[tuple[int, int]]:
    """(outputs, inputs) of each adapted layer."""
    assert learner.bank is not None
    modules = dict(learner.model.named_modules())
    layers = [modules[name] for name in learner.bank.layer_names]
    return [(m.out_features, m.in_features) for m in layers if isinstance(m, nn.Linear)]


if __name__ == "__main__":
    main()
