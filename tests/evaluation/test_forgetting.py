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
from foretune.evaluation.forgetting_text import forgetting_rows, forgetting_sentences
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
    [texts] = forgetting["measures"]
    none, standard = texts["bases"]
    assert none["base"] == texts["before"] and none["base_change"]["mean"] == 0
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
    again = the_json("run", recipe, "retrain.learning_rate=1e-2", "--resume")
    [changed] = again["forgetting"]["measures"]
    assert changed["examples"] == 2 and changed["before"] != texts["before"]


@pytest.fixture
def quiz(tmp_path: Path) -> Path:
    """A task of lm-eval's, of questions with two answers."""
    questions = [
        {"question": "the cat", "choices": ["one", "red"], "answer": i % 2} for i in range(3)
    ]
    questions += [{"question": "a b", "choices": ["two dog", "mat"], "answer": 1}]
    (tmp_path / "quiz.jsonl").write_text("\n".join(map(json.dumps, questions)))
    (tmp_path / "quiz.yaml").write_text(f"""
task: quiz
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "quiz.jsonl"}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
""")
    return tmp_path / "quiz.yaml"


def accuracy(model: Any, quiz: Path) -> float:
    """The share of questions whose right answer is the likelier one, summed over its tokens."""
    right = []
    for line in quiz.with_suffix(".jsonl").read_text().splitlines():
        row = json.loads(line)
        start = len(TOKENIZER(row["question"])["input_ids"])
        scores = []
        for choice in row["choices"]:
            ids = TOKENIZER(f"{row['question']} {choice}")["input_ids"]
            with torch.no_grad():
                log_p = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            scores.append(sum(float(log_p[i - 1, ids[i]]) for i in range(start, len(ids))))
        right.append(int(np.argmax(scores)) == row["answer"])
    return float(np.mean(right))


def test_benchmarks_of_lm_eval_stand_beside_the_texts(recipe: Path, quiz: Path) -> None:
    pytest.importorskip("lm_eval")
    settings = ["retrain.learning_rate=1e-1", f"forgetting.benchmarks=[{quiz}]"]
    result = call("run", recipe, *settings)
    assert result.exit_code == 0, result.output
    assert "it/s" not in result.stderr
    assert "quiz, acc" in result.stdout and "On quiz no base clearly became worse" in result.stdout
    run = recipe.parent / "run"
    record = json.loads((run / "comparison.json").read_text())["forgetting"]
    texts, of_quiz = record["measures"]
    assert texts["name"] == "general texts" and of_quiz["examples"] == 4
    before = load_base(recipe.parent / "model")[0]
    assert of_quiz["before"] == accuracy(before, quiz)
    base = run / "bases" / "standard" / "seed-0" / "base"
    row = of_quiz["bases"][1]
    assert row["base"] == accuracy(load_base(base)[0], quiz)
    assert row["base_change"]["mean"] == pytest.approx(row["base"] - of_quiz["before"])
    adapted = [
        accuracy(peft.PeftModel.from_pretrained(load_base(base)[0], folder), quiz)
        for folder in sorted((run / "adapters" / "standard").iterdir())
    ]
    assert row["adapted"] == pytest.approx(np.mean(adapted))
    assert "quiz, acc" in (run / "report.html").read_text()
    again = the_json("run", recipe, *settings, "--resume")
    assert again["forgetting"] == record
    alone = the_json("run", recipe, *settings, "forgetting.source=null", "--overwrite")
    assert [measure["name"] for measure in alone["forgetting"]["measures"]] == ["quiz"]


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
    assert "forgetting needs source" in last_line("run", recipe, "forgetting.source=null")
    with pytest.raises(UserError, match="a decoder that predicts tokens, which BertModel is not"):
        text_scores(tiny_models.bert(), TOKENIZER, TEXTS)


def test_mistakes_in_benchmarks_come_before_training(recipe: Path, quiz: Path) -> None:
    pytest.importorskip("lm_eval")

    def mistake(name: str) -> str:
        return last_line("plan", recipe, f"forgetting.benchmarks=[{name}]")

    assert (
        'has no task hellaswga; `lm-eval ls tasks` lists them. Did you mean "hellaswag"?'
        in mistake("hellaswga")
    )
    assert "hellaswag cannot be loaded" in mistake("hellaswag")
    assert "absent.yaml does not exist" in mistake("absent.yaml")
    text = quiz.read_text()
    again = quiz.with_name("again.yaml")
    again.write_text(text)
    assert "again.yaml brings a second task quiz" in mistake(f"{quiz},{again}")
    again.write_text(text.replace("metric: acc", "metric: no_such_metric"))
    assert "knows no metric of task quiz" in mistake(str(again))
    quiz.with_suffix(".jsonl").unlink()
    assert "quiz.yaml cannot be loaded" in mistake(str(quiz))
    quiz.write_text("task: [")
    assert "quiz.yaml cannot be loaded" in mistake(str(quiz))


def test_groups_and_examples_in_prompts(quiz: Path) -> None:
    pytest.importorskip("lm_eval")
    from foretune.evaluation.benchmarks import Benchmarks

    group = quiz.with_name("group.yaml")
    group.write_text("group: quizzes\ntask: [quiz]\n")
    [measured] = Benchmarks([str(group)]).measure(tiny_models.llama(), TOKENIZER)
    [alone] = Benchmarks([str(quiz)]).measure(tiny_models.llama(), TOKENIZER)
    assert measured.score == alone.score == accuracy(tiny_models.llama(), quiz)
    shots = quiz.with_name("shots.jsonl")
    shots.write_text(quiz.with_suffix(".jsonl").read_text())
    few = quiz.with_name("few.yaml")
    few.write_text(
        quiz.read_text().replace("{test:", f"{{train: {shots}, test:")
        + "num_fewshot: 1\ntraining_split: train\n"
    )
    before = Benchmarks([str(few)]).digest
    assert before == Benchmarks([str(few)]).digest
    shots.write_text(shots.read_text().replace("the cat", "a dog"))
    assert before != Benchmarks([str(few)]).digest


def test_nobody_counts_what_is_loaded(quiz: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Online these libraries tell a server, for local files, too."""
    pytest.importorskip("lm_eval")
    import datasets
    import evaluate

    from foretune.evaluation.benchmarks import Benchmarks
    from foretune.tasks.uncounted import uncounted

    told: list[str] = []
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.load, "get_session", lambda: told.append("datasets"))
    monkeypatch.setattr(evaluate.config, "HF_EVALUATE_OFFLINE", False)
    monkeypatch.setattr(evaluate.loading, "head_hf_s3", lambda *_, **__: told.append("evaluate"))
    Benchmarks([str(quiz)])
    with uncounted():
        evaluate.loading.increase_load_count("accuracy", "metric")
    assert told == []
    evaluate.loading.increase_load_count("accuracy", "metric")
    assert told == ["evaluate"]


def test_a_base_that_became_worse_is_named_with_what_would_help() -> None:
    def row(name: str, low: float, high: float) -> dict[str, Any]:
        change = {"mean": (low + high) / 2, "low": low, "high": high}
        return {"name": name, "base": -3.0, "base_change": change}

    measure = {
        "name": "general texts",
        "metric": "log-likelihood per token",
        "higher_is_better": True,
        "before": -2.5,
        "bases": [row("standard", -0.4, -0.2), row("peft-ml", -0.2, 0.1)],
    }
    first, advice = forgetting_sentences([measure], {"standard": "standard retraining"})
    assert "standard retraining became worse (log-likelihood per token −0.3)" in first
    assert "peft-ml" not in first and "interpolate" in advice
    rows = forgetting_rows(measure, {})
    assert rows[2] == ["standard", "−3.000", "−0.300 (−0.400 to −0.200)", "", ""]
    level = {**measure, "bases": measure["bases"][1:]}
    assert forgetting_sentences([level], {}) == ["On general texts no base clearly became worse."]
    perplexity = {**measure, "metric": "perplexity", "higher_is_better": False}
    assert len(forgetting_sentences([perplexity], {})) == 1
    perplexity["bases"] = [row("standard", 0.2, 0.4)]
    assert "standard became worse (perplexity +0.3)" in forgetting_sentences([perplexity], {})[0]
    without_interval = {"mean": 1.0, "low": None, "high": None}
    perplexity["bases"] = [{"name": "standard", "base": 9.0, "base_change": without_interval}]
    assert len(forgetting_sentences([perplexity], {})) == 1
    assert forgetting_rows(perplexity, {})[2][2] == "+1.000"
