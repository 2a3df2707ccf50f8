"""`foretune check` finds adapters that are not applied, and says which."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import foretune
import tiny_models
from command_line import call, the_error, the_json
from foretune.models.loading import load_base, load_module, save_base
from foretune.recipes import check
from foretune.tasks.objectives.causal_lm import CausalLM
from foretune.tasks.objectives.classification import Classification
from foretune.tasks.task import Task, TaskCollection

TOKENIZER = tiny_models.tokenizer(special=False)


def tasks(kind: str) -> TaskCollection:
    if kind == "causal-lm":
        rows = [
            [{"text": f"{word} cat sat one"} for word in words]
            for words in (("a", "one"), ("the", "a"))
        ]
        objective: Any = CausalLM(TOKENIZER)
    else:
        rows = [
            [
                {"text": word, "label": label}
                for word, label in zip(("red", "one"), labels, strict=True)
            ]
            for labels in (("x", "y"), ("y", "x"))
        ]
        objective = Classification(TOKENIZER)
    parts = [Task(f"t{i}", part, [], part) for i, part in enumerate(rows)]
    return TaskCollection(tuple(parts)).with_objective(objective)


@pytest.fixture(params=["causal-lm", "classification"])
def folders(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """A base, and the adapters of two tasks on it."""
    kind = request.param
    model = tiny_models.llama(num_labels=2 if kind == "classification" else None, seed=1)
    model.config.pad_token_id = 0
    save_base(model, TOKENIZER, tmp_path / "base")
    base, _ = load_base(tmp_path / "base")
    run = foretune.Run(steps=3, batch_size=2, out=tmp_path / "adapted")
    foretune.adapt(base, tasks(kind), foretune.LoRA(learning_rate=1e-2), run)
    return tmp_path / "base", tmp_path / "adapted"


def change(adapter: Path, by: Any) -> None:
    file = adapter / "adapter_model.safetensors"
    save_file(by(load_file(file)), file, metadata={"format": "pt"})


def adapters_in(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.glob("**/adapter_config.json"))


def test_adapters_that_were_not_to_be_trained_are_no_fault(folders: tuple[Path, Path]) -> None:
    base, _ = folders
    model, _ = load_base(base)
    kind = "classification" if "Classification" in type(model).__name__ else "causal-lm"
    untrained = base.parent / "untrained"
    run = foretune.Run(steps=0, batch_size=2, out=untrained)
    foretune.adapt(model, tasks(kind), foretune.LoRA(learning_rate=1e-2), run)
    result = the_json("check", base, untrained)
    assert result["ok"]
    if kind == "causal-lm":  # a classifier of two tasks has a head for each
        notes = [note for adapter in result["adapters"] for note in adapter["notes"]]
        assert notes.count("changes no output: it was trained for 0 steps") == 2


def test_sound_adapters_pass(folders: tuple[Path, Path]) -> None:
    base, adapted = folders
    shown = call("check", base, adapted)
    assert shown.exit_code == 0, shown.output
    assert "2 adapters, none at fault." in shown.stdout
    result = the_json("check", base, *adapters_in(adapted))
    assert result["ok"] and len(result["adapters"]) == 2
    for adapter in result["adapters"]:
        assert adapter["effect"] > 1e-3 and adapter["difference"] < 1e-5
        assert adapter["faults"] == adapter["notes"] == []


def test_sound_adapters_of_a_base_in_half_precision_pass(tmp_path: Path) -> None:
    model = tiny_models.llama(seed=1, initializer_range=0.5).to(torch.bfloat16)
    save_base(model, TOKENIZER, tmp_path / "base")
    rows = [{"task": "t", "text": f"the {word} cat sat"} for word in ("a", "red", "one", "blue")]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ("--tasks", tmp_path / "rows.jsonl", "--objective", "causal-lm", "method=lora")
    more = ("--out", tmp_path / "adapters", "steps=4", "learning_rate=0.05")
    assert call("adapt", tmp_path / "base", *words, *more).exit_code == 0
    shown = call("check", tmp_path / "base", tmp_path / "adapters")
    assert shown.exit_code == 0, shown.output
    merged = call("export", tmp_path / "base", tmp_path / "adapters", "--out", tmp_path / "merged")
    assert merged.exit_code == 0, merged.output
    weights = load_base_state(tmp_path / "merged").values()
    assert {weight.dtype for weight in weights} == {torch.bfloat16}  # as the base was saved


def test_every_fault_is_named_and_fails(folders: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapted = folders
    first, second = adapters_in(adapted)
    shutil.copytree(first, tmp_path / "copy")
    shutil.copytree(first, tmp_path / "empty")
    shutil.copytree(first, tmp_path / "half")
    original = load_base_state(base)
    change(
        tmp_path / "empty",
        lambda tensors: {
            name: torch.zeros_like(t) if "lora_B" in name else original.get(plain_name(name), t)
            for name, t in tensors.items()
        },
    )
    change(tmp_path / "half", lambda t: {n: t[n] for n in list(t)[1:]})
    other = tiny_models.llama(num_labels=2 if "score.weight" in original else None, seed=9)
    save_base(other, TOKENIZER, tmp_path / "other")
    names = ["copy", "empty", "half"]
    shown = call("check", base, first, second, *(tmp_path / name for name in names), "--json")
    assert shown.exit_code == 1
    faults = [adapter["faults"] for adapter in json.loads(shown.stdout)["adapters"]]
    assert faults[:2] == [[], []]
    assert faults[2] == [f"has the same weights as {first}"]
    assert len(faults[3]) == 1 and faults[3][0].startswith("changes no output on the probe")
    assert len(faults[4]) == 1 and "half" in faults[4][0]
    shown = call("check", tmp_path / "other", adapted)
    assert shown.exit_code == 1 and shown.stdout.count("was trained on another base") == 2
    assert "2 adapters, 2 at fault." in shown.stdout


def load_base_state(base: Path) -> dict[str, torch.Tensor]:
    return load_file(base / "model.safetensors")


def plain_name(name: str) -> str:
    return name.removeprefix("base_model.model.")


def test_other_outputs_of_stock_peft_are_a_fault(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapted = folders
    by_peft = check._by_peft
    monkeypatch.setattr(check, "_by_peft", lambda *at: by_peft(*at) * 1.01)
    shown = call("check", base, adapted)
    assert shown.exit_code == 1
    assert shown.stdout.count("stock PEFT computes other outputs than foretune") == 2


def test_arrays_are_tried_on_rows(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "from torch import nn\n\ndef build():\n"
        "    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))\n"
    )
    model = load_module(tmp_path / "net.py")
    save_base(model, None, tmp_path / "base")
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(8, 3)).astype(np.float32), rng.integers(2, size=8)
    rows = [{"x": a, "y": int(b)} for a, b in zip(x, y, strict=True)]
    collection = TaskCollection((Task("t", rows, [], rows),)).with_objective(Classification())
    base, _ = load_base(tmp_path / "base", trust_remote_code=True)
    run = foretune.Run(steps=3, batch_size=4, out=tmp_path / "adapted")
    foretune.adapt(base, collection, foretune.LoRA(learning_rate=1e-2), run)
    np.savez(tmp_path / "rows.npz", task=np.array(["t"] * 8), x=x, y=y)
    words = ("check", tmp_path / "base", tmp_path / "adapted", "--trust-remote-code")
    assert "add --rows with a file of rows" in the_error(*words)
    shown = call(*words, "--rows", tmp_path / "rows.npz")
    assert shown.exit_code == 0, shown.output


def test_a_folder_without_adapters_is_an_error(tmp_path: Path) -> None:
    save_base(tiny_models.llama(), TOKENIZER, tmp_path / "base")
    assert "is not an adapter, and holds none: no such folder" in the_error(
        "check", tmp_path / "base", tmp_path / "none"
    )
    (tmp_path / "empty").mkdir()
    assert "holds none: no adapter_config.json in it" in the_error(
        "check", tmp_path / "base", tmp_path / "empty"
    )
    assert "no base in" in the_error("check", tmp_path / "nothing", tmp_path / "empty")


def test_adapters_call_their_base_as_it_is_served(tmp_path: Path) -> None:
    save_base(tiny_models.llama(seed=1), TOKENIZER, tmp_path / "base")
    rows = [{"task": "t", "text": f"the {word} cat sat"} for word in ("a", "red", "one", "blue")]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = [
        "--tasks",
        tmp_path / "rows.jsonl",
        "--objective",
        "causal-lm",
        "method=lora",
        "steps=2",
    ]
    named = ("--out", tmp_path / "adapters", "--base-name", "my-org/my-base")
    shown = call("adapt", tmp_path / "base", *words, *named)
    assert shown.exit_code == 0, shown.output
    config = json.loads((tmp_path / "adapters" / "t" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "my-org/my-base"
    assert call("check", tmp_path / "base", tmp_path / "adapters").exit_code == 0
