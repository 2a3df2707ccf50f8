"""A decoder of 7 B parameters on paper, and one of its layers really stepped.

python benchmarks/speed/large_shapes.py

The shape (32 layers of width 4096, 11008 inside, 32000 tokens) is planned as `foretune plan
--layers` does it, on one process and over eight shards. Then one layer of it, with random weights
and the LoRA adapters of 1, 10 or 50 tasks, takes forward and backward passes on a few hundred
tokens; its CPU time is compared with the plan's: its operations, divided by the rate of matrix
products, which are timed in turn with it. Memory is how far the process rises in a pass.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import memory
import systems
import timing
import tokenizers
import torch
import torch.nn.functional as F
import transformers

import foretune
from foretune.recipes.plan_layers import plan_layers
from foretune.recipes.traced_step import to_fake, trace
from foretune.run import Run
from foretune.tasks.objectives.causal_lm import CausalLM
from foretune.tasks.task import Task, TaskCollection
from foretune.training.learners.joint import Learner

KEY = ("part", "what", "tasks", "rows", "length", "precision")
SHAPE = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32,
         "num_hidden_layers": 32, "vocab_size": 32000}  # fmt: skip
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2,
        "num_hidden_layers": 3, "vocab_size": 64}  # fmt: skip
LORA = {"r": 8, "lora_alpha": 16}
PROCESSES = 8
VOCABULARY = 64  # of the model with one layer


def main() -> None:
    parser = timing.parser(__doc__)
    options = parser.parse_args()
    timing.begin(options)
    shape = TINY if options.quick else SHAPE
    results = timing.Results("large-shapes", KEY, options)
    cells = ((2, 1, 6),) if options.quick else ((10, 4, 512),)
    for num_tasks, rows, length in cells:
        for what in ("retrain", "adapt"):
            for precision in ("fp32", "bf16"):
                cell = {"part": "plan", "what": what, "tasks": num_tasks, "rows": rows,
                        "length": length, "precision": precision}  # fmt: skip
                if not results.has(**cell):
                    results.add({**cell, **planned(shape, cell)})
    cells = ((2, 1, 6),) if options.quick else ((1, 10, 32), (10, 1, 32), (50, 1, 8))
    for num_tasks, rows, length in cells:
        for what in ("retrain", "adapt"):
            cell = {"part": "layer", "what": what, "tasks": num_tasks, "rows": rows,
                    "length": length, "precision": "fp32"}  # fmt: skip
            if not results.has(**cell):
                results.add({**cell, **stepped(shape, cell, options)})


def planned(shape: dict[str, int], cell: dict[str, Any]) -> dict[str, Any]:
    """PEFT-ML's step, or one that adapts the same tasks, of the whole shape."""
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
    method: Any = foretune.PEFTML(lora=LORA)
    if cell["what"] == "adapt":
        method = foretune.LoRA(lora=LORA)
    text = " ".join(["word"] * cell["length"])
    rows = [{"text": text}] * cell["rows"]
    tasks = TaskCollection(
        tuple(Task(f"task {i}", rows) for i in range(cell["tasks"])),
        CausalLM(words(), max_tokens=cell["length"]),
    )
    run = Run(batch_size=cell["rows"], precision=cell["precision"])
    learner = method.learner(model, tasks.objective, tasks.names[:1], run)
    plan = plan_layers(learner, tasks, method, run, PROCESSES)
    share = plan.share
    assert share is not None
    return {
        "tokens": plan.tokens,
        "tokens_at_once": plan.tokens_at_once,
        "flops_per_second": round(plan.rate),
        "memory_mb": round(plan.memory_mb),
        "seconds": round(plan.seconds, 1),
        "processes": share.processes,
        "memory_of_each_mb": round(share.memory_mb),
        "seconds_of_each": round(share.seconds, 1),
        "received_by_each_mb": round(share.received_mb),
        "parts": [
            {
                "name": part.name,
                "parameters": part.parameters,
                "weights_mb": round(part.weights_mb, 1),
                "training_mb": round(part.training_mb, 1),
                "kept_mb": round(part.kept_mb, 1),
                "flops": round(part.flops),
                "seconds": round(part.seconds, 2),
            }
            for part in plan.parts
        ],
    }


def stepped(
    shape: dict[str, int], cell: dict[str, Any], options: argparse.Namespace
) -> dict[str, Any]:
    """One layer's forward and backward pass, beside what its shapes say."""
    tasks = systems.made_up_tasks(cell["tasks"], cell["rows"], [cell["length"]], VOCABULARY)
    learner, step = one_layer("cpu", shape, cell), systems.joint_step(tasks)
    number = cell["tasks"] * cell["rows"]
    on_paper = one_layer("meta", shape, cell)
    to_fake(on_paper)
    traced = trace(on_paper, number, cell["length"], "fp32", predicts_tokens=False)
    x = torch.ones(step.num_tokens, shape["hidden_size"])
    gradient = torch.ones(step.num_tokens, shape["intermediate_size"])
    weight = torch.ones(shape["intermediate_size"], shape["hidden_size"])

    def products() -> None:  # those that `foretune plan` times
        F.linear(x, weight)
        gradient @ weight
        gradient.T @ x

    assert learner.bank is not None
    with learner.ready():
        variants = {"products": products, "layer": lambda: learner.backward(step)}
        times = timing.interleaved(variants, options.repeats)
        megabytes = memory.rise(lambda: learner.backward(step), [learner.model, learner.bank])
    operations = 6 * step.num_tokens * shape["hidden_size"] * shape["intermediate_size"]
    per_operation = [seconds / operations for seconds in times["products"]]
    times["plan"] = [traced.flops[""] * seconds for seconds in per_operation]
    return {
        "repeats": options.repeats,
        "tokens": step.num_tokens,
        "flops": round(traced.flops[""]),
        "flops_per_second": round(operations / statistics.median(times["products"])),
        "seconds": timing.seconds({name: times[name] for name in ("layer", "plan")}),
        "measured_to_planned": timing.ratio(times, "layer", "plan"),
        "kept_mb": round(sum(traced.kept_mb.values()), 1),
        "rise_mb": megabytes,
    }


def one_layer(device: str, shape: dict[str, int], cell: dict[str, Any]) -> Learner:
    """A learner of one layer of the shape, in float32."""
    sizes = {**shape, "num_hidden_layers": 1, "vocab_size": VOCABULARY}
    with torch.device(device):
        model = transformers.LlamaModel(transformers.LlamaConfig(**sizes, use_cache=False)).train()
    num_tasks = cell["tasks"] if device == "cpu" else 1
    return systems.learner(model, num_tasks, train_base=cell["what"] == "retrain", lora=LORA)


def words() -> Any:
    """A tokenizer of one word."""
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[PAD]": 0, "word": 1}, "[PAD]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]")


if __name__ == "__main__":
    main()
