"""One PEFT-ML joint step against plain fine-tuning, a peft loop and the authors' loop.

python benchmarks/speed/meta_step.py                       # the grid, one thread
python benchmarks/speed/meta_step.py --threads 2 --cells minilm:10x1x64,minilm:50x1x64
python benchmarks/speed/meta_step.py --precision bf16 --cells minilm:10x1x64

Cells are model:tasks×rows×length. A cell of more tokens than --max-tokens is not run, and one of
more than --max-loop-tokens without the two loops; both are written down with the reason.
"""

from __future__ import annotations

import argparse

import systems
import timing
import torch

GRID = [
    (size, tasks, batch, length)
    for size in ("minilm", "roberta-base")
    for tasks in (2, 10, 50, 200)
    for batch in (1, 4, 8)
    for length in (64, 128)
]
MOST = {"minilm": 12_800, "roberta-base": 3_200, "tiny": 10**6}
MOST_LOOPS = {"minilm": 3_200, "roberta-base": 1_280, "tiny": 10**6}
KEY = ("model", "tasks", "batch", "length", "precision", "threads")


def main() -> None:
    options = parse()
    timing.begin(options)
    results = timing.Results("meta-step", KEY, options)
    for size, tasks, batch, length in cells(options):
        cell = {"model": size, "tasks": tasks, "batch": batch, "length": length,
                "precision": options.precision, "threads": options.threads}  # fmt: skip
        tokens = tasks * batch * length
        if results.has(**cell):
            continue
        if tokens > (options.max_tokens or MOST[size]):
            results.add({**cell, "tokens": tokens, "not_run": f"{tokens} tokens take too long"})
            continue
        results.add({**cell, "tokens": tokens, **measure(options, size, tasks, batch, length)})


def parse() -> argparse.Namespace:
    parser = timing.parser(__doc__)
    parser.add_argument("--cells", help="model:TxBxL, separated by commas; the grid by default")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--max-tokens", type=int)
    parser.add_argument("--max-loop-tokens", type=int)
    return parser.parse_args()


def cells(options: argparse.Namespace) -> list[tuple[str, int, int, int]]:
    if options.quick:
        return [("tiny", 3, 2, 8)]
    if not options.cells:
        return sorted(GRID, key=lambda c: (c[0] != "minilm", c[1] * c[2] * c[3]))
    found = []
    for text in options.cells.split(","):
        size, numbers = text.split(":")
        tasks, batch, length = map(int, numbers.split("x"))
        found.append((size, tasks, batch, length))
    return found


def measure(
    options: argparse.Namespace, size: str, num_tasks: int, batch: int, length: int
) -> dict[str, object]:
    """Ratios to the floor, and how far the gradients are from those of the peft loop."""
    precision = options.precision
    tasks = systems.made_up_tasks(num_tasks, batch, [length], systems.SIZES[size]["vocab_size"])
    ours = systems.learner(systems.encoder(size), num_tasks, precision=precision)
    step = systems.joint_step(tasks, ours.model)
    variants = {"floor": systems.floor(systems.encoder(size), tasks, precision)}
    if precision == "fp32":
        same = systems.in_our_products(systems.encoder(size))
        variants["same products"] = systems.floor(same, tasks)
    error = None
    loops = num_tasks * batch * length <= (options.max_loop_tokens or MOST_LOOPS[size])
    if loops:
        made = systems.peft_model(systems.encoder(size), num_tasks)
        error = gradient_error(ours, made, tasks, step) if precision == "fp32" else None
        variants["peft"] = systems.peft_loop(made, tasks, precision)
        if precision == "fp32":
            variants["authors"] = systems.authors_loop(made, tasks)
    with systems.ready(ours) as (update,):
        variants["ours"] = lambda: update(step)
        times = timing.interleaved(variants, options.repeats)
    return {
        "chunks": len(step.chunks),
        "repeats": options.repeats,
        "seconds": timing.seconds(times),
        "to_floor": {k: timing.ratio(times, k, "floor") for k in times if k != "floor"},
        "to_same_products": (
            timing.ratio(times, "ours", "same products") if precision == "fp32" else None
        ),
        "peft_to_ours": timing.ratio(times, "peft", "ours") if loops else None,
        "gradient_error": error,
    }


def gradient_error(
    ours: systems.Learner, made: systems.Any, tasks: list, step: systems.Step
) -> float:
    """Greatest difference of a gradient, base and adapters, relative to the tensor's maximum.

    Tensors whose gradient is zero but for rounding (the biases of keys) count against a thousandth
    of the greatest gradient of all.
    """
    bank = ours.bank
    assert bank is not None
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
    with torch.no_grad():
        for name, module in made.base_model.model.named_modules():
            if name in bank.layer_names:
                for i in range(len(tasks)):
                    bank.set_factors(
                        name, i, module.lora_A[str(i)].weight, module.lora_B[str(i)].weight
                    )
    with ours.ready():
        ours.backward(step)
    for i, rows in enumerate(tasks):
        systems.select_task(made, i)
        (systems.losses_of(made, systems.inputs_of(rows)).mean() / len(tasks)).backward()
    plain = {n.replace("base_layer.", ""): p for n, p in made.base_model.model.named_parameters()}
    for name, p in ours.model.named_parameters():
        if p.grad is not None:
            pairs.append((p.grad, plain[name].grad))
    for name in bank.layer_names:
        layer = bank._layer(name)
        for i in range(len(tasks)):
            for grad, kind in ((layer.a.grad[i], "A"), (layer.b.grad[i].T, "B")):
                # the bank's slots get the gradient of the mean over tasks, as here
                pairs.append((grad, plain[f"{name}.lora_{kind}.{i}.weight"].grad))
    least = max(float(b.abs().max()) for _, b in pairs) / 1000
    error = max(float((a - b).abs().max()) / max(float(b.abs().max()), least) for a, b in pairs)
    for p in [*ours.model.parameters(), *bank.parameters(), *made.parameters()]:
        p.grad = None
    return float(f"{error:.1e}")


if __name__ == "__main__":
    main()
