"""Runs a recipe that is killed (SIGKILL) at random moments, and resumes it.

One process imports everything once and forks for each run, so that many kills stay cheap.

Usage: killed_recipe.py FOLDER NUMBER; prints one JSON object per kill, with what was there after
it and whether the resumed run has the bits of the undisturbed one.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch

from foretune.recipes.runner import run_recipe
from foretune.recipes.schema import Recipe, load_recipe

RECIPE = """
name: kills
model: {file: net.py}
objective: {kind: classification}
tasks: {source: data.npz, unseen: 2}
retrain:
  methods: [none, standard, {peft-ml: {lora: {r: 2}}}]
  steps: 12
  patience: 2
  eval_every: 3
  learning_rates: [0.01, 0.1]
adapt: {methods: [lora, basis], lora: {r: 2}, steps: 4, shots: [2], learning_rates: [0.01, 0.1]}
spectrum: {ranks: [1], shots: 2}
"""
MODEL = """
from torch import nn

def build():
    return nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.1), nn.ReLU(), nn.Linear(6, 2))
"""
OLD = {"retrain.steps": 3}  # the recipe whose result is replaced
torch.set_num_threads(1)


def write_inputs() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(6, 40, 4)).astype(np.float32)
    y = (np.einsum("tnd,td->tn", x, rng.normal(size=(6, 4))) > 0).astype(np.int64)
    task = np.repeat([f"t{i}" for i in range(6)], 40)
    np.savez("data.npz", task=task, x=x.reshape(-1, 4), y=y.reshape(-1))
    Path("net.py").write_text(MODEL)
    Path("kills.yaml").write_text(RECIPE)


def recipe(out: str, **changes: Any) -> Recipe:
    return load_recipe("kills.yaml", [f"out={out}", *(f"{k}={v}" for k, v in changes.items())])


def child(work: Callable[[], object], kill_after: float | None = None) -> bool:
    """Runs `work` in a fork; returns whether it ended well, before it was killed if it was."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1] == 0


def bits(file: Path) -> tuple[dict[str, Any], str]:
    """The header of a safetensors file, whose keys have no fixed order, and its tensors."""
    raw = file.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:end]), raw[end:].hex()


def result(folder: Path) -> dict[str, Any]:
    """The bits of all weights, and the scores."""
    files = sorted(folder.rglob("*.safetensors"))
    comparison = json.loads((folder / "comparison.json").read_text())
    return {
        **{str(file.relative_to(folder)): bits(file) for file in files},
        "scores": comparison["scores"],
        "verdict": comparison["verdict"],
    }


def kill(number: int, moment: float, seconds: float, undisturbed: dict[str, Any]) -> dict[str, Any]:
    """One killed run; every second one replaces an older result."""
    out = Path(f"out-{number}")
    overwrite = number % 2 == 1
    if overwrite:
        old = result(Path("old"))
        child(lambda: run_recipe(recipe(str(out), **OLD)))
    ended = child(lambda: run_recipe(recipe(str(out)), overwrite=overwrite), moment * seconds)
    kept = not overwrite or result(out) in (old, undisturbed)
    beside = out.with_name(f".unfinished-{out.name}")
    place = beside if beside.is_dir() else out
    left = sorted({str(path.relative_to(place).parent) for path in place.rglob("*")})
    again = {"overwrite": True} if overwrite and not beside.is_dir() else {"resume": True}
    resumed = child(lambda: run_recipe(recipe(str(out)), **again))
    same = resumed and result(out) == undisturbed
    clean = not beside.exists() and not list(out.rglob(".unfinished-*"))
    shutil.rmtree(out)
    flags = {"killed": not ended, "kept": kept, "same": same, "clean": clean}
    return {"moment": moment, "left": left, **flags}


def main(folder: Path, number: int) -> None:
    os.chdir(folder)
    write_inputs()
    run_recipe(recipe("warm-up"))
    child(lambda: run_recipe(recipe("old", **OLD)))
    start = time.monotonic()
    child(lambda: run_recipe(recipe("undisturbed")))
    seconds = time.monotonic() - start
    undisturbed = result(Path("undisturbed"))
    rng = random.Random(0)
    moments = [(i + rng.random()) / number for i in range(number)]
    reports = [kill(i, m, seconds, undisturbed) for i, m in enumerate(moments)]
    sys.stdout.write(json.dumps({"seconds": seconds, "kills": reports}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
