"""Files of rows: what CSV means, cells that nobody reads, and bytes that no tool has written."""

from __future__ import annotations

import csv
import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from foretune.errors import UserError
from foretune.tasks.file_formats import READERS
from foretune.tasks.sources import Source, load_tasks
from foretune.tasks.task import Task

HEADER = "task,text,label\n"


def load(path: Path, content: str | bytes | None = None, kind: str = "classification") -> Task:
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    source = Source(source=str(path), validation=0.0, test=0.0, num_candidates=2)
    return load_tasks(source, kind)[0].tasks[0]


def refusal(path: Path, content: str | bytes | None = None, kind: str = "classification") -> str:
    with pytest.raises(UserError) as caught:
        load(path, content, kind)
    message = str(caught.value)
    assert "\n" not in message
    return message


def table(path: Path, **columns: Any) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


# CSV and TSV

TEXTS = [
    "plain",
    'a, "quoted"\ttext',
    "two\nlines",
    "two\r\nlines",
    " spaces ",
    "naïve 🚚",
    "x" * 200_000,
]


@pytest.mark.parametrize("name", ["d.csv", "d.tsv", "d.csv.gz", "D.TSV"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_table_holds_the_rows_that_were_written(tmp_path, name, encoding):
    delimiter = "\t" if "tsv" in name.lower() else ","
    path = tmp_path / name
    opened: Any = gzip.open if name.endswith("gz") else open
    with opened(path, "wt", encoding=encoding, newline="") as stream:
        writer = csv.writer(stream, delimiter=delimiter)
        writer.writerow(["task", "text", "label"])
        writer.writerows(["7", text, str(i % 2)] for i, text in enumerate(TEXTS))
    task = load(path)
    assert task.name == "7"
    assert task.train == tuple({"text": t, "label": str(i % 2)} for i, t in enumerate(TEXTS))


def test_empty_cells_and_nameless_columns_are_missing(tmp_path):
    content = ",task,text,label,split,note\n0,a,t,l,test,\n\n1,a,t,l,,x\n,,,,,\n"
    task = load(tmp_path / "d.csv", content)
    assert task.train == ({"text": "t", "label": "l", "note": "x"},)
    assert task.test == ({"text": "t", "label": "l"},)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (HEADER + 'a,"two\nlines",x\na,,x\n', "d.csv line 4: text missing"),
        (HEADER + "a,one, two,x\n", "d.csv line 2: 4 cells, but the header has 3"),
        (HEADER + "a,t\n", "d.csv line 2: 2 cells, but the header has 3"),
        (HEADER + 'a,"never closed,x\nb,t,x\n', "d.csv line 2: malformed CSV"),
        (HEADER + 'a,"a" b,x\n', "d.csv line 2: malformed CSV"),
        ("task;text;label\na;t;x\n", "line 1: the header has a single column"),
        ("task,text,text\na,t,u\n", 'd.csv has 2 columns "text"'),
        ("a,hello,x\na,there,y\n", 'd.csv line 2: no "task" column; it has a, hello, x'),
        (HEADER, "d.csv is empty"),
        ("", "d.csv is empty"),
        ("task,text,label\na,t,x\n".encode("utf-16"), "the header: byte 0xff is not UTF-8"),
        (HEADER.encode() + b"a,caf\xe9,x\n", "d.csv line 2: text: byte 0xe9 is not UTF-8: save"),
        ("sep=,\n" + HEADER + "a,t,x\n", "d.csv line 1: a line for Excel (sep=…): remove it"),
    ],
)
def test_faults_of_a_table_are_named_by_line(tmp_path, content, message):
    assert message in refusal(tmp_path / "d.csv", content)


def test_a_table_holds_no_arrays(tmp_path):
    message = refusal(tmp_path / "d.csv", "task,x,y\na,0.5,1\n", "regression")
    assert message.endswith(
        'got "0.5" (a CSV or TSV file holds text only: write .jsonl or .parquet)'
    )
    choice = "task,context,candidates,answer\na,hi,\"['x','y']\",0\n"
    assert "holds text only" in refusal(tmp_path / "d.csv", choice, "choice")


def test_a_table_may_hold_responses(tmp_path):
    content = "task,context,response\n" + "".join(f"a,hi {i},answer {i}\n" for i in range(6))
    assert load(tmp_path / "d.csv", content, "choice").train[0]["context"] == "hi 0"


# Cells that nobody can read

NOT_UTF8 = pyarrow.StringArray.from_buffers(
    1, *pyarrow.array([b"caf\xe9"], pyarrow.binary()).buffers()[1:]
)
BAD_CELLS: dict[str, tuple[str, Callable[[Path, str], Path], str]] = {
    "parquet": ("d.parquet", lambda p, c: table(p, **ROW | {c: NOT_UTF8}), "row 1"),
    "csv": ("d.csv", lambda p, c: write_csv(p, c), "line 2"),
    "npz": ("d.npz", lambda p, c: write_npz(p, c), "row 1"),
    "integer": ("d.jsonl", lambda p, c: write_json(p, c, "9" * 5000), "line 1"),
    "negative": ("d.jsonl", lambda p, c: write_json(p, c, "-" + "9" * 5000), "line 1"),
    "nested": ("d.jsonl", lambda p, c: write_json(p, c, "[" * 200 + "]" * 200), "line 1"),
    "object": ("d.jsonl", lambda p, c: write_json(p, c, '{"k": 1, "k": 2}'), "line 1"),
    "list": ("d.json", lambda p, c: write_json(p, c, "[" * 200 + "]" * 200, "[%s]"), "row 1"),
}
REASONS = {
    "csv": "byte 0xe9 is not UTF-8: save the file as UTF-8",
    "tsv": "byte 0xe9 is not UTF-8: save the file as UTF-8",
    "integer": "an integer of 5000 digits",
    "negative": "an integer of 5000 digits",
    "nested": "nested more than 100 levels deep",
    "list": "nested more than 100 levels deep",
    "object": 'the key "k" occurs 2 times',
}
ROW = {"task": ["a"], "text": ["t"], "label": ["l"]}


def write_csv(path: Path, column: str) -> Path:
    cells = {name: cell.encode() for name, (cell,) in ROW.items()} | {column: b"caf\xe9"}
    path.write_bytes(",".join(cells).encode() + b"\n" + b",".join(cells.values()) + b"\n")
    return path


def write_npz(path: Path, column: str) -> Path:
    np.savez(path, **ROW | {column: np.array([b"caf\xe9"])})
    return path


def write_json(path: Path, column: str, cell: str, form: str = "%s") -> Path:
    cells = {name: json.dumps(cell) for name, (cell,) in ROW.items()} | {column: cell}
    path.write_text(form % ("{" + ", ".join(f'"{k}": {v}' for k, v in cells.items()) + "}"))
    return path


@pytest.mark.parametrize("format", BAD_CELLS)
def test_a_cell_that_cannot_be_decoded_matters_to_its_readers_only(tmp_path, format):
    name, write, place = BAD_CELLS[format]
    assert load(write(tmp_path / name, "note")).train == ({"text": "t", "label": "l"},)
    reason = REASONS.get(format, "byte 0xe9 is not UTF-8")
    for column in ("text", "label", "task", "split", "dialogue"):
        message = refusal(write(tmp_path / name, column))
        assert message == f"{tmp_path / name} {place}: {column}: {reason}"


@pytest.mark.parametrize("column", ["task", "text", "label"])
def test_half_a_character_is_named(tmp_path, column):
    message = refusal(write_json(tmp_path / "d.jsonl", column, r'"ab\ud83d"'))
    assert f"line 1, {column}: character 3 is half of a surrogate pair ('\\ud83d')" in message
    whole = load(write_json(tmp_path / "d.jsonl", column, r'"ab\ud83d\ude9a"'))
    assert "ab🚚" in (whole.name, *whole.train[0].values())


def test_what_occurs_twice_is_named(tmp_path):
    row = '{"task": "a", "text": "t", "label": "x", "label": "y"}'
    assert 'd.jsonl line 1: the key "label" occurs 2 times' in refusal(tmp_path / "d.jsonl", row)
    names = ["task", "text", "label", "label"]
    arrays = [pyarrow.array(["a"])] * 4
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays(arrays, names), tmp_path / "d.parquet")
    assert 'd.parquet has 2 columns "label"' in refusal(tmp_path / "d.parquet")


def test_a_message_shows_no_control_characters(tmp_path):
    row = json.dumps({"task": "a", "text": "t", "label": "x", "split": "\x1b[2J\x9b"})
    assert r"\x1b[2J\x9b" in refusal(tmp_path / "d.jsonl", row)
    assert r"it has \u202ek" in refusal(tmp_path / "d.jsonl", '{"\\u202ek": 1}')


def test_numbers_beyond_float_are_refused(tmp_path):
    for x, y in (("[1e999]", "1"), ("[1" + "0" * 400 + "]", "1"), ("[1]", "1" + "0" * 400)):
        content = f'{{"task": "a", "x": {x}, "y": {y}}}'
        assert "d.jsonl line 1: " in refusal(tmp_path / "d.jsonl", content, "regression")


def test_arrow_files_are_read(tmp_path):
    stored = pyarrow.table({name: cells * 3 for name, cells in ROW.items()})
    for name, create in (("a", pyarrow.ipc.new_file), ("b", pyarrow.ipc.new_stream)):
        with create(tmp_path / f"{name}.arrow", stored.schema) as writer:
            writer.write_table(stored)
        assert len(load(tmp_path / f"{name}.arrow").train) == 3


# Any bytes


def examples_of_every_format(folder: Path) -> dict[str, bytes]:
    """A good file of each format."""
    columns = {
        "task": ["a", "b"] * 8,
        "text": [f"text {i}" for i in range(16)],
        "label": [*"xy"] * 8,
    }
    rows = [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    separated = {
        mark: "\n".join(mark.join(cells) for cells in (columns, *(r.values() for r in rows)))
        for mark in ",\t"
    }
    table(folder / "x.parquet", **columns)
    np.savez(folder / "x.npz", **columns)
    stored = pyarrow.table(columns)
    with pyarrow.ipc.new_file(folder / "x.arrow", stored.schema) as writer:
        writer.write_table(stored)
    plain = {
        ".jsonl": lines,
        ".ndjson": lines,
        ".json": json.dumps(rows).encode(),
        ".csv": separated[","].encode(),
        ".tsv": separated["\t"].encode(),
        **{s: (folder / f"x{s}").read_bytes() for s in (".parquet", ".npz", ".arrow")},
    }
    packed = {f"{suffix}.gz": gzip.compress(plain[suffix]) for suffix in list(plain)[:5]}
    return plain | packed


def mutated(content: bytes, rng: random.Random) -> bytes:
    """The content after a few changes of the kind that fuzzers make."""
    changed = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        start, length = rng.randrange(len(changed) + 1), rng.randint(1, 12)
        change = rng.randrange(6)
        if change == 0:
            changed[start : start + length] = rng.randbytes(length)
        elif change == 1:
            del changed[start : start + length]
        elif change == 2:
            changed[start:start] = rng.choice(
                [b"\0", b'"', b"\xff\xfe", b"[" * 3000, b"1e999", b"\\ud800"]
            )
        elif change == 3:
            changed = changed[: start or 1]
        elif change == 4:
            changed[start:start] = changed[-length:]
        elif start < len(changed):
            changed[start] ^= 1 << rng.randrange(8)
    return bytes(changed)


@pytest.mark.parametrize("suffix", READERS)
def test_any_bytes_are_rows_or_one_line(tmp_path, suffix):
    """No other exception, and nothing that hangs, whatever has become of the file."""
    content = examples_of_every_format(tmp_path)[suffix]
    rng = random.Random(suffix)
    path = tmp_path / f"d{suffix}"
    assert len(load(path, content).train) == 8
    for trial in range(60):
        path.write_bytes(mutated(content, rng) if trial % 4 else rng.randbytes(rng.randrange(200)))
        try:
            load(path)
        except UserError as error:
            assert "\n" not in str(error)
