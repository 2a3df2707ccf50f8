"""At the end of a run the model as it was and adapters answer questions of unseen tasks."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import tiny_models
from chat_templates import FAMILIES, tokenizer_of
from command_line import call, the_error, the_json
from foretune.decoding.answers import questions_of
from foretune.models.loading import save_base
from foretune.tasks.sources import PACKAGED
from foretune.tasks.task import Task

QUESTIONS = ("one cat", "a dog", "the mat")


def chat(question: str, answer: str) -> dict[str, Any]:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    tokenizer = tokenizer_of(FAMILIES["chatml"])
    model = tiny_models.llama(vocab_size=len(tokenizer), max_position_embeddings=128).float()
    save_base(model, tokenizer, tmp_path / "model")
    rows = [
        {"task": task, "split": split, **chat(question, "red" if i % 2 else "blue")}
        for i, task in enumerate("abcd")
        for question in QUESTIONS
        for split in ("train", "test")
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    text = f"""
name: tiny
model: {{name: {tmp_path / "model"}}}
tasks: {{source: {tmp_path / "rows.jsonl"}, unseen: [a, b]}}
objective: {{kind: causal-lm}}
retrain: {{methods: [none, standard], steps: 2, tasks_per_step: 2, batch_size: 2}}
adapt: {{method: lora, learning_rate: 1e-3, steps: 2, batch_size: 2, shots: [2]}}
answers: 3
out: {tmp_path / "run"}
"""
    (tmp_path / "recipe.yaml").write_text(text)
    return tmp_path / "recipe.yaml"


def test_the_model_as_it_was_and_an_adapter_answer(recipe: Path) -> None:
    result = call("run", recipe)
    assert result.exit_code == 0, result.output
    answers = json.loads((recipe.parent / "run" / "answers.json").read_text())
    assert len(answers) == 3
    first, second = answers[:2]  # one question, which the two unseen tasks answer differently
    assert first["question"] == second["question"] == chat("one cat", "")["messages"][:1]
    assert (first["task"], first["reference"]) == ("a", "blue")
    assert (second["task"], second["reference"]) == ("b", "red")
    assert first["before"] == second["before"]
    for label in ("a was asked", "and said", "says", "with the adapter of a"):
        assert label in result.stdout
    assert the_json("run", recipe, "--resume")["answers"] == answers
    without = ("answers=0", f"out={recipe.parent / 'other'}")
    assert "answers" not in the_json("run", recipe, *without) | {"recipe": None}


def test_a_run_whose_questions_are_too_long_has_its_results(recipe: Path) -> None:
    folder = recipe.parent / "model" / "config.json"
    config = json.loads(folder.read_text())
    folder.write_text(json.dumps({**config, "max_position_embeddings": 50}))
    result = call("run", recipe)
    assert result.exit_code == 0, result.output
    assert "no answers: a prompt of" in result.stderr
    assert (recipe.parent / "run" / "report.html").is_file()


def test_only_a_chat_model_answers() -> None:
    assert "takes objective.kind causal-lm" in the_error("plan", "quickstart", "answers=1")


def test_rows_without_conversations_are_refused_before_training(recipe: Path) -> None:
    rows = recipe.parent / "rows.jsonl"
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    texts = [{"task": r["task"], "split": r["split"], "text": "one cat"} for r in lines]
    rows.write_text("\n".join(map(json.dumps, texts)))
    result = call("plan", recipe)
    assert result.exit_code == 2
    assert "answers=3: no test row of an unseen task has messages" in result.stderr


def test_disputed_questions_come_first() -> None:
    tasks = [
        Task("a", [], [], [chat("x", "1"), chat("y", "1")]),
        Task("b", [], [], [chat("x", "1"), {"text": "z"}, chat("y", "2")]),
    ]
    rows = [(task, turns[0]["content"]) for task, turns in questions_of(tasks, 10)]
    assert rows == [("a", "y"), ("b", "y"), ("a", "x")]
    assert len(questions_of(tasks, 1)) == 1


def test_the_conversations_in_the_package_are_its_votes() -> None:
    def rows_of(name: str) -> list[dict[str, Any]]:
        with gzip.open(PACKAGED[name], "rt", encoding="utf-8") as lines:
            return [json.loads(line) for line in lines]

    votes = {(row["task"], row["text"]): row["label"] for row in rows_of("land-bank")}
    chats = rows_of("land-bank-chats")
    for row in chats:
        question, answer = (turn["content"] for turn in row["messages"])
        label = votes[row["task"], question.removesuffix(" Do you agree?")]
        assert (
            answer == {"agree": "Yes, I agree", "disagree": "No, I disagree"}[label] + " with that."
        )
    counts = Counter((row["task"], row["split"]) for row in chats)
    assert len(counts) == 200
    assert {count for (_, split), count in counts.items() if split == "test"} == {10}
