"""`--quantize` and `--dtype` of adapt and compare."""

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


def test_a_retrained_base_that_chose_how_to_adapt(base: Path) -> None:
    """Its record, its basis and its trainable layers are those of full weights."""
    (base.parent / "recipe.yaml").write_text(f"""
name: tiny
model: {{name: {base}, trainable_layers: 1}}
tasks: {{source: {base.parent / "many.jsonl"}, unseen: [a]}}
objective: {{kind: causal-lm}}
retrain: {{methods: [standard], steps: 2, tasks_per_step: 2, batch_size: 2}}
adapt: {{methods: [lora, basis], steps: 2, batch_size: 2, shots: [2], learning_rates: [1e-3]}}
out: {base.parent / "run"}
""")
    rows = [
        {"task": task, "split": split, "text": f"{task} cat sat {word}"}
        for task in ("a", "the", "one", "red", "blue", "dog")
        for word in ("one", "two", "blue", "mat")
        for split in ("train", "test")
    ]
    (base.parent / "many.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result = call("run", base.parent / "recipe.yaml")
    assert result.exit_code == 0, result.output
    retrained = base.parent / "run/bases/standard/seed-0/base"
    for quantize in ("nf4", "int8"):
        out = base.parent / quantize
        adapt = ("adapt", retrained, "--tasks", base.parent / "many.jsonl", "--quantize", quantize)
        assert the_json(*adapt, "--out", out)["adapting"]
        assert the_json("check", retrained, out)["ok"]
        names = json.loads((out / "a" / "adapter_config.json").read_text())["target_modules"]
        assert all("layers.0" not in name for name in names)
        line = the_error(*adapt, "--out", base.parent / "head", "method=head", "steps=1")
        assert "is quantised, so tasks cannot have copies of it" in line


@pytest.mark.parametrize("num_labels", [None, 2])
@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_an_encoder_with_a_pooler(num_labels: int | None, quantize: str, tmp_path: Path) -> None:
    model = tiny_models.bert(num_labels=num_labels, hidden_size=64, intermediate_size=64).float()
    save_base(model, TOKENIZER, tmp_path / "base")
    rows = [
        {"task": task, "text": word, "label": label}
        for task in "ab"
        for word, label in (("red", "x"), ("one", "y"), ("cat", "x"), ("dog", "y"))
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    adapt = ("adapt", tmp_path / "base", "--tasks", tmp_path / "rows.jsonl", "steps=1")
    words = ("--objective", "classification", "--quantize", quantize, "method=lora")
    the_json(*adapt, *words, "--out", tmp_path / "adapters")
    assert the_json("check", tmp_path / "base", tmp_path / "adapters")["ok"]


def test_a_comparison_says_how_bases_were_held(base: Path) -> None:
    compare = ("compare", base, "--tasks", base.parent / "rows.jsonl", "--shots", "1", "steps=1")
    words = ("--objective", "causal-lm", "--out", base.parent / "cmp", "--quantize", "nf4")
    result = the_json(*compare, *words)
    assert result["held_in"] == {"dtype": "float32", "quantize": "nf4"}
    assert "(bases in nf4)" in (base.parent / "cmp" / "report.html").read_text()


def test_mistakes(base: Path) -> None:
    adapt = ("adapt", base, "--tasks", base.parent / "rows.jsonl", "--objective", "causal-lm")
    assert "'int4' is not one of 'nf4', 'int8'" in the_error(*adapt, "--quantize", "int4")
    wholly = ("method=full", "steps=1", "--quantize", "nf4", "--out", base.parent / "full")
    assert "adapt it with lora or head" in the_error(*adapt, *wholly)
