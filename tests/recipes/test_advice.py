"""What a run says to do with its result: the same in terminal, report and card, and it works."""

from __future__ import annotations

import html
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tests.command_line import call
from tests.recipes.test_towers import SMALL

from foretune.recipes.templates import template_text
from tower_tasks import TEXTS, encoder_folder


def blocks(page: str, language: str) -> list[str]:
    """The code of a report or a card."""
    in_html = re.findall(rf'<pre class="{language}"[^>]*><code>(.*?)</code>', page, re.S)
    in_markdown = re.findall(rf"```{language}\n(.*?)\n```", page, re.S)
    return [html.unescape(code) for code in in_html] + in_markdown


def test_advice_is_the_same_everywhere_and_runs_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    encoder_folder(tmp_path / "encoder")
    labels = ("no", "yes", "dunno")
    rows = [
        {"task": f"p{i}", "text": text, "label": labels[(i + j) % 3], "split": split}
        for i in range(5)
        for split in ("train", "validation", "test")
        for j, text in enumerate(TEXTS)
    ]
    Path("data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    Path("my.yaml").write_text(template_text("classification"))
    folder = Path("runs/my run")
    run = call("run", "my.yaml", *SMALL, "retrain.methods=[none, standard]", f"out={folder}")
    assert run.exit_code == 0, run.output
    page = (folder / "report.html").read_text("utf-8")
    card = (folder / "README.md").read_text("utf-8")
    [python], [adapt, again] = blocks(page, "python"), blocks(page, "shell")
    assert blocks(card, "python") == [python] and blocks(card, "shell") == [adapt, again]
    assert f"in Python:\n{python}\n" in run.stdout
    assert run.stdout.endswith(f"in the same way: {adapt}\n")
    # Without foretune, where the user typed the command.
    done = subprocess.run([sys.executable, "-c", python], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in labels and "foretune" not in python
    shown = call("report", folder)
    assert shown.exit_code == 0 and (folder / "report.html").read_text("utf-8") == page
    for command in (adapt.replace("NEW.jsonl", "data.jsonl"), again):
        result = call(*shlex.split(command)[1:])
        assert result.exit_code == 0, result.output
    assert Path("runs/my run-again/report.html").is_file()


def test_a_comparison_says_how_to_repeat_it_and_how_to_load_its_bases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    encoder_folder(tmp_path / "encoder")
    rows = [
        {"task": task, "text": text, "label": ["no", "yes"][j % 2], "split": split}
        for task in ("a", "b")
        for split in ("train", "validation", "test")
        for j, text in enumerate(TEXTS)
    ]
    Path("new.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["compare", "encoder", "steps=1", "--tasks", "new.jsonl", "--shots", "1,all"]
    words += ["--objective", "classification", "--out", "cmp"]
    compared = call(*words)
    assert compared.exit_code == 0, compared.output
    page = Path("cmp/report.html").read_text("utf-8")
    [python], [adapt, again] = blocks(page, "python"), blocks(page, "shell")
    assert python in compared.stdout and adapt in compared.stdout
    exec(python, {})
    for command in (again, adapt.replace("NEW.jsonl", "new.jsonl")):
        result = call(*shlex.split(command)[1:])
        assert result.exit_code == 0, result.output
    first, second = (
        json.loads(Path(f, "comparison.json").read_text()) for f in ("cmp", "cmp-again")
    )
    assert first["scores"] == second["scores"]
    assert 'href="../encoder"' in page
