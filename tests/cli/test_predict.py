"""`foretune predict` as typed, against stock transformers and PEFT one row at a time."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from pyarrow import parquet
from transformers import AutoModel, AutoModelForSequenceClassification

import tiny_models
from adapted_folders import adapted, stock, texts, write
from command_line import call, the_error, the_json
from foretune.models.loading import save_base

LABELS = {"a": ["x", "y"], "b": ["y", "z", "w"], "c/d": ["x", "z"]}


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """A folder with a base, rows of three tasks with labels, and new rows without."""
    save_base(tiny_models.bert(num_labels=3), tiny_models.tokenizer(), tmp_path / "base")
    rows = [
        {"task": task, "text": text, "label": labels[i % len(labels)]}
        for task, labels in LABELS.items()
        for i, text in enumerate(texts(12))
    ]
    write(tmp_path / "rows.jsonl", rows)
    new = [{"id": i, "task": [*LABELS][i % 3], "text": text} for i, text in enumerate(texts(17))]
    write(tmp_path / "new.jsonl", new)
    return tmp_path


def new_rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "new.jsonl").read_text().splitlines()]


FAST = ("learning_rate=1e-2", "steps=6", "--objective", "classification")


@pytest.mark.parametrize("method", ("lora", "head", "full"))
def test_labels_are_those_of_stock_models(labelled: Path, method: str) -> None:
    adapters = adapted(labelled, f"method={method}", *FAST, "--out", labelled / "adapters")
    result = the_json("predict", labelled / "base", adapters, labelled / "new.jsonl")
    tokenizer = tiny_models.tokenizer()
    folders = {path.name[0]: path for path in adapters.iterdir() if path.is_dir()}
    for row, predicted in zip(new_rows(labelled), result["rows"], strict=True):
        folder = folders[row["task"][0]]
        if method == "full":
            model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        else:
            model = stock(AutoModelForSequenceClassification, labelled, folder)
        labels = json.loads((folder / "labels.json").read_text())
        with torch.no_grad():
            logits = model(torch.tensor([tokenizer(row["text"])["input_ids"]])).logits[0]
        logits = logits[[i for i, label in enumerate(labels) if label is not None]]
        labels = [label for label in labels if label is not None]
        expected = dict(zip(labels, logits.softmax(0).tolist(), strict=True))
        assert predicted["probabilities"] == pytest.approx(expected, abs=1e-5)
        assert predicted["prediction"] == max(expected, key=expected.get)
        assert predicted["probability"] == max(predicted["probabilities"].values())
        assert {k: predicted[k] for k in row} == row
        assert {*labels} == {*LABELS[row["task"]]}


def test_files_in_and_out(labelled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapters = adapted(labelled, "method=lora", *FAST, "--out", labelled / "adapters")
    monkeypatch.chdir(labelled)
    command = ("predict", "base", "adapters", "new.jsonl", "--out")
    expected = the_json(*command[:-1])["rows"]
    for name in ("p.jsonl", "p.csv", "p.tsv", "p.parquet"):
        result = call(*command, name)
        assert result.exit_code == 0 and result.stdout == f"Predictions: {name}\n", result.output
    lines = Path("p.jsonl").read_text().splitlines()
    assert list(map(json.loads, lines)) == expected
    assert list(map(json.loads, call(*command[:-1]).stdout.splitlines())) == expected
    for name, delimiter in (("p.csv", ","), ("p.tsv", "\t")):
        with Path(name).open() as file:
            rows = list(csv.DictReader(file, delimiter=delimiter))
        assert [row["prediction"] for row in rows] == [row["prediction"] for row in expected]
        assert [json.loads(r["probabilities"]) for r in rows] == [
            row["probabilities"] for row in expected
        ]
    rows = parquet.read_table("p.parquet").to_pylist()
    assert [row["probability"] for row in rows] == [row["probability"] for row in expected]
    assert "p.jsonl exists: use --overwrite" in the_error(*command, "p.jsonl")
    assert call(*command, "p.jsonl", "--overwrite").exit_code == 0
    Path("mine.jsonl").write_text("{}")
    assert "was not made by foretune" in the_error(*command, "mine.jsonl", "--overwrite")
    assert "rows are written as .jsonl" in the_error(*command, "p.xlsx")
    # rows as a table, in another column, for one adapter without a task
    with Path("new.csv").open("w") as file:
        file.write("body\n" + "\n".join(row["text"] for row in new_rows(labelled)))
    one = the_json("predict", "base", "adapters/a", "new.csv", "tasks.columns.body=text")["rows"]
    places = [i for i, row in enumerate(expected) if row["task"] == "a"]
    assert [one[i]["prediction"] for i in places] == [expected[i]["prediction"] for i in places]
    assert (adapters / "scores.json").is_file()


def test_mistakes(labelled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapted(labelled, "method=lora", *FAST, "--out", labelled / "adapters")
    monkeypatch.chdir(labelled)

    def mistake(rows: list[dict[str, Any]], *more: object, adapters: str = "adapters") -> str:
        return the_error("predict", "base", adapters, write(Path("bad.jsonl"), rows), *more)

    good = {"task": "a", "text": "the cat"}
    assert 'no "task" column' in mistake([{"text": "the cat"}])
    assert "line 2: no adapter of task q in adapters, which has 3" in mistake(
        [good, {**good, "task": "q"}]
    )
    assert "line 2: text or x missing, it has task, body" in mistake(
        [good, {"task": "a", "body": "the cat"}]
    )
    assert "line 1: text is empty" in mistake([{"task": "a", "text": " "}])
    assert "a column prediction is there already" in mistake([{**good, "prediction": 1}])
    assert "has no rows" in mistake([]) or "is empty" in mistake([])
    assert "no such folder" in mistake([good], adapters="absent")
    Path("empty").mkdir()
    assert "holds no adapters: neither" in mistake(
        [good], "--objective", "classification", adapters="empty"
    )
    assert "only tasks.KEY=VALUE" in mistake([good], "steps=3")
    assert not Path("out.jsonl").exists()
    save_base(tiny_models.bert(num_labels=3, seed=5), tiny_models.tokenizer(), Path("other"))
    other = the_error("predict", "other", "adapters", "new.jsonl", "--out", "out.jsonl")
    assert "was trained on another base" in other and not Path("out.jsonl").exists()


def test_candidates(tmp_path: Path) -> None:
    save_base(tiny_models.bert(), tiny_models.tokenizer(), tmp_path / "base")
    rows = [
        {"task": task, "context": text, "candidates": texts(5)[:4], "answer": i % 4}
        for task in "ab"
        for i, text in enumerate(texts(8))
    ]
    write(tmp_path / "rows.jsonl", rows)
    new = [{k: v for k, v in row.items() if k != "answer"} for row in rows[3:13]]
    new[0]["candidates"] = new[0]["candidates"][:2]
    write(tmp_path / "new.jsonl", new)
    settings = ("method=lora", "learning_rate=1e-2", "steps=4", "--objective", "choice")
    adapters = adapted(tmp_path, *settings, "--out", tmp_path / "adapters")
    result = the_json("predict", tmp_path / "base", adapters, tmp_path / "new.jsonl")
    tokenizer = tiny_models.tokenizer()
    for row, predicted in zip(new, result["rows"], strict=True):
        model = stock(AutoModel, tmp_path, adapters / row["task"])

        def embedding(text: str, model: Any = model) -> Any:
            with torch.no_grad():
                ids = torch.tensor([tokenizer(text)["input_ids"]])
                return torch.nn.functional.normalize(model(ids).last_hidden_state[0].mean(0), dim=0)

        context = embedding(row["context"])
        cosines = [float(embedding(c) @ context) for c in row["candidates"]]
        scores = np.array(cosines) / 0.05
        assert predicted["scores"] == pytest.approx(scores, abs=1e-3)
        best = int(np.argmax(scores))
        assert predicted["prediction_index"] == best
        assert predicted["prediction"] == row["candidates"][best]
        expected = float(np.exp(scores[best]) / np.exp(scores).sum())
        assert predicted["probability"] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("scoring", ("reward", "dpo"))
def test_preferred_candidates(tmp_path: Path, scoring: str) -> None:
    model = tiny_models.llama(num_labels=1) if scoring == "reward" else tiny_models.llama()
    save_base(model.float(), tiny_models.tokenizer(), tmp_path / "base")
    rows = [
        {"task": task, "prompt": "the cat", "chosen": first, "rejected": second}
        for task in "ab"
        for first, second in zip(texts(6), texts(7), strict=False)
        if first != second
    ]
    write(tmp_path / "rows.jsonl", rows)
    candidates = ["a dog", "sat on", "red blue mat"]
    new = [{"task": task, "prompt": "the cat", "candidates": candidates} for task in "ab"]
    write(tmp_path / "new.jsonl", new)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"""
name: tiny
model: {{name: {tmp_path / "base"}}}
tasks: {{source: {tmp_path / "rows.jsonl"}, unseen: [b]}}
objective: {{kind: preference, scoring: {scoring}}}
retrain: {{methods: [standard], steps: 2, learning_rate: 1e-2}}
adapt: {{method: lora, learning_rate: 1e-2, steps: 2, shots: [2]}}
out: {tmp_path / "run"}
""")
    assert call("run", recipe).exit_code == 0
    base = tmp_path / "run" / "bases" / "standard" / "seed-0" / "base"
    result = call(
        "adapt",
        base,
        "--tasks",
        tmp_path / "rows.jsonl",
        "--out",
        tmp_path / "adapters",
        "method=lora",
        "learning_rate=3e-2",
        "steps=8",
    )
    assert result.exit_code == 0, result.output
    adapters = tmp_path / "adapters"
    predictions = the_json("predict", base, adapters, tmp_path / "new.jsonl")["rows"]
    for row, predicted in zip(new, predictions, strict=True):
        assert len(predicted["scores"]) == 3
        best = int(np.argmax(predicted["scores"]))
        assert predicted["prediction"] == candidates[best]
        assert len({*predicted["scores"]}) == 3
        # whichever other candidates stand beside it, a reward is the same
        pair = write(tmp_path / "pair.jsonl", [{**row, "candidates": candidates[::-1][:2]}])
        [again] = the_json("predict", base, adapters, pair)["rows"]
        assert again["scores"] == pytest.approx(predicted["scores"][::-1][:2], abs=1e-5)


def test_arrays(tmp_path: Path) -> None:
    module = tmp_path / "net.py"
    module.write_text(
        "from torch import nn\n\ndef build():\n"
        "    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))\n"
    )
    rng = np.random.default_rng(0)
    rows = [
        {"task": task, "x": rng.normal(size=3).tolist(), "y": rng.normal(size=2).tolist()}
        for task in "abc"
        for _ in range(12)
    ]
    write(tmp_path / "rows.jsonl", rows)
    new = write(tmp_path / "new.jsonl", [{"task": r["task"], "x": r["x"]} for r in rows[::5]])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"""
name: tiny
model: {{file: {module}}}
tasks: {{source: {tmp_path / "rows.jsonl"}, unseen: [c]}}
objective: {{kind: regression}}
retrain: {{methods: [peft-ml], steps: 4, learning_rate: 1e-2}}
adapt: {{method: lora, learning_rate: 1e-2, steps: 4, shots: [4]}}
out: {tmp_path / "run"}
""")
    assert call("run", recipe).exit_code == 0
    base = tmp_path / "run" / "bases" / "peft-ml" / "seed-0" / "base"
    command = ("adapt", base, "--tasks", tmp_path / "rows.jsonl", "--out", tmp_path / "adapters")
    assert call(*command, "method=lora", "learning_rate=1e-2", "steps=4").exit_code == 0
    predicted = the_json("predict", base, tmp_path / "adapters", new, "--trust-remote-code")["rows"]
    from foretune.adapters.peft_format import bank_like, load_adapter
    from foretune.adapters.stored_adapter import read_adapter
    from foretune.models.loading import load_base
    from foretune.models.routing import route
    from foretune.models.trusted_code import trusted_code

    with trusted_code(True):
        model = load_base(base)[0]
    for row in predicted:
        folder = tmp_path / "adapters" / row["task"]
        bank = bank_like(model, read_adapter(folder, model), ["one"])
        load_adapter(bank, 0, folder, model)
        with bank.attached(), route([0]), torch.no_grad():
            expected = model(torch.tensor([row["x"]]))[0].tolist()
        assert row["prediction"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("method", ("lora", "full"))
def test_words_are_compared_with_prompts_of_the_base(tmp_path: Path, method: str) -> None:
    from foretune.models.loading import load_base
    from foretune.tasks.objectives.prompts import PromptClassification
    from foretune.tasks.task import Task, TaskCollection

    tokenizer = tiny_models.tokenizer()
    save_base(tiny_models.bert(), tokenizer, tmp_path / "base")
    labels = {"a": ["red", "blue"], "b": ["cat", "dog", "mat"]}
    rows = [
        {"task": task, "text": text, "label": of_task[i % len(of_task)]}
        for task, of_task in labels.items()
        for i, text in enumerate(texts(12))
    ]
    write(tmp_path / "rows.jsonl", rows)
    new = [{"task": "ab"[i % 2], "text": text} for i, text in enumerate(texts(8))]
    write(tmp_path / "new.jsonl", new)
    settings = (f"method={method}", "learning_rate=1e-2", "steps=8", "--objective", "prompts")
    adapters = adapted(tmp_path, *settings, "--out", tmp_path / "adapters")
    predicted = the_json("predict", tmp_path / "base", adapters, tmp_path / "new.jsonl")["rows"]
    base = load_base(tmp_path / "base")[0].eval()
    tasks = TaskCollection(
        tuple(
            Task(task, [{"text": "the cat", "label": label} for label in of_task])
            for task, of_task in labels.items()
        )
    )
    objective = PromptClassification(tokenizer).fit(tasks).bind(base)
    for row, prediction in zip(new, predicted, strict=True):
        folder = adapters / row["task"]
        if method == "full":
            model = load_base(folder)[0].eval()
        else:
            model = stock(AutoModel, tmp_path, folder)
        example = {"text": row["text"], "label": labels[row["task"]][0]}
        batch = objective.collate([objective.encode(example, row["task"])], [0])
        with torch.no_grad():
            logits = objective.outputs(model, batch)[0]
        names = objective.labels[row["task"]]
        expected = dict(zip(names, logits[: len(names)].softmax(0).tolist(), strict=True))
        assert prediction["probabilities"] == pytest.approx(expected, abs=1e-4)


def test_models_of_another_base_are_refused(labelled: Path) -> None:
    adapters = adapted(labelled, "method=full", *FAST, "--out", labelled / "adapters")
    save_base(tiny_models.bert(num_labels=3, seed=5), tiny_models.tokenizer(), labelled / "other")
    line = the_error("predict", labelled / "other", adapters, labelled / "new.jsonl")
    assert "was adapted from another base" in line
    (adapters / "run.json").unlink()
    command = ("predict", labelled / "base", adapters, labelled / "new.jsonl")
    command = (*command, "--objective", "classification")
    assert "does not record which base" in the_error(*command)
    assert call(*command, "--allow-unverified").exit_code == 0


def test_adapters_that_peft_wrote(labelled: Path) -> None:
    base = AutoModelForSequenceClassification.from_pretrained(labelled / "base")
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"])
    torch.manual_seed(0)
    model = peft.get_peft_model(base, config)
    for name, p in model.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            torch.nn.init.normal_(p, std=0.3)
    model.save_pretrained(labelled / "plain")
    new = write(labelled / "new.jsonl", [{"text": text} for text in texts(5)])
    command = ("predict", labelled / "base", labelled / "plain", new)
    command = (*command, "--objective", "classification")
    assert "--allow-unverified" in the_error(*command)
    predicted = the_json(*command, "--allow-unverified")["rows"]
    model.eval()
    for row in predicted:
        ids = torch.tensor([tiny_models.tokenizer()(row["text"])["input_ids"]])
        with torch.no_grad():
            expected = model(input_ids=ids).logits[0].softmax(0).tolist()
        assert [*row["probabilities"].values()] == pytest.approx(expected, abs=1e-5)
    file = labelled / "plain" / "adapter_config.json"
    record = json.loads(file.read_text())
    file.write_text(json.dumps({**record, "init_lora_weights": "pissa"}))
    line = the_error(*command, "--allow-unverified")
    assert "plain: the bank has no adapters with init_lora_weights pissa" in line


def test_columns_stay_as_they_are(labelled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datetime

    import pyarrow

    adapted(labelled, "method=lora", *FAST, "--out", labelled / "adapters")
    monkeypatch.chdir(labelled)
    when = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
    table = {"task": ["a", "b"], "body": ["the cat", "a dog"], "when": [when, None]}
    parquet.write_table(pyarrow.table({**table, "raw": [b"\x00\xff", b""]}), "new.parquet")
    command = ("predict", "base", "adapters", "new.parquet", "tasks.columns.body=text")
    assert call(*command, "--out", "p.parquet").exit_code == 0
    written = parquet.read_table("p.parquet")
    before = parquet.read_table("new.parquet")
    for name in before.column_names:
        assert written.column(name).equals(before.column(name)), name
    assert the_json(*command)["rows"][0]["when"].startswith("2020-01-01")
    rows = [{"task": "a", "text": "the\rcat", "w": float("nan"), "meta": {}}]
    write(Path("odd.jsonl"), rows)
    command = ("predict", "base", "adapters", "odd.jsonl")
    assert the_json(*command)["rows"][0]["w"] is None
    assert call(*command, "--out", "odd.csv").exit_code == 0
    with Path("odd.csv").open(newline="") as file:
        [row] = csv.DictReader(file)
    assert row["text"] == "the\rcat" and row["meta"] == "{}"
    again = call("predict", "base", "adapters", "odd.csv")
    assert again.exit_code == 2 and "a column prediction is there" in again.stderr
    result = call(*command, "--out", "odd.parquet")
    assert result.exit_code == 2 and "Parquet does not take the values of" in result.stderr
    assert not list(Path().glob("*unfinished*"))


def test_nothing_is_taken_that_has_no_effect(
    labelled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted(labelled, "method=lora", *FAST, "--out", labelled / "adapters")
    monkeypatch.chdir(labelled)
    command = ("predict", "base", "adapters", "new.jsonl")
    assert "tasks.max_rows is not used here" in the_error(*command, "tasks.max_rows=1")
    rows = [{"task": "a", "text": "the cat", "body": "red blue"}]
    both = ("predict", "base", "adapters", write(Path("both.jsonl"), rows))
    assert 'already has a column "text"' in the_error(*both, "tasks.columns.body=text")
    assert "does not have" in the_error(*both, "tasks.columns.absent=text")
    Path("notes.csv").write_text("day,note\nmon,my prediction is rain\n")
    line = the_error(*command, "--out", "notes.csv", "--overwrite")
    assert "was not made by foretune" in line
    Path("bytes.csv").write_bytes(b"task,text,note\na,the cat,caf\xe9\n")
    assert "not UTF-8" in the_error("predict", "base", "adapters", "bytes.csv")
    long = write(Path("long.jsonl"), [{"task": "a", "text": "cat " * 500}])
    assert the_json("predict", "base", "adapters", long)["rows"][0]["prediction"] in LABELS["a"]
    assert "nothing is predicted by the objective denoising" in the_error(
        *command, "--objective", "denoising"
    )
    Path("adapters/a/labels.json").write_text("[null, null]")
    assert "labels.json is damaged" in the_error(*command)


def test_models_of_a_base_without_a_head(tmp_path: Path) -> None:
    """The base that adapt loads has a head which the folder lacks."""
    save_base(tiny_models.bert(), tiny_models.tokenizer(), tmp_path / "base")
    rows = [{"task": "a", "text": text, "label": "xy"[i % 2]} for i, text in enumerate(texts(10))]
    write(tmp_path / "rows.jsonl", rows)
    new = write(tmp_path / "new.jsonl", [{"task": "a", "text": text} for text in texts(4)])
    for method in ("lora", "full"):
        settings = (f"method={method}", *FAST, "--out", tmp_path / "adapters", "--overwrite")
        adapters = adapted(tmp_path, *settings)
        rows = the_json("predict", tmp_path / "base", adapters, new)["rows"]
        assert {row["prediction"] for row in rows} <= {"x", "y"}, method


def test_tasks_whose_names_differ_in_case(labelled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"task": task, "text": text, "label": labels[i % 2]}
        for task, labels in {"Red": "xy", "red": "zw"}.items()
        for i, text in enumerate(texts(10))
    ]
    write(labelled / "rows.jsonl", rows)
    adapters = adapted(labelled, "method=lora", *FAST, "--out", labelled / "adapters")
    new = write(labelled / "new.jsonl", [{"task": t, "text": "a b"} for t in ("Red", "red")])
    command = ("predict", labelled / "base", adapters, new, "--objective", "classification")
    for _ in range(2):  # as the folder records them, and by the names of folders alone
        upper, lower = the_json(*command)["rows"]
        assert {*upper["probabilities"]} == {"x", "y"} and {*lower["probabilities"]} == {"z", "w"}
        (adapters / "scores.json").unlink(missing_ok=True)
