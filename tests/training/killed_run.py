"""Runs retrainings that are killed (SIGKILL) at chosen moments, and resumes them.

One process imports everything once (by a retraining of its own) and forks for each run, so that
many kills stay cheap. Without a CUDA device, a fork may use autograd after its parent did.

Usage: killed_run.py FOLDER; prints one JSON object {moment: {"killed": bool, "left": [names]}}.
Beside each run's folder lies NAME.safetensors with the final base and adapters.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from safetensors.torch import save_file

import foretune
import linear_tasks
from foretune import files, manifest
from foretune.run import Run
from foretune.training import checkpoint, outcome

METHOD = foretune.PEFTML(
    learning_rate=0.05, adapter_learning_rate=0.05, lora={"r": 2, "lora_dropout": 0.2}
)
STEPS = 12
torch.set_num_threads(1)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def half(path: Path) -> None:
    """Leaves the first half of a file."""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def at_update(number: int) -> Callable[[], None]:
    def arm() -> None:
        global stop_at
        stop_at = number

    return arm


def in_write(number: int) -> Callable[[], None]:
    """In the middle of writing the weights of checkpoint `number`."""

    def arm() -> None:
        write, calls = checkpoint.save_file, []

        def save_half(tensors: dict, path: Path) -> None:
            write(tensors, path)
            calls.append(path)
            if len(calls) == number:
                half(path)
                die()

        checkpoint.save_file = save_half

    return arm


def before_rename() -> None:
    """When the second checkpoint is written but does not bear its name yet."""
    calls = []
    flush = files._flush

    def die_at_last(path: Path) -> None:
        flush(path)
        calls.append(path)
        if path.parent.name == ".unfinished-checkpoint-4" and path.name == "state.json":
            die()

    files._flush = die_at_last


def in_removal(name: str) -> Callable[[], None]:
    """In the middle of removing a checkpoint."""

    def arm() -> None:
        remove = shutil.rmtree

        def remove_half(path: Path, **options: bool) -> None:
            if Path(path).name == name:
                (Path(path) / "state.json").unlink()
                die()
            remove(path, **options)

        files.shutil.rmtree = remove_half

    return arm


def in_base() -> None:
    """In the middle of writing the final base."""
    write = outcome.save_base

    def save_half(model: torch.nn.Module, tokenizer: object, folder: Path) -> None:
        write(model, tokenizer, folder)
        half(folder / "model.safetensors")
        die()

    outcome.save_base = save_half


def in_record() -> None:
    """In the middle of writing metrics.jsonl."""
    write = outcome.write_whole

    def write_half(path: Path, text: str) -> None:
        if path.name == "metrics.jsonl":
            path.with_name(manifest.UNFINISHED + path.name).write_text(text[:5])
            die()
        write(path, text)

    outcome.write_whole = write_half


stop_at: int | None = None
MOMENTS: dict[str, Callable[[], None]] = {
    "before-any-checkpoint": at_update(1),
    "between-checkpoints": at_update(7),
    "at-the-last-update": at_update(STEPS),
    "in-the-first-write": in_write(1),
    "in-the-third-write": in_write(3),
    "before-the-rename": before_rename,
    "in-a-removal": in_removal("checkpoint-4"),
    "in-the-base": in_base,
    "in-the-record": in_record,
    "in-the-clearing": in_removal(f"checkpoint-{STEPS}"),
}


def retrain(out: Path, *, resume: bool) -> foretune.Outcome:
    def progress(update: int, _: int, __: dict) -> None:
        if update == stop_at:
            die()

    run = Run(steps=STEPS, eval_every=2, batch_size=4, device="cpu", out=out, resume=resume, seed=1)
    return foretune.retrain(
        linear_tasks.Net(), linear_tasks.family(), METHOD, run, progress=progress
    )


def child(work: Callable[[], None]) -> int:
    """Runs `work` in a fork; returns its wait status."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1]


def write_result(folder: Path, name: str, *, resume: bool) -> None:
    result = retrain(folder / name, resume=resume)
    tensors = {**result.model.state_dict(), **result.bank.state_dict()}
    metadata = json.dumps([result.history, result.validation_score, result.cost["examples"]])
    save_file(
        {k: v.contiguous() for k, v in tensors.items()},
        folder / f"{name}.safetensors",
        metadata={"about": metadata},
    )


def main(folder: Path) -> None:
    report: dict[str, dict] = {}
    retrain(folder / "warm-up", resume=False)
    status = child(lambda: write_result(folder, "undisturbed", resume=False))
    report["undisturbed"] = {"ok": status == 0}
    for name, arm in MOMENTS.items():

        def killed(name: str = name, arm: Callable[[], None] = arm) -> None:
            arm()
            retrain(folder / name, resume=False)

        status = child(killed)
        left = sorted(path.name for path in (folder / name).iterdir())
        resumed = child(lambda name=name: write_result(folder, name, resume=True))
        report[name] = {
            "killed": os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL,
            "left": left,
            "ok": resumed == 0,
            "after": sorted(path.name for path in (folder / name).iterdir()),
        }
    sys.stdout.write(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
