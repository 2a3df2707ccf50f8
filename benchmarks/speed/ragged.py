"""Rows of the lengths of real dialogues: padding removed, against padding and against a peft loop.

python benchmarks/speed/ragged.py --data PATH          # ConvAI2's rows, see benchmarks/README.md

    padded floor    a plain full fine-tuning step on one padded batch
    packed floor    the same step without padding and without adapters, by foretune
    same products   the packed floor with its layers multiplied by the library that ours uses
    ours            PEFT-ML's joint step without padding
    peft            set_adapter task by task; each task is padded to its own longest row
"""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path
from typing import Any

import systems
import timing
import torch
from transformers import LlamaConfig, LlamaModel

from foretune.models.loading import load_model

KEY = ("model", "rows_are", "tasks", "batch", "threads")
LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    parser = timing.parser(__doc__)
    parser.add_argument("--data", help="JSONL (.gz) with context, response and task")
    parser.add_argument(
        "--cells",
        default="minilm:texts:50x8,minilm:texts:10x8,minilm:pairs:50x4,minilm:pairs:10x16,"
        "llama:pairs:50x4",
    )
    options = parser.parse_args()
    timing.begin(options)
    if not options.quick and not (options.data and Path(options.data).is_file()):
        print("ragged.py: no data; give --data PATH of ConvAI2's rows (see benchmarks/README.md)")
        return
    results = timing.Results("ragged", KEY, options)
    for text in ("tiny:texts:3x2",) if options.quick else options.cells.split(","):
        size, kind, numbers = text.split(":")
        num_tasks, batch = map(int, numbers.split("x"))
        cell = {"model": size, "rows_are": kind, "tasks": num_tasks, "batch": batch,
                "threads": options.threads}  # fmt: skip
        if not results.has(**cell):
            results.add({**cell, **measure(options, size, kind, num_tasks, batch)})


def measure(
    options: argparse.Namespace, size: str, kind: str, num_tasks: int, batch: int
) -> dict[str, object]:
    tasks = rows_of(options, kind, num_tasks, batch)
    lengths = [len(row["ids"]) for rows in tasks for row in rows]
    systems.LORA["target_modules"] = LLAMA if size == "llama" else systems.TARGETS
    packed_floor = systems.learner(model_of(size), num_tasks, adapters=False)
    model = systems.in_our_products(model_of(size))
    same_products = systems.learner(model, num_tasks, adapters=False)
    ours = systems.learner(model_of(size), num_tasks, lora=systems.LORA)
    step = systems.joint_step(tasks, ours.model)
    variants = {
        "padded floor": systems.floor(model_of(size), tasks),
        "peft": systems.peft_loop(systems.peft_model(model_of(size), num_tasks), tasks),
    }
    with systems.ready(packed_floor, same_products, ours) as (plain, same, joint):
        variants |= {
            "packed floor": lambda: plain(step),
            "same products": lambda: same(step),
            "ours": lambda: joint(step),
        }
        times = timing.interleaved(variants, options.repeats)
    return {
        "rows": len(lengths),
        "tokens": sum(lengths),
        "fill": round(sum(lengths) / (len(lengths) * max(lengths)), 3),
        "chunks": len(step.chunks),
        "repeats": options.repeats,
        "seconds": timing.seconds(times),
        "to_packed_floor": timing.ratio(times, "ours", "packed floor"),
        "to_same_products": timing.ratio(times, "ours", "same products"),
        "to_padded_floor": timing.ratio(times, "ours", "padded floor"),
        "peft_to_ours": timing.ratio(times, "peft", "ours"),
    }


def model_of(size: str) -> Any:
    """The pretrained MiniLM, a decoder of Llama's shape and about that size, or a tiny encoder."""
    if size == "llama":
        config = LlamaConfig(
            vocab_size=30522, hidden_size=384, num_hidden_layers=6, num_attention_heads=12,
            num_key_value_heads=4, intermediate_size=1024, use_cache=False,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return LlamaModel(config).train()
    if size == "tiny":
        return systems.encoder("tiny")
    model = load_model("minilm", head="none")[0].train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def rows_of(
    options: argparse.Namespace, kind: str, num_tasks: int, batch: int
) -> list[list[dict[str, Any]]]:
    """Real rows as MiniLM's tokenizer cuts them, at most 128 tokens: the last two turns of the
    context with the reply ("pairs"), or the one and the other each for itself ("texts")."""
    if options.quick:
        return systems.made_up_tasks(num_tasks, batch, [3, 8, 5, 2], 100)
    tokenizer = load_model("minilm", head="none")[1]
    tasks: dict[str, list[dict[str, Any]]] = {}
    opened = gzip.open if options.data.endswith(".gz") else open
    with opened(options.data, "rt", encoding="utf-8") as stream:
        for line in stream:
            row = json.loads(line)
            kept = tasks.setdefault(row["task"], [])
            if not row["context"]:
                continue
            context = " ".join(row["context"][-2:])
            texts = (
                [(context, row["response"])]
                if kind == "pairs"
                else [(context,), (row["response"],)]
            )
            for parts in texts[: batch - len(kept)]:
                ids = tokenizer(*parts, truncation=True, max_length=128)["input_ids"]
                kept.append({"ids": ids, "label": len(ids) % 2})
    full = [rows for rows in tasks.values() if len(rows) == batch]
    return full[:num_tasks]


if __name__ == "__main__":
    main()
