"""Pages of methods on images and trajectories, typed on tiny models: commands, scripts, Python."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import foretune
import tiny_models
from command_line import call
from promises.pages import ROOT, blocks, shell_lines

# Start of a command → what is typed behind it, so that it takes less time.
ADDED = {"foretune adapt": ["steps=2"], "foretune compare": ["steps=1"]}


def typed(page: Path) -> dict[str, str]:
    """What each command of a page printed."""
    printed = {}
    for line in shell_lines(page, "foretune"):
        short = re.sub("number: 100", "number: 2", re.sub(r" steps=\d+", " steps=2", line))
        more = next((v for start, v in ADDED.items() if line.startswith(start)), [])
        _, *args = shlex.split(short)
        done = call(*args, *([] if " steps=" in short else more))
        assert done.exit_code == 0, (line, done.output)
        printed[line] = done.stdout
    return printed


def test_forecast_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = ROOT / "docs/methods/forecast-peft.md"
    [script] = blocks(page, "python")
    exec(compile(re.sub(r"junctions\((\d+)0,", r"junctions(\1,", script), page.name, "exec"), {})
    printed = typed(page)
    [adapted, shown] = list(printed.values())[1:3]
    [text] = blocks(page, "text")
    assert "task, held-out scenes" in adapted and "task, held-out scenes" in text
    assert shown.split()[:4] == ["model", "task", "scenes", "minADE1"]
    assert "Chosen on held-out scenes: " in shown and "Chosen on held-out scenes: " in text
    assert (tmp_path / "page.html").is_file()


def test_fd_align(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = ROOT / "docs/methods/fd-align.md"
    [rows] = re.findall(r"cat > rows.jsonl <<'END'\n(.*?)END\n", "".join(blocks(page, "")), re.S)
    Path("rows.jsonl").write_text(rows, "utf-8")
    tokenizer = tiny_models.tokenizer()
    for name, model in (
        ("base", tiny_models.bert(num_hidden_layers=1)),
        ("clip", tiny_models.clip()),
    ):
        model.save_pretrained(name)
        tokenizer.save_pretrained(name)
    random = np.random.default_rng(0)
    for label in tiny_models.WORDS[:5]:
        for i in range(16):
            file = tmp_path / "photos" / label / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(file)
    printed = typed(page)
    [compared] = [text for line, text in printed.items() if line.startswith("foretune compare")]
    assert "before adapting" in compared and "(95 % interval" in compared
    assert (tmp_path / "tuned-clip" / "photos" / "model.safetensors").is_file()
    comparison = json.loads((tmp_path / "episodes" / "comparison.json").read_text())
    assert {row["task"] for row in comparison["scores"]} == {"episode 1", "episode 2"}
    monkeypatch.setattr(
        foretune, "load_model", lambda _: (tiny_models.bert(num_hidden_layers=1), tokenizer)
    )
    for code in blocks(page, "python"):
        exec(compile(code, page.name, "exec"), {})
