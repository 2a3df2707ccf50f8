"""A recipe from start to end on arrays and a model from a file: seconds, no download."""

from __future__ import annotations

import copy
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import foretune
from command_line import call
from foretune.cli.output import comparison_text
from foretune.errors import DivergedError, ForetuneError, UserError
from foretune.models.reading import Reading
from foretune.recipes.adapting import candidates_of
from foretune.recipes.plan import Plan, plan_recipe
from foretune.recipes.runner import find_entry, retrain_one, run_recipe
from foretune.recipes.schema import Recipe, load_recipe
from foretune.recipes.templates import template_text
from foretune.recipes.timing import Stopwatch

MODEL = """
from torch import nn

def build(width=8):
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 2))
"""
SMALL = [
    *("model.file=my_model.py", "model.args={width: 6}"),
    "tasks.unseen=2",
    "retrain.methods=[none, standard, peft-ml]",
    "retrain.steps=4",
    "retrain.batch_size=4",
    "adapt.steps=3",
    "adapt.shots=[2]",
    "seeds=1",
]


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.chdir(tmp_path)
    return small_recipe()


def small_recipe() -> Recipe:
    """The recipe, its data and its model in this folder."""
    write_data(Path("data.npz"), [f"t{i}" for i in range(5)])
    Path("my_model.py").write_text(MODEL)
    Path("my.yaml").write_text(template_text("arrays"))
    return load_recipe("my.yaml", SMALL)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder that a run writes, and what it returns."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("finished"))
        recipe = small_recipe()
        return recipe.folder.absolute(), run_recipe(recipe)


@pytest.fixture
def finished(recipe: Recipe, results: tuple[Path, dict[str, Any]]) -> dict[str, Any]:
    """What the recipe's run returned, with a copy of its folder in place."""
    shutil.copytree(results[0], recipe.folder)
    return copy.deepcopy(results[1])


def write_data(path: Path, names: list[str]) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(len(names), 40, 4)).astype(np.float32)
    direction = rng.normal(size=(len(names), 4))
    y = (np.einsum("tnd,td->tn", x, direction) > 0).astype(np.int64)
    task = np.repeat(names, 40)
    np.savez(path, task=task, x=x.reshape(-1, 4), y=y.reshape(-1))


def test_run_writes_all_that_it_promises(recipe: Recipe, finished: dict[str, Any]) -> None:
    comparison = finished
    names = {path.name for path in recipe.folder.iterdir()}
    promised = {"comparison.json", "report.html", "config.yaml", "README.md", "run.json", "bases"}
    assert promised <= names
    assert [base["name"] for base in comparison["bases"]] == ["none", "standard", "peft-ml"]
    assert comparison == json.loads((recipe.folder / "comparison.json").read_text())
    assert load_recipe(recipe.folder / "config.yaml") == recipe
    assert comparison["conflict"].keys() & {"advice", "unmeasured"}


def test_bases_say_how_they_were_made(recipe: Recipe, finished: dict[str, Any]) -> None:
    base = finished["bases"][2]
    assert base["method"] == "peft-ml"
    assert (recipe.folder / base["path"]).is_dir()
    assert len(base["retrain"]["searched"]) == 2
    assert base["retrain"]["learning_rate"] in (5e-4, 2e-3)
    assert (
        base["retrain"]["curve"][0]["step"] == 0 and "adapted_score" in base["retrain"]["curve"][0]
    )
    [row] = base["adapt"]["by_shots"]
    assert row["shots"] == 2 and row["num_tasks"] == 1 and base["adapt"]["trials"]


def test_finished_run_resumes_without_training(
    recipe: Recipe, finished: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **fields: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(foretune, "retrain", fail, raising=False)
    monkeypatch.setattr(foretune, "compare", fail, raising=False)
    assert run_recipe(recipe, resume=True)["scores"] == finished["scores"]


def test_interrupted_run_continues_to_the_same_scores(
    recipe: Recipe, results: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = results[1]
    with monkeypatch.context() as patch:

        def killed(*args: object, **fields: object) -> None:
            raise KeyboardInterrupt

        patch.setattr(foretune, "compare", killed, raising=False)
        with pytest.raises(KeyboardInterrupt):
            run_recipe(recipe)
    assert run_recipe(recipe, resume=True)["scores"] == undisturbed["scores"]


@pytest.mark.usefixtures("finished")
@pytest.mark.parametrize("compares", [True, False])
def test_rows_that_changed_during_a_run_are_noticed(recipe: Recipe, compares: bool) -> None:
    """Finished stages would be reused, and the comparison would mix two collections."""

    def run(**more: bool) -> None:
        if compares:
            run_recipe(recipe, **more)
        else:
            retrain_one(recipe, "none", Path("one"), **more)

    if not compares:
        run()
    data = dict(np.load("data.npz"))
    np.savez("data.npz", **{**data, "y": 1 - data["y"]})
    with pytest.raises(UserError, match="was started with other rows of task"):
        run(resume=True)
    write_data(Path("data.npz"), [f"t{i}" for i in range(6)])
    with pytest.raises(UserError, match="was started with tasks="):
        run(resume=True)


def test_a_run_that_failed_before_its_first_result_may_start_again(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **fields: object) -> None:
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(foretune, "retrain", fail, raising=False)
        with pytest.raises(RuntimeError):
            run_recipe(recipe)
    data = dict(np.load("data.npz"))
    np.savez("data.npz", **{**data, "y": 1 - data["y"]})
    assert run_recipe(load_recipe("my.yaml", [*SMALL, "retrain.batch_size=2"]))["scores"]


def test_repeats_are_kept_apart(recipe: Recipe) -> None:
    comparison = run_recipe(recipe.model_copy(update={"seeds": 2}))
    assert {score["seed"] for score in comparison["scores"]} == {0, 1}
    assert {pair["num_seeds"] for pair in comparison["pairs"]} == {2}
    # Each repeat has its own search of how to adapt: a shared one would correlate the repeats.
    read = [json.loads(p.read_text()) for p in sorted((recipe.folder / "repeats").iterdir())]
    trials = [repeat["bases"][1]["adapt"]["trials"] for repeat in read]
    assert len(trials[0]) == len(trials[1]) and trials[0] != trials[1]
    chosen = [repeat["bases"][1]["adapt"]["by_shots"] for repeat in read]
    assert comparison["bases"][1]["adapt"]["by_repeat"] == chosen
    rates = [repeat["bases"][1]["retrain"]["learning_rate"] for repeat in read]
    assert comparison["bases"][1]["retrain"]["learning_rates"] == rates


def test_second_run_into_the_folder_is_refused(recipe: Recipe) -> None:
    recipe.folder.mkdir(parents=True)
    (recipe.folder / "x").write_text("")
    with pytest.raises(UserError, match="--resume"):
        run_recipe(recipe)


@pytest.mark.usefixtures("finished")
def test_overwrite_keeps_the_old_run_until_the_new_one_has_data_and_a_model(recipe: Recipe) -> None:
    for bad in ("tasks.source=none.npz", "model.file=none.py", "model.args={nope: 1}"):
        with pytest.raises(UserError):
            run_recipe(load_recipe("my.yaml", [*SMALL, bad]), overwrite=True)
        assert (recipe.folder / "report.html").is_file()


def test_a_model_that_cannot_take_the_rows_is_named_with_their_shape(recipe: Recipe) -> None:
    data = dict(np.load("data.npz"))
    np.savez("data.npz", **{**data, "x": data["x"].repeat(2, axis=1)})
    with pytest.raises(UserError, match=r"model\.file cannot .* shape \(8,\): mat1 and mat2"):
        run_recipe(recipe)
    assert not recipe.folder.exists()


def test_diverged_trial_is_skipped(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    real = foretune.retrain

    def diverges(model: Any, tasks: Any, method: Any, run: Any, **more: Any) -> Any:
        if getattr(method, "learning_rate", 0) == 2e-3:
            raise error
        return real(model, tasks, method, run, **more)

    monkeypatch.setattr(foretune, "retrain", diverges, raising=False)
    error: ForetuneError = ForetuneError("the disk is full")
    with pytest.raises(ForetuneError, match="disk"):  # not the fault of a rate
        run_recipe(recipe)
    error = DivergedError("the loss is nan")
    standard = run_recipe(recipe, resume=True)["bases"][1]
    assert standard["retrain"]["learning_rate"] == 5e-4
    assert standard["retrain"]["searched"][1]["score"] is None


def test_recipe_without_unseen_tasks_cannot_be_compared(recipe: Recipe) -> None:
    with pytest.raises(UserError, match=r"tasks\.unseen"):
        run_recipe(load_recipe("my.yaml", [*SMALL, "tasks.unseen=null"]))


def test_spectrum_is_measured_if_the_recipe_has_it(recipe: Recipe) -> None:
    with_spectrum = load_recipe("my.yaml", [*SMALL, "spectrum={shots: 4, ranks: [1, 2]}"])
    spectrum = run_recipe(with_spectrum)["spectrum"]
    assert {row["rank"] for row in spectrum["rows"]} == {1, 2}
    costs = {cost["rank"]: cost for cost in spectrum["costs"] if cost["base"] == "standard"}
    # Rank 1 on 4 × 6 and 6 × 2 weights, twice that at rank 2; all weights include the head.
    parameters = {rank: cost["trainable_parameters"] for rank, cost in costs.items()}
    assert parameters == {1: 18, 2: 36, None: 44}
    assert all(cost["tokens"] > 0 and cost["num_tasks"] == 2 for cost in costs.values())


def test_plan_counts_and_writes_nothing(recipe: Recipe) -> None:
    plan = plan_recipe(recipe)
    assert len(plan.seen) == 2  # a third one chooses the rate of adapting
    assert plan.unseen is not None
    assert len(plan.unseen) == 2
    peft_ml = plan.retrain[2]
    assert peft_ml.parameters["base"] == 4 * 6 + 6 + 6 * 2 + 2
    assert peft_ml.parameters["adapter"] > 0
    assert plan.adapt is not None
    assert not recipe.folder.exists()


def test_plan_times_tasks_whose_first_rows_lack_a_label(recipe: Recipe) -> None:
    rows = 40
    y = np.tile(np.repeat([0, 1], rows // 2), 5)  # the first twenty rows of a task are of one class
    x = np.random.default_rng(0).normal(size=(len(y), 4)).astype(np.float32)
    split = np.tile([*["train"] * (rows - 1), "test"], 5)
    task = np.repeat([f"t{i}" for i in range(5)], rows)
    np.savez("data.npz", task=task, x=x, y=np.array(["no", "yes"])[y], split=split)
    assert plan_recipe(recipe).adapt is not None


def test_plan_prints_and_gives_json(recipe: Recipe) -> None:
    shown = call("plan", "my.yaml", *SMALL)
    assert shown.exit_code == 0, shown.output
    assert "2 seen tasks" in shown.stdout
    assert json.loads(call("plan", "my.yaml", *SMALL, "--json").stdout)["name"] == "my-run"


def test_tasks_take_turns(recipe: Recipe) -> None:
    turning = load_recipe("my.yaml", [*SMALL, "tasks.rotate=true", "seeds=3"])
    comparison = run_recipe(turning)
    tasks = [s["task"] for s in comparison["scores"] if (s["base"], s["shots"]) == ("none", 2)]
    assert sorted(tasks) == [f"t{i}" for i in range(5)]  # each once
    assert {s["seed"] for s in comparison["scores"]} == {0}
    assert all(pair["num_tasks"] == 5 for pair in comparison["pairs"])
    assert comparison["collection"]["turns"] == 3
    for turn in range(3):
        folder = turning.folder / "bases" / "peft-ml"
        base = json.loads((folder / f"seed-{turn}" / "run.json").read_text())
        held = json.loads((turning.folder / "repeats" / f"seed-{turn}.json").read_text())
        assert not {s["task"] for s in held["scores"]} & set(base["tasks"])
        assert (folder / f"seed-{turn}" / "search.json").is_file()


def test_turns_must_be_complete(recipe: Recipe) -> None:
    with pytest.raises(
        UserError, match="unseen=2 gives 3 turns; seeds must be a multiple of 3, got 2"
    ):
        run_recipe(load_recipe("my.yaml", [*SMALL, "tasks.rotate=true", "seeds=2"]))
    with pytest.raises(UserError, match="turns need a number"):
        load_recipe("my.yaml", [*SMALL, "tasks.rotate=true", "tasks.unseen=[t1]"])


def test_held_out_tasks_without_validation_rows_are_refused_before_anything_is_trained(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **fields: object) -> None:
        raise AssertionError("trained")

    monkeypatch.setattr(foretune, "retrain", fail, raising=False)
    overrides = [*SMALL, "tasks.validation=0", "retrain.methods=[standard]", "adapt.shots=[40]"]
    with pytest.raises(
        UserError, match=r"no validation examples to score on; set tasks\.validation"
    ):
        run_recipe(load_recipe("my.yaml", overrides))


def test_auto_chooses_among_the_methods_of_the_recipe(recipe: Recipe) -> None:
    methods = "retrain.methods=[none, standard, {peft-ml: {as: ours}}, {auto: {rounds: 1}}]"
    chosen = load_recipe("my.yaml", [*SMALL, methods])
    comparison = run_recipe(chosen)
    base = comparison["bases"][3]
    tried = {"none", "standard 0.0005", "standard 0.002", "ours 0.0005", "ours 0.002"}
    [choice] = base["choices"]
    assert set(choice["scores"]) == tried and choice["chosen"] in tried
    report = (chosen.folder / "report.html").read_text()
    assert f"auto took {choice['chosen']}" in report and "What auto tried" in report
    assert f"auto took {choice['chosen']}" in comparison_text(comparison)
    assert [*base["config"]["adapt"][1]] == ["lora"]
    assert base["config"]["adapt_run"]["steps"] == 3
    assert base["config"]["shots"] == [2]
    assert base["retrain"]["tokens"] > 0


def test_auto_may_have_its_own_candidates(recipe: Recipe) -> None:
    items = "[none, {standard: {interpolate: 0.5, learning_rate: 1e-3}}]"
    changes = [*SMALL, f"retrain.methods=[{{auto: {{candidates: {items}}}}}]"]
    candidates = load_recipe("my.yaml", changes).entries[0].record().candidates
    assert [c["name"] for c in candidates] == ["none", "standard"]
    assert candidates[1]["learning_rate"] == 1e-3
    bad = "retrain.methods=[none, {auto: {candidates: [none, {standrd: {}}]}}]"
    with pytest.raises(UserError, match='Did you mean "standard"'):
        load_recipe("my.yaml", [*SMALL, bad])
    with pytest.raises(UserError, match="at least 2 candidates"):
        load_recipe("my.yaml", [*SMALL, "retrain.methods=[none, auto]"])


def test_the_plan_of_auto_counts_its_trials(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At one second per step: one full training, and a quarter of one per trained candidate."""
    monkeypatch.setattr(Stopwatch, "seconds_per_update", lambda self: 1.0)
    monkeypatch.setattr("foretune.recipes.plan.FORWARD_SHARE", 0.0)

    def plan(methods: str) -> Plan:
        return plan_recipe(load_recipe("my.yaml", [*SMALL, f"retrain.methods={methods}"]))

    fixed = "{standard: {learning_rate: 1e-3}}"
    standard = plan(f"[{fixed}]")
    auto = plan(f"[{{auto: {{rounds: 1, candidates: [none, {fixed}]}}}}]")
    assert auto.retrain[0].seconds == pytest.approx(1.25 * standard.retrain[0].seconds)
    assert standard.adapt is not None and auto.adapt is not None
    # A step has two tasks; two candidates adapt to one task, in six draws, in each way.
    steps = 3 * len(candidates_of(recipe))
    assert auto.adapt.seconds - standard.adapt.seconds == pytest.approx(steps * 2 * 6 / 2)


def test_the_plan_counts_what_frozen_layers_read_once_for_each_row(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At one second per step, and 0.1 for each text that is new to frozen layers."""
    changes = [*SMALL, "retrain.methods=[{standard: {learning_rate: 1e-3}}]"]
    monkeypatch.setattr(Stopwatch, "seconds_per_update", lambda self: 1.0)
    monkeypatch.setattr("foretune.recipes.plan.FORWARD_SHARE", 0.0)
    trained = plan_recipe(load_recipe("my.yaml", changes)).retrain[0].seconds
    run = load_recipe("my.yaml", changes).retrain_run()
    monkeypatch.setattr(Reading, "seconds_per_text", lambda self: 0.1)
    plan = plan_recipe(load_recipe("my.yaml", changes))
    assert plan.retrain[0].seconds == trained
    # Two texts for each row of an update.
    texts = 2 * min(run.tasks_per_step or len(plan.seen), len(plan.seen)) * run.batch_size
    monkeypatch.setattr(Stopwatch, "texts_per_update", lambda self: texts)
    plan = plan_recipe(load_recipe("my.yaml", changes))
    rows = sum(splits["train"] + splits["validation"] for splits in plan.seen.values())
    assert plan.retrain[0].seconds - trained == pytest.approx(2 * 0.1 * rows)


@pytest.mark.parametrize("item", ["5", "{standard: 5}", "{standard: {learning_rates: 0.1}}"])
def test_bad_candidates_of_auto_are_named(recipe: Recipe, item: str) -> None:
    bad = f"retrain.methods=[{{auto: {{candidates: [none, {item}]}}}}]"
    with pytest.raises(UserError, match=r"an item of retrain\.methods is|must be a list"):
        load_recipe("my.yaml", [*SMALL, bad])


def test_find_entry_refuses_a_method_of_another_verb(recipe: Recipe) -> None:
    with pytest.raises(UserError, match="lora is a method for adapt, not for retrain"):
        find_entry(recipe, "lora")


def test_find_entry_guesses(recipe: Recipe) -> None:
    with pytest.raises(UserError, match='Did you mean "peft-ml"'):
        find_entry(recipe, "peftml")


def test_auto_that_the_recipe_does_not_list_adapts_as_in_the_recipe(recipe: Recipe) -> None:
    fields = find_entry(recipe, "auto").fields
    assert fields["shots"] == recipe.adapt.row_counts
    assert fields["adapt_rates"] == recipe.adapt.rates
    assert {c["name"] for c in fields["candidates"]} == {e.method for e in recipe.entries}


def test_the_verbs_chain_through_folders(recipe: Recipe) -> None:
    for method in ("none", "peft-ml"):
        done = call("retrain", "my.yaml", *SMALL, "--method", method, "--out", f"runs/{method}")
        assert done.exit_code == 0, done.output
    write_data(Path("new.npz"), ["a", "b"])
    adapted = call(
        "adapt", "runs/peft-ml", "steps=2", "--tasks", "new.npz", "--out", "adapters", "--json"
    )
    assert adapted.exit_code == 0, adapted.output
    assert json.loads(adapted.stdout)["scores"].keys() == {"a", "b"}
    assert (Path("adapters") / "a" / "adapter_config.json").is_file()
    folders = ["runs/none", "runs/peft-ml"]
    options = ["--tasks", "new.npz", "--shots", "1,2", "--seeds", "2", "--out", "cmp", "--json"]
    compared = call("compare", *folders, "steps=2", *options)
    assert compared.exit_code == 0, compared.output
    bases = json.loads(compared.stdout)["bases"]
    assert [base["method"] for base in bases] == ["none", "peft-ml"]
    page = Path("cmp/report.html")
    page.unlink()
    assert call("report", "cmp").exit_code == 0
    assert page.is_file()


@pytest.mark.usefixtures("finished")
def test_bases_of_a_run_are_compared_under_names_from_their_paths(recipe: Recipe) -> None:
    write_data(Path("new.npz"), ["a", "b"])
    bases = [
        str(recipe.folder / "bases" / name / "seed-0" / "base") for name in ("none", "peft-ml")
    ]
    options = ["--tasks", "new.npz", "--shots", "2", "--out", "cmp", "--json"]
    compared = call("compare", *bases, "steps=2", *options)
    assert compared.exit_code == 0, compared.output
    names = [base["name"] for base in json.loads(compared.stdout)["bases"]]
    assert names == ["none/seed-0", "peft-ml/seed-0"]
    twice = call("compare", bases[0], bases[0], "--tasks", "new.npz", "--out", "twice")
    assert twice.exit_code == 2 and "is given twice" in twice.stderr


@pytest.mark.usefixtures("finished")
def test_code_in_the_readme_of_a_run_loads_its_result(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The card of a run is read where the run was started, that of a base in its folder.
    for card, where in ((recipe.folder, "."), (recipe.folder / "bases/peft-ml/seed-0",) * 2):
        [code] = re.findall("```python\n(.*?)```", Path(card, "README.md").read_text(), re.S)
        variables: dict[str, Any] = {}
        with monkeypatch.context() as patch:
            patch.chdir(where)
            exec(code, variables)
        assert variables["base"](torch.zeros(1, 4)).shape == (1, 2)


@pytest.mark.parametrize(
    ("folder", "says"),
    [
        ("adapters/peft-ml/{}", "is an adapter: give the base that it belongs to"),
        ("bases/peft-ml", "is not a base: .* did you mean .*bases/peft-ml/seed-0/base"),
        (".", "is not a base: .* did you mean .*base"),
    ],
)
@pytest.mark.usefixtures("finished")
def test_error_for_a_folder_that_is_not_a_base_says_what_it_is(
    recipe: Recipe, folder: str, says: str
) -> None:
    task = next((recipe.folder / "adapters" / "peft-ml").iterdir()).name
    path = str(recipe.folder / folder.format(task))
    result = call("adapt", path, "--tasks", "data.npz", "--out", "new")
    assert result.exit_code == 2 and re.search(says, result.stderr), result.stderr


@pytest.mark.usefixtures("finished")
def test_adapting_without_test_rows_says_that_nothing_was_scored(recipe: Recipe) -> None:
    base = str(recipe.folder / "bases" / "none" / "seed-0" / "base")
    changes = ["steps=2", "tasks.test=0", "tasks.validation=0"]
    shown = call("adapt", base, *changes, "--tasks", "data.npz", "--out", "all").stdout
    assert "nothing was scored" in shown


@pytest.mark.parametrize("device", ["banana", "cuda:99", "npu"])
def test_a_missing_device_is_refused(recipe: Recipe, device: str) -> None:
    result = call("run", "my.yaml", *SMALL, f"device={device}")
    assert result.exit_code == 2
    assert f"device={device}" in result.stderr or f"got '{device}'" in result.stderr


def test_run_prints_a_table_and_the_verdict(recipe: Recipe) -> None:
    settings = [*SMALL, "adapt.max_grad_norm=null"]
    shown = call("run", "my.yaml", *settings)
    assert shown.exit_code == 0, shown.output
    assert "PEFT-ML" in shown.stdout
    assert "runs/my-run/report.html" in shown.stdout
    assert "standard" not in shown.stderr.splitlines()[0]
    last_line = shown.stdout.splitlines()[-1]
    write_data(Path("new.npz"), ["a"])
    command = shlex.split(last_line.partition(": ")[2].replace("NEW.jsonl", "new.npz"))
    assert command[-3:] == ["--tasks", "new.npz", "--trust-remote-code"]
    done = call(*command[1:])
    assert done.exit_code == 0, done.output
    assert (Path("adapters") / "a" / "adapter_config.json").is_file()
    resumed = call("run", "my.yaml", *settings, "--resume", "--json")
    assert json.loads(resumed.stdout)["out"] == "runs/my-run"
