"""Damaged files and hostile settings through the command line; `make fuzz` tries more of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tiny_models
from command_line import call
from fuzzing import OUT, VALUES, check_command, copied, damaged

RECIPE = """
name: tiny
model: {name: base}
tasks: {source: rows.jsonl, unseen: 1, validation: 0.2, test: 0.2}
objective: {kind: classification}
retrain: {methods: [none], steps: 1, batch_size: 2, learning_rate: 1e-3}
adapt: {method: lora, steps: 1, batch_size: 2, learning_rate: 1e-3, shots: [1]}
out: out
"""
ADAPT = ("adapt", "base", "--tasks", "rows.jsonl", "--out", OUT, "steps=1", "batch_size=2")
FROM_BASIS = ("adapt", "with-basis", *ADAPT[2:], "method=basis")
FUSE = ("fuse", "average", "base", "a=adapters/t0", "b=adapters/t1", "--out", OUT)
FUSE_FULL = ("fuse", "average", "base", "a=full", "b=base", "--out", OUT)
GENERATE = ("generate", "adlm/l0", "the cat", "--max-new-tokens", "2")
COMPARE = ("compare", "retrained", "--tasks", "rows.jsonl", "--out", OUT, "--shots", "1", "steps=1")
RETRAIN = ("retrain", "recipe.yaml", "--method", "standard", "--out", OUT)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with a tokenizer, examples, a recipe, adapters and a comparison."""
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        tiny_models.bert(num_labels=2, num_hidden_layers=1).save_pretrained("base")
        tiny_models.tokenizer().save_pretrained("base")
        (folder / "recipe.yaml").write_text(RECIPE)
        rows = [
            {"task": f"t{t}", "split": split, "text": f"the {word} {other}", "label": word}
            for t in range(3)
            for split in ("train", "validation", "test")
            for word in ("cat", "dog")
            for other in ("a", "b")
        ]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        tasks = ("--tasks", "rows.jsonl", "--objective", "classification")
        pandas.DataFrame(rows).to_csv("rows.csv", index=False)
        pandas.DataFrame(rows).to_parquet("rows.parquet")
        tiny_models.bert(num_labels=2, num_hidden_layers=1, seed=1).save_pretrained("full")
        tiny_models.llama(num_hidden_layers=1).save_pretrained("llama")
        tiny_models.tokenizer(special=False).save_pretrained("llama")
        lines = [{"task": "l0", "prompt": row["text"], "completion": row["label"]} for row in rows]
        (folder / "lm.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        texts = ("--tasks", "lm.jsonl", "--objective", "causal-lm")
        for command in (
            ("adapt", "llama", *texts, "--out", "adlm", "steps=1"),
            ("retrain", "recipe.yaml", "--method", "standard", "--out", "retrained"),
            ("retrain", "recipe.yaml", "--method", "peft-ml", "--out", "with-basis"),
            ("adapt", "retrained", *tasks, "--out", "adapters", "steps=1"),
            ("compare", "retrained", *tasks, "--out", "compared", "--shots", "1", "steps=1"),
        ):
            result = call(*command)
            assert result.exit_code == 0, result.output
    return folder


@pytest.mark.parametrize(
    ("file", "command"),
    [
        ("rows.jsonl", ADAPT),
        ("rows.csv", ("adapt", "base", "--tasks", "rows.csv", *ADAPT[4:])),
        ("rows.parquet", ("adapt", "base", "--tasks", "rows.parquet", *ADAPT[4:])),
        ("recipe.yaml", RETRAIN),
        ("recipe.yaml", ("plan", "recipe.yaml")),
        ("llama/config.json", GENERATE),
        ("adlm/l0/adapter_config.json", GENERATE),
        ("adlm/l0/adapter_model.safetensors", GENERATE),
        ("adlm/l0/base_fingerprint.json", GENERATE),
        ("full/config.json", FUSE_FULL),
        ("full/model.safetensors", FUSE_FULL),
        ("retrained/base/foretune.json", COMPARE),
        ("base/config.json", ADAPT),
        ("base/model.safetensors", ADAPT),
        ("base/tokenizer.json", ADAPT),
        ("base/tokenizer_config.json", ADAPT),
        ("retrained/base/foretune.json", ("adapt", "retrained", *ADAPT[2:])),
        ("retrained/base/config.json", ("adapt", "retrained", *ADAPT[2:])),
        ("with-basis/base/foretune_basis/basis.safetensors", FROM_BASIS),
        ("adapters/t0/adapter_config.json", FUSE),
        ("adapters/t0/adapter_model.safetensors", FUSE),
        ("adapters/t0/base_fingerprint.json", FUSE),
        ("adapters/t0/labels.json", FUSE),
        ("compared/comparison.json", ("report", "compared")),
    ],
)
@given(data=st.data())
def test_a_damaged_file_is_read_or_one_line(
    data: st.DataObject, file: str, command: tuple[str, ...], world: Path
) -> None:
    fuse_base = ["retrained/base" if part == "base" else part for part in command]
    arguments = fuse_base if command is FUSE else command
    with pytest.MonkeyPatch.context() as patch:
        folder = copied(world, world.with_name("copy"))
        patch.chdir(folder)
        if "--objective" not in arguments and arguments[0] == "adapt":
            arguments = (*arguments, "--objective", "classification")
        (folder / file).write_bytes(data.draw(damaged(folder / file)))
        check_command(folder, arguments, may_change=_report_files)


def _report_files(name: str) -> bool:
    return name.startswith(("compared/report.html", "compared/scores.csv", "compared/figures/"))


@pytest.mark.parametrize("file", ["run.json", "t0/adapter_model.safetensors", "adapt_scores.json"])
@given(data=st.data())
def test_a_damaged_file_of_a_run_is_one_line_when_it_is_resumed(
    data: st.DataObject, file: str, world: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        folder = copied(world, world.with_name("copy"))
        patch.chdir(folder)
        path = folder / "adapters" / file
        if not path.is_file():
            pytest.skip(f"a run writes no {file}")
        path.write_bytes(data.draw(damaged(path)))
        command = ("adapt", "retrained", "--tasks", "rows.jsonl", "--objective", "classification")
        check_command(
            folder,
            (*command, "--out", "adapters", "steps=1", "--resume"),
            may_change=lambda name: name.startswith("adapters/"),
        )


SETTINGS = [
    *("steps", "batch_size", "learning_rate", "schedule", "warmup", "weight_decay", "device"),
    *("max_grad_norm", "token_budget", "tasks_per_wave", "dtype", "seed", "eval_every", "patience"),
    *("lora", "lora.r", "lora.lora_alpha", "lora.target_modules", "lora.exclude_modules"),
    *("lora.layers_to_transform", "lora.rank_pattern", "lora.lora_dropout", "lora.modules_to_save"),
    *("tasks.source", "tasks.task_column", "tasks.test", "tasks.validation", "tasks.min_rows"),
    *("tasks.max_tasks", "tasks.seed", "method", "shots", "x", "", "a.b.c", "lora."),
]


def as_setting(value: Any) -> str:
    """A value as one types it after KEY=."""
    return value if isinstance(value, str) else json.dumps(value)


@given(key=st.sampled_from(SETTINGS), value=st.sampled_from(VALUES))
def test_any_setting_of_adapt_runs_or_is_one_line(key: str, value: Any, world: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        folder = copied(world, world.with_name("copy"))
        patch.chdir(folder)
        arguments = [part for part in ADAPT if not part.startswith(f"{key}=")]
        large = isinstance(value, int | float) and value > 100
        if large and key in ("steps", "batch_size", "eval_every"):  # valid, and takes for ever
            return
        setting = f"{key}={as_setting(value)}"
        check_command(folder, (*arguments, "--objective", "classification", setting))


RECIPE_SETTINGS = [
    *("name", "out", "repeats", "precision", "device", "model", "model.name", "model.file"),
    *("tasks.source", "tasks.unseen", "tasks.validation", "tasks.test", "tasks.seed", "tasks.x"),
    *("objective", "objective.kind", "objective.max_tokens", "retrain", "retrain.methods"),
    *("retrain.learning_rate", "retrain.learning_rates", "retrain.search_tasks", "retrain.warmup"),
    *("retrain.optimizer", "retrain.tasks_per_step", "retrain.schedule", "retrain.token_budget"),
    *("adapt", "adapt.method", "adapt.shots", "adapt.draws", "adapt.lora", "adapt.patience"),
    *("spectrum", "compare", "none", "standard", "peft-ml.lora"),
]


@given(key=st.sampled_from(RECIPE_SETTINGS), value=st.sampled_from(VALUES))
def test_any_setting_of_a_recipe_is_retrained_with_or_is_one_line(
    key: str, value: Any, world: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        folder = copied(world, world.with_name("copy"))
        patch.chdir(folder)
        check_command(folder, (*RETRAIN, f"{key}={as_setting(value)}"))


GENERATE_OPTIONS = ("--seed", "--temperature", "--beams", "--batch-size", "--max-new-tokens")


@given(option=st.sampled_from(GENERATE_OPTIONS), value=st.sampled_from(VALUES))
def test_any_option_of_generate_runs_or_is_one_line(option: str, value: Any, world: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        folder = copied(world, world.with_name("copy"))
        patch.chdir(folder)
        check_command(folder, (*GENERATE, option, as_setting(value)))


OPTIONS = ("--tasks", "--out", "--shots", "--seed", "--objective")


@given(option=st.sampled_from(OPTIONS), value=st.sampled_from([v for v in VALUES if v != "\x00"]))
def test_any_value_of_an_option_runs_or_is_one_line(option: str, value: Any, world: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        folder = copied(world, world.with_name("copy"))
        patch.chdir(folder)
        text = as_setting(value)
        arguments = [*ADAPT, *("--objective", "classification"), option, text]
        if option == "--out" and text in ("/", "..", "../x"):  # outside the folder that is watched
            return
        inside = text.strip("/").split("/")[0]
        check_command(
            folder,
            arguments,
            may_change=lambda name: option == "--out" and name.split("/")[0] == inside,
        )
