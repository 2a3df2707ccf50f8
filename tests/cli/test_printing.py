"""What reaches a terminal, a pipe or a page: no character of a name drives them, none is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from tests.command_line import call, the_error
from tests.evaluation.test_report import comparison

from foretune.cli.group import explain
from foretune.cli.output import emit, emit_json, quiet_stdout, table
from foretune.evaluation.report import summary_rows, write_report
from foretune.printable import markdown, printable
from foretune.recipes.model_card import model_card

ROOT = Path(__file__).resolve().parents[2]
COMPARISONS = [
    path
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    if '"foretune-comparison-1"' in path.read_text("utf-8")[:100]
]
HOSTILE = "red\x1b]0;owned\x07\x9b31m\u202e\ud800"


def foretune(*args: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "foretune", *args]
    return subprocess.run(
        command, capture_output=True, env={**os.environ, **environment}, timeout=60, check=False
    )


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_any_encoding_of_stdout_will_do(encoding: str) -> None:
    text = foretune("show", "peft-ml", PYTHONIOENCODING=encoding, PYTHONUTF8="0")
    assert (text.returncode, text.stderr) == (0, b"")
    record = foretune("show", "peft-ml", "--json", PYTHONIOENCODING=encoding, PYTHONUTF8="0")
    assert json.loads(record.stdout.decode(encoding))["name"] == "peft-ml"


def test_a_closed_pipe_ends_a_command_quietly() -> None:
    line = f"{sys.executable} -m foretune show peft-ml | true"
    result = subprocess.run(line, shell=True, capture_output=True, timeout=60, check=False)
    assert (result.stdout, result.stderr) == (b"", b"")


@pytest.mark.parametrize("closed", [">&-", "<&-", ">&- 2>&-"])
def test_a_stream_that_is_closed_is_no_error(closed: str) -> None:
    line = f"{sys.executable} -m foretune ls {closed}"
    result = subprocess.run(line, shell=True, capture_output=True, timeout=60, check=False)
    assert result.returncode == 0 and not result.stderr, result.stderr


def test_control_characters_are_printed_as_escapes(capsys: pytest.CaptureFixture[str]) -> None:
    emit(HOSTILE)
    assert capsys.readouterr().out == "red\\x1b]0;owned\\x07\\x9b31m\\u202e\\ud800\n"
    emit_json({"task": HOSTILE})
    out = capsys.readouterr().out
    assert printable(out) == out
    assert json.loads(out) == {"task": HOSTILE}


def test_tables_are_aligned_in_any_script() -> None:
    text = table(["task", "score"], [["日本語", 0.5], ["e\u0301te\u0301", 12], ["plain", 3]])
    assert text.splitlines() == [
        *("task    score", "日本語    0.5", "e\u0301te\u0301        12", "plain       3"),
    ]


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.stem)
def test_the_table_of_a_comparison_fits_eighty_columns(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    comparison = json.loads(path.read_text("utf-8"))
    monkeypatch.setenv("COLUMNS", "80")
    header, rows = summary_rows(comparison)
    text = table(header, rows)
    assert max(map(len, text.splitlines())) <= 80
    for row in rows:
        assert all(word in text for cell in row for word in cell.split())


def test_what_takes_seconds_is_said_before(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with quiet_stdout():
        assert capsys.readouterr().err == ""
    monkeypatch.delitem(sys.modules, "torch")
    with quiet_stdout():
        assert capsys.readouterr().err == "loading PyTorch\n"


def test_a_wide_table_may_have_a_column_without_a_title() -> None:
    text = table(["", "check", "found"], [["ok", "disk", "word " * 30], ["fix", "hub", "x" * 90]])
    assert text.splitlines()[0].split() == ["check", "found"]
    text = table(["field", "default", "meaning"], [["a", "word " * 30, "word " * 20]])
    assert max(map(len, text.splitlines())) <= 80
    assert table(["", "a" * 90], []).split() == ["a" * 90]


def test_control_characters_of_an_argument_are_escaped_in_the_error() -> None:
    assert "\\x1b[2J" in the_error("show", "\x1b[2J")


def test_control_characters_are_escaped_on_the_pages(tmp_path: Path) -> None:
    record = comparison()
    record["bases"][0]["label"] = record["title"] = HOSTILE + "<script>"
    for score in record["scores"]:
        score["task"] += HOSTILE.replace("\ud800", "")  # refused where examples are read
    record["bases"] = [{"model_class": None, "num_labels": None, **b} for b in record["bases"]]
    write_report(record, tmp_path)
    texts = {path.suffix: path.read_text("utf-8") for path in tmp_path.rglob("*.*")}
    texts[".md"] = model_card(record)
    assert {".html", ".csv", ".svg"} < texts.keys()
    assert all(printable(text) == text for text in texts.values())
    assert texts[".html"].count("<script>") == 1  # the page's, which sorts tables
    assert "<script>" not in texts[".svg"] + texts[".md"]


@pytest.mark.parametrize("name", ["a|b", "*a*", "`a`", "<b>", "a\nb", "[a](b)", "a\\|b", "&lt;"])
def test_markdown_shows_a_name_as_it_is(name: str) -> None:
    page = MarkdownIt().enable("table").parse(f"|x|\n|---|\n|{markdown(name)}|\n")
    cell = page[[token.type for token in page].index("td_open") + 1]
    assert "".join(child.content for child in cell.children or ()) == name.replace("\n", " ")


def test_memory_that_torch_cannot_allocate_is_explained() -> None:
    import torch

    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert explain(caught.value)[0].startswith("error: out of memory; lower ")


@pytest.mark.parametrize("shots", ["9" * 5000, "²", "0", "-1", "1,,2", "1e3"])
def test_shots_that_are_no_numbers_are_one_short_line(shots: str, tmp_path: Path) -> None:
    line = the_error("compare", str(tmp_path), "--tasks", "x.jsonl", "--shots", shots)
    assert "--shots must be numbers from 1" in line
    assert len(line) < 300


@pytest.mark.parametrize("text", ["[" * 5000, "{a: " * 5000, "- " * 5000])
def test_yaml_nested_too_deeply_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(text)
    assert "nested too deeply" in the_error("plan", str(tmp_path / "r.yaml"))
    assert call("plan", "quickstart", f"retrain.methods={text}").exit_code == 2
