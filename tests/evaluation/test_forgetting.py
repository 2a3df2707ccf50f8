"""General texts before and after retraining, and with adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch

import tiny_models
from command_line import call, the_json
from foretune.errors import UserError
from foretune.evaluation.forgetting import text_scores
from foretune.evaluation.forgetting_text import forgetting_rows, forgetting_sentence
from foretune.models.loading import load_base, save_base

TOKENIZER = tiny_models.tokenizer(special=False)
TEXTS = ["the cat sat on the mat", "red blue", "one two a dog", "a b c d one"]


def log_likelihoods(model: Any) -> np.ndarray:
    """Of each text alone: the mean of log softmax at the next token."""
    means = []
    for text in TEXTS:
        ids = torch.tensor([[*TOKENIZER(text)["input_ids"]]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0].double().numpy()
        log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        means.append(np.mean([log_p[i, token] for i, token in enumerate(ids[0, 1:].tolist())]))
    return np.array(means)


def test_the_score_is_the_mean_log_likelihood_of_a_token() -> None:
    model = tiny_models.llama()
    expected = log_likelihoods(model)
    tokenizer = tiny_models.tokenizer(special=False)
    tokenizer.eos_token = None  # no closing token, which is none of the text's
    assert np.allclose(text_scores(model, tokenizer, TEXTS), expected, atol=1e-6)
    assert len(text_scores(model, tokenizer, TEXTS, max_tokens=2)) == len(TEXTS)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    save_base(tiny_models.llama(seed=1).float(), TOKENIZER, tmp_path / "model")
    rows = [
        {"task": task, "split": split, "text": f"{task} cat sat {word}"}
        for task in ("a", "the", "one", "red")
        for word in ("one", "two", "blue")
        for split in ("train", "test")
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    general = "\n".join(json.dumps({"text": text}) for text in TEXTS)
    (tmp_path / "general.jsonl").write_text(general)
    (tmp_path / "recipe.yaml").write_text(f"""
name: tiny
model: {{name: {tmp_path / "model"}}}
tasks: {{source: {tmp_path / "rows.jsonl"}, unseen: [a, the]}}
objective: {{kind: causal-lm}}
retrain: {{methods: [none, standard], steps: 3, tasks_per_step: 2, batch_size: 2}}
adapt: {{method: lora, learning_rate: 1e-2, steps: 3, batch_size: 2, shots: [2]}}
forgetting: {{source: {tmp_path / "general.jsonl"}, adapters: 2}}
out: {tmp_path / "run"}
""")
    return tmp_path / "recipe.yaml"


def test_before_after_and_adapted_stand_in_the_report(recipe: Path) -> None:
    result = call("run", recipe, "retrain.learning_rate=1e-2")
    assert result.exit_code == 0, result.output
    assert "the model as it was" in result.stdout and "On general texts" in result.stdout
    run = recipe.parent / "run"
    forgetting = json.loads((run / "comparison.json").read_text())["forgetting"]
    none, standard = forgetting["bases"]
    assert none["base"] == forgetting["before"] and none["base_change"]["mean"] == 0
    base = run / "bases" / "standard" / "seed-0" / "base"
    assert standard["base"] == pytest.approx(log_likelihoods(load_base(base)[0]).mean(), abs=1e-5)
    adapted = [
        log_likelihoods(peft.PeftModel.from_pretrained(load_base(base)[0], folder))
        for folder in sorted((run / "adapters" / "standard").iterdir())
    ]
    assert standard["adapted"] == pytest.approx(np.mean(adapted), abs=1e-5)
    assert "Did retraining hurt what the model could do?" in (run / "report.html").read_text()
    again = the_json("run", recipe, "retrain.learning_rate=1e-2", "--resume")
    assert again["forgetting"] == forgetting
    longest = " ".join(["one two"] * 100)  # longer than the model reads
    (recipe.parent / "general.jsonl").write_text(
        "\n".join(json.dumps({"text": text}) for text in (longest, "red blue"))
    )
    changed = the_json("run", recipe, "retrain.learning_rate=1e-2", "--resume")["forgetting"]
    assert changed["texts"] == 2 and changed["before"] != forgetting["before"]


def last_line(*args: object) -> str:
    """The error that a command ends with, before anything is trained."""
    result = call(*args)
    assert result.exit_code == 2 and "seed 0" not in result.stderr
    return result.stderr.splitlines()[-1]


def test_mistakes_come_before_training(recipe: Path) -> None:
    texts = recipe.parent / "general.jsonl"
    texts.write_text('{"text": "a cat"}\n{"body": "x"}\n')
    assert "line 2: forgetting reads a column text" in last_line("plan", recipe)
    texts.write_text('{"text": "a cat"}\n')
    assert "has 1 rows; two are the least" in last_line("run", recipe)
    texts.write_text('{"text": "a cat"}\n{"text": "the"}\n')
    assert "needs two tokens or more" in last_line("plan", recipe)
    texts.unlink()
    assert "general.jsonl" in last_line("run", recipe)
    with pytest.raises(UserError, match="a decoder that predicts tokens, which BertModel is not"):
        text_scores(tiny_models.bert(), TOKENIZER, TEXTS)


def test_a_base_that_fell_is_named_with_what_would_help() -> None:
    def row(name: str, low: float, high: float) -> dict[str, Any]:
        change = {"mean": (low + high) / 2, "low": low, "high": high}
        return {"name": name, "base": -3.0, "base_change": change}

    record = {"before": -2.5, "bases": [row("standard", -0.4, -0.2), row("peft-ml", -0.2, 0.1)]}
    sentence = forgetting_sentence(record, {"standard": "standard retraining"})
    assert "standard retraining fell (by 0.3 nats" in sentence and "interpolate" in sentence
    assert "peft-ml fell" not in sentence
    rows = forgetting_rows(record, {})
    assert rows[2] == ["standard", "−3.000", "−0.300 (−0.400 to −0.200)", "", ""]
    assert "no base clearly fell" in forgetting_sentence({"bases": record["bases"][1:]}, {})
