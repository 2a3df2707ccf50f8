"""Files of a retraining and of an adaptation carry their format, and a newer one is refused."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import foretune
from foretune import formats
from foretune.adapters.stored_adapter import check_base
from foretune.errors import UserError
from foretune.formats import check_format, unstamped
from foretune.methods import make
from foretune.models.loading import load_base, load_module
from foretune.run import Run
from foretune.training.checkpoint import CheckpointStore
from format_checks import assert_versions, newer
from linear_tasks import Net, family, module_file

RUN = {"steps": 4, "batch_size": 4, "eval_every": 2, "device": "cpu"}
AUTO = {
    "candidates": [{"name": "none"}, {"name": "standard", "learning_rate": 0.03}],
    "rounds": 1,
    "shots": [4],
    "adapt_run": {"steps": 2, "device": "cpu"},
}


def retrain(folder: Path, method: str, **fields: object) -> foretune.Outcome:
    run = Run(**RUN, out=folder, resume=True)
    return foretune.retrain(Net(), family(), make(method, **fields), run)


def test_record_of_a_run(tmp_path):
    retrain(tmp_path, "standard")
    assert_versions(tmp_path / "run.json", formats.RUN, lambda: retrain(tmp_path, "standard"))


def test_record_of_a_run_that_is_not_finished(tmp_path):
    def stop(update, updates, figures):
        if update == 3:
            raise KeyboardInterrupt

    run = Run(**RUN, out=tmp_path / "killed")
    with pytest.raises(KeyboardInterrupt):
        foretune.retrain(Net(), family(), make("standard"), run, progress=stop)
    for file, current in (
        ("run.json", formats.RUN),
        ("checkpoint-2/state.json", formats.CHECKPOINT),
    ):
        copied = tmp_path / f"copy-{current}"
        shutil.copytree(tmp_path / "killed", copied)

        def resume(copied=copied):
            """From a copy of its own, since the checkpoint goes when the run has ended."""
            again = copied.with_name("again")
            shutil.copytree(copied, again, dirs_exist_ok=True)
            try:
                return retrain(again, "standard")
            finally:
                shutil.rmtree(again)

        assert_versions(copied / file, current, resume)


def test_state_of_a_checkpoint_comes_back_without_its_format(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save(3, {"a": torch.ones(2)}, {"history": []})
    assert store.newest()[1] == {"step": 3, "history": []}


def test_trials_of_a_choice(tmp_path):
    retrain(tmp_path, "auto", **AUTO)
    assert_versions(
        tmp_path / "choice.json", formats.CHOICE, lambda: retrain(tmp_path, "auto", **AUTO)
    )


def test_record_of_an_adapter(tmp_path):
    run = Run(**RUN)
    foretune.adapt(Net(), family(), make("lora"), run).save(tmp_path)
    folder = tmp_path / "task0"
    file = folder / "base_fingerprint.json"
    assert_versions(file, formats.ADAPTER, lambda: check_base(folder, Net()))


def test_sparse_change_of_a_newer_version_is_refused(tmp_path):
    foretune.adapt(Net(), family(), make("sara", fraction=0.5), Run(**RUN)).save(tmp_path)
    file = tmp_path / "task0" / "sparse_delta.safetensors"
    with safe_open(file, "pt") as stored:
        metadata = stored.metadata()
    assert metadata["format"] == formats.SPARSE
    save_file(load_file(file), file, {**metadata, "format": newer(formats.SPARSE)})
    with pytest.raises(
        UserError, match=r"written by a newer foretune \(format foretune-sparse-2\)"
    ):
        foretune.load_sparse(Net(), tmp_path / "task0")


def test_a_run_from_before_formats_is_resumed_to_the_same_weights(tmp_path):
    first = retrain(tmp_path, "peft-ml")
    for file in tmp_path.rglob("*.json"):
        record = json.loads(file.read_text())
        if isinstance(record, dict):
            file.write_text(json.dumps({k: v for k, v in record.items() if k != "format"}))
    again = retrain(tmp_path, "peft-ml")
    assert again.history == first.history
    pairs = zip(first.model.parameters(), again.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_base_from_when_heads_were_a_field_of_its_method_is_loaded(tmp_path):
    model = load_module(module_file(tmp_path), hidden=6)
    method = foretune.PEFTML(learning_rate=0.03)
    run = Run(**RUN)
    foretune.retrain(model, family(), method, run.replace(out=tmp_path / "out"))
    file = tmp_path / "out" / "base" / "foretune.json"
    record = json.loads(file.read_text())
    for name in ("peft-ml", "standard"):
        record["method"] = {"name": name, "heads": "per-task"}
        file.write_text(json.dumps(record))
        foretune.adapt(load_base(file.parent)[0], family(), foretune.Head(), run)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"format": "foretune-other-1"}, "its format is 'foretune-other-1'"),
        ({"format": "foretune-run-0"}, "its format is 'foretune-run-0'"),
        ({"format": True}, "its format is True"),
        ({"format": None}, "its format is None"),
        ({"format": 2}, r"newer foretune \(format foretune-run-2\)"),
        ([], "it holds no mapping"),
    ],
)
def test_what_is_no_record_is_refused(record, message):
    with pytest.raises(UserError, match=message):
        check_format(Path("run.json"), record, formats.RUN)


@pytest.mark.parametrize("record", [{}, {"format": 1}, {"format": formats.RUN}])
def test_the_first_version_is_read_however_it_is_written(record):
    given = copy.deepcopy(record)
    assert unstamped(Path("run.json"), record, formats.RUN) == {}
    assert record == given


def test_an_earlier_version_is_read():
    check_format(Path("run.json"), {"format": "foretune-run-1"}, "foretune-run-3")
