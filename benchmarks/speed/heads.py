"""A training step with a head per task, compared with a LoRA adapter per task.

python benchmarks/speed/heads.py

    lora          an adapter of rank 8 per task on every linear layer that trains
    heads         a copy of the classifier per task
    slot by slot  the same, each copy called on its own rows
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import systems
import timing
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from foretune.adapters.bank import AdapterBank
from foretune.models.routing import route
from foretune.models.surgery import freeze_lower, head_modules
from foretune.tasks.batch import Batch
from foretune.training.data import SlotRows, TaskData
from foretune.training.learners.joint import Learner
from foretune.training.token_budget import default_token_budget

KEY = ("model", "tasks", "batch", "length", "threads")
LORA = {"r": 8, "lora_alpha": 8}


def main() -> None:
    parser = timing.parser(__doc__)
    parser.add_argument("--cells", default="mlp:400x8x1,minilm:400x1x16", help="model:TxBxL")
    options = parser.parse_args()
    timing.begin(options)
    results = timing.Results("heads", KEY, options)
    for text in ("mlp:4x2x1", "tiny:4x1x8") if options.quick else options.cells.split(","):
        size, numbers = text.split(":")
        num_tasks, batch, length = map(int, numbers.split("x"))
        cell = {"model": size, "tasks": num_tasks, "batch": batch, "length": length,
                "threads": options.threads}  # fmt: skip
        if not results.has(**cell):
            times = measure(size, num_tasks, batch, length, options.repeats)
            results.add({
                **cell,
                "repeats": options.repeats,
                "seconds": timing.seconds(times),
                "to_lora": {k: timing.ratio(times, k, "lora") for k in times if k != "lora"},
            })  # fmt: skip


def measure(size: str, num_tasks: int, batch: int, length: int, repeats: int) -> timing.Times:
    keys = [str(i) for i in range(num_tasks)]
    learners = {}
    for name in ("lora", "heads", "slot by slot"):
        model, objective, lora = network() if size == "mlp" else top_layer(size)
        heads = () if name == "lora" else head_modules(model)
        bank = AdapterBank(model, keys, lora=lora if name == "lora" else None, heads=heads)
        if name == "slot by slot":
            for head in bank.heads.values():
                head.inner = {}  # type: ignore[assignment]
        learners[name] = Learner(
            model, objective, bank=bank, learning_rate=systems.RATE,
            bank_learning_rate=systems.RATE,
        )  # fmt: skip
        learners[name].start(systems.RUN)
    if size == "mlp":
        rows: Any = [[{"x": torch.randn(64), "label": j % 6} for j in range(batch)] for _ in keys]
    else:
        vocabulary = systems.SIZES[size]["vocab_size"]
        rows = systems.made_up_tasks(num_tasks, batch, [length], vocabulary)
    data = TaskData([SlotRows(k, rows[i]) for i, k in enumerate(keys)], objective)
    picks = [(i, j) for i in range(num_tasks) for j in range(batch)]
    budget = default_token_budget(model)
    step = data.step(picks, "train", train=True, seed=[0], budget=budget)
    with systems.ready(*learners.values()) as updates:
        variants = {
            name: lambda update=update: update(step)
            for name, update in zip(learners, updates, strict=True)
        }
        return timing.interleaved(variants, repeats)


def network() -> tuple[Any, Any, dict[str, Any]]:
    """A small network on arrays."""
    model = nn.Sequential(
        nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 6)
    )
    return model.train(), ArrayRows(), LORA


def top_layer(size: str) -> tuple[Any, Any, dict[str, Any]]:
    """An encoder of which the top layer is trained; what lies below is computed once."""
    model = systems.encoder(size)
    freeze_lower(model, 1)
    top = systems.SIZES[size]["num_hidden_layers"] - 1
    lora = {**systems.LORA, "layers_to_transform": [top], "layers_pattern": "layer"}
    return model, systems.TokenRows(), lora


class ArrayRows(systems.TokenRows):
    """Rows of an array with a label."""

    @override
    def size(self, row: Mapping[str, Any]) -> int:
        return 1

    @override
    def collate(self, rows: Sequence[Mapping[str, Any]], slots: Sequence[int]) -> Batch:
        labels = torch.tensor([row["label"] for row in rows])
        x = torch.stack([row["x"] for row in rows])
        return Batch({"x": x, "labels": labels}, tuple(slots), len(rows), {})

    @override
    def losses(self, model: Any, batch: Batch) -> Tensor:
        with route(batch.slots):
            logits = model(batch.inputs["x"])
        return F.cross_entropy(logits, batch.inputs["labels"], reduction="none")


if __name__ == "__main__":
    main()
