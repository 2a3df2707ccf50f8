"""`foretune predict` where the answers are texts, against stock PEFT one row at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

import tiny_models
from adapted_folders import adapted, stock, texts, write
from command_line import the_error, the_json
from foretune.models.loading import save_base


@pytest.mark.parametrize("kind", ("llama", "gpt2"))  # which has absolute positions
def test_texts_of_many_adapters_in_one_batch(tmp_path: Path, kind: str) -> None:
    tokenizer = tiny_models.tokenizer()
    save_base(getattr(tiny_models, kind)().float(), tokenizer, tmp_path / "base")
    rows = [
        {"task": task, "prompt": text, "completion": f"{word} {word}"}
        for task, word in zip("abc", ("red", "blue", "mat"), strict=True)
        for text in texts(6)
    ]
    write(tmp_path / "rows.jsonl", rows)
    new = [{"task": "abc"[i % 3], "prompt": text} for i, text in enumerate(texts(7))]
    write(tmp_path / "new.jsonl", new)
    settings = ("method=lora", "learning_rate=3e-2", "steps=40", "--objective", "causal-lm")
    adapters = adapted(tmp_path, *settings, "--out", tmp_path / "adapters")
    command = ("predict", tmp_path / "base", adapters, tmp_path / "new.jsonl")
    predicted = [row["prediction"] for row in the_json(*command, "--max-new-tokens", 6)["rows"]]
    expected = []
    for row in new:
        model = stock(AutoModelForCausalLM, tmp_path, adapters / row["task"])
        ids = tokenizer(row["prompt"], return_tensors="pt")["input_ids"]
        if ids[0, -1] == tokenizer.eos_token_id:
            ids = ids[:, :-1]
        out = model.generate(
            input_ids=ids,
            max_new_tokens=6,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=0,
        )
        text = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        expected.append(text.strip())
    assert predicted == expected and len({*predicted}) >= 3


def test_texts_that_cannot_be_written_are_said_with_their_row(tmp_path: Path) -> None:
    save_base(tiny_models.gpt2().float(), tiny_models.tokenizer(), tmp_path / "base")
    rows = [{"task": "a", "prompt": text, "completion": "red"} for text in texts(6)]
    write(tmp_path / "rows.jsonl", rows)
    settings = ("method=lora", "learning_rate=1e-3", "steps=1", "--objective", "causal-lm")
    adapters = adapted(tmp_path, *settings, "--out", tmp_path / "adapters")

    def mistake(row: dict[str, Any]) -> str:
        good = {"task": "a", "prompt": "the cat"}
        new = write(tmp_path / "new.jsonl", [good, {"task": "a", **row}])
        return the_error("predict", tmp_path / "base", adapters, new, "--max-new-tokens", 4)

    assert "line 2: a prompt of" in mistake({"prompt": "cat " * 90})
    assert "line 2: neither messages, nor prompt" in mistake({"body": "cat"})
    assert "line 2: messages, turn 1" in mistake({"messages": [{"role": "cat", "content": "x"}]})
    assert "line 2, prompt" in mistake({"prompt": "\ud83d cat"})
    save_base(tiny_models.bert(), tiny_models.tokenizer(), tmp_path / "encoder")
    new = write(tmp_path / "new.jsonl", [{"task": "a", "prompt": "the cat"}])
    line = the_error("predict", tmp_path / "encoder", adapters, new)
    assert "lacks weights that BertLMHeadModel needs" in line
