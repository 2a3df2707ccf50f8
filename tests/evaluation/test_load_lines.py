"""The lines of a report that load a base run as they stand, where foretune was called."""

from __future__ import annotations

import html
import re
from pathlib import Path

import pytest

import foretune
import tiny_models
from foretune import PEFTML, Classification, Full, LoRA, Run, Task, TaskCollection
from foretune.evaluation.report import write_report
from foretune.evaluation.report.advice import load_lines, run_again

WORDS = ["the", "cat", "dog", "house"]
STEPS = Run(steps=2, batch_size=4, device="cpu")


def collection(*names: str, labels: str = "xyz") -> TaskCollection:
    rows = {
        name: [{"text": f"{name} {word}", "label": label} for word in WORDS for label in labels]
        for name in names
    }
    tasks = [Task(name, train=r, validation=r[:2], test=r[2:]) for name, r in rows.items()]
    return TaskCollection(tasks, Classification(tiny_models.tokenizer()))


def loading_code(page: Path) -> str:
    block = re.search('<pre class="python"[^>]*><code>(.*?)</code>', page.read_text(), re.S)
    assert block is not None
    return html.unescape(block[1])


@pytest.mark.parametrize("adapt", [LoRA(lora={"r": 2}), Full()], ids=["lora", "full"])
@pytest.mark.parametrize("labels", ["xyz", "vwxyz"])
def test_lines_load_base_adapter_tokenizer_and_labels(adapt, labels, tmp_path, monkeypatch, capsys):
    base = foretune.retrain(
        tiny_models.bert(num_labels=3),
        collection("a", "b"),
        PEFTML(lora={"r": 2}),
        STEPS.replace(out=tmp_path / "bases" / "one"),
        tokenizer=tiny_models.tokenizer(),
    )
    unseen = collection("new task", labels=labels)
    comparison = foretune.compare(
        {"peft-ml": base}, unseen, adapt=adapt, run=STEPS, shots=(1,), keep=tmp_path / "adapters"
    ).to_dict()
    monkeypatch.chdir(tmp_path.parent)  # the path of the base is relative to where one works
    comparison["bases"][0]["path"] = str(Path(tmp_path.name) / "bases/one/base")
    code = loading_code(write_report(comparison, Path(tmp_path.name)))
    exec(code, variables := {})
    assert variables["labels"] == list(labels)
    assert capsys.readouterr().out.strip() in {*labels}
    assert ("model" in variables) == (adapt.name == "lora")


def test_lines_name_the_folders_of_a_run_that_are_no_longer_there(tmp_path, monkeypatch):
    comparison = foretune.compare(
        {"base": tiny_models.bert(num_labels=3)},
        collection("new"),
        adapt=LoRA(lora={"r": 2}),
        run=STEPS,
        shots=(1,),
    ).to_dict()
    comparison["bases"][0]["path"] = "bases/base/seed-0/base"
    monkeypatch.chdir(tmp_path)
    code = loading_code(write_report(comparison, Path("runs/new")))
    assert '"runs/new/bases/base/seed-0/base"' in code
    assert 'from_pretrained(base, "runs/new/adapters/base/TASK")' in code


def test_a_base_without_adapters_names_its_labels(tmp_path, monkeypatch, capsys):
    model = tiny_models.bert(num_labels=3)
    model.config.id2label = dict(enumerate(["red", "green", "blue"]))
    model.save_pretrained(tmp_path / "base")
    tiny_models.tokenizer().save_pretrained(tmp_path / "base")
    base = {"name": "b", "path": "base", "model_class": type(model).__name__, "num_labels": None}
    exec("\n".join(load_lines(base, tmp_path)), {})
    assert capsys.readouterr().out.strip() in {"red", "green", "blue"}


def test_lines_name_the_folder_that_an_unfinished_one_will_become(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    unfinished = Path("runs/.unfinished-new")
    (unfinished / "bases/b").mkdir(parents=True)
    base = {"name": "b", "path": "bases/b", "model_class": "BertModel", "num_labels": None}
    assert 'from_pretrained("runs/new/bases/b")' in load_lines(base, unfinished)[-1]
    command = {"command": ["foretune", "compare", "a b"]}
    again = {Path(): "../new-again", unfinished: "runs/new-again", Path(".."): "../../runs-again"}
    monkeypatch.chdir(Path("runs/.unfinished-new").rename("runs/new"))
    for folder, out in again.items():
        assert run_again(command, folder) == f"foretune compare 'a b' --out {out}"
