"""Ten thousand unseen tasks: time, memory, an interruption; and a loop over one adapter.

python benchmarks/speed/many_tasks.py --work FOLDER          # continues what FOLDER holds

1. A base is made: MiniLM whose last layer was trained on seen tasks, with their basis. A task is a
   made-up person who likes some topics: six short texts of its own, four to adapt on, two to score.
2. `foretune adapt` adapts it to all tasks, by basis and by LoRA of rank 2 on the last layer, in a
   process of its own. It is killed between two waves and resumed. The adapters of the waves before
   and after are compared with those of a run that nothing interrupts.
3. In one process, in turns, each time on other tasks: as many steps by foretune.adapt and by a loop
   that trains one adapter after the other on one text at a time. `plain` is a forward and backward
   pass of the model, `cached` computes what is below the last layer once per text.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import timing
import torch
from torch import Tensor, nn

import foretune
from foretune.models.loading import load_base, load_model
from foretune.run import Run
from foretune.tasks.objectives import make_objective
from foretune.tasks.sources import Source, load_tasks

PARTS = ("loop", "adapt")
KEY = ("what", "method", "tasks", "threads")
METHODS: dict[str, Any] = {
    "basis": foretune.FromBasis(),
    "lora": foretune.LoRA(learning_rate=3e-3, lora={"r": 2, "lora_alpha": 4}),
}
SETTINGS = {
    "basis": ["method=basis"],
    "lora": ["method=lora", "learning_rate=3e-3", "lora={r: 2, lora_alpha: 4}"],
}
STEPS = 20
SEEN, TRAIN, TEST = 48, 4, 2
TOPICS = (
    "dog cat horse bird fish sheep", "bread cheese apple soup rice cake",
    "car train bus plane boat bicycle", "football tennis golf chess swimming boxing",
    "piano guitar drum violin song choir", "rain snow wind storm sun fog",
    "doctor nurse hospital medicine surgery patient", "king queen prince castle crown throne",
    "computer software keyboard internet screen phone", "tree flower grass forest garden leaf",
    "money bank loan tax price market", "school teacher student book lesson exam",
)  # fmt: skip
FILLERS = ["the", "a", "my", "this", "old", "new", "big", "small", "good", "some"]


def write_people(path: Path, first: int, number: int) -> None:
    """Rows of `number` people, who like topics by three traits that they share with others."""
    rng = random.Random(1)
    traits = [[rng.gauss(0, 1) for _ in range(3)] for _ in TOPICS]
    with path.open("w", encoding="utf-8") as stream:
        for person in range(first, first + number):
            rng = random.Random(person)
            taste = [rng.gauss(0, 1) for _ in range(3)]
            order = sorted(range(len(TOPICS)), key=lambda i: liking(taste, traits[i]))
            liked = order[len(TOPICS) // 2 :]
            for i in range(TRAIN + TEST):
                topic = (order[0], order[-1])[i] if i < 2 else rng.choice(order)  # both labels
                words = rng.sample(TOPICS[topic].split(), 3)
                text = " ".join(w for word in words for w in (rng.choice(FILLERS), word))
                row = {
                    "task": f"person-{person:05d}",
                    "split": "train" if i < TRAIN else "test",
                    "text": text,
                    "label": "yes" if topic in liked else "no",
                }
                stream.write(json.dumps(row) + "\n")


def liking(taste: Sequence[float], traits: Sequence[float]) -> float:
    return sum(t * u for t, u in zip(taste, traits, strict=True))


def tasks_of(path: Path, tokenizer: Any) -> Any:
    tasks, _ = load_tasks(Source(source=str(path), validation=0, test=0), "classification")
    return tasks.with_objective(make_objective("classification", tokenizer).fit(tasks))


def make_base(folder: Path, quick: bool) -> None:
    """MiniLM, its last layer trained on the seen tasks, and the basis of their adapters."""
    write_people(folder / "seen.jsonl", 10**6, SEEN)
    model, tokenizer = load_model("minilm", head="classification", num_labels=2)
    model.requires_grad_(False)
    top(model).requires_grad_(True)
    model.classifier.requires_grad_(True)
    seen, steps = tasks_of(folder / "seen.jsonl", tokenizer), 2 if quick else 40
    run = Run(steps=steps, batch_size=2, patience=None)
    outcome = foretune.retrain(model, seen, foretune.Standard(), run, tokenizer=tokenizer)
    method = foretune.LoRA(learning_rate=3e-3)
    basis = foretune.fit_basis(outcome.model, seen, method, run.replace(batch_size=TRAIN))
    foretune.set_basis(outcome.model, basis)
    outcome.basis = basis
    outcome.save(folder / "made")
    (folder / "made" / "base").rename(folder / "base")


def top(model: Any) -> Any:
    """The last layer of MiniLM."""
    return model.bert.encoder.layer[-1]


def command(folder: Path, tasks: Path, out: Path, method: str, wave: int) -> list[str]:
    """What is typed; the recorded command leaves out the folders."""
    return [
        *(sys.executable, "-m", "foretune.cli", "adapt", str(folder / "base"), *SETTINGS[method]),
        *(f"steps={STEPS}", "batch_size=1", f"tasks_per_wave={wave}"),
        *("tasks.validation=0", "tasks.test=0", "--tasks", str(tasks), "--out", str(out)),
        *("--json",),
    ]


def run_in_process(
    words: Sequence[str], threads: int, until: Callable[[], bool] | None = None
) -> dict[str, Any]:
    """Runs a command; its wall and CPU seconds and peak of resident memory, and what it prints.

    Args:
        words: The command.
        threads: Its threads.
        until: The process is killed once this is true; None lets it finish.

    Raises:
        SystemExit: It fails.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    environment |= {"TOKENIZERS_PARALLELISM": "false"}
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as printed:
        process = subprocess.Popen(words, stdout=printed, env=environment)
        killed = False
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG if not killed else 0)
            if pid:
                break
            if until is not None and until():
                process.send_signal(signal.SIGKILL)
                killed = True
            time.sleep(1)
        process.returncode = os.waitstatus_to_exitcode(status)
        printed.seek(0)
        text = printed.read()
    if process.returncode and not killed:
        raise SystemExit(f"{' '.join(words)} failed with {process.returncode}")
    return {
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_mb": round(usage.ru_maxrss / 1024, 1),
        "killed": killed,
        "printed": json.loads(text) if text.strip() and not killed else None,
    }


class Saved:
    """Whether so many tasks have finished in a folder; reads its list only when it has changed."""

    def __init__(self, out: Path, number: int) -> None:
        self.out, self.number, self.seen = out, number, 0

    def __call__(self) -> bool:
        file = self.out / "scores.json"
        changed = file.stat().st_mtime_ns if file.is_file() else 0
        before, self.seen = self.seen, changed
        return changed != before and num_saved(self.out) >= self.number


def num_saved(out: Path) -> int:
    """The tasks that have finished in a folder of adapters."""
    file = out / "scores.json"
    return len(json.loads(file.read_text("utf-8"))) if file.is_file() else 0


def adapt_all(
    options: argparse.Namespace, folder: Path, method: str, num_tasks: int, wave: int
) -> dict[str, Any]:
    """Part 2: all tasks, with an interruption in the middle."""
    source = folder / f"people-{num_tasks}.jsonl"
    if not source.is_file():
        write_people(source, 0, num_tasks)
    out, parts = folder / f"{method}-{num_tasks}", folder / f"{method}-{num_tasks}.json"
    halfway = max(1, num_tasks // wave // 2) * wave
    record = json.loads(parts.read_text()) if parts.is_file() else []
    words = command(folder, source, out, method, wave)
    if not record:
        shutil.rmtree(out, ignore_errors=True)
        until = Saved(out, halfway) if halfway < num_tasks else None
        record.append(run_in_process(words, options.threads, until) | {"saved": num_saved(out)})
        parts.write_text(json.dumps(record))
    if record[-1]["killed"]:
        part = run_in_process([*words, "--resume"], options.threads)
        record.append(part | {"saved": num_saved(out)})
        parts.write_text(json.dumps(record))
    scores = record[-1]["printed"]["scores"]
    assert num_saved(out) == len(scores) == num_tasks
    files = [p for p in out.rglob("*") if p.is_file()]
    row = {
        "steps": STEPS,
        "texts": TRAIN + TEST,
        "tasks_per_wave": wave,
        **spent(record),
        "mean_score": round(sum(scores.values()) / num_tasks, 4),
        "files": len(files),
        "adapters_mb": round(sum(p.stat().st_size for p in files) / 2**20, 1),
    }
    if len(record) > 1:
        row["interrupted_after"] = record[0]["saved"]
        row["two_waves"] = two_waves(options, folder, method, out, record[0]["saved"], wave)
    return row


def spent(parts: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Wall and CPU seconds of processes, and their highest peak of memory."""
    return {
        "seconds": round(sum(part["seconds"] for part in parts), 1),
        "cpu_seconds": round(sum(part["cpu_seconds"] for part in parts), 1),
        "peak_mb": max(part["peak_mb"] for part in parts),
    }


def two_waves(
    options: argparse.Namespace, folder: Path, method: str, out: Path, saved: int, wave: int
) -> dict[str, Any]:
    """An uninterrupted run of the waves around the interruption: cost, and whether it is equal."""
    first = saved - wave
    source, whole = folder / "around.jsonl", folder / f"{method}-around"
    write_people(source, first, 2 * wave)
    shutil.rmtree(whole, ignore_errors=True)
    part = run_in_process(command(folder, source, whole, method, wave), options.threads)
    weights = [f"{task}/adapter_model.safetensors" for task in part["printed"]["scores"]]
    same = [w for w in weights if (out / w).read_bytes() == (whole / w).read_bytes()]
    return {"tasks": len(weights), **spent([part]), "same_bytes": len(same)}


def against_a_loop(options: argparse.Namespace, folder: Path, method: str) -> dict[str, Any]:
    """Part 3: seconds per task of foretune.adapt and of the loops, each time on other tasks."""
    many, few = (4, 2) if options.quick else (options.sample, options.sample // 10)
    model, tokenizer = load_base(folder / "base")
    turn = iter(range(2 * 10**6, 10**7, many))

    def sample(number: int) -> Any:
        file = folder / "sample.jsonl"
        write_people(file, next(turn), number)
        return tasks_of(file, tokenizer)

    run = Run(steps=STEPS, batch_size=1)
    variants = {
        "ours": lambda: foretune.adapt(model, sample(many), METHODS[method], run),
        "plain": lambda: loop(model, sample(few), cached=False),
        "cached": lambda: loop(model, sample(few), cached=True),
    }
    times = timing.interleaved(variants, options.repeats)
    per_task = {
        name: [t / (many if name == "ours" else few) for t in of_turn]
        for name, of_turn in times.items()
    }
    return {
        "repeats": options.repeats,
        "loop_tasks": few,
        "seconds_per_task": {k: round(v, 5) for k, v in timing.seconds(per_task).items()},
        "plain_to_ours": timing.ratio(per_task, "plain", "ours"),
        "cached_to_ours": timing.ratio(per_task, "cached", "ours"),
    }


def loop(base: Any, tasks: Any, *, cached: bool) -> float:
    """One LoRA of rank 2 on the last layer, trained for task after task, one text at a time.

    Returns:
        The mean accuracy.
    """
    import copy

    import peft

    config = peft.LoraConfig(
        **METHODS["lora"].lora,
        target_modules=["query", "key", "value", "dense"],
        layers_to_transform=[len(base.bert.encoder.layer) - 1],
        layers_pattern="layer",
    )
    model: Any = peft.get_peft_model(copy.deepcopy(base), config)
    trained = [p for p in model.parameters() if p.requires_grad]
    start = [p.detach().clone() for p in trained]
    below = Below(model.base_model.model)
    right = 0.0
    for task in tasks:
        with torch.no_grad():
            for p, value in zip(trained, start, strict=True):
                p.copy_(value)
        optimizer = torch.optim.AdamW(trained, lr=3e-3, fused=True)
        rows = [tasks.objective.encode(example, task.name) for example in task.train]
        call = below.calls(rows) if cached else [inputs_of(row) for row in rows]
        model.train()
        for step in range(STEPS):
            row, inputs = rows[step % len(rows)], call[step % len(rows)]
            logits = below.logits(inputs) if cached else model(**inputs).logits
            nn.functional.cross_entropy(logits, torch.tensor([row["label"]])).backward()
            optimizer.step()
            optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            for example in task.test:
                row = tasks.objective.encode(example, task.name)
                right += int(model(**inputs_of(row)).logits.argmax()) == row["label"]
    return right / (TEST * len(tasks))


def inputs_of(row: Mapping[str, Any]) -> dict[str, Tensor]:
    ids = torch.tensor([row["input_ids"]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class Below:
    """MiniLM from what its last layer reads on, which is computed once per text."""

    def __init__(self, model: Any) -> None:
        self.model = model

    @torch.no_grad()
    def calls(self, rows: Sequence[Mapping[str, Any]]) -> list[Tensor]:
        """(1, L, d) what the last layer reads, of each text."""
        read: list[Tensor] = []
        hook = top(self.model).register_forward_pre_hook(lambda _, args: read.append(args[0]))
        for row in rows:
            self.model(**inputs_of(row))
        hook.remove()
        return read

    def logits(self, states: Tensor) -> Tensor:
        bert = self.model.bert
        hidden = top(self.model)(states)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        return self.model.classifier(self.model.dropout(bert.pooler(hidden)))


def main() -> None:
    parser = timing.parser(__doc__)
    parser.add_argument("--tasks", type=int, nargs="+", default=[10_000])
    parser.add_argument("--wave", type=int, default=500, help="tasks_per_wave")
    parser.add_argument("--sample", type=int, default=100, help="tasks of ours in part 3")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--work", type=Path, help="a folder to keep and continue; else temporary")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    options = parser.parse_args()
    timing.begin(options)
    results = timing.Results("many-tasks", KEY, options)
    with tempfile.TemporaryDirectory(prefix="foretune-many-") as temporary:
        folder = options.work or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "base").is_dir():
            make_base(folder, options.quick)
        for method in options.methods if "loop" in options.parts else ():
            cell: dict[str, Any] = {"method": method, "threads": options.threads}
            many = {"what": "a loop", "tasks": options.sample, **cell}
            if not results.has(**many):
                results.add({**many, **against_a_loop(options, folder, method)})
        for method in options.methods if "adapt" in options.parts else ():
            cell = {"method": method, "threads": options.threads}
            for number in (8,) if options.quick else options.tasks:
                all_of = {"what": "adapt", "tasks": number, **cell}
                wave = 2 if options.quick else options.wave
                if not results.has(**all_of):
                    results.add({**all_of, **adapt_all(options, folder, method, number, wave)})


if __name__ == "__main__":
    main()
