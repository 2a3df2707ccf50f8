"""`foretune forecast` as a user types it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import foretune.forecasting
from command_line import call, the_error, the_json
from forecasting.tiny_scenes import scene_tasks
from foretune.forecasting import folders, model
from foretune.forecasting.junctions import junctions
from foretune.forecasting.pretraining import SceneReconstruction
from foretune.forecasting.scenes import save_scenes
from foretune.tasks.task import Task, TaskCollection
from format_checks import assert_versions_by_command
from fuzzing import check_command, copied, damaged

SIZES = "width=16 encoder_depth=1 decoder_depth=1 num_heads=2 history_steps=10 future_steps=12"
TINY = [*SIZES.split(), "lane_points=10", "steps=2", "batch_size=4"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    save_scenes(folder / "s.npz", scene_tasks(6))
    scenes = ("--scenes", folder / "s.npz")
    assert call("forecast", "pretrain", *TINY, *scenes, "--out", folder / "base").exit_code == 0
    for method, changes in (
        ("forecast-peft", ("modes=3", "prompts=2", "adapter_rank=2")),
        ("full", ()),
    ):
        out = ("--out", folder / method, "--method", method)
        result = call("forecast", "adapt", folder / "base", "steps=2", *changes, *scenes, *out)
        assert result.exit_code == 0, result.output
        assert "minFDE (m)" in result.stdout and "trained parameters per task" in result.stdout
    return folder


@pytest.mark.parametrize(("method", "modes"), [("forecast-peft", 3), ("full", 6)])
def test_an_adapted_folder_is_measured_beside_constant_velocity(world, tmp_path, method, modes):
    page = tmp_path / "page.html"
    rows = the_json(
        *("forecast", "eval", world / method, "--scenes", world / "s.npz", "--out", page),
        *("--pictures", "1"),
    )["rows"]
    assert [(r["model"], r["task"], r["scenes"]) for r in rows] == [
        (m, t, 2) for t in ("one", "two") for m in (method, "constant velocity")
    ]
    assert all(f"minFDE{modes}" in row and f"MR{modes}" in row for row in rows)
    assert page.read_text().count("<svg") == 2
    assert "exists: use --overwrite to replace it" in the_error(
        "forecast", "eval", world / method, "--scenes", world / "s.npz", "--out", page
    )


@pytest.mark.parametrize(
    ("file", "current"),
    [
        ("forecast-peft/forecasts.json", folders.FORMAT),
        ("forecast-peft/one/forecast_peft.json", foretune.forecasting.FORMAT),
        ("base/config.json", model.FORMAT),
    ],
)
def test_folders_of_a_newer_version_are_refused(world, file, current):
    command = ("forecast", "eval", world / "forecast-peft", "--scenes", world / "s.npz")
    assert_versions_by_command(world / file, current, *command)


@pytest.mark.parametrize("method", ["forecast-peft", "full"])
def test_adapting_twice_with_one_seed_gives_the_same_bits(world, tmp_path, method):
    weights = []
    for out in (tmp_path / "one", tmp_path / "two"):
        options = ("--scenes", world / "s.npz", "--method", method, "--out", out)
        assert call("forecast", "adapt", world / "base", "steps=1", *options).exit_code == 0
        weights.append([f.read_bytes() for f in sorted(out.rglob("*.safetensors"))])
    assert weights[0] == weights[1] and weights[0]


def test_eval_prints_a_table(world):
    result = call("forecast", "eval", world / "forecast-peft", "--scenes", world / "s.npz")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[0].split()[:3] == ["model", "task", "scenes"]


def test_a_folder_of_one_task_that_is_a_model_is_measured_on_all(world):
    rows = the_json("forecast", "eval", world / "full" / "one", "--scenes", world / "s.npz")["rows"]
    assert {row["task"] for row in rows} == {"one", "two"}


def test_a_base_that_moved_is_found_by_its_option(world, tmp_path):
    shutil.copytree(world / "forecast-peft", tmp_path / "a")
    summary = tmp_path / "a" / "forecasts.json"
    adaptation = json.loads(summary.read_text())
    summary.write_text(json.dumps({**adaptation, "base": str(tmp_path / "gone")}))
    command = ("forecast", "eval", tmp_path / "a", "--scenes", world / "s.npz")
    assert "pass its folder by --base" in the_error(*command)
    assert the_json(*command, "--base", world / "base")["rows"]


def test_a_folder_that_is_not_empty_is_only_replaced_by_overwrite(world, tmp_path):
    scenes = ("--scenes", world / "s.npz")
    before = (world / "base" / "model.safetensors").read_bytes()
    for args in (
        ("pretrain", *TINY, *scenes, "--out", world / "base"),
        ("adapt", world / "base", *scenes, "--out", world / "forecast-peft"),
    ):
        assert "is not empty: use --overwrite to replace it" in the_error("forecast", *args)
    assert (world / "base" / "model.safetensors").read_bytes() == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    message = the_error(
        "forecast", "pretrain", *TINY, *scenes, "--out", tmp_path / "mine", "--overwrite"
    )
    assert "files that foretune did not write" in message
    shutil.copytree(world / "base", tmp_path / "old")
    again = ("pretrain", *TINY, "warmup=0.2", *scenes, "--out", tmp_path / "old")
    assert the_json("forecast", *again, "--overwrite")["tasks"] == 2
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ("pretrain", "wdth=16"),
            'no setting "wdth"; the model has width, .* Did you mean "width"?',
        ),
        (("pretrain", "width=20"), "width must be a multiple of 8"),
        (("pretrain", "steps"), '"steps" must read KEY=VALUE'),
        (("pretrain", "steps=0"), "steps must be a whole number not below 1"),
        (("pretrain", "learning_rate=0"), "learning_rate must be a number above 0"),
        (("adapt", "BASE", "prompts=0"), "prompts must be a whole number"),
        (("adapt", "BASE", "--method", "lora"), "one of forecast-peft, full; got 'lora'"),
        (("adapt", "BASE", "rank=4"), 'no setting "rank"; forecast-peft has modes'),
        (("adapt", "NONE"), "no such file or folder"),
        (("adapt", "."), "holds no Forecast-MAE"),
        (("eval", "BASE"), "only pretrained and cannot forecast yet"),
        (("eval", "BASE", "--split", "dev"), "--split must be one of"),
        (("eval", "NONE"), "no such file or folder"),
        (("eval", "."), "holds no Forecast-MAE"),
    ],
)
def test_mistakes_are_one_line(world, tmp_path, args, message):
    import re

    paths = {"BASE": world / "base", "NONE": tmp_path / "x"}
    out = ("--out", tmp_path / "out") if args[0] != "eval" else ()
    error = the_error(
        "forecast", *(paths.get(a, a) for a in args), "--scenes", world / "s.npz", *out
    )
    assert re.search(message, error), error
    assert not (tmp_path / "out").exists()


def test_sizes_larger_than_any_memory_are_compared_with_the_weights_first(world, tmp_path):
    folder = shutil.copytree(world / "base", tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    config["sizes"]["width"] = 2**17
    (folder / "config.json").write_text(json.dumps(config))
    error = the_error(
        *("forecast", "adapt", folder, "--scenes", world / "s.npz", "--out", tmp_path / "out")
    )
    assert "does not fit the files beside it" in error


def test_scenes_that_do_not_fit_the_model_are_named(world, tmp_path):
    settings = [t for t in TINY if not t.startswith("future")]
    message = the_error(
        "forecast",
        "pretrain",
        *settings,
        "future_steps=5",
        "--scenes",
        world / "s.npz",
        "--out",
        tmp_path / "o",
    )
    assert 'task "one", train scene 1: agents must have the shape (agents, 15, 2)' in message
    message = the_error(
        "forecast",
        "adapt",
        world / "base",
        "--scenes",
        tmp_path / "no.npz",
        "--out",
        tmp_path / "o",
    )
    assert "no such file or folder" in message
    assert not (tmp_path / "o").exists()


def test_help_and_mistakes_do_not_import_torch():
    for args in (
        ["forecast", "--help"],
        ["forecast", "pretrain", "width=20", "--scenes", "x"],
        ["forecast", "pretrain", "--scenes", "x"],
        ["forecast", "adapt", "nope", "--scenes", "x"],
        ["forecast", "eval", "nope", "--scenes", "x"],
    ):
        code = (
            "import sys; from foretune.cli import app\n"
            f"try: app({args!r})\nexcept SystemExit: pass\n"
            "print([m for m in ('torch', 'numpy', 'peft') if m in sys.modules])"
        )
        process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert process.stdout.splitlines()[-1] == "[]", process


@pytest.mark.parametrize(
    "file",
    [
        *("base/config.json", "base/model.safetensors", "s.npz", "forecast-peft/forecasts.json"),
        *("forecast-peft/one/forecast_peft.json", "forecast-peft/one/forecast_peft.safetensors"),
    ],
)
@given(data=st.data())
def test_a_damaged_file_is_read_or_one_line(data: st.DataObject, file: str, world: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        folder = copied(world, world.with_name("copy"))
        patch.chdir(folder)
        (folder / file).write_bytes(data.draw(damaged(folder / file)))
        command = ("forecast", "eval", "forecast-peft", "--scenes", "s.npz", "--base", "base")
        check_command(folder, command)


@pytest.mark.parametrize(
    ("changes", "scored_each_time"),
    [
        (["steps=3", "batch_size=10"], 3),  # validated after each step, of 10 scenes
        (["steps=4", "batch_size=10", "eval_every=2"], 6),
        (["steps=3", "batch_size=10", "eval_rows=9"], 9),  # as asked for
        (["steps=3", "batch_size=1"], 1),
    ],
)
def test_validating_takes_at_most_a_tenth_of_pretraining(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: list[str], scored_each_time: int
) -> None:
    scenes = junctions(24, 0)
    one = Task("one", scenes[:12], scenes[12:], ())
    save_scenes(tmp_path / "s.npz", TaskCollection((one,)))
    read: dict[str, list[int]] = {"trained": [], "scored": []}

    def counting(name: str, of: str) -> None:
        real = getattr(SceneReconstruction, name)

        def counted(self: SceneReconstruction, model: Any, batch: Any) -> Any:
            if torch.is_grad_enabled() == (of == "trained"):
                read[of].append(len(batch.slots))
            return real(self, model, batch)

        monkeypatch.setattr(SceneReconstruction, name, counted)

    counting("losses", "trained")
    counting("scores", "scored")
    command = ["forecast", "pretrain", *SIZES.split(), "lane_points=10", *changes]
    result = the_json(*command, "--scenes", tmp_path / "s.npz", "--out", tmp_path / "base")
    assert set(read["scored"]) == {scored_each_time}
    assert result["validation_loss"] is not None
    if scored_each_time not in (1, 9):
        assert sum(read["scored"]) / 3 <= 0.1 * sum(read["trained"])


def test_pretraining_reads_few_scenes_at_once() -> None:
    assert folders.pretrain_settings([], 0).run.token_budget == folders.TOKENS_AT_ONCE
    assert folders.pretrain_settings(["token_budget=null"], 0).run.token_budget is None
    assert folders.pretrain_settings([], 0).run.eval_rows == 32
