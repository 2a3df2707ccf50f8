"""Killed and resumed equals never killed; nothing is left half written; nothing is overwritten."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

import foretune
import tiny_models
from foretune.claims import claim_file
from foretune.errors import ForetuneError, UserError
from foretune.files import same_on_disk
from foretune.run import Run
from foretune.training import checkpoint, outcome
from linear_tasks import Net, copy_of, equal_bits, family

LORA = {"r": 2, "lora_dropout": 0.2}
METHODS = {
    "peft-ml": foretune.PEFTML(learning_rate=0.05, adapter_learning_rate=0.05, lora=LORA),
    "standard": foretune.Standard(learning_rate=0.05),
    "peft-ml-last-layer": foretune.PEFTML(
        learning_rate=0.05, adapter_learning_rate=0.05, form="last-layer"
    ),
    "peft-ml-sparse": foretune.PEFTML(
        learning_rate=0.05, adapter_learning_rate=0.05, form="sparse", restart_every=4
    ),
    "reptile": foretune.Reptile(learning_rate=0.05, inner_learning_rate=0.05, inner_steps=2),
    "reptile-adapter": foretune.Reptile(
        learning_rate=0.05, inner_learning_rate=0.05, inner_steps=2, inner="adapter", lora=LORA
    ),
}
MOMENTS = (
    "before-any-checkpoint", "between-checkpoints", "at-the-last-update", "in-the-first-write",
    "in-the-third-write", "before-the-rename", "in-a-removal", "in-the-base", "in-the-record",
    "in-the-clearing",
)  # fmt: skip


class Stop(Exception):  # noqa: N818
    pass


def _run(out=None, **changes) -> Run:
    fixed = {"steps": 12, "eval_every": 2, "batch_size": 4, "device": "cpu", "seed": 1}
    return Run(**{**fixed, "out": out, **changes})


def _retrain(name="peft-ml", out=None, *, stop_at=None, **changes):
    def progress(update, updates, figures):
        if update == stop_at:
            raise Stop

    run = _run(out, **changes)
    return foretune.retrain(Net(), family(), METHODS[name], run, progress=progress)


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {".foretune"}


def _checkpoints(folder: Path) -> list[str]:
    return sorted(name for name in _names(folder) if name.startswith("checkpoint-"))


@pytest.mark.parametrize("stop_at", [1, 3, 6])
@pytest.mark.parametrize("name", METHODS)
def test_stopped_and_resumed_equals_undisturbed(name, stop_at, tmp_path):
    undisturbed = _retrain(name)
    with pytest.raises(Stop):
        _retrain(name, tmp_path / "out", stop_at=stop_at)
    resumed = _retrain(name, tmp_path / "out", resume=True)
    assert equal_bits(resumed.model.state_dict(), undisturbed.model.state_dict())
    if undisturbed.bank is not None:
        assert equal_bits(resumed.bank.state_dict(), undisturbed.bank.state_dict())
    assert resumed.history == undisturbed.history
    assert resumed.validation_score == undisturbed.validation_score
    assert resumed.cost["examples"] == undisturbed.cost["examples"]
    assert resumed.cost["tokens"] == undisturbed.cost["tokens"]


def test_resumed_over_and_over_equals_undisturbed(tmp_path):
    for stop_at in (2, 3, 5, 8, 11):
        with pytest.raises(Stop):
            _retrain(out=tmp_path, resume=True, stop_at=stop_at)
    resumed, undisturbed = _retrain(out=tmp_path, resume=True), _retrain()
    assert equal_bits(resumed.model.state_dict(), undisturbed.model.state_dict())


def test_best_checkpoint_survives_a_resume(tmp_path):
    """The best state may lie before the moment of the kill; it must still be what is returned."""
    wild = {"schedule": "constant", "warmup": 0.0, "steps": 30, "seed": 0}
    method = foretune.Standard(learning_rate=0.8)

    def go(stop_at=None, **changes):
        def progress(update, updates, figures):
            if update == stop_at:
                raise Stop

        run = _run(**wild, **changes)
        return foretune.retrain(Net(), family(), method, run, progress=progress)

    undisturbed = go()
    best = max(undisturbed.history, key=lambda entry: entry["score"])["step"]
    assert best < 24
    with pytest.raises(Stop):
        go(stop_at=27, out=tmp_path)
    assert f"checkpoint-{best}" in _checkpoints(tmp_path)
    assert len(_checkpoints(tmp_path)) == 2
    resumed = go(out=tmp_path, resume=True)
    assert equal_bits(resumed.model.state_dict(), undisturbed.model.state_dict())


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The runs of killed_run.py: about twenty seconds, half of it imports."""
    folder = tmp_path_factory.mktemp("killed")
    driver = Path(__file__).with_name("killed_run.py")
    done = subprocess.run(
        [sys.executable, str(driver), str(folder)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_sigkill_and_resume_equals_undisturbed(killed, moment):
    folder, report, stderr = killed
    assert set(report) == {"undisturbed", *MOMENTS}
    assert report["undisturbed"]["ok"] and report[moment]["killed"]
    assert report[moment]["ok"], stderr
    files = [folder / f"{name}.safetensors" for name in (moment, "undisturbed")]
    assert equal_bits(*map(load_file, files))
    abouts = []
    for file in files:
        with safe_open(file, "pt") as opened:
            abouts.append(opened.metadata()["about"])
    assert abouts[0] == abouts[1]
    finished = {".foretune", "base", "adapters", "metrics.jsonl", "README.md", "run.json"}
    assert set(report[moment]["after"]) == finished


@pytest.mark.slow
def test_the_kills_came_when_they_were_meant_to(killed):
    _, report, _ = killed
    assert "checkpoint-2" not in report["in-the-first-write"]["left"]
    assert ".unfinished-checkpoint-2" in report["in-the-first-write"]["left"]
    assert {".unfinished-checkpoint-6", "checkpoint-4"} <= set(report["in-the-third-write"]["left"])
    assert {".unfinished-checkpoint-4", "checkpoint-2"} <= set(report["before-the-rename"]["left"])
    assert {"checkpoint-4", "checkpoint-6"} <= set(report["in-a-removal"]["left"])
    assert ".unfinished-base" in report["in-the-base"]["left"]
    assert ".unfinished-metrics.jsonl" in report["in-the-record"]["left"]
    assert {"base", "checkpoint-12"} <= set(report["in-the-clearing"]["left"])


# --- a finished run ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_resuming_a_finished_run_reads_it_back(name, tmp_path):
    first = _retrain(name, tmp_path)
    again = _retrain(name, tmp_path, resume=True, stop_at=1)  # a single update would stop it
    assert equal_bits(again.model.state_dict(), first.model.state_dict())
    if first.bank is not None:
        assert equal_bits(again.bank.state_dict(), first.bank.state_dict())
    assert again.history == first.history
    assert again.validation_score == first.validation_score
    assert again.cost == first.cost
    assert not again.model.training


def test_no_retraining_is_resumed_too(tmp_path):
    first = foretune.retrain(Net(), family(), foretune.NoRetraining(), _run(tmp_path))
    again = foretune.retrain(Net(), family(), foretune.NoRetraining(), _run(tmp_path, resume=True))
    assert again.validation_score == first.validation_score
    assert equal_bits(again.model.state_dict(), first.model.state_dict())


@pytest.mark.parametrize("finished", [False, True])
def test_resuming_another_run_is_refused(finished, tmp_path):
    with pytest.raises(Stop):
        _retrain(out=tmp_path, stop_at=5)
    if finished:
        _retrain(out=tmp_path, resume=True)
    with pytest.raises(UserError, match="was started with steps=12, this run has steps=20"):
        _retrain(out=tmp_path, resume=True, steps=20)
    with pytest.raises(
        UserError, match="was started with name=peft-ml, this run has name=standard"
    ):
        _retrain("standard", tmp_path, resume=True)
    with pytest.raises(UserError, match=r"was started with tasks=\['task0', .*'task1'\]: resume"):
        tasks = family().subset(["task0", "task1"])
        foretune.retrain(Net(), tasks, METHODS["peft-ml"], _run(tmp_path, resume=True))

    for inputs, message in _other_inputs():
        with pytest.raises(UserError, match=message):
            foretune.retrain(*inputs, METHODS["peft-ml"], _run(tmp_path, resume=True))


def _other_inputs():
    """(model, tasks) that differ from what `_retrain` takes in one respect, and what is said."""
    tasks = family()
    shifted = foretune.Task("task1", _shifted(tasks["task1"].train), *_rest(tasks["task1"]))
    swapped = foretune.Task("task2", tasks["task2"].train[::-1], *_rest(tasks["task2"]))
    for task in (shifted, swapped):
        several = tuple(task if old.name == task.name else old for old in tasks)
        message = f'was started with other rows of task "{task.name}": resume'
        yield (Net(), foretune.TaskCollection(several, tasks.objective)), message
    yield (Net(seed=1), tasks), "was started with another model: resume"
    buffered = Net()
    buffered.register_buffer("mean", torch.ones(1))
    yield (buffered, tasks), "was started with another model: resume"


def _shifted(rows):
    """The same rows with the targets of their neighbours."""
    ys = [row["y"] for row in rows]
    return [{**row, "y": y} for row, y in zip(rows, ys[1:] + ys[:1], strict=True)]


def _rest(task):
    return task.validation, task.test


# --- adapt ---------------------------------------------------------------------------------------


def _adapt(
    out, *, model=None, stop_at=None, method=None, names=("task0", "task1", "task2"), **more
):
    calls = []

    def progress(update, updates, figures):
        calls.append(update)
        if len(calls) == stop_at:
            raise Stop

    run = Run(steps=3, batch_size=4, device="cpu", out=out, tasks_per_wave=1, **more)
    adapted = foretune.adapt(
        model or Net(),
        family().subset(names),
        method or foretune.LoRA(lora={"r": 2}),
        run,
        shots=4,
        draws=2,
        progress=progress,
    )
    return adapted, len(calls)


@pytest.mark.parametrize("method", [foretune.LoRA(lora={"r": 2}), foretune.Full()])
def test_adapting_is_resumed_wave_by_wave(method, tmp_path):
    undisturbed, _ = _adapt(tmp_path / "whole", method=method)
    with pytest.raises(Stop):
        _adapt(tmp_path / "out", method=method, stop_at=8)
    resumed, updates = _adapt(tmp_path / "out", method=method, resume=True)
    assert updates == 6 * 3 - 2 * 3  # two waves of three updates were done
    assert resumed.scores == undisturbed.scores
    assert resumed.num_rows == undisturbed.num_rows
    for file in (tmp_path / "whole").rglob("*.safetensors"):
        twin = tmp_path / "out" / file.relative_to(tmp_path / "whole")
        assert twin.read_bytes() == file.read_bytes()


def test_scores_of_another_base_are_not_taken_over(tmp_path):
    _adapt(tmp_path)
    with pytest.raises(UserError, match="was started with another model"):
        _adapt(tmp_path, model=Net(seed=1), resume=True)


def test_a_resumed_subset_tells_its_own_tasks_alone(tmp_path):
    _adapt(tmp_path)
    adapted, updates = _adapt(tmp_path, names=["task1"], resume=True)
    assert updates == 0
    assert set(adapted.scores) == {("task1", 0), ("task1", 1)}


def test_classes_of_tasks_that_are_added_are_no_other_objective(tmp_path):
    rows = [{"x": [float(i), 1.0, 0.0, 0.0], "y": i % 3} for i in range(12)]
    tasks = foretune.TaskCollection(
        tuple(foretune.Task(name, rows, (), rows) for name in "ab"), foretune.Classification()
    )
    run = Run(steps=2, batch_size=4, device="cpu", out=tmp_path)
    for names, resume in (("a", False), ("ab", True), ("a", True)):
        adapted = foretune.adapt(
            Net(), tasks.subset(names), foretune.Head(), run.replace(resume=resume), shots=2
        )
        assert {task for task, _ in adapted.scores} == set(names)


def test_a_head_that_is_replaced_anyway_is_no_other_model(tmp_path):
    def model(seed):
        torch.manual_seed(seed)
        net = torch.nn.Sequential(base, torch.nn.Linear(4, 7))
        net.head_modules = ["1"]
        return net

    rows = [{"x": [float(i), 1.0, 0.0, 0.0], "y": i % 3} for i in range(12)]
    tasks = foretune.TaskCollection((foretune.Task("a", rows, rows),), foretune.Classification())
    base = torch.nn.Linear(4, 4)
    method = METHODS["standard"]
    foretune.retrain(model(0), tasks, method, _run(tmp_path))
    foretune.retrain(model(1), tasks, method, _run(tmp_path, resume=True))


def test_scores_of_other_rows_are_not_taken_over(tmp_path):
    """Nor those of a task that was added when the run was resumed before."""
    _adapt(tmp_path, names=["task0"])
    _adapt(tmp_path, names=["task1"], resume=True)
    tasks = family()
    shifted = foretune.Task("task1", _shifted(tasks["task1"].train), *_rest(tasks["task1"]))
    run = Run(steps=3, batch_size=4, device="cpu", out=tmp_path, tasks_per_wave=1, resume=True)
    with pytest.raises(UserError, match='started with other rows of task "task1"'):
        foretune.adapt(
            Net(),
            foretune.TaskCollection((shifted,), tasks.objective),
            foretune.LoRA(lora={"r": 2}),
            run,
            shots=4,
            draws=2,
        )


def test_a_number_sign_in_a_task_name_is_no_draw(tmp_path):
    row = family().tasks[0].train[:4]
    tasks = foretune.TaskCollection(
        (foretune.Task("C#1", row, (), row), foretune.Task("C", row, (), row)), family().objective
    )
    run = Run(steps=2, device="cpu", out=tmp_path)
    for resume in (False, True):
        adapted = foretune.adapt(Net(), tasks, foretune.LoRA(), run.replace(resume=resume))
        assert set(adapted.scores) == {("C#1", 0), ("C", 0)}


def _two_words(names, words=("red", "blue"), test=True):
    """Tasks that tell words apart, with or without test examples."""
    rows = [{"text": f"the {word}", "label": word} for word in words] * 4
    tasks = tuple(foretune.Task(name, rows, (), rows if test else ()) for name in names)
    return foretune.TaskCollection(tasks, foretune.Classification(tiny_models.tokenizer()))


def _adapt_bert(out, tasks, *, model=None, stop_at=None, method=None, **more):
    updates = []

    def progress(*_):
        updates.append(1)
        if len(updates) == stop_at:
            raise Stop

    run = Run(steps=2, batch_size=4, device="cpu", out=out, tasks_per_wave=1, **more)
    model = model or tiny_models.bert(num_labels=2, num_hidden_layers=1)
    adapted = foretune.adapt(model, tasks, method or foretune.LoRA(), run, progress=progress)
    return adapted, len(updates)


@pytest.mark.parametrize("method", [foretune.LoRA(), foretune.Head(), foretune.Full()])
def test_tasks_with_more_labels_are_added_to_a_finished_folder(method, tmp_path):
    """The adapters that are there stay as they are; the new ones are as if alone."""
    narrow, wide = _two_words("ab"), _two_words(["c"], ("red", "blue", "green"))
    _adapt_bert(tmp_path / "out", narrow, method=method)
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*.safetensors")}
    all_tasks = foretune.TaskCollection((*narrow, *wide), narrow.objective)
    for added in (wide, all_tasks, narrow):
        adapted, updates = _adapt_bert(tmp_path / "out", added, method=method, resume=True)
        assert updates == (2 if added is wide else 0)
        assert {task for task, _ in adapted.scores} == set(added.names)
    assert {p: p.read_bytes() for p in before} == before
    labels = json.loads((tmp_path / "out" / "c" / "labels.json").read_text())
    assert labels == ["blue", "green", "red"]
    _adapt_bert(tmp_path / "alone", wide, method=method)
    (file,) = (tmp_path / "out" / "c").glob("*.safetensors")
    assert file.read_bytes() == (tmp_path / "alone" / "c" / file.name).read_bytes()


def test_finished_tasks_without_test_examples_are_not_trained_again(tmp_path):
    tasks = _two_words("ab", test=False)
    with pytest.raises(Stop):
        _adapt_bert(tmp_path, tasks, stop_at=3)
    assert _adapt_bert(tmp_path, tasks, resume=True)[1] == 2
    adapted, updates = _adapt_bert(tmp_path, tasks, resume=True)
    assert updates == 0 and adapted.scores == {} and (tmp_path / "b").is_dir()


def test_an_adapter_that_is_gone_is_trained_again(tmp_path):
    _adapt_bert(tmp_path, _two_words("ab"))
    before = (tmp_path / "b" / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "b")
    assert _adapt_bert(tmp_path, _two_words("ab"), resume=True)[1] == 2
    assert (tmp_path / "b" / "adapter_model.safetensors").read_bytes() == before


NAMES = (
    *("red", "Red", "RED", "red-draw1", "a/b", "a_b-6d959c", "base", "run.json", "scores.json"),
    *(".foretune", "..", ".", "CON", "nul.txt", "x.", "x ", "x", " ", "caf\u00e9", "cafe\u0301"),
    *("y" * 300, "y" * 299 + "z", "checkpoint-3", ".unfinished-red", "a\tb", "a\nb", "-", "\ud55c"),
)


def test_no_two_tasks_share_a_folder_and_each_is_found_again(tmp_path):
    rows = family().tasks[0].train[:4]
    tasks = foretune.TaskCollection(
        tuple(foretune.Task(name, rows) for name in NAMES), family().objective
    )
    run = Run(steps=1, device="cpu", out=tmp_path / "adapted")
    foretune.adapt(Net(), tasks, foretune.LoRA(), run, draws=2, shots=2)
    entries = json.loads((tmp_path / "adapted" / "scores.json").read_text())
    folders = {(entry["task"], entry["draw"]): entry["folder"] for entry in entries}
    assert set(folders) == {(name, draw) for name in NAMES for draw in (0, 1)}
    assert len({same_on_disk(name) for name in folders.values()}) == 2 * len(NAMES)
    assert {path.name for path in (tmp_path / "adapted").iterdir() if path.is_dir()} == {
        *folders.values()
    }
    assert folders["red", 0] == "red" and folders["x", 1] == "x-draw1"

    outcome = foretune.retrain(Net(), tasks, METHODS["peft-ml"], _run(tmp_path / "out", steps=2))
    again = foretune.retrain(
        Net(), tasks, METHODS["peft-ml"], _run(tmp_path / "out", steps=2, resume=True)
    )
    assert equal_bits(again.bank.state_dict(), outcome.bank.state_dict())


def test_a_task_that_is_added_takes_no_folder_of_another(tmp_path):
    rows = family().tasks[0].train[:4]

    def adapt(*names, **options):
        tasks = tuple(foretune.Task(name, rows) for name in names)
        collection = foretune.TaskCollection(tasks, family().objective)
        run = Run(steps=1, device="cpu", out=tmp_path, **options)
        return foretune.adapt(Net(), collection, foretune.LoRA(), run).folders

    assert adapt("red") == {("red", 0): "red"}
    folders = adapt("Red", "red", resume=True)
    assert folders["red", 0] == "red" and folders["Red", 0].startswith("Red-")
    assert adapt("Red", resume=True)["Red", 0] == folders["Red", 0]


# --- what must be the same -----------------------------------------------------------------------


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("verb", ["retrain", "adapt"])
def test_another_tokenizer_or_config_is_refused(verb, finished, tmp_path):
    def go(tokenizer=None, stop=False, resume=True, **config):
        updates = []

        def progress(*_):
            updates.append(1)
            if stop and len(updates) == (6 if verb == "adapt" else 3):
                raise Stop

        model = tiny_models.bert(num_labels=2, num_hidden_layers=1, **config)
        objective = foretune.Classification(tokenizer or tiny_models.tokenizer())
        tasks = _two_words("ab").with_objective(objective)
        method = foretune.LoRA() if verb == "adapt" else METHODS["standard"]
        call = foretune.adapt if verb == "adapt" else foretune.retrain
        run = _run(tmp_path, steps=4, resume=resume, tasks_per_wave=1)
        call(model, tasks, method, run, progress=progress)

    with contextlib.nullcontext() if finished else pytest.raises(Stop):
        go(resume=False, stop=not finished)
    other = tiny_models.tokenizer(special=False)
    with pytest.raises(UserError, match="was started with another tokenizer"):
        go(other)
    with pytest.raises(UserError, match=r"was started with hidden_act=gelu, this run has .*relu"):
        go(hidden_act="relu")
    with pytest.raises(UserError, match="was started with layer_norm_eps=1e-12"):
        go(layer_norm_eps=1e-5)
    go()


def test_other_settings_of_a_module_of_ones_own_are_refused(tmp_path):
    def net(eps=1e-5, activation=torch.relu):
        model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3, eps=eps))
        model.activation, model.head_modules = activation, ["0"]
        return model

    torch.manual_seed(0)
    base = net()

    def go(model, **more):
        model.load_state_dict(base.state_dict())
        foretune.retrain(model, family(), METHODS["standard"], _run(tmp_path, steps=2, **more))

    go(net())
    for other in (net(eps=1e-3), net(activation=torch.tanh)):
        with pytest.raises(UserError, match="was started with modules="):
            go(other, resume=True)
    go(net(), resume=True)


def test_a_finished_base_with_other_weights_is_refused(tmp_path):
    _retrain(out=tmp_path)
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    tensors["body.weight"][0, 0] += 1
    save_file(tensors, file)
    with pytest.raises(UserError, match=r"the weights in .*base are not those that were retrained"):
        _retrain(out=tmp_path, resume=True)


# --- folders -------------------------------------------------------------------------------------


def test_a_folder_that_is_not_empty_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"is not empty: use --resume to continue"):
        _retrain(out=tmp_path)
    with pytest.raises(UserError, match=r"holds files that foretune did not write.*thesis.txt"):
        _retrain(out=tmp_path, overwrite=True)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_project_with_names_of_ours_is_not_overwritten(tmp_path):
    for name in ("config.yaml", "run.json", "thesis.txt"):
        (tmp_path / name).write_text("mine")
    (tmp_path / "adapters").mkdir()
    with pytest.raises(UserError, match="holds files that foretune did not write"):
        _retrain(out=tmp_path, overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {
        *("config.yaml", "run.json", "thesis.txt", "adapters")
    }


def test_the_current_folder_is_not_overwritten(tmp_path, monkeypatch):
    _retrain(out=tmp_path / "out")
    monkeypatch.chdir(tmp_path / "out" / "base")
    for out in (tmp_path / "out", Path("..")):
        with pytest.raises(UserError, match="holds the current folder"):
            _retrain(out=out, overwrite=True)
    assert (tmp_path / "out" / "run.json").is_file()


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match="is a file; --out needs a folder"):
        _retrain(out=tmp_path / "out")


def test_a_file_is_written_over_only_with_overwrite(tmp_path):
    report = tmp_path / "report.html"
    claim_file(report, overwrite=False)
    assert not report.exists()
    report.write_text("my own")
    with pytest.raises(UserError, match=r"report.html was not made by foretune"):
        claim_file(report, overwrite=True)
    report.write_text("old, by foretune")
    with pytest.raises(UserError, match=r"report.html exists: use --overwrite to replace it"):
        claim_file(report, overwrite=False)
    claim_file(report, overwrite=True)
    assert report.read_text() == "old, by foretune"
    with pytest.raises(UserError, match="is a folder; name a file"):
        claim_file(tmp_path, overwrite=True)


@pytest.mark.parametrize("stop_at", [1, 5])
def test_overwrite_replaces_what_a_killed_run_left(stop_at, tmp_path):
    with pytest.raises(Stop):
        _retrain(out=tmp_path, stop_at=stop_at)
    (tmp_path / ".unfinished-checkpoint-8").mkdir()
    result = _retrain("standard", tmp_path, overwrite=True)
    assert result.method.name == "standard"
    assert json.loads((tmp_path / "run.json").read_text())["method"]["name"] == "standard"
    assert not any(name.startswith((".unfinished", "checkpoint")) for name in _names(tmp_path))


def test_overwrite_replaces_a_run_of_adapt(tmp_path):
    with pytest.raises(Stop):
        _adapt(tmp_path, stop_at=4)
    _adapt(tmp_path, overwrite=True)
    assert "scores.json" in _names(tmp_path)


# --- damage --------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["state.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_told(file, tmp_path):
    with pytest.raises(Stop):
        _retrain(out=tmp_path, stop_at=5)
    damaged = tmp_path / "checkpoint-4" / file
    damaged.write_bytes(damaged.read_bytes()[:40])
    with pytest.raises(UserError, match="checkpoint-4 is not a readable checkpoint") as error:
        _retrain(out=tmp_path, resume=True)
    assert "\n" not in str(error.value)


def test_a_damaged_record_is_told(tmp_path):
    with pytest.raises(Stop):
        _retrain(out=tmp_path, stop_at=5)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(UserError, match=r"run\.json is not JSON"):
        _retrain(out=tmp_path, resume=True)


FULL = [
    OSError(errno.ENOSPC, "No space left on device"),
    SafetensorError('Error while serializing: IoError(Os { message: "No space left on device" })'),
    RuntimeError("I/O error: No space left on device (os error 28)"),
]


@pytest.mark.parametrize("error", FULL, ids=lambda e: type(e).__name__)
def test_a_full_disk_is_told_and_the_last_checkpoint_stays(error, tmp_path, monkeypatch):
    write, calls = checkpoint.save_file, []

    def save(tensors, path):
        calls.append(path)
        if len(calls) == 3:
            path.write_bytes(b"half")
            raise error
        write(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", save)
    with pytest.raises(
        ForetuneError, match=r"the disk is full: could not write .*checkpoint-6.*--resume"
    ) as raised:
        _retrain(out=tmp_path)
    assert "\n" not in str(raised.value) and raised.value.exit_code == 1
    assert _names(tmp_path) == {"checkpoint-4", "run.json"}
    resumed, undisturbed = _retrain(out=tmp_path, resume=True), _retrain()
    assert equal_bits(resumed.model.state_dict(), undisturbed.model.state_dict())


def test_a_disk_that_is_full_at_the_end_keeps_the_checkpoint(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(outcome, "save_base", full)
        with pytest.raises(ForetuneError, match=r"the disk is full: could not write .*base"):
            _retrain(out=tmp_path)
    assert _names(tmp_path) >= {"checkpoint-12", "run.json"}
    assert "base" not in _names(tmp_path) and ".unfinished-base" not in _names(tmp_path)
    resumed, undisturbed = _retrain(out=tmp_path, resume=True), _retrain()
    assert equal_bits(resumed.model.state_dict(), undisturbed.model.state_dict())


def test_other_errors_are_not_called_a_full_disk(tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("something else")

    monkeypatch.setattr(checkpoint, "save_file", broken)
    with pytest.raises(RuntimeError, match=r"^something else$"):
        _retrain(out=tmp_path)


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    with checkpoint.whole_folder(tmp_path / "x") as part:
        (part / "file").write_text("old")
        assert not (tmp_path / "x").exists()
    with pytest.raises(Stop), checkpoint.whole_folder(tmp_path / "x") as part:
        (part / "file").write_text("new")
        raise Stop
    assert (tmp_path / "x" / "file").read_text() == "old"
    assert _names(tmp_path) == {"x"}


def test_an_unfinished_run_leaves_the_model_alone(tmp_path):
    model = Net()
    before = copy_of(model)
    with pytest.raises(Stop):
        foretune.retrain(
            model, family(), METHODS["peft-ml"], _run(tmp_path), progress=lambda *_: _stop()
        )
    assert equal_bits(model.state_dict(), before)
    assert torch.is_grad_enabled()


def _stop():
    raise Stop
