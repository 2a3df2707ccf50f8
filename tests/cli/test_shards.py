"""`foretune adapt --shard` in jobs that do not know of each other, and `merge-shards`, as typed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tiny_models
from command_line import call, the_error, the_json
from foretune.models.loading import save_base

HOW = ("--objective", "classification", "method=lora", "learning_rate=1e-2", "steps=3")
TYPED = ("--tasks", "rows.jsonl", "--shots", "2", *HOW)
TASKS = ("d", "B", "a", "c", "b")  # sorted: B, a, b, c, d


def rows_of(task: str, start: int = 0) -> list[dict[str, Any]]:
    labels = "xyz" if task == "c" else "xy"  # the head is wider because of one task
    words = tiny_models.WORDS[3:]
    return [
        {"task": task, "text": f"{words[i % 7]} {words[i % 5]}", "label": labels[i % len(labels)]}
        for i in range(start, start + 12)
    ]


def write(*tasks: str, start: int = 0) -> None:
    rows = [row for task in tasks for row in rows_of(task, start)]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    model = tiny_models.bert(num_labels=2)
    save_base(model, tiny_models.tokenizer(), tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    write(*TASKS)
    return tmp_path


def adapt(*more: object) -> dict[str, Any]:
    result: dict[str, Any] = the_json("adapt", "base", *TYPED, *more)
    return result


def shards(number: int, *more: object) -> list[str]:
    """The folders of all shards."""
    return [adapt("--shard", f"{k}/{number}", *more)["out"] for k in range(1, number + 1)]


def files(folder: str) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file()
    }


def close(first: Path, second: Path) -> bool:
    """Whether two adapters are equal up to the order of sums in batches."""
    tensors, others = (load_file(path / "adapter_model.safetensors") for path in (first, second))
    return tensors.keys() == others.keys() and all(
        torch.allclose(tensors[name], other, atol=1e-5) for name, other in others.items()
    )


def test_shards_together_are_the_adaptation_without_shards(place: Path) -> None:
    whole = adapt("--out", "whole")
    result = adapt("--shard", "1/3")
    assert (result["out"], result["shard"]) == ("adapters-1-of-3", "1/3")
    assert {*result["num_train"]} == {"B", "c"}
    write(*sorted(TASKS))  # in another order
    typed = call("adapt", "base", *TYPED, "--shard", "2/3")
    assert "shard 2/3: 2 of 5 tasks, in adapters-2-of-3" in typed.stderr
    assert "Adapters: adapters-2-of-3" in typed.stdout
    adapt("--shard", "3/3")
    folders = [f"adapters-{k}-of-3" for k in (2, 3, 1)]
    before = {folder: files(folder) for folder in folders}
    merged = the_json("merge-shards", "adapters", *folders)
    assert {folder: files(folder) for folder in folders} == before
    assert merged["added"] == sorted(TASKS) and merged["there"] == [] and merged["shards"] == 3
    assert merged["scores"] == whole["scores"]
    listed = {
        folder: the_json("ls", "adapters", folder)["adapters"] for folder in ("whole", "adapters")
    }
    for one, other in zip(listed["whole"], listed["adapters"], strict=True):
        assert (one["task"], one["rows"], one["score"]) == (
            other["task"],
            other["rows"],
            other["score"],
        )
        assert close(Path(one["folder"]), Path(other["folder"]))
    # two names that some file systems take for the same were in different shards
    names = {row["task"]: Path(row["folder"]).name for row in listed["adapters"]}
    assert names["B"] == "B" and names["b"].startswith("b-")
    assert len(the_json("check", "base", "adapters")["adapters"]) == 5
    Path("new.jsonl").write_text(json.dumps({"task": "b", "text": "red"}))
    predicted = the_json("predict", "base", "adapters", "new.jsonl")["rows"]
    assert [row["task"] for row in predicted] == ["b"]
    assert adapt()["there"] == sorted(TASKS)  # and `adapt` goes on in the merged folder


def test_a_shard_goes_on_and_its_versions_come_along(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = shards(2, "--resume")
    assert adapt("--shard", "1/2")["there"] == ["B", "b", "d"]
    assert the_json("merge-shards", "adapters", *folders)["added"] == sorted(TASKS)
    weights = Path("a", "adapter_model.safetensors")
    assert Path("adapters", weights).samefile(Path(folders[1], weights))
    again = the_json("merge-shards", "adapters", *folders)
    assert again["added"] == [] and again["there"] == sorted(TASKS)
    write(*TASKS, start=5)
    assert adapt("--shard", "2/2", "--replace")["replaced"] == ["a", "c"]
    assert "other rows of task" in the_error("merge-shards", "adapters", *folders)
    adapt("--shard", "1/2", "--replace")

    def no_links(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", no_links)
    the_json("merge-shards", "newer", *folders)
    assert not Path("newer", weights).samefile(Path(folders[1], weights))
    assert Path("newer/versions/a/1", weights.name).read_bytes() == (
        Path("adapters", weights).read_bytes()
    )
    assert adapt("--out", "newer")["there"] == [*TASKS]
    assert adapt("--shard", "2/2", "--overwrite")["there"] == []


def test_new_tasks_join_those_of_the_folder(place: Path) -> None:
    the_json("merge-shards", "adapters", *shards(2))
    before = files("adapters")
    write("e", "f")
    week = shards(3, "--out", "week")
    empty = call("adapt", "base", *TYPED, "--out", "week", "--shard", "3/3")
    assert empty.exit_code == 0 and "Shard 3/3 has no task" in empty.stdout
    shown = call("merge-shards", "adapters", *week)
    assert "Merged 3 shards: 2 tasks added" in shown.stdout, shown.output
    after = files("adapters")
    changed = ("scores.json", "run.json", ".foretune")
    assert all(after[name] == content for name, content in before.items() if name not in changed)
    assert {row["task"] for row in the_json("ls", "adapters", "adapters")["adapters"]} == {
        *TASKS,
        "e",
        "f",
    }
    adapt("--overwrite")
    assert not Path("adapters/a").exists()  # all of it was foretune's to replace


def altered(folder: str, old: str, new: str, to: str = "altered") -> str:
    """A copy of a folder with another text in its run.json."""
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(folder, to)
    text = Path(to, "run.json").read_text()
    assert old in text
    Path(to, "run.json").write_text(text.replace(old, new))
    return to


def test_shards_that_do_not_belong_together_are_refused(place: Path) -> None:
    first, second = shards(2)

    def refused(*folders: object) -> str:
        line = the_error("merge-shards", "adapters", *folders)
        assert not Path("adapters").exists() and not Path(".unfinished-adapters").exists()
        return line

    assert "of 2 shards these are missing: 2;" in refused(first)
    assert "are both shard 1/2" in refused(first, second, first)
    assert "no such folder: absent" in refused(first, "absent")
    assert "base is not a shard" in refused(first, "base")
    adapt("--out", "plain")
    assert "plain is not a shard" in refused(first, "plain")
    other = altered(second, '"learning_rate": 0.01', '"learning_rate": 0.001')
    assert "learning_rate=0.001, adapters-1-of-2 with learning_rate=0.01" in refused(first, other)
    assert "is shard 2/3" in refused(first, altered(second, '"2/2"', '"2/3"'))
    assert "another list of tasks" in refused(
        first, altered(second, '"all_tasks": "', '"all_tasks": "0')
    )
    assert "another model" in refused(first, altered(second, '"model": "', '"model": "0'))
    twice = altered(first, '"1/2"', '"2/2"')
    assert f'task "B" is in {first} and in {twice}' in refused(first, twice)
    assert "is one of the shards" in the_error("merge-shards", first, first, second)
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("x")
    assert "(notes.txt)" in the_error("merge-shards", "mine", first, second)
    the_json("merge-shards", "plain2", first, second)
    altered("plain2", '"steps": 3', '"steps": 4', to="slower")
    line = the_error("merge-shards", "slower", first, second)
    assert "slower was started with steps=4, the shards with steps=3" in line
    shutil.rmtree(Path(second, "a"))
    assert "is not finished, 1 of 2 tasks are missing (a)" in refused(first, second)
    write(*TASKS, "new")
    result = call("adapt", "base", *TYPED, "--shard", "1/2")
    assert result.exit_code == 2
    line = result.stderr.splitlines()[-1]
    assert "adapters-1-of-2 was started with another list of tasks" in line


def test_a_merge_that_ends_early_leaves_what_was_there(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = shards(2)
    the_json("merge-shards", "adapters", *folders)
    write("e", "f")
    week, before = shards(2, "--out", "week"), files("adapters")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    for name in ("write_scores", "write_whole"):
        with monkeypatch.context() as patch:
            patch.setattr(f"foretune.recipes.merge_shards.{name}", killed)
            assert call("merge-shards", "adapters", *week).exit_code == 130
            assert call("merge-shards", "fresh", *week).exit_code == 130
        assert files("adapters") == before and not Path("fresh").exists()
    shutil.copytree("adapters", ".unfinished-adapters")  # as a kill leaves it
    assert the_json("merge-shards", "adapters", *week)["added"] == ["e", "f"]
    assert not Path(".unfinished-adapters").exists()


@pytest.mark.parametrize("shard", ["0/8", "9/8", "a/b", "2", "-1/8", "1/0", "²/8"])
def test_a_shard_is_checked_before_anything_is_read(shard: str) -> None:
    line = the_error("adapt", "base", "--tasks", "rows.jsonl", f"--shard={shard}")
    assert shard in line or "²" in shard
    assert "K/N" in line
