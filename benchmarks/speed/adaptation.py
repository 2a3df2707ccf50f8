"""Many unseen tasks on a frozen base: adapting them all, and scoring with all their adapters.

python benchmarks/speed/adaptation.py

    ours       all tasks in one step of foretune's learner on the frozen base
    peft       a loop of set_adapter, forward, backward and a fused AdamW for each task
    reused     the best plain loop: one adapter serves all tasks in turn; swapping it is not charged
    base       (scoring) the model's own forward on all rows, without any adapter
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import systems
import timing
import torch

KEY = ("what", "model", "tasks", "batch", "length", "threads")


def main() -> None:
    parser = timing.parser(__doc__)
    parser.add_argument(
        "--cells", default="minilm:100x1x64,minilm:1000x1x64", help="model:TxBxL of both parts"
    )
    parser.add_argument("--max-peft-tasks", type=int, default=100)
    options = parser.parse_args()
    timing.begin(options)
    results = timing.Results("adaptation", KEY, options)
    for text in ("tiny:4x1x8",) if options.quick else options.cells.split(","):
        size, numbers = text.split(":")
        num_tasks, batch, length = map(int, numbers.split("x"))
        for what, work in (("adapt", adapt), ("score", score), ("top layers", top_layers)):
            cell = {"what": what, "model": size, "tasks": num_tasks, "batch": batch,
                    "length": length, "threads": options.threads}  # fmt: skip
            if not results.has(**cell):
                results.add({**cell, **work(options, size, num_tasks, batch, length)})


def adapt(
    options: argparse.Namespace, size: str, num_tasks: int, batch: int, length: int
) -> dict[str, object]:
    """One training step of every task's adapter."""
    tasks = systems.made_up_tasks(num_tasks, batch, [length], systems.SIZES[size]["vocab_size"])
    ours = systems.learner(systems.encoder(size), num_tasks, train_base=False)
    step = systems.joint_step(tasks, ours.model)
    variants: dict[str, Callable[[], object]] = {
        "reused": loop(systems.peft_model(systems.encoder(size), 1, train_base=False), tasks, True)
    }
    if num_tasks <= options.max_peft_tasks:
        made = systems.peft_model(systems.encoder(size), num_tasks, train_base=False)
        variants["peft"] = loop(made, tasks, False)
    with systems.ready(ours) as (update,):
        variants["ours"] = lambda: update(step)
        times = timing.interleaved(variants, options.repeats)
    return {
        "repeats": options.repeats,
        "chunks": len(step.chunks),
        "seconds": timing.seconds(times),
        **{f"{k}_to_ours": timing.ratio(times, k, "ours") for k in variants if k != "ours"},
    }


def loop(made: Any, tasks: list[list[dict[str, Any]]], reused: bool) -> Callable[[], None]:
    batches = [systems.inputs_of(rows) for rows in tasks]
    parts = [
        [p for n, p in made.named_parameters() if f".{0 if reused else i}.weight" in n]
        for i in range(1 if reused else len(tasks))
    ]
    optimizers = [torch.optim.AdamW(part, lr=systems.RATE, fused=True) for part in parts]

    def step() -> None:
        for i, inputs in enumerate(batches):
            if not reused:
                systems.select_task(made, i, train_base=False)
            systems.losses_of(made, inputs).mean().backward()
            optimizer = optimizers[0 if reused else i]
            optimizer.step()
            optimizer.zero_grad()

    return step


@torch.no_grad()
def score(
    options: argparse.Namespace, size: str, num_tasks: int, batch: int, length: int
) -> dict[str, object]:
    """The forward pass on all tasks' rows, each with its own adapter, 64 rows at a time."""
    tasks = systems.made_up_tasks(num_tasks, batch, [length], systems.SIZES[size]["vocab_size"])
    ours = systems.learner(systems.encoder(size).eval(), num_tasks, train_base=False)
    base = systems.encoder(size).eval()
    parts = [
        systems.joint_step([[]] * start + tasks[start : start + 64]).chunks[0]
        for start in range(0, num_tasks, 64)
    ]
    objective = systems.TokenRows()
    variants: dict[str, Callable[[], object]] = {
        "base": lambda: [systems.losses_of(base, part.inputs) for part in parts]
    }
    if num_tasks <= options.max_peft_tasks:
        made = systems.peft_model(systems.encoder(size), num_tasks, train_base=False).eval()
        batches = [systems.inputs_of(rows) for rows in tasks]

        def peft_loop() -> None:
            for i, inputs in enumerate(batches):
                systems.select_task(made, i, train_base=False)
                systems.losses_of(made, inputs)

        variants["peft"] = peft_loop
    with ours.ready():
        variants["ours"] = lambda: [objective.losses(ours.model, part) for part in parts]
        times = timing.interleaved(variants, options.repeats)
    return {
        "repeats": options.repeats,
        "seconds": timing.seconds(times),
        "to_base": {k: timing.ratio(times, k, "base") for k in variants if k != "base"},
    }


def top_layers(
    options: argparse.Namespace, size: str, num_tasks: int, batch: int, length: int
) -> dict[str, object]:
    """Adapters in the upper third only: what lies below is computed once, or in every step."""
    layers = systems.SIZES[size]["num_hidden_layers"]
    upper = list(range(layers - max(1, layers // 3), layers))
    lora = {**systems.LORA, "layers_to_transform": upper, "layers_pattern": "layer"}
    tasks = systems.made_up_tasks(num_tasks, batch, [length], systems.SIZES[size]["vocab_size"])
    kept = systems.learner(systems.encoder(size), num_tasks, train_base=False, lora=lora)
    every = systems.learner(systems.encoder(size), num_tasks, train_base=False, lora=lora)
    step = systems.joint_step(tasks, kept.model)
    assert every.bank is not None
    with systems.ready(kept) as (update,), every.bank.attached():
        times = timing.interleaved(
            {
                "computed once": lambda: update(step),
                "every step": lambda: every.update([step], systems.RUN, 1.0),
            },
            options.repeats,
        )
    return {
        "adapted_layers": len(upper),
        "repeats": options.repeats,
        "seconds": timing.seconds(times),
        "every_to_once": timing.ratio(times, "every step", "computed once"),
    }


if __name__ == "__main__":
    main()
