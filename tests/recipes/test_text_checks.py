"""Texts that cannot be read are named by file and line before anything is trained."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from tokenizers import normalizers

import foretune
import tiny_models
from command_line import call, the_json
from foretune.errors import UserError
from foretune.models.loading import save_base
from foretune.recipes.text_checks import check_texts
from foretune.tasks.objectives.causal_lm import CausalLM
from foretune.tasks.objectives.choice import Choice
from foretune.tasks.objectives.classification import Classification
from foretune.tasks.task import Task, TaskCollection
from foretune.training.text_limits import TextLimits

RECIPE = """
name: r
model: {{name: model}}
tasks: {{source: rows.jsonl, unseen: 1}}
objective: {{kind: {kind}, max_tokens: {max_tokens}}}
retrain: {{methods: [none, standard], steps: 1, batch_size: 2, learning_rate: 1e-3}}
adapt: {{method: lora, lora: {{r: 1}}, steps: 1, shots: [2, 40], learning_rate: 1e-3}}
out: run
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(rows, kind, *, max_tokens=16, model=None, tokenizer=None):
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("r.yaml").write_text(RECIPE.format(kind=kind, max_tokens=max_tokens))
    save_base(model or tiny_models.bert(), tokenizer or tiny_models.tokenizer(), "model")


def labelled(bad=None, *, names="abc", rows=10):
    made = [
        {"task": name, "text": "the cat", "label": i % 2} for name in names for i in range(rows)
    ]
    if bad is not None:
        made[17]["text"] = bad
    return made


def refusal(*args):
    result = call(*args)
    assert result.exit_code == 2, result.output
    assert not Path("run").exists()
    return result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    "command", [["plan", "r.yaml"], ["run", "r.yaml"], ["retrain", "r.yaml", "--out", "run"]]
)
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("\t", "rows.jsonl line 18: text is empty"),
        ("\u200b", 'task "b" (rows.jsonl line 18): the tokenizer makes no token of'),
        ("zebra", "(rows.jsonl line 18): the tokenizer does not take 'zebra': WordLevel error"),
        ("red " * 99, "(rows.jsonl line 18): a text of 80 tokens, but"),
        ("red \ud800", "rows.jsonl line 18, text: character 5 is half of a surrogate pair"),
        ("cow", "(rows.jsonl line 18): token 'cow' has id 24, but"),
    ],
)
def test_a_text_that_cannot_be_read_is_named_by_line(place, command, bad, message):
    tokenizer = tiny_models.tokenizer(unknown=bad != "zebra")
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    tokenizer.add_tokens(["cow"] * (bad == "cow"))
    write(labelled(bad), "classification", max_tokens=80, tokenizer=tokenizer)
    assert message in refusal(*command)


def test_a_text_of_one_token_is_named_by_line(place):
    rows = [{"task": t, "text": "the cat"} for t in "abc" for _ in range(10)]
    rows[25]["text"] = "cat"
    tokenizer = tiny_models.tokenizer(special=False)
    write(rows, "causal-lm", model=tiny_models.llama(), tokenizer=tokenizer)
    assert 'task "c" (rows.jsonl line 26): a text needs two tokens' in refusal("plan", "r.yaml")


@pytest.mark.parametrize("command", ["adapt", "compare"])
def test_adapt_and_compare_check_before_they_write(place, command):
    write(labelled("red " * 99), "classification", model=tiny_models.bert(num_labels=2))
    words = ["model", "--tasks", "rows.jsonl", "--out", "run", "--objective", "classification"]
    assert "set max_tokens to 64 or less (now 128)" in refusal(command, *words)


def test_a_model_whose_limit_is_not_known_is_tried_on_the_longest_text(caplog):
    model = tiny_models.bert(num_labels=2)
    model.bert.embeddings.lookup = model.bert.embeddings.position_embeddings
    del model.bert.embeddings.position_embeddings
    forward = model.bert.embeddings.forward

    def renamed(*args, **kwargs):
        model.bert.embeddings.__dict__["position_embeddings"] = model.bert.embeddings.lookup
        return forward(*args, **kwargs)

    model.bert.embeddings.forward = renamed
    objective = Classification(tiny_models.tokenizer(), max_tokens=128)
    rows = [{"text": "the cat", "label": 0}, {"text": "the cat " * 40, "label": 1}]
    tasks = TaskCollection((Task("t", rows),))
    tasks = tasks.with_objective(objective.fit(tasks))
    with pytest.raises(UserError, match=r"train row 2: a text of 82 tokens, .* lower max_tokens"):
        check_texts(tasks, model)


def test_drawn_candidates_that_cannot_be_told_apart_are_counted():
    rows = [{"context": "a", "response": f"the cat sat {word}"} for word in ("on", "red", "blue")]
    from foretune.tasks.candidates import draw_candidates

    tasks = draw_candidates(TaskCollection((Task("t", rows),)), 3, own_task=True)
    for most, count in ((5, 3), (6, 0)):
        objective = Choice(tiny_models.tokenizer(), max_response_tokens=most).fit(tasks)
        alike = check_texts(tasks.with_objective(objective), tiny_models.bert())
        assert alike.count == count
    assert alike.first == ""


def test_padding_without_an_embedding_is_refused_by_the_verbs():
    tokenizer = tiny_models.tokenizer(pad=False)
    tokenizer.add_special_tokens({"pad_token": "[FILL]"})
    with pytest.raises(UserError, match="pads with token id 24, but LlamaForCausalLM has"):
        TextLimits.of(tiny_models.llama(), CausalLM(tokenizer))


def test_a_row_that_is_read_in_training_is_checked_there_too():
    rows = [{"text": "red " * 99}]
    tasks = TaskCollection((Task("t", rows, (), rows),), CausalLM(tiny_models.tokenizer()))
    with pytest.raises(UserError, match=r'task "t", train row 1: a text of 101 tokens'):
        foretune.adapt(tiny_models.gpt2(), tasks, foretune.LoRA(lora={"r": 1}))


def test_the_plan_shows_labels_and_how_many_rows_the_shots_come_to(place, caplog):
    caplog.set_level(logging.ERROR)
    rows = [
        {**row, "label": str(row["label"]) if i % 3 else row["label"]}
        for i, row in enumerate(labelled())
    ]
    write(rows, "classification")
    plan = the_json("plan", "r.yaml")
    assert plan["labels"] == {name: [0, 1] for name in "abc"}
    shown = call("plan", "r.yaml").stdout
    assert "3 tasks, such as" in shown and ": 0, 1\n" in shown
    assert "40 rows per class: 7 rows of a task" in shown
    comparison = the_json("run", "r.yaml")
    assert {row["num_train"] for row in comparison["scores"] if row["shots"] == 40} == {7}
    assert "40 rows per class: 7 rows of a task" in Path("run/README.md").read_text()
    assert "40 rows per class: 7 rows of a task" in Path("run/report.html").read_text()


def test_a_single_label_is_said(place):
    write([{**row, "label": "x"} for row in labelled()], "classification")
    assert 'all rows have the label "x"' in call("plan", "r.yaml").stderr


def test_compare_takes_the_objective_from_the_base_that_records_it(place):
    write(labelled(rows=20), "classification")
    call("retrain", "r.yaml", "--method", "standard", "--out", "standard")
    settings = ("--tasks", "rows.jsonl", "--shots", "2", "steps=1")
    result = call("compare", "model", "standard", *settings, "--out", "c")
    assert result.exit_code == 0, result.output
    assert "max_tokens" in Path("standard/base/foretune.json").read_text()


def test_adapt_names_the_tasks_that_it_could_not_score(place):
    alone = [{"task": "b/c", "text": "the dog", "label": i} for i in range(2)]
    write(labelled(names="a") + alone, "classification")
    settings = ("--tasks", "rows.jsonl", "--objective", "classification", "steps=1")
    assert "Not scored, without test examples: b/c" in call("adapt", "model", *settings).stdout
