"""`foretune adapt … method=fd-align`, as a user types it."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import command_line
import tiny_models

call = partial(command_line.call, "adapt")


TEXTS = [
    {"task": task, "split": split, "text": f"{word} sat on the mat", "label": word}
    for task in ("pets", "more")
    for split in ("train", "test")
    for word in ("cat", "dog")
]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    model = tiny_models.bert(num_hidden_layers=1)
    model.save_pretrained(tmp_path / "base")
    tiny_models.tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in TEXTS))
    return tmp_path / "base"


def fd_align(base: Path, *more: object) -> Any:
    rows = base.parent / "rows.jsonl"
    fixed = (
        "--tasks",
        rows,
        "--objective",
        "prompts",
        "--out",
        base.parent / "out",
        "steps=2",
        "tasks.validation=0",
    )
    return call(base, *fixed, "method=fd-align", *more)


def test_each_task_gets_a_model_that_transformers_loads(base: Path) -> None:
    import transformers

    result = fd_align(base, "fields.weight=2", "fields.interpolate=0.5", "--json")
    assert result.exit_code == 0, result.stderr
    assert set(json.loads(result.stdout)["scores"]) == {"pets", "more"}
    for task in ("pets", "more"):
        assert transformers.AutoModel.from_pretrained(base.parent / "out" / task)


def test_with_lora_each_task_gets_an_adapter(base: Path) -> None:
    result = fd_align(base, "fields.lora.r=2", "learning_rate=0.001")
    assert result.exit_code == 0, result.stderr
    assert "pets" in result.stdout and "accuracy" in result.stdout
    assert (base.parent / "out" / "pets" / "adapter_model.safetensors").is_file()


def test_a_second_run_adapts_nothing_again(base: Path) -> None:
    assert fd_align(base).exit_code == 0
    again = fd_align(base)
    assert again.exit_code == 0 and "Already there, not adapted again" in again.output
    assert fd_align(base, "--overwrite").exit_code == 0


def test_images_from_an_npz_tune_a_clip(tmp_path: Path) -> None:
    model = tiny_models.clip()
    model.save_pretrained(tmp_path / "clip")
    tiny_models.tokenizer().save_pretrained(tmp_path / "clip")
    rows = np.random.default_rng(0).normal(size=(4, 3, 8, 8)).astype("f4")
    names = np.array(["cat", "dog", "cat", "dog"])
    splits = np.array(["train", "train", "test", "test"])
    np.savez(tmp_path / "x.npz", x=rows, y=names, split=splits, task=np.array(["pets"] * 4))
    result = call(
        *(tmp_path / "clip", "--tasks", tmp_path / "x.npz", "--objective", "prompts"),
        *("--out", tmp_path / "out", "method=fd-align", "steps=2", "tasks.validation=0"),
    )
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "out" / "pets" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("fields.weigth=2", 'fd-align has no field "weigth"'),
        ("fields.weight=-1", "weight must be a number not below 0, got -1"),
        ("fields.num_kept=99", "num_kept is 99, but there are 80 templates"),
        ("lora.r=2", "the settings may have lora only with the method lora, not with fd-align"),
    ],
)
def test_a_bad_setting_is_one_line_and_writes_no_model(base: Path, change: str, says: str) -> None:
    result = fd_align(base, change)
    assert result.exit_code == 2
    [line] = [part for part in result.output.splitlines() if part.startswith("error")]
    assert says in line
    assert not (base.parent / "out" / "pets").exists()


def test_a_base_with_a_head_of_its_own_objective_is_refused(base: Path) -> None:
    rows = base.parent / "rows.jsonl"
    result = call(
        *(
            base,
            "--tasks",
            rows,
            "--objective",
            "classification",
            "method=fd-align",
            "steps=2",
            "tasks.validation=0",
        ),
        *("--out", base.parent / "out"),
    )
    assert result.exit_code == 2
