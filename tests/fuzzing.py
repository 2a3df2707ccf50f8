"""Damaged copies of a file, and what must hold of any command that reads one.

No traceback and no "this is a bug"; a user's mistake is one line and exit code 2; nothing that was
read is changed, nothing is written beside `--out`, and after a refusal nothing is left there.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import shutil
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

from command_line import call

OUT = "out"
NO_NUMBER = ("the loss is", "not finite", " nan")
# Numbers too large for memory, C or int(); wrong types; text that means something elsewhere.
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 7, 10**9, 2**63, 10**30, 0.5, -0.0, 1e308),
    *(
        float("nan"),
        float("inf"),
        "",
        "x",
        "0",
        "1e-3",
        "..",
        "../x",
        "/",
        "a/b",
        "\x00",
        "\x1b[2J",
    ),
    *("(", "[", "{", "*", "é", "e\u0301", "\U0001f600", "x" * 300, "nan", "auto", "torch.float32"),
    *([], [None], [0], ["x"], [[[]]], {}, {"x": 1}, {"name": "x"}, {"": None}),
]
BYTES = [
    b"",
    b"\x00",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"{",
    b"[]",
    b"null",
    b"\n",
    b"9" * 6000,
    b"[" * 9000,
]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path to each value inside nested lists and mappings, itself included."""
    inside = value.items() if isinstance(value, dict) else ()
    inside = enumerate(value) if isinstance(value, list) else inside
    return [path, *(place for key, part in inside for place in places(part, (*path, key)))]


@st.composite
def damaged_values(draw: st.DrawFn, value: Any) -> Any:
    """The value with one of its parts replaced, removed, or under another name."""
    path = draw(st.sampled_from(places(value)))
    if not path:
        return draw(st.sampled_from(VALUES))
    changed = copy.deepcopy(value)
    holder = changed
    for key in path[:-1]:
        holder = holder[key]
    action = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add"]))
    if action == "replace":
        holder[path[-1]] = draw(st.sampled_from(VALUES))
    elif action == "remove":
        del holder[path[-1]]
    elif isinstance(holder, dict):
        holder[draw(st.sampled_from(["x", "", "name", "format"]))] = draw(st.sampled_from(VALUES))
    else:
        holder.insert(0, draw(st.sampled_from(VALUES)))
    return changed


@st.composite
def damaged_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """The bytes cut, replaced, with one byte changed, or with others in between."""
    place = draw(st.integers(0, max(len(content) - 1, 0)))
    action = draw(st.sampled_from(["cut", "replace", "flip", "insert"]))
    if action == "cut":
        return content[:place]
    if action == "replace":
        return draw(st.sampled_from(BYTES))
    if action == "insert":
        return content[:place] + draw(st.sampled_from(BYTES)) + content[place:]
    changed = bytearray(content or b"\x00")
    changed[place] ^= draw(st.integers(1, 255))
    return bytes(changed)


@st.composite
def damaged_tensors(draw: st.DrawFn, content: bytes) -> bytes:
    """A safetensors file with a damaged header, or a number that is not finite."""
    length = struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    if draw(st.booleans()):
        header = draw(damaged_values(header))
    elif len(data) >= 4:
        place = 4 * draw(st.integers(0, len(data) // 4 - 1))
        odd = struct.pack("<f", draw(st.sampled_from([float("nan"), float("inf"), -1e38])))
        data = data[:place] + odd + data[place + 4 :]
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + data


@st.composite
def damaged_rows(draw: st.DrawFn, content: bytes) -> bytes:
    """Lines of JSON with one of them damaged."""
    lines = content.splitlines()
    number = draw(st.integers(0, len(lines) - 1))
    row = draw(damaged_values(json.loads(lines[number])))
    lines[number] = json.dumps(row).encode()
    return b"\n".join(lines) + b"\n"


def damaged(file: Path) -> st.SearchStrategy[bytes]:
    """Contents that the file might have been damaged to, most of them still of its format."""
    content = file.read_bytes()
    ways = [damaged_bytes(content)]
    if file.suffix == ".json":
        ways.append(damaged_values(json.loads(content)).map(lambda v: json.dumps(v).encode()))
    elif file.suffix == ".yaml":
        values = damaged_values(yaml.safe_load(content))
        ways.append(values.map(lambda v: yaml.safe_dump(v, allow_unicode=True).encode()))
    elif file.suffix == ".jsonl":
        ways.append(damaged_rows(content))
    elif file.suffix == ".safetensors":
        ways.append(damaged_tensors(content))
    return st.one_of(ways[0], *ways[1:] * 3)


def digests(folder: Path) -> dict[str, str]:
    """The digest of each file below a folder, without the output."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    names = {path: str(path.relative_to(folder)) for path in files}
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path, name in names.items()
        if name.split("/")[0] != OUT
    }


def check_command(
    folder: Path,
    arguments: Sequence[object],
    *,
    may_change: Callable[[str], bool] = lambda name: False,
) -> int:
    """Runs a command in a folder and asserts what this module's docstring says; its exit code.

    Args:
        folder: The working directory; the command's results go to `OUT` in it.
        arguments: The command line.
        may_change: Whether the command may write the file of that name, relative to `folder`.
    """
    before, had_out = digests(folder), (folder / OUT).exists()
    result = call(*arguments)
    said = result.stderr.splitlines()[-1:] or [""]
    assert result.exit_code in (0, 1, 2), (arguments, result.output)
    assert "Traceback" not in result.output and "this is a bug" not in result.output, result.output
    if result.exit_code == 1:  # no mistake of the user's: what was read computes no number
        assert any(words in said[0] for words in NO_NUMBER), said
    if result.exit_code:
        assert said[0].startswith("error: "), said
        assert len(said[0]) < 2000, said
        if not had_out:
            out = folder / OUT
            assert not out.exists() or not any(out.iterdir()), sorted(out.rglob("*"))
    after = digests(folder)
    changed = {name for name in {*before, *after} if before.get(name) != after.get(name)}
    assert not {name for name in changed if not may_change(name)}, changed
    return result.exit_code


def copied(source: Path, target: Path) -> Path:
    """A fresh copy of a folder; of an earlier one, all that differs by now is replaced."""
    target.mkdir(exist_ok=True)
    original, earlier = _original(source), contents(target)
    for name in sorted(earlier, reverse=True):
        if name not in original or original[name] != earlier[name]:
            path = target / name
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    for name in original:
        if (source / name).is_dir():
            (target / name).mkdir(exist_ok=True)
        elif not (target / name).exists():
            shutil.copy2(source / name, target / name)
    return target


@functools.cache
def _original(source: Path) -> dict[Path, bytes | bool]:
    return contents(source)


def contents(folder: Path) -> dict[Path, bytes | bool]:
    """The bytes of each file below a folder; of all else, whether it is a link."""
    return {
        path.relative_to(folder): path.read_bytes() if path.is_file() else path.is_symlink()
        for path in sorted(folder.rglob("*"))
    }
