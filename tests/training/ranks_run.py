"""Runs cases in one process and in two, and writes down what each process got.

The two are forks of one parent that has imported everything, connected by gloo.

Usage: ranks_run.py FOLDER; leaves FOLDER/CASE-WHO.pt for each case and each of `alone`, `0`, `1`.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import nn

import foretune
import linear_tasks
import tiny_models
from foretune.adapters.basis_file import set_basis
from foretune.errors import ForetuneError
from foretune.run import Run
from foretune.tasks.objectives.causal_lm import CausalLM
from foretune.tasks.objectives.choice import Choice
from foretune.tasks.objectives.classification import Classification
from foretune.tasks.task import Task, TaskCollection
from foretune.training.fit_basis import fit_basis
from foretune.training.learners import joint
from foretune.training.sharding import shard

torch.set_num_threads(1)
LORA = {"r": 2}
INNER = {"learning_rate": 0.02, "inner_learning_rate": 0.05, "inner_steps": 2, "lora": LORA}
RUN = Run(steps=12, eval_every=3, batch_size=4, device="cpu", seed=1, warmup=0.0)
UNEVEN = [24, 3, 9]


class StopError(ForetuneError):
    """The run is interrupted."""


def words(num_tasks: int, rows: int) -> list[Task]:
    """Tasks of texts of unlike lengths."""
    texts = [" ".join(tiny_models.WORDS[i % 7 : i % 7 + 2 + i % 5]) for i in range(999)]
    tasks = []
    for t in range(num_tasks):
        rows_of_task = [
            {
                "text": texts[t * 31 + i],
                "context": texts[t * 31 + i],
                "candidates": texts[t + i : t + i + 4],
                "answer": i % 4,
            }
            for i in range(rows + 4)
        ]
        tasks.append(
            Task(f"words{t}", rows_of_task[: rows - t], rows_of_task[rows:], rows_of_task[rows:])
        )
    return tasks


def retrain(
    method: Any,
    *,
    out: Path | None = None,
    rows: list[int] | None = None,
    tokens: str | None = None,
    stops: bool = False,
    model: nn.Module | None = None,
    held_out: foretune.HeldOut | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """What a retraining gave: base, adapters by task, record."""

    def progress(update: int, *_: Any) -> None:
        if stops and update == 7:
            raise StopError("stopped")

    model = model or linear_tasks.Net()
    tasks = linear_tasks.family(rows=rows or UNEVEN)
    run = RUN.replace(out=out, **changes)
    if tokens is not None:
        model = getattr(tiny_models, tokens)()  # BERT and GPT-2 have dropout
        objective = (Choice if tokens == "bert" else CausalLM)(tiny_models.tokenizer())
        if tokens == "bert":
            objective = replace(objective, train_candidates=3)
        tasks = TaskCollection(tuple(words(3, 9)), objective)
        # Ties of scores are broken by rounding, so the last state is what is compared.
        run = run.replace(steps=6, eval_every=0)
    result = foretune.retrain(model, tasks, method, run, held_out=held_out, progress=progress)
    bank = result.bank
    return {
        "base": result.model.state_dict(),
        "adapters": {}
        if bank is None
        else {key: bank.slot_state(slot) for slot, key in enumerate(bank.keys)},
        "history": result.history,
        "score": result.validation_score,
        "basis": None if result.basis is None else [*result.basis.explained, result.basis.in_span],
        "cost": {k: result.cost[k] for k in ("tokens", "examples", "trainable_parameters")},
    }


def signs(tasks: TaskCollection) -> TaskCollection:
    """The tasks with labels for answers."""
    parts = [
        [[{"x": row["x"], "y": i % 3} for i, row in enumerate(part)] for part in splits]
        for splits in ((task.train, task.validation, task.test) for task in tasks)
    ]
    labelled = [Task(task.name, *splits) for task, splits in zip(tasks, parts, strict=True)]
    return TaskCollection(tuple(labelled), Classification())


def adapt(
    method: Any,
    *,
    num_tasks: int = 5,
    shots: int | None = None,
    draws: int = 2,
    stops: bool = False,
    score_at: tuple[int, ...] = (),
    labelled: bool = False,
    tokens: str | None = None,
    model: nn.Module | None = None,
    on_update: Callable[[], None] = lambda: None,
    **changes: Any,
) -> dict[str, Any]:
    """What an adaptation gave."""
    tasks = linear_tasks.family(rows=[9, 3, 12, 5, 7][:num_tasks], prefix="unseen")
    if labelled:
        tasks = signs(tasks)
    if tokens is not None:
        model = getattr(tiny_models, tokens)()
        tasks = TaskCollection(tuple(words(3, 9)), CausalLM(tiny_models.tokenizer()))
    waves = []

    def progress(update: int, *_: Any) -> None:
        on_update()
        waves.append(update)
        if stops and waves.count(1) == 2:
            raise StopError("stopped")

    run = RUN.replace(**changes)
    model = model or linear_tasks.Net()
    result = foretune.adapt(
        model, tasks, method, run, shots=shots, draws=draws, score_at=score_at, progress=progress
    )
    return {
        "scores": result.scores,
        "num_rows": result.num_rows,
        "stopped": result.stopped,
        "path": result.path,
        "path_losses": result.path_losses,
        "tensors": result.tensors,
        "models": {key: model.state_dict() for key, model in result.models.items()},
        "cost": {k: result.cost[k] for k in ("tokens", "examples", "trainable_parameters")},
    }


def adapt_in_basis() -> dict[str, Any]:
    """What an adaptation in a basis gave that starts from one of the seen adapters."""
    base = linear_tasks.Net()
    seen = linear_tasks.family(rows=UNEVEN)
    with alone():
        basis = fit_basis(base, seen, LORA_ADAPT, RUN)
    set_basis(base, basis)
    return adapt(foretune.FromBasis(start="nearest"), model=base)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Inside the block this is the only process."""
    size = os.environ.pop("WORLD_SIZE", None)
    try:
        yield
    finally:
        if size is not None:
            os.environ["WORLD_SIZE"] = size


@contextlib.contextmanager
def sharded() -> Iterator[None]:
    """Inside the block the launcher has asked for FSDP2."""
    os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")
    try:
        yield
    finally:
        del os.environ["ACCELERATE_USE_FSDP"]


PEFT = foretune.PEFTML(learning_rate=0.02, adapter_learning_rate=0.05, lora=LORA)
SLOW = foretune.PEFTML(learning_rate=0.002, adapter_learning_rate=0.005, lora=LORA)
HEADS = replace(PEFT, form="last-layer")
POOLED = foretune.Standard(learning_rate=0.02)
FACTORISED = foretune.FactorisedHeads(
    learning_rate=0.02, adapter_learning_rate=0.05, num_factors=2, penalty=0.1
)
PULLED = replace(PEFT, form="both", penalty=0.1, penalty_towards="mean")
WILD = foretune.Standard(learning_rate=0.2)
LORA_ADAPT = foretune.LoRA(learning_rate=0.05, lora=LORA)
SLOW_LORA = replace(LORA_ADAPT, learning_rate=0.005)
REPTILE, FOMAML = foretune.Reptile(**INNER), foretune.FOMAML(**INNER)
HELD_OUT = foretune.HeldOut(
    tasks=linear_tasks.family(3, prefix="held", seed=0),
    method=LORA_ADAPT,
    run=Run(steps=4, batch_size=4),
)
CONSTANT = {"schedule": "constant", "steps": 30}

Cases = dict[str, Callable[[Path], Any]]
RETRAINED: Cases = {
    "joint": lambda _: retrain(PEFT),
    "one-a-step": lambda _: retrain(PEFT, tasks_per_step=1),
    "two-a-step": lambda _: retrain(PEFT, tasks_per_step=2),
    "one-task": lambda _: retrain(PEFT, rows=[9]),
    "chunks": lambda _: retrain(PEFT, token_budget=3),
    "last-layer": lambda _: retrain(HEADS),
    "clipped": lambda _: retrain(PEFT, max_grad_norm=0.01),
    "pooled": lambda _: retrain(POOLED),
    "pooled-chunks": lambda _: retrain(POOLED, token_budget=2, tasks_per_step=1),
    "towards-mean": lambda _: retrain(PULLED),
    "factorised": lambda _: retrain(FACTORISED),
    "reptile": lambda _: retrain(REPTILE),
    "reptile-adapter": lambda _: retrain(replace(REPTILE, inner="adapter")),
    "fomaml": lambda _: retrain(FOMAML),
    "fomaml-adapter": lambda _: retrain(replace(FOMAML, inner="adapter")),
    "none": lambda _: retrain(foretune.NoRetraining()),
    "best-in-memory": lambda _: retrain(WILD, **CONSTANT),
    "best-on-disk": lambda out: retrain(WILD, **CONSTANT, out=out),
    "on-disk": lambda out: retrain(PEFT, out=out),
    "choice": lambda _: retrain(SLOW, tokens="bert"),
    "pooled-choice": lambda _: retrain(replace(POOLED, learning_rate=0.002), tokens="bert"),
    "llama": lambda _: retrain(SLOW, tokens="llama", token_budget=40),
    "held-out": lambda _: retrain(WILD, **CONSTANT, held_out=HELD_OUT, patience=3),
    "held-out-last-layer": lambda _: retrain(HEADS, held_out=HELD_OUT),
    "held-out-none": lambda _: retrain(foretune.NoRetraining(), held_out=HELD_OUT),
    "sharded": lambda _: retrain(PEFT),
    "sharded-one-task": lambda _: retrain(PEFT, rows=[9]),
    "sharded-one-a-step": lambda _: retrain(PEFT, tasks_per_step=1),
    "sharded-pooled": lambda _: retrain(POOLED, token_budget=3),
    "sharded-heads": lambda _: retrain(HEADS),
    "sharded-best": lambda _: retrain(WILD, **CONSTANT),
    "sharded-on-disk": lambda out: retrain(PEFT, out=out),
    "sharded-llama": lambda _: retrain(SLOW, tokens="llama", token_budget=40),
    "sharded-gpt2": lambda _: retrain(
        SLOW, tokens="gpt2", token_budget=40, gradient_checkpointing=True
    ),
    "sharded-choice": lambda _: retrain(SLOW, tokens="bert"),
    "sharded-both": lambda _: retrain(replace(PEFT, form="both")),
    "sharded-sparse": lambda _: retrain(replace(PEFT, form="sparse")),
    "sharded-towards-mean": lambda _: retrain(PULLED),
    "sharded-reptile": lambda _: retrain(REPTILE),
    "sharded-reptile-chunks": lambda _: retrain(REPTILE, token_budget=3),
    "sharded-reptile-one-task": lambda _: retrain(REPTILE, rows=[9]),
    "sharded-reptile-adapter": lambda _: retrain(replace(REPTILE, inner="adapter")),
    "sharded-fomaml": lambda _: retrain(FOMAML),
    "sharded-fomaml-adapter": lambda _: retrain(replace(FOMAML, inner="adapter")),
    "sharded-fomaml-llama": lambda _: retrain(
        replace(FOMAML, learning_rate=0.002, inner_learning_rate=0.005), tokens="llama"
    ),
}
ADAPTED: Cases = {
    "adapt": lambda _: adapt(LORA_ADAPT),
    "adapt-waves": lambda out: adapt(LORA_ADAPT, tasks_per_wave=2, out=out),
    "adapt-shots": lambda _: adapt(LORA_ADAPT, shots=2, num_tasks=3),
    "adapt-patience": lambda _: adapt(LORA_ADAPT, patience=1, eval_every=2),
    "adapt-path": lambda _: adapt(LORA_ADAPT, score_at=(0, 3, 12), num_tasks=3),
    "adapt-labels": lambda _: adapt(LORA_ADAPT, score_at=(0, 12), labelled=True),
    "sharded-adapt": lambda _: adapt(LORA_ADAPT),
    "sharded-adapt-waves": lambda out: adapt(LORA_ADAPT, tasks_per_wave=1, out=out),
    "sharded-adapt-path": lambda _: adapt(LORA_ADAPT, score_at=(0, 3, 12), num_tasks=3),
    "sharded-adapt-labels": lambda _: adapt(LORA_ADAPT, score_at=(0, 12), labelled=True),
    "sharded-adapt-head": lambda _: adapt(foretune.Head(learning_rate=0.05), labelled=True),
    "sharded-adapt-one-task": lambda _: adapt(LORA_ADAPT, num_tasks=1, draws=1),
    "sharded-adapt-basis": lambda _: adapt_in_basis(),
    "sharded-adapt-llama": lambda _: adapt(SLOW_LORA, tokens="llama", token_budget=40),
    "sharded-adapt-gpt2": lambda _: adapt(SLOW_LORA, tokens="gpt2", gradient_checkpointing=True),
    "adapt-full": lambda _: adapt(foretune.Full(learning_rate=0.05), num_tasks=2),
}
# Each of them is stopped, and continued by another number of processes.
RESUMED: dict[str, Callable[..., Any]] = {
    "resumed": lambda **more: retrain(PEFT, **more),
    "resumed-one-a-step": lambda **more: retrain(PEFT, tasks_per_step=1, **more),
    "resumed-pooled": lambda **more: retrain(POOLED, **more),
    "sharded-resumed": lambda **more: retrain(PEFT, **more),
    "resumed-adapt": lambda **more: adapt(LORA_ADAPT, tasks_per_wave=2, **more),
    "sharded-resumed-adapt": lambda **more: adapt(LORA_ADAPT, tasks_per_wave=1, **more),
}


def full_disk() -> None:
    if os.environ["RANK"] == "1":
        raise ForetuneError("the disk is full")


def seeded_by_rank() -> nn.Module:
    return linear_tasks.Net(seed=int(os.environ["RANK"]))


ERRORS: Cases = {
    "not-empty": lambda out: retrain(PEFT, out=out.parent),
    "diverged": lambda _: retrain(replace(PEFT, adapter_learning_rate=1e30), max_grad_norm=None),
    "other-models": lambda _: retrain(POOLED, model=seeded_by_rank()),
    "statistics": lambda _: retrain(
        POOLED, model=nn.Sequential(nn.BatchNorm1d(4), linear_tasks.Net())
    ),
    "in-one-process": lambda _: adapt(LORA_ADAPT, on_update=full_disk),
    "sharded-factorised": lambda _: retrain(FACTORISED),
    "sharded-sara": lambda _: adapt(foretune.SaRA(learning_rate=0.05)),
    "sharded-held-out": lambda _: retrain(PEFT, held_out=HELD_OUT),
    "sharded-8bit": lambda _: retrain(PEFT, optimizer="adamw-8bit"),
    "sharded-full": lambda _: adapt(foretune.Full(learning_rate=0.05)),
    "sharded-patience": lambda _: adapt(LORA_ADAPT, patience=1),
    "sharded-diverged": lambda _: adapt(replace(LORA_ADAPT, learning_rate=1e30)),
}


shard_calls: list[int] = []
joint.shard = lambda *args: (shard_calls.append(1), shard(*args))


def play(cases: Cases, folder: Path, who: str) -> None:
    """Runs cases; what they gave goes to disk, be it an error."""
    for name, case in cases.items():
        under = sharded if name.startswith("sharded") and who != "alone" else contextlib.nullcontext
        shard_calls.clear()
        try:
            with under():
                result = case(folder / f"{name}-{'alone' if who == 'alone' else 'two'}")
        except ForetuneError as error:
            result = f"{type(error).__name__}: {error}"
        if isinstance(result, dict):
            result["sharded"] = bool(shard_calls)
        torch.save(result, folder / f"{name}-{who}.pt")


def begun(folder: Path, where: str) -> Cases:
    return {
        f"{name}-begun-{where}": lambda _, case=case, name=name: case(
            out=folder / f"{name}-{where}", stops=True
        )
        for name, case in RESUMED.items()
    }


def continued(folder: Path, where: str) -> Cases:
    return {
        f"{name}-from-{where}": lambda _, case=case, name=name: case(
            out=folder / f"{name}-{where}", resume=True
        )
        for name, case in RESUMED.items()
    }


def forked(work: Callable[[str], None]) -> None:
    """Forks two connected processes; raises when one fails."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(2):
        pid = os.fork()
        if pid:
            children.append(pid)
            continue
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        os.environ.update(place | ranks, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
        try:
            work(str(rank))
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    failed = [os.waitpid(pid, 0)[1] for pid in children]
    if any(failed):
        raise SystemExit("a process failed")


def main(folder: Path) -> None:
    undisturbed = RETRAINED | ADAPTED
    never_stopped = {name: lambda _, case=case: case() for name, case in RESUMED.items()}
    play(undisturbed | never_stopped | begun(folder, "one"), folder, "alone")
    in_two = undisturbed | ERRORS | continued(folder, "one") | begun(folder, "two")
    forked(lambda who: play(in_two, folder, who))
    play(continued(folder, "two"), folder, "alone")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
