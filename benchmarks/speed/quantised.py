"""Memory of a base in 32, 16, 8 and 4 bits while a hundred adapters train on it.

python benchmarks/speed/quantised.py

SmolLM2-135M, LoRA of rank 8 on the queries and values of all layers. Each precision runs in a
process of its own. Weights and adapters are the bytes of their tensors. `load` is how far the
memory that is the process's own (not files that are mapped) rises while the base is loaded, `step`
how far its resident memory rises in a step of all adapters above what it has with their gradients
in place. The score is the mean log-likelihood per token of a few sentences.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import systems
import timing
import torch
from memory import rise
from transformers import LlamaConfig, LlamaForCausalLM

from foretune.allocator import give_back_freed_memory
from foretune.models.loading import load_base

KEY = ("model", "tasks", "batch", "length", "precision")
PRECISIONS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "bfloat16", "quantize": "int8"},
    "nf4": {"dtype": "bfloat16", "quantize": "nf4"},
}
LORA = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}
SENTENCES = (
    "The ferry to the islands leaves at seven, and on Sundays at nine.",
    "She put the letter back into the drawer and did not speak of it again.",
    "Water boils at a lower temperature on a mountain than at the sea.",
    "The committee will publish its report before the end of the year.",
)


def main() -> None:
    parser = timing.parser(__doc__)
    parser.add_argument("--cells", default="100x1x32")
    parser.add_argument("--model", default="smollm2", help="name or folder of a decoder")
    parser.add_argument("--one", help="of a process of its own: the precision to measure")
    options = parser.parse_args()
    cells = "3x1x8" if options.quick else options.cells
    if options.one:
        torch.set_num_threads(options.threads)
        torch.manual_seed(0)
        print(json.dumps(measured(options.one, options.model, cells)))
        return
    results = timing.Results("quantised", KEY, options)
    if options.quick:
        options.model = str(tiny(results.path.with_name("tiny")))
    for cell in cells.split(","):
        num_tasks, batch, length = map(int, cell.split("x"))
        for precision in PRECISIONS:
            row = {"model": Path(options.model).name, "tasks": num_tasks, "batch": batch,
                   "length": length, "precision": precision}  # fmt: skip
            if not results.has(**row):
                results.add({**row, **in_a_process(options, precision, cell)})


def in_a_process(options: argparse.Namespace, precision: str, cell: str) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", str(Path(__file__).resolve()), "--one", precision]
    command += ["--cells", cell, "--threads", str(options.threads), "--model", options.model]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=os.environ, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def tiny(folder: Path) -> Path:
    """A decoder with random weights and no tokenizer."""
    config = LlamaConfig(vocab_size=1000, hidden_size=64, intermediate_size=64,
                         num_hidden_layers=2, num_attention_heads=2)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def measured(precision: str, name: str, cell: str) -> dict[str, Any]:
    num_tasks, batch, length = map(int, cell.split("x"))
    load_base(name)  # what is made once: imports, the conversion of the file
    give_back_freed_memory()
    with Watched() as watched:
        base, tokenizer = load_base(name, **PRECISIONS[precision])
    with torch.no_grad():
        texts = () if tokenizer is None else SENTENCES
        score = [-base(**ids, labels=ids["input_ids"]).loss.item()
                 for ids in (tokenizer(text, return_tensors="pt") for text in texts)]  # fmt: skip
    tasks = systems.made_up_tasks(num_tasks, batch, [length], 1000)
    base.requires_grad_(False)
    learner = systems.learner(base.model, num_tasks, train_base=False, lora=LORA)
    step = systems.joint_step(tasks, budget=num_tasks * batch * length)
    with learner.ready():
        began = time.process_time()
        step_mb = rise(lambda: learner.backward(step), [learner.bank])
        seconds = (time.process_time() - began) / 2
    return {
        "weights_mb": size_mb([*base.parameters(), *base.buffers()]),
        "adapters_mb": size_mb(learner.bank.parameters()),
        "load_mb": watched.rise_mb,
        "step_mb": step_mb,
        "seconds_per_step": round(seconds, 2),
        "score": round(sum(score) / len(score), 3) if score else None,
    }


class Watched:
    """How far the process's own memory rises inside the block, looked at every few milliseconds."""

    def __enter__(self) -> Watched:
        self.before = self.highest = anonymous_mb()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()
        self.rise_mb = round(self.highest - self.before)

    def _watch(self) -> None:
        while not self.done.wait(0.003):
            self.highest = max(self.highest, anonymous_mb())


def anonymous_mb() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon:"))


def size_mb(tensors: Any) -> float:
    return round(sum(t.numel() * t.element_size() for t in tensors) / 2**20, 1)


if __name__ == "__main__":
    main()
