"""Whatever a file of ours holds, reading it gives its content or one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save
from typing_extensions import TypedDict

from foretune.errors import UserError
from foretune.formats import ADAPTER, read_json, read_tensors


class Record(TypedDict, total=False):
    base: str
    sizes: dict[str, list[int]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[" * 10**5 + b"]" * 10**5, "is not JSON: recursion limit exceeded"),
        (b'{"sizes": 1' + b"0" * 5000 + b"}", "is not JSON: number out of range"),
        (b"[1]", "it holds no mapping"),
        (b'{"base": 3}', r"base: input should be a valid string, got 3"),
        (b'{"sizes": {"a": [1, "2"]}}', r"sizes\.a\.1: input should be a valid integer, got '2'"),
        (b'{"format": "foretune-adapter-9"}', "newer foretune"),
        (b'{"format": "foretune-run-1"}', "its format is 'foretune-run-1'"),
    ],
)
def test_a_damaged_record_is_refused_by_its_name_and_field(
    content: bytes, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "record.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_json(path, Record, ADAPTER)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_record_is_read_without_its_format_and_without_unknown_fields(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text('{"format": "foretune-adapter-1", "base": "x", "of later": 1}')
    assert read_json(path, Record, ADAPTER) == {"base": "x"}


@given(content=st.binary(max_size=200))
def test_any_bytes_are_a_record_or_one_line(
    content: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("any") / "record.json"
    path.write_bytes(content)
    for read in (lambda: read_json(path, Record, ADAPTER), lambda: read_tensors(path)):
        try:
            read()
        except UserError as error:
            assert "\n" not in str(error)


@given(place=st.integers(0, 200), bits=st.integers(1, 255))
def test_a_changed_byte_of_a_tensor_file_is_read_or_one_line(
    place: int, bits: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = bytearray(save({"a": torch.zeros(3, 4), "b": torch.arange(3)}))
    content[place % len(content)] ^= bits
    path = tmp_path_factory.mktemp("any") / "model.safetensors"
    path.write_bytes(bytes(content))
    try:
        read_tensors(path)
    except UserError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused_by_the_tensors_name(
    number: float, tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(save({"fine": torch.zeros(2), "bad": torch.tensor([0.0, number])}))
    with pytest.raises(UserError, match="bad holds NaN or infinite numbers"):
        read_tensors(path)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a file"):
        read_json(tmp_path, Record)
    with pytest.raises(UserError, match="no file"):
        read_tensors(tmp_path / "missing.safetensors")
