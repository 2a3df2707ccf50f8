"""`foretune prune --low-memory`: the same folder, and never the whole checkpoint in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import tiny_models
from command_line import call
from pruning import tiny_mixtures


def prune(line: str, code: int = 0) -> Any:
    result = call("prune", *line.split())
    assert result.exit_code == code, result.output
    return result


def mixture_in(folder: str, family: str, **changes: Any) -> None:
    model = tiny_mixtures.mixture(family, **changes)
    model.save_pretrained(folder, max_shard_size="20KB")
    tiny_models.tokenizer().save_pretrained(folder)
    rows = [json.dumps(row) for row in tiny_mixtures.rows(count=20)]
    Path("task.jsonl").write_text("\n".join(rows))


@pytest.mark.parametrize("family", tiny_mixtures.FAMILIES)
def test_the_folder_is_the_one_that_is_made_in_memory(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    mixture_in("mix", family)
    results = []
    for out in ("whole", "mapped --low-memory"):
        line = f"uncurl mix experts=4 --rows task.jsonl --json --out {out}"
        results.append(json.loads(prune(line).stdout))
    losses = [[entry["loss"] for entry in result["scored"]] for result in results]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    auto = transformers.AutoModelForCausalLM
    whole, mapped = (auto.from_pretrained(f).state_dict() for f in ("whole", "mapped"))
    assert list(whole) == list(mapped)
    for name, tensor in whole.items():
        torch.testing.assert_close(mapped[name], tensor)
    files = {path.name for path in Path("mapped").iterdir()}
    assert {"experts.json", "tokenizer.json", "config.json"} <= files
    assert not [path for path in Path("mapped").iterdir() if path.is_dir()]
    assert not list(tmp_path.glob(".unfinished*"))
