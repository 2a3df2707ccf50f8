"""`--quantize` and `--dtype` of generate and datastore."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import tiny_models
from command_line import the_error, the_json
from foretune.models.loading import save_base

pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize("options", [("--quantize", "nf4"), ("--dtype", "bfloat16")])
def test_adapters_generate_and_stores_are_of_one_precision(
    options: tuple[str, ...], tmp_path: Path
) -> None:
    base, rows, out = tmp_path / "base", tmp_path / "rows.jsonl", tmp_path / "adapters"
    model = tiny_models.llama(hidden_size=64, intermediate_size=64).float()
    save_base(model, tiny_models.tokenizer(special=False), base)
    lines = [{"task": "a", "split": split, "text": "a cat sat"} for split in ("train", "test")]
    rows.write_text("\n".join(map(json.dumps, lines)))
    adapt = ("adapt", base, "--tasks", rows, "--objective", "causal-lm", "steps=3", "--out", out)
    the_json(*adapt, *options)
    for precision in ((), options):  # an adapter belongs to the original, too
        generate = ("generate", out / "a", "one", "--max-new-tokens", 2)
        assert the_json(*generate, *precision)["results"][0]["num_tokens"] > 0
    store = tmp_path / "store"
    built = the_json("datastore", "build", base, "--rows", rows, "--out", store, *options)
    assert built["entries"] > 0
    evaluate = ("datastore", "eval", store, "--rows", rows, "--lora-steps", 0, "--shots", 0)
    assert the_json(*evaluate, *options)
    assert "another base" in the_error(*evaluate)
