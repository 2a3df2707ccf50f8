"""Recipes whose model is a tower, from the data to adapters of unseen tasks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from command_line import call
from foretune.errors import UserError
from foretune.models.loading import load_base
from foretune.recipes.console import SILENT
from foretune.recipes.schema import load_recipe
from foretune.recipes.setup import set_up
from foretune.recipes.templates import template_text
from tower_tasks import TEXTS, encoder_folder

SMALL = [
    *(
        "tasks.unseen=2",
        "retrain.steps=3",
        "retrain.learning_rates=[1e-3]",
        "tasks.source=data.jsonl",
    ),
    *("retrain.methods=[none, standard, peft-ml]", "adapt.steps=2", "adapt.shots=[1]"),
    *("adapt.learning_rates=[1e-2]", "model.name=./encoder", "model.tower=[4, 3]"),
]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    encoder_folder(tmp_path / "encoder")
    rng = np.random.default_rng(0)
    rows = [
        {"task": f"p{i}", "text": text, "label": ["no", "yes"][label], "split": split}
        for i in range(5)
        for split in ("train", "validation", "test")
        for text, label in zip(TEXTS, rng.permutation([0, 1] * 3).tolist(), strict=True)
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "my.yaml").write_text(template_text("classification"))
    (tmp_path / "arrays.yaml").write_text(template_text("arrays"))
    x = rng.normal(size=(100, 2, 3)).astype(np.float32)
    task = np.repeat([f"t{i}" for i in range(5)], 20)
    np.savez(tmp_path / "x.npz", task=task, x=x, y=(x[:, 0, 0] > 0).astype(int))
    np.savez(tmp_path / "y.npz", task=task, x=x, y=x[:, 0, :2])
    return tmp_path


def test_run_and_adapt_need_no_trust_for_our_own_folders(place: Path) -> None:
    done = call("run", "my.yaml", *SMALL, "out=out")
    assert done.exit_code == 0, done.output
    base = place / "out/bases/standard/seed-0/base"
    assert type(load_base(base)[0]).__name__ == "TowerForSequenceClassification"
    lines = (place / "out/README.md").read_text()
    assert "AutoModelForSequenceClassification.from_pretrained(" in lines
    assert "trust_remote_code=True" in lines
    again = call("adapt", str(base), "--tasks", "data.jsonl", "--out", "more", "steps=2")
    assert again.exit_code == 0, again.output
    assert (place / "more/p0/adapter_config.json").is_file()


@pytest.mark.parametrize("data", ["x", "y"])
def test_arrays_need_neither_a_model_file_nor_a_name(data: str, place: Path) -> None:
    kind = "classification" if data == "x" else "regression"
    settings = [s for s in SMALL if not s.startswith(("model.", "tasks.source"))]
    settings += [f"tasks.source={data}.npz", f"objective.kind={kind}", "out=out"]
    done = call("run", "arrays.yaml", *settings)
    assert done.exit_code == 0, done.output
    model, _ = load_base(place / "out/bases/standard/seed-0/base")
    assert (model.config.input_size, model.config.widths) == (6, [64, 64])
    base = str(place / "out/bases/peft-ml/seed-0/base")  # which has a basis beside it
    command = ("adapt", base, "--tasks", f"{data}.npz", "--out", "more")
    assert call(*command, "method=basis", "steps=2", "learning_rate=0.1").exit_code == 0
    assert call("check", base, "more", "--rows", f"{data}.npz").exit_code == 0


def test_plan_reads_and_times_a_tower(place: Path) -> None:
    shown = call("plan", "my.yaml", *SMALL, "--json")
    assert shown.exit_code == 0, shown.output
    [cost] = [c for c in json.loads(shown.stdout)["retrain"] if c["name"] == "standard"]
    assert cost["parameters"]["base"] == 16 * 4 + 4 + 4 * 3 + 3 + 3 * 2 + 2


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("model.tower=[]", "model.tower"),
        ("model.tower=[0]", "model.tower"),
        ("model.tower=64", "model.tower"),
        ("model={tower: [4], file: m.py}", "tower or file, not both"),
        ("model={name: minilm, tower: [4], trainable_layers: 1}", "tower or trainable_layers"),
        ("model={trainable_layers: 1}", "or for arrays a tower"),
        ("objective={kind: causal-lm}", "for causal-lm leave it out"),
        ("objective={kind: choice, scoring: causal}", "for choice with scoring causal"),
        ("objective={kind: regression}", "regression of arrays (without name)"),
    ],
)
def test_a_tower_that_cannot_be_is_refused(setting: str, says: str, place: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe("my.yaml", [*SMALL, setting])
    assert says in str(caught.value)


def test_rows_and_tower_must_fit(place: Path) -> None:
    with pytest.raises(UserError, match="add the name of an encoder"):
        set_up(load_recipe("arrays.yaml", ["tasks.source=data.jsonl", "tasks.unseen=2"]), SILENT)
    with pytest.raises(UserError, match=r"leave model\.name out"):
        set_up(load_recipe("my.yaml", [*SMALL, "tasks.source=x.npz"]), SILENT)


def test_trainable_layers_on_the_command_line_replace_the_tower(place: Path) -> None:
    assert load_recipe("my.yaml", ["model.trainable_layers=1"]).model.tower is None
    assert load_recipe("arrays.yaml", ["model.file=m.py"]).model.tower is None
