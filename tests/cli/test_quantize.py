"""`--quantize` and `--dtype` of adapt, compare, generate and datastore."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import tiny_models
from command_line import call, the_error, the_json
from foretune.models.loading import load_base, save_base

pytest.importorskip("bitsandbytes")

TOKENIZER = tiny_models.tokenizer(special=False)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    model = tiny_models.llama(hidden_size=64, intermediate_size=64).float()
    save_base(model, TOKENIZER, tmp_path / "base")
    rows = [
        {"task": task, "split": split, "text": f"{task} cat sat one"}
        for task in ("a", "the")
        for split in ("train", "test")
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "base"


@pytest.mark.parametrize("options", [("--quantize", "nf4"), ("--quantize", "int8"),
                                     ("--dtype", "bfloat16", "--quantize", "nf4"),
                                     ("--dtype", "bfloat16")])  # fmt: skip
def test_a_walk(base: Path, options: tuple[str, ...]) -> None:
    rows, out = base.parent / "rows.jsonl", base.parent / "adapters"
    adapt = ("adapt", base, "--tasks", rows, "--objective", "causal-lm", "steps=3", "--out", out)
    adapted = the_json(*adapt, *options)
    assert set(adapted["scores"]) == {"a", "the"}
    # the adapters belong to the original, on which stock PEFT reads them as foretune does
    checked = the_json("check", base, out)
    assert checked["ok"] and len(checked["adapters"]) == 2
    assert the_json("generate", out / "a", "one", "--max-new-tokens", 2, *options)["results"]
    store = ("datastore", "build", base, "--rows", rows, "--out", base.parent / "store")
    assert the_json(*store, *options)["entries"] > 0
    compare = ("compare", base, "--tasks", rows, "--objective", "causal-lm", "steps=1")
    assert the_json(*compare, "--shots", "1", "--out", base.parent / "cmp", *options)["means"]


def test_a_quantised_checkpoint_is_a_base(base: Path) -> None:
    model, tokenizer = load_base(base, quantize="nf4")
    save_base(model, tokenizer, base.parent / "small")
    rows, out = base.parent / "rows.jsonl", base.parent / "adapters"
    adapt = ("adapt", base.parent / "small", "--tasks", rows, "--objective", "causal-lm", "steps=2")
    the_json(*adapt, "--out", out)
    assert the_json("check", base.parent / "small", out)["ok"]
    assert not json.loads(call("check", base, out, "--json").stdout)["ok"]
    assert "the original" in the_error("export", base.parent / "small", out / "a", "--out", "x")
    assert "already" in the_error(*adapt, "--out", base.parent / "b", "--quantize", "nf4")


def test_mistakes(base: Path) -> None:
    adapt = ("adapt", base, "--tasks", base.parent / "rows.jsonl", "--objective", "causal-lm")
    assert "'int4' is not one of 'nf4', 'int8'" in the_error(*adapt, "--quantize", "int4")
    wholly = ("method=full", "steps=1", "--quantize", "nf4", "--out", base.parent / "full")
    assert "adapt it with lora or head" in the_error(*adapt, *wholly)
