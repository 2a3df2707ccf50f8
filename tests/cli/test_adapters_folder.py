"""A folder of adapters that new tasks join every week, as typed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tiny_models
from command_line import call, the_error, the_json
from foretune.models.loading import save_base

HOW = ("--objective", "classification", "method=lora", "learning_rate=1e-2", "steps=3")


def rows_of(task: str, number: int = 12, start: int = 0) -> list[dict[str, Any]]:
    words = tiny_models.WORDS[3:]
    return [
        {"task": task, "text": f"{words[i % len(words)]} {words[i % 5]}", "label": "xy"[i % 2]}
        for i in range(start, start + number)
    ]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    save_base(tiny_models.bert(num_labels=2), tiny_models.tokenizer(), tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def adapt(rows: list[dict[str, Any]], *more: object) -> dict[str, Any]:
    """What `adapt` says of these rows."""
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result: dict[str, Any] = the_json("adapt", "base", "--tasks", "rows.jsonl", *HOW, *more)
    return result


def weights(folder: str) -> bytes:
    return Path("adapters", folder, "adapter_model.safetensors").read_bytes()


def close(first: str, second: str) -> bool:
    """Whether two adapters are equal up to the order of sums in batches."""
    one, other = (load_file(Path(name, "adapter_model.safetensors")) for name in (first, second))
    return all(torch.allclose(one[name], value, atol=1e-5) for name, value in other.items())


def test_new_tasks_join_those_that_are_there(place: Path) -> None:
    assert adapt([*rows_of("a"), *rows_of("b")])["there"] == []
    before = {name: weights(name) for name in "ab"}
    again = adapt([*rows_of("b"), *rows_of("c")])
    assert again["there"] == ["b"] and again["replaced"] == []
    assert {*again["scores"]} == {"b", "c"}
    assert {name: weights(name) for name in "ab"} == before
    result = call("adapt", "base", "--tasks", "rows.jsonl", *HOW)
    assert "Already there, not adapted again: 2 tasks (b and c)" in result.stdout
    alone = adapt([*rows_of("b"), *rows_of("c")], "--out", "alone")
    assert alone["scores"] == again["scores"]
    assert close("alone/c", "adapters/c")


def test_changed_rows_are_a_new_version_on_request(place: Path) -> None:
    adapt([*rows_of("a"), *rows_of("b")])
    before = {name: weights(name) for name in "ab"}
    changed = [*rows_of("a", start=5), *rows_of("b")]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, changed)))
    line = the_error("adapt", "base", "--tasks", "rows.jsonl", *HOW)
    assert 'other rows of task "a": --replace' in line
    assert {name: weights(name) for name in "ab"} == before
    again = adapt(changed, "--replace")
    assert again["there"] == ["b"] and again["replaced"] == ["a"]
    assert weights("versions/a/1") == before["a"] and weights("b") == before["b"]
    adapt(rows_of("a", start=5), "--out", "alone")
    assert close("alone/a", "adapters/a") and weights("a") != before["a"]
    assert adapt(changed)["there"] == ["a", "b"]
    adapt(rows_of("a", start=7), "--replace")
    assert sorted(path.name for path in Path("adapters/versions/a").iterdir()) == ["1", "2"]
    assert close("adapters/versions/a/2", "alone/a")
    adapters = the_json("ls", "adapters", "adapters")["adapters"]
    assert [(row["task"], row["version"]) for row in adapters] == [("a", 3), ("b", 1)]
    checked = the_json("check", "base", "adapters")["adapters"]
    assert [row["adapter"] for row in checked] == ["adapters/a", "adapters/b"]
    # the marker lists the versions, so that they are foretune's to replace
    assert call("adapt", "base", "--tasks", "rows.jsonl", *HOW, "--overwrite").exit_code == 0
    assert not Path("adapters/versions").exists()


def test_what_replaces_is_whole_or_the_earlier_one_stays(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapt([*rows_of("a"), *rows_of("b")])
    before = {name: weights(name) for name in "ab"}
    changed = [*rows_of("a", start=5), *rows_of("b", start=5)]

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("foretune.training.adapting._adapt_wave", full)
        Path("rows.jsonl").write_text("\n".join(map(json.dumps, changed)))
        assert call("adapt", "base", "--tasks", "rows.jsonl", *HOW, "--replace").exit_code != 0
    assert {name: weights(name) for name in "ab"} == before
    # the rows are those of the second call now, and the adapters are not yet
    assert adapt(changed)["replaced"] == ["a", "b"]
    assert weights("a") != before["a"] and weights("versions/a/1") == before["a"]


def test_other_settings_and_bases_are_refused(place: Path) -> None:
    adapt(rows_of("a"))
    command = ("adapt", "base", "--tasks", "rows.jsonl", *HOW)
    assert "steps=3, this run has steps=4" in the_error(*command, "steps=4")
    save_base(tiny_models.bert(num_labels=2, seed=3), tiny_models.tokenizer(), place / "base")
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows_of("b"))))
    assert "another model" in the_error(*command)
    assert "choose one" in the_error(*command, "--replace", "--overwrite")
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("x")
    assert "mine is not empty" in the_error(*command, "--out", "mine")


def test_the_list_of_adapters(place: Path) -> None:
    adapt([*rows_of("a"), *rows_of("b", 20)], "--base-name", "my-org/base")
    adapters = the_json("ls", "adapters", "adapters")["adapters"]
    a, b = adapters
    assert (a["task"], a["version"], a["base"]) == ("a", 1, "my-org/base")
    assert a["rows"] == 9 and b["rows"] == 14  # the others are held out
    assert 0 <= a["score"] <= 1 and a["adapted"].endswith("+00:00")
    shown = call("ls", "adapters", "adapters").stdout.splitlines()
    assert shown[0].split() == ["task", "version", "rows", "score", "adapted", "base"]
    assert "which folder?" in the_error("ls", "adapters")
    assert "holds no adapters" in the_error("ls", "adapters", "base")
    assert "no such folder: absent" in the_error("ls", "adapters", "absent")
    assert "only adapters are listed of a folder" in the_error("ls", "methods", "adapters")
    assert "cannot list" in the_error("ls", "adaptors")


def test_the_list_needs_no_pytorch(place: Path) -> None:
    adapt(rows_of("a"))
    code = (
        "import sys; sys.modules.update(torch=None, transformers=None, peft=None)\n"
        "from foretune.cli import app; app(['ls', 'adapters', 'adapters'])"
    )
    listing = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert (listing.returncode, listing.stderr) == (0, "")
    assert listing.stdout.splitlines()[1].split()[:3] == ["a", "1", "9"]


def test_what_libraries_say_to_developers_is_not_printed(place: Path) -> None:
    """PEFT imports bitsandbytes where that is installed, which logs a warning about its kernels."""
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows_of("a"))))
    command = ["adapt", "base", "--tasks", "rows.jsonl", *HOW]
    adapting = subprocess.run(
        [sys.executable, "-m", "foretune", *command], capture_output=True, text=True, check=False
    )
    assert adapting.returncode == 0, adapting.stderr
    first, *progress = adapting.stderr.splitlines()
    assert first == "loading PyTorch"
    assert all("adapt" in line for line in progress), progress
