"""The pages of the decode methods, typed on tiny models: their commands, and their Python."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny_models
from command_line import call
from promises.pages import ROOT, blocks, shell_lines

SPEAKERS = ("GLOUCESTER", "ROMEO")
SHORT = {"adapt": ["steps=2"], "generate": ["--max-new-tokens", "3"]}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the models and rows that the pages name."""
    monkeypatch.chdir(tmp_path)
    sharp = {"initializer_range": 0.4, "num_hidden_layers": 1, "max_position_embeddings": 256}
    tokenizer = tiny_models.tokenizer(special=False)
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    for seed, name in enumerate(("stories", "large", "small", "small-tuned")):
        tiny_models.llama(seed=seed, **sharp).save_pretrained(name)
        tokenizer.save_pretrained(name)
    random = np.random.default_rng(0)
    rows = [
        {
            "task": task,
            "split": "test" if i % 4 == 3 else "train",
            "text": " ".join(random.choice(tiny_models.WORDS, 8)),
        }
        for task in SPEAKERS
        for i in range(16)
    ]
    write("speakers.jsonl", rows)
    tiny_models.bert(num_hidden_layers=1).save_pretrained("encoder")
    tiny_models.tokenizer().save_pretrained("encoder")
    for row in rows:
        row |= {"text": " ".join([row["text"]] * 2), "label": f"{row['task'].lower()} speaks"}
    write("tickets.jsonl", rows)
    return tmp_path


def write(file: str, rows: list[dict[str, Any]]) -> None:
    Path(file).write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def typed(page: Path, here: Path) -> dict[str, Any]:
    """What each command of a page printed; its Python is run afterwards."""
    printed = {}
    for line in shell_lines(page, "foretune"):
        line = line.replace("speakers.jsonl.gz", "speakers.jsonl").replace("minilm", "encoder")
        _, *args = shlex.split(line)
        done = call(*args, *SHORT.get(args[0], []))
        assert done.exit_code == 0, (line, done.output)
        printed[line] = done.stdout
    for code in blocks(page, "python"):
        exec(compile(code, page.name, "exec"), {})
    return printed


def test_eft(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = typed(ROOT / "docs/methods/eft.md", here)
    [sweep] = [text for line, text in printed.items() if "--beta-sweep" in line]
    assert [line.split("  ")[0] for line in sweep.splitlines()[1:]] == [
        *("model alone", "EFT", "EFT", "EFT", "small tuned alone")
    ]
    assert (here / "frontier.svg").is_file()
    assert len(capsys.readouterr().out.splitlines()) >= 2  # of the two snippets


def test_rtd(here: Path) -> None:
    printed = typed(ROOT / "docs/methods/rtd.md", here)
    [table] = [text for line, text in printed.items() if "datastore eval romeo" in line]
    assert table.split()[:2] == ["method", "perplexity"]
    assert (here / "romeo" / "store.json").is_file()
    [predicted] = [text for line, text in printed.items() if "datastore predict" in line]
    assert predicted.split()[:3] == ["label", "probability", "text"]
    assert predicted.count(" speaks ") == 8
