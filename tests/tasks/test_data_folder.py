"""Folders as other tools write them: each file's split is what its name says, or it is refused."""

from __future__ import annotations

import json
import os
import random
import re
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from foretune.errors import UserError
from foretune.tasks.sources import Source, load_tasks
from foretune.tasks.task import Task


def rows(text: str, count: int = 4, **columns: Any) -> list[dict[str, Any]]:
    return [{"task": "a", "text": f"{text} {i}", "label": i % 2, **columns} for i in range(count)]


def fill(folder: Path, names: list[str], **columns: Any) -> str:
    """Write files whose texts are their own names."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".parquet"):
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows(name, **columns)), path)
        elif name.casefold().endswith((".csv", ".tsv")):
            mark = "\t" if name.endswith("tsv") else ","
            lines = [mark.join(("task", "text", "label"))]
            lines += [mark.join(map(str, row.values())) for row in rows(name)]
            path.write_text("\n".join(lines))
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows(name, **columns)))
    return str(folder)


def load(source: str, **fields: Any) -> Task:
    tasks, _ = load_tasks(
        Source(source=source, validation=0.0, test=0.0, **fields), "classification"
    )
    return tasks.tasks[0]


def files_of(task: Task) -> dict[str, set[str]]:
    """The files from which each split's rows came."""
    return {
        split: {row["text"].rpartition(" ")[0] for row in task.split(split)}
        for split in ("train", "validation", "test")
        if task.split(split)
    }


def refusal(source: str, **fields: Any) -> str:
    with pytest.raises(UserError) as caught:
        load(source, **fields)
    message = str(caught.value)
    assert "\n" not in message
    return message


LAYOUTS = {
    "shards": (
        ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"],
        [],
        ["test-00000-of-00001.parquet"],
    ),
    "hub": (
        ["data/train-00000-of-00001-a09b74b3ef9c3b56.parquet"],
        ["data/validation-00000-of-00001.parquet"],
        ["data/test-00000-of-00001.parquet"],
    ),
    "folders": (["train/part-0.parquet", "train/part-1.parquet"], ["dev/x.jsonl"], ["Test/y.csv"]),
    "spellings": (["Train.jsonl"], ["VAL.csv"], ["test.JSONL"]),
    "suffixes": (["train.jsonl"], ["valid.tsv"], ["test.csv"]),
    "words": (["shop_train.jsonl"], ["shop-dev.jsonl"], ["shop.test.jsonl"]),
    "fillers": (["train_data.csv"], ["validation-set.csv"], ["test_part_0.csv"]),
    "numbers": (["train_0.jsonl", "train_1.jsonl"], ["val1.jsonl"], ["test-2.jsonl"]),
    "partitions": (
        ["split=train/part-0.parquet"],
        ["split=valid/part-0.parquet"],
        ["split=test/part-0.parquet"],
    ),
    "Spark": (["train.parquet/part-00000.parquet"], [], ["test.parquet/part-00000.parquet"]),
    "mixed": (["train/a.jsonl"], ["validation.jsonl"], []),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_name_of_a_file_or_its_folder_is_its_split(tmp_path, layout):
    train, validation, test = LAYOUTS[layout]
    source = fill(tmp_path, [*train, *validation, *test])
    expected = {"train": set(train), "validation": set(validation), "test": set(test)}
    assert files_of(load(source)) == {split: names for split, names in expected.items() if names}


def test_without_a_train_file_nothing_is_trained_on(tmp_path):
    message = refusal(fill(tmp_path, ["test.parquet", "validation.parquet"]))
    assert message == 'task "a" has no train examples, only 4 validation, 4 test'


def test_files_that_name_no_split_are_read_as_one(tmp_path):
    source = fill(tmp_path, ["b.jsonl", "a.csv", "part-00000-c0ffee.parquet", "latest.jsonl"])
    assert len(load(source).train) == 16


def test_what_holds_no_rows_is_passed_over(tmp_path):
    names = ["README.md", "LICENSE", ".gitattributes", "_SUCCESS", "dataset_infos.json", "make.py"]
    for name in (*names, ".cache/huggingface/test.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("no rows")
    assert len(load(fill(tmp_path, ["data.jsonl"])).train) == 4


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("test.feather", r"holds more than can be read: test.feather; convert"),
        ("test.jsonl.zst", r"test.jsonl.zst; convert or rename it"),
        ("test.txt", r"test.txt; .*set source to one of train.jsonl"),
        ("old/data.jsonl", r"old/ \(a folder that names no split\)"),
        ("eval.jsonl", r'eval.jsonl: which split is "eval".*tasks.splits.eval=train'),
        ("split=eval/0.jsonl", r'got "eval" \(validation to some tools, test to others\)'),
        ("test_sft.jsonl", r'which split is "test_sft"'),
        ("test_train.jsonl", r'which split is "test_train"'),
        ("train/test.jsonl", "train/test.jsonl names two splits, train and test"),
        ("more.jsonl", r"train.jsonl name a split, more.jsonl none.*tasks.splits.more=train"),
        ("train.csv", r"train.csv and train.jsonl may be the same rows twice"),
        ("train (1).jsonl", r"train \(1\).jsonl and train.jsonl may be the same rows twice"),
        ("Copy of train.csv", r"Copy of train.csv and train.jsonl may be the same rows twice"),
        ("test-00001-of-00003.jsonl", r"has 1 of the 3 files test-…-of-00003"),
    ],
)
def test_what_is_not_clear_is_refused(tmp_path, name, message):
    source = fill(tmp_path, ["train.jsonl"])
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text((tmp_path / "train.jsonl").read_text())
    with pytest.raises(UserError, match=message):
        load(source)


def test_links_pipes_and_devices_are_named(tmp_path):
    source = fill(tmp_path, ["train.jsonl"])
    (tmp_path / "test.jsonl").symlink_to("gone.jsonl")
    os.mkfifo(tmp_path / "more.jsonl")
    message = refusal(source)
    assert "test.jsonl (a link to gone.jsonl, which does not exist)" in message
    assert "more.jsonl (a pipe or a device)" in message
    assert "is a link to gone.jsonl" in refusal(str(tmp_path / "test.jsonl"))
    assert "is a pipe or a device" in refusal(str(tmp_path / "more.jsonl"))
    assert "is a pipe or a device" in refusal("/dev/zero")


def test_links_to_files_are_read_and_circles_end(tmp_path):
    fill(tmp_path / "blobs", ["0.jsonl"])
    (tmp_path / "d" / "data").mkdir(parents=True)
    (tmp_path / "d" / "data" / "train.jsonl").symlink_to("../../blobs/0.jsonl")
    assert len(load(str(tmp_path / "d")).train) == 4
    for name in ("data", "train", "split=test"):
        (tmp_path / "d" / "data" / name).symlink_to(tmp_path / "d" / "data")
    assert "data/data is a link to a folder that it is in" in refusal(str(tmp_path / "d"))


def test_partitions_are_columns(tmp_path):
    for task in ("a", "b%2Fc"):
        path = tmp_path / f"task={task}" / "split=train"
        path.mkdir(parents=True)
        (path / "0.jsonl").write_text('{"text": "t", "label": "x"}\n' * 3)
    tasks, _ = load_tasks(Source(source=str(tmp_path)), "classification")
    assert tasks.names == ["a", "b/c"]


def test_a_row_that_contradicts_its_folder_is_refused(tmp_path):
    message = refusal(fill(tmp_path / "1", ["task=b/0.jsonl"]))
    assert message.endswith('0.jsonl line 1: task is "a", but the folder says "task=b"')
    message = refusal(fill(tmp_path / "2", ["train.jsonl"], split="test"))
    assert 'line 1: the row says split "test", but its file is of train' in message
    assert len(load(fill(tmp_path / "3", ["dev.jsonl", "train.jsonl"])).validation) == 4


CUSTOM = {"train_sft": "train", "test_sft": "test", "train_gen": None, "test_gen": None}


@pytest.mark.parametrize(
    "form", ["{}-00000-of-00001.parquet", "{}.jsonl", "{}/0.csv", "split={}/0.csv"]
)
def test_custom_names_of_splits_are_mapped(tmp_path, form):
    source = fill(tmp_path, [form.format(name) for name in CUSTOM])
    assert "tasks.splits.t" in refusal(source)
    task = load(source, splits=CUSTOM)
    expected = {"train": {form.format("train_sft")}, "test": {form.format("test_sft")}}
    assert files_of(task) == expected


def test_custom_names_of_splits_in_rows_are_mapped(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for n in CUSTOM for row in rows(n, split=n)))
    assert "d.jsonl line 1: split must be" in (message := refusal(str(path)))
    assert 'got "train_sft": rename it, or set tasks.splits.train_sft=train' in message
    assert files_of(load(str(path), splits=CUSTOM)) == {
        "train": {"train_sft"},
        "test": {"test_sft"},
    }


def test_a_custom_name_that_is_not_in_the_data_is_refused(tmp_path):
    source = fill(tmp_path, ["train.jsonl", "dev.jsonl"])
    assert files_of(load(source, splits={"dev": "test"})) == {
        "train": {"train.jsonl"},
        "test": {"dev.jsonl"},
    }
    message = refusal(source, splits={"dve": "test"})
    assert 'renames "dve", which' in message and 'Did you mean "dev"?' in message
    assert "must be one of train, validation, test" in refusal(source, splits={"dev": "tset"})


def test_splits_of_a_saved_dataset_are_mapped(tmp_path):
    import datasets

    tables = {name: datasets.Dataset.from_list(rows(name)) for name in CUSTOM}
    datasets.DatasetDict(tables).save_to_disk(tmp_path / "d")
    assert 'got "train_sft"' in refusal(str(tmp_path / "d"))
    task = load(str(tmp_path / "d"), splits=CUSTOM)
    assert files_of(task) == {"train": {"train_sft"}, "test": {"test_sft"}}
    (tmp_path / "d" / "test.csv").write_text("task,text,label\n")
    assert "holds other files too: test.csv" in refusal(str(tmp_path / "d"))


def test_rows_of_a_dataset_without_splits_may_name_theirs(tmp_path):
    import datasets

    table = datasets.Dataset.from_list(rows("x", split="train") + rows("y", split="test"))
    table.save_to_disk(tmp_path / "d")
    assert files_of(load(str(tmp_path / "d"))) == {"train": {"x"}, "test": {"y"}}


def test_a_dataset_card_says_which_files_are_which(tmp_path, tmp_path_factory, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    source = fill(tmp_path, ["first.jsonl", "second.jsonl"])
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n"
    for split, name in (("train", "first.jsonl"), ("test", "second.jsonl")):
        card += f"  - split: {split}\n    path: {name}\n"
    (tmp_path / "README.md").write_text(card + "---\n# Mine\n")
    assert files_of(load(source)) == {"train": {"first.jsonl"}, "test": {"second.jsonl"}}
    (tmp_path / "README.md").write_text(card.replace("first", "../first") + "---\n")
    assert "names files outside" in refusal(source)


@pytest.mark.parametrize("call", ["iterdir", "is_file", "stat"])
def test_a_folder_without_permission_is_one_line(tmp_path, monkeypatch, call):
    source = fill(tmp_path, ["train.jsonl"])
    unchanged = getattr(Path, call)

    def refuse(path: Path, **options: Any) -> Any:
        if path == tmp_path or path.parent == tmp_path:
            raise PermissionError(13, "Permission denied", str(path))
        return unchanged(path, **options)

    monkeypatch.setattr(Path, call, refuse)
    assert refusal(source) == f"{source} cannot be read: Permission denied"


FOLDERS = ["", "", "", "data/", "train/", "Test/", "split=valid/", "task=a/", "old/", "x.parquet/"]
STEMS = ["train", "test", "dev", "eval", "a", "b", "train_sft", "my-test", "part-0", "train-0-of-2"]
SUFFIXES = [".jsonl", ".jsonl", ".csv", ".JSONL", ".tsv", ".parquet", ".txt", ".md", ".jsonl.bak"]


def test_no_file_of_a_folder_is_read_under_another_name_or_not_at_all(tmp_path):
    """Of any tree: all its files are read, each as the split that it names, or none is."""
    rng = random.Random(0)
    read = refused = 0
    for trial in range(200):
        names = {
            "".join(map(rng.choice, (FOLDERS, FOLDERS, STEMS, SUFFIXES)))
            for _ in range(rng.choice((1, 1, 2, 3)))
        }
        source = fill(tmp_path / str(trial), sorted(names))
        try:
            tasks, _ = load_tasks(Source(source=source, validation=0.0, test=0.0), "classification")
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
            continue
        read += 1
        expected = {name for name in names if not name.endswith(".md")}
        splits = files_of(tasks.tasks[0])
        assert set().union(*splits.values()) == expected
        for split, words in {"test": "test", "validation": "valid|dev"}.items():
            named = {name for name in expected if re.search(words, name.casefold())}
            assert splits.get(split, set()) == named
    assert read > 20 and refused > 20
