"""Two processes give what one gives: bases, adapters, scores, checkpoints, errors."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from foretune.processes import num_processes, process_rank
from foretune.recipes.templates import template_text
from foretune.tasks.objectives.regression import Regression
from foretune.training import process_group
from foretune.training.data import SlotRows, TaskData
from foretune.training.process_group import Partition, ProcessGroup, partition_slots

BY_TASK = ("joint", "one-a-step", "two-a-step", "chunks", "last-layer", "clipped", "on-disk")
BY_TASK += ("one-task", "choice", "llama")
BY_ROW = ("pooled", "pooled-chunks", "pooled-choice", "best-in-memory", "best-on-disk")
OTHERS = ("towards-mean", "reptile", "reptile-adapter", "fomaml", "fomaml-adapter", "none")
OTHERS += ("factorised", "held-out", "held-out-last-layer", "held-out-none")
SHARDED = ("", "-one-task", "-one-a-step", "-pooled", "-heads", "-best", "-on-disk", "-llama")
SHARDED += ("-gpt2", "-choice", "-both", "-sparse", "-towards-mean")
SHARDED += ("-reptile", "-reptile-chunks", "-reptile-one-task")
SHARDED += ("-reptile-adapter", "-fomaml", "-fomaml-adapter", "-fomaml-llama")
SHARDED = tuple(f"sharded{name}" for name in SHARDED)
ADAPTED = ("adapt", "adapt-waves", "adapt-shots", "adapt-patience", "adapt-full", "adapt-path")
ADAPTED += ("adapt-labels",)
SHARDED_ADAPTED = ("", "-waves", "-path", "-labels", "-head", "-one-task", "-basis", "-llama")
SHARDED_ADAPTED = tuple(f"sharded-adapt{name}" for name in (*SHARDED_ADAPTED, "-gpt2"))
RESUMED = ("resumed", "resumed-one-a-step", "resumed-pooled", "sharded-resumed", "resumed-adapt")
RESUMED += ("sharded-resumed-adapt",)
ON_DISK = ("on-disk", "sharded-on-disk", "best-on-disk", "adapt-waves", "sharded-adapt-waves")
# The true gradient of a key's bias is zero; AdamW makes a step of the rounding error.
NOISE = ("key.bias", "c_attn.bias")
# Cosines divided by 0.05 and AdamW make more of rounding errors; a wrong weight would be 1e-3.
ATOL = dict.fromkeys(("choice", "pooled-choice", "sharded-choice"), 2e-5)
ATOL |= dict.fromkeys(("llama", "sharded-llama"), 5e-6)  # torch 2.9 rounds its products otherwise


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ranks_run.py left: about thirty seconds, a third of it imports."""
    folder = tmp_path_factory.mktemp("ranks")
    driver = Path(__file__).with_name("ranks_run.py")
    done = subprocess.run(
        [sys.executable, str(driver), str(folder)],
        capture_output=True,
        text=True,
        timeout=500,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return folder


def load(folder: Path, *names: str) -> list[Any]:
    return [torch.load(folder / f"{name}.pt", weights_only=False) for name in names]


def close(actual: dict[str, Any], expected: dict[str, Any], atol: float = 1e-6) -> None:
    """The same names, and tensors that are equal up to rounding."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        if not name.endswith(NOISE):
            torch.testing.assert_close(actual[name], value, rtol=0, atol=atol, msg=name)


def same_file(actual: Path, expected: Path) -> None:
    """The same names, and tensors that are equal up to rounding."""
    ours, theirs = load_file(actual), load_file(expected)
    if expected.name != "basis.safetensors":
        return close(ours, theirs)
    # Signs, and directions of little variance, are rounding errors; the Gaussian is not.
    assert ours.keys() == theirs.keys()
    for mine, other in zip(gaussian(ours), gaussian(theirs), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-3 * float(other.abs().max()))


def gaussian(basis: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean (1, n) and covariance (n, n) of the changed parameters that a basis describes."""
    columns = []
    for part in sorted(name.partition(":")[2] for name in basis if name.startswith("mean:")):
        values = torch.cat([basis[f"mean:{part}"][None], basis[f"directions:{part}"]])
        if f"left:{part}" in basis:
            values = basis[f"left:{part}"] @ values @ basis[f"right:{part}"]
        columns.append(values.flatten(1))
    values = torch.cat(columns, 1)
    return values[:1], values[1:].T @ values[1:]


def same_retraining(
    ranks: list[dict[str, Any]], expected: dict[str, Any], atol: float = 1e-6
) -> None:
    """Every rank has the base and the record; each adapter is on one of them."""
    for rank in ranks:
        close(rank["base"], expected["base"], atol)
        assert rank["score"] == pytest.approx(expected["score"], abs=1e-5)
        steps = [{k: pytest.approx(v, abs=1e-5) for k, v in e.items()} for e in expected["history"]]
        assert rank["history"] == steps
        assert rank["basis"] == pytest.approx(expected["basis"], abs=1e-2)
    adapters = {key: state for rank in ranks for key, state in rank["adapters"].items()}
    assert sum(len(rank["adapters"]) for rank in ranks) == len(adapters)
    assert adapters.keys() == expected["adapters"].keys()
    for key, state in adapters.items():
        close(state, expected["adapters"][key], atol)
    for name, state in ranks[0]["base"].items():
        assert all(torch.equal(rank["base"][name], state) for rank in ranks), name


def same_adaptation(ranks: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    """Every rank has the scores; each adapter is on one of them."""
    for rank in ranks:
        assert rank["scores"] == pytest.approx(expected["scores"], abs=1e-5)
        assert list(rank["scores"]) == list(expected["scores"])
        for path in ("path", "path_losses"):
            assert list(rank[path]) == list(expected[path])
            for step, values in expected[path].items():
                assert rank[path][step] == pytest.approx(values, abs=1e-5)
        assert rank["num_rows"] == expected["num_rows"] and rank["stopped"] == expected["stopped"]
    for kind in ("tensors", "models"):
        assert sum(len(rank[kind]) for rank in ranks) <= len(expected[kind])
        for rank in ranks:
            for key, state in rank[kind].items():
                close(state, expected[kind][key])


@pytest.mark.parametrize("name", (*BY_TASK, *BY_ROW, *OTHERS))
def test_two_processes_retrain_as_one_does(name: str, played: Path) -> None:
    alone, *ranks = load(played, f"{name}-alone", f"{name}-0", f"{name}-1")
    same_retraining(ranks, alone, ATOL.get(name, 1e-6))
    if name != "pooled-choice":  # a text that two rows share is read once, by each process
        assert all(rank["cost"] == alone["cost"] for rank in ranks)


@pytest.mark.parametrize("name", SHARDED)
def test_a_sharded_base_is_retrained_as_a_whole_one(name: str, played: Path) -> None:
    alone, *ranks = load(played, f"{name}-alone", f"{name}-0", f"{name}-1")
    same_retraining(ranks, alone, ATOL.get(name, 1e-6))
    assert [rank["sharded"] for rank in (alone, *ranks)] == [False, True, True]


@pytest.mark.parametrize("name", SHARDED_ADAPTED)
def test_tasks_are_adapted_on_a_sharded_base_as_on_a_whole_one(name: str, played: Path) -> None:
    alone, *ranks = load(played, f"{name}-alone", f"{name}-0", f"{name}-1")
    same_adaptation(ranks, alone)
    assert ranks[0]["cost"] == ranks[1]["cost"]
    assert [rank["sharded"] for rank in (alone, *ranks)] == [False, True, True]


@pytest.mark.parametrize("name", ADAPTED)
def test_two_processes_adapt_as_one_does(name: str, played: Path) -> None:
    alone, *ranks = load(played, f"{name}-alone", f"{name}-0", f"{name}-1")
    same_adaptation(ranks, alone)
    assert all(sum(len(rank[kind]) for kind in ("tensors", "models")) for rank in ranks)
    assert ranks[0]["cost"] == ranks[1]["cost"] == alone["cost"]


@pytest.mark.parametrize("name", RESUMED)
def test_another_number_of_processes_continues(name: str, played: Path) -> None:
    [alone] = load(played, f"{name}-alone")
    begun = [f"{name}-begun-one-alone", f"{name}-begun-two-0", f"{name}-begun-two-1"]
    assert load(played, *begun) == ["StopError: stopped"] * 3
    from_one = load(played, f"{name}-from-one-0", f"{name}-from-one-1")
    from_two = load(played, f"{name}-from-two-alone")
    same = same_adaptation if name.endswith("adapt") else same_retraining
    same(from_one, alone)
    same(from_two, alone)


@pytest.mark.parametrize("name", ON_DISK)
def test_the_folder_is_what_one_process_writes(name: str, played: Path) -> None:
    alone, two = played / f"{name}-alone", played / f"{name}-two"
    names = {path.relative_to(alone) for path in alone.rglob("*")}
    assert names == {path.relative_to(two) for path in two.rglob("*")}
    for path in names:
        if path.suffix == ".safetensors":
            same_file(two / path, alone / path)
        elif path.name == "foretune.json":
            same = [json.loads((f / path).read_text()) for f in (alone, two)]
            assert same[0]["trainable"] == same[1]["trainable"]
    marks = {path.read_text() for path in two.rglob("base_fingerprint.json")}
    assert len(marks) <= 1


def test_all_processes_raise_the_same_error(played: Path) -> None:
    messages = {
        "not-empty": "UserError: .* is not empty",
        "diverged": "DivergedError: .*task",
        "other-models": "UserError: the 2 processes of this job have different models",
        "statistics": r"UserError: 0 \(BatchNorm1d\) keeps batch statistics",
        "in-one-process": "ForetuneError: the disk is full",
        "sharded-factorised": "UserError: the shared heads of factorised-heads cannot be sharded",
        "sharded-sara": "UserError: sara trains a whole copy of the base for each task",
        "sharded-held-out": "UserError: held-out tasks need the whole base in every process",
        "sharded-8bit": "UserError: optimizer adamw-8bit cannot be sharded",
        "sharded-full": "UserError: full trains a whole copy of the base for each task",
        "sharded-patience": "UserError: patience=1 stops tasks one by one",
        "sharded-diverged": "DivergedError: .*task",
    }
    for name, message in messages.items():
        first, second = load(played, f"{name}-0", f"{name}-1")
        assert first == second
        assert re.match(message, first), first


# --- dealing out ---------------------------------------------------------------------------------


def slots(*sizes: int) -> TaskData:
    row = {"x": np.zeros(4, "f4"), "y": np.zeros(3, "f4")}
    examples = [SlotRows(f"t{i}", [row] * size) for i, size in enumerate(sizes)]
    return TaskData(examples, Regression())


def test_slots_are_dealt_out_by_tokens_within_a_step() -> None:
    ranks = ProcessGroup(size=2)
    assert ranks.owners([4, 1, 1, 2], 4) == [0, 1, 1, 1]
    assert ranks.owners([4, 4, 1, 1], 2) == [0, 1, 0, 1]
    assert ranks.owners([3], 1) == [0]
    assert ranks.owners([], 1) == []


def test_a_process_alone_has_everything() -> None:
    partition = partition_slots(ProcessGroup(), slots(3, 1), 4, None, pooled=False)
    assert partition.slots == partition.bank_slots == [0, 1]
    assert partition.local_data is partition.data


def test_a_process_without_tasks_holds_a_copy_that_is_not_used() -> None:
    partition = Partition(slots(3), ProcessGroup(1, 2), owners=[0])
    assert (
        partition.slots == []
        and partition.bank_slots == [0]
        and partition.local_data.keys == ["t0"]
    )
    step = partition.step([(0, 1), (0, 2)], [0], None)
    assert step.chunks == () and (step.num_slots, step.num_rows) == (1, 2)


def test_a_step_knows_what_others_hold() -> None:
    partition = Partition(slots(3, 3, 3), ProcessGroup(1, 2), owners=[0, 1, 1])
    step = partition.step([(0, 0), (1, 1), (2, 0), (2, 1)], [0], None)
    assert step.slots == (0, 1, 1)  # the bank's own numbers
    assert (step.num_slots, step.num_rows) == (3, 4)


def test_pooled_rows_are_dealt_out_whichever_slot_they_are_of() -> None:
    picks = [(0, 0), (0, 1), (0, 2), (1, 0)]
    parts = [
        Partition(slots(3, 1), ProcessGroup(rank, 2), owners=[0, 1], by_rows=True).step(
            picks, [0], None
        )
        for rank in range(2)
    ]
    assert [len(part.slots) for part in parts] == [2, 2]
    assert sorted(parts[0].slots + parts[1].slots) == [0, 0, 0, 1]


def test_without_a_launcher_there_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    assert (num_processes(), process_rank()) == (1, 0)
    monkeypatch.setenv("RANK", "1")
    assert (num_processes(), process_rank()) == (2, 1)


LEAVES = """
import atexit, os
import torch.distributed as dist

def say():  # in a single write, for both processes write to one pipe
    os.write(1, f"{dist.is_initialized()}\\n".encode())

atexit.register(say)  # runs after what is registered later
from foretune.training.process_group import process_group

process_group()
say()
"""


def test_processes_disconnect_before_they_exit() -> None:
    # Otherwise one of five that has done its work aborts, as gloo's threads outlive Python.
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *launcher, "--no-python", sys.executable, "-c", LEAVES],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Exception") == 0, done.stderr
    assert sorted(done.stdout.split()) == ["False", "False", "True", "True"]


def test_a_process_that_failed_does_not_wait_to_disconnect(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: calls.append("left"))
    monkeypatch.setattr(sys, "last_value", RuntimeError(), raising=False)
    process_group._disconnect()
    assert not calls
    monkeypatch.delattr(sys, "last_value")
    process_group._disconnect()
    assert calls == ["left"]


# --- the launcher --------------------------------------------------------------------------------

MODEL = """
import os, signal
import torch
from torch import nn

class Mortal(nn.Sequential):
    calls = 0

    def forward(self, x):
        self.calls += self.training and self[0].weight.requires_grad  # not where a copy is adapted
        if os.environ.get("KILL") == f"{os.environ.get('RANK')} {self.calls}":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)

def build(width=6):
    torch.manual_seed(0)
    return Mortal(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 2))
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5, 40, 4)).astype(np.float32)
    y = (np.einsum("tnd,td->tn", x, rng.normal(size=(5, 4))) > 0).astype(np.int64)
    task = np.repeat([f"t{i}" for i in range(5)], 40)
    np.savez(tmp_path / "data.npz", task=task, x=x.reshape(-1, 4), y=y.reshape(-1))
    (tmp_path / "my_model.py").write_text(MODEL)
    (tmp_path / "my.yaml").write_text(template_text("arrays"))
    return tmp_path


def launch(place: Path, *args: str, processes: int = 2, interval_s: float = 0.1, **env: str) -> Any:
    command = [sys.executable, "-m", "foretune.cli"]
    if processes > 1:
        many = ["--multi_gpu", "--num_processes", str(processes), "--main_process_port", "0"]
        many += ["--monitor_interval", str(interval_s)]
        command = [sys.executable, "-m", "accelerate.commands.launch", *many]
        command += ["-m", "foretune.cli"]
    return subprocess.run(
        [*command, *args],
        cwd=place,
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
    )


RETRAIN = (
    "retrain",
    "my.yaml",
    "model.file=my_model.py",
    "tasks.unseen=2",
    "retrain.learning_rates=[1e-3]",
)
RETRAIN += ("retrain.steps=60", "retrain.eval_every=10", "retrain.patience=null", "--out", "out")


@pytest.mark.slow
@pytest.mark.parametrize(("victim", "processes"), [(0, 1), (1, 2)])
def test_a_killed_process_ends_the_job_and_nothing_is_lost(
    victim: int, processes: int, place: Path
) -> None:
    # A launcher that looks every 0.1 s may stop the survivor before it could say what it saw.
    killed = launch(place, *RETRAIN, interval_s=10, KILL=f"{victim} 35")
    assert killed.returncode != 0
    assert "another process of this job has ended" in killed.stderr
    assert f"Signal {int(signal.SIGKILL)} (SIGKILL)" in killed.stderr
    assert {path.name for path in (place / "out").glob("checkpoint-*")} >= {"checkpoint-30"}
    resumed = launch(place, *RETRAIN, "--resume", processes=processes)
    assert resumed.returncode == 0, resumed.stderr
    undisturbed = launch(place, *RETRAIN[:-1], "undisturbed", processes=1)
    assert undisturbed.returncode == 0, undisturbed.stderr
    for path in (place / "undisturbed").rglob("*.safetensors"):
        same_file(place / "out" / path.relative_to(place / "undisturbed"), path)


@pytest.mark.slow
def test_the_first_process_alone_speaks(place: Path) -> None:
    done = launch(place, *RETRAIN, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["base"] == "out/base"
    assert done.stderr.count("model: my_model.py") == 1
    refused = launch(place, *RETRAIN)
    assert refused.returncode != 0 and refused.stdout == ""
    assert [line for line in refused.stderr.splitlines() if "is not empty" in line] == [
        "error: out is not empty: use --resume to continue its run, --overwrite to replace it, "
        "or another folder"
    ]
    source = (
        "adapt",
        "out/base",
        "--tasks",
        "data.npz",
        "steps=3",
        "--json",
        "--trust-remote-code",
    )
    two = launch(place, *source, "--out", "two")
    assert two.returncode == 0, two.stderr
    alone = launch(place, *source, "--out", "one", processes=1)
    assert json.loads(two.stdout)["scores"] == json.loads(alone.stdout)["scores"]
    rows = [json.loads((place / name / "scores.json").read_text()) for name in ("one", "two")]
    assert all(row.pop("adapted") for of_run in rows for row in of_run)
    assert sorted(rows[0], key=str) == sorted(rows[1], key=str)
