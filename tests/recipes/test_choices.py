"""What held-out tasks choose in a run: which retraining is the base, and how to adapt it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import foretune
from foretune.errors import UserError
from foretune.models.base_record import record_adapting
from foretune.models.loading import load_base
from foretune.recipes import trials
from foretune.recipes.adapting import held_out_of
from foretune.recipes.console import SILENT, Console
from foretune.recipes.on_folders import adapt_folder, compare_folders
from foretune.recipes.runner import retrain_one, run_recipe
from foretune.recipes.schema import Recipe, load_recipe
from foretune.recipes.setup import set_up
from foretune.run import Run
from foretune.tasks.task import Task, TaskCollection
from foretune.training.adapt_plan import AdaptPlan, PlannedSetting, Setting

RECIPE = """
name: choices
model: {tower: [6]}
tasks: {source: data.npz, unseen: 2}
objective: {kind: classification}
retrain:
  methods: [none, {peft-ml: {lora: {r: 2}, search: {penalty: [0.0, 0.1]}}}]
  steps: 4
  learning_rates: [0.01, 0.1]
adapt:
  methods: [head, lora, basis]
  lora: {r: 2}
  learning_rates: [0.01, 0.1]
  steps: 3
  shots: [2]
seeds: 2
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_rows("data.npz", {f"t{i}": 40 for i in range(12)})
    Path("my.yaml").write_text(RECIPE)
    return tmp_path


def write_rows(path: str, num_rows: dict[str, int], seed: int = 0, **more: Any) -> None:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(sum(num_rows.values()), 4)).astype(np.float32)
    task = np.repeat([*num_rows], [*num_rows.values()])
    direction = {name: rng.normal(size=4) for name in num_rows}
    y = np.array([int(row @ direction[name] > 0) for row, name in zip(x, task, strict=True)])
    np.savez(path, task=task, x=x, y=y, **more)


def recipe(*changes: str) -> Recipe:
    return load_recipe("my.yaml", list(changes))


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def bits(folder: Path) -> dict[str, bytes]:
    """The tensors of each file; its header has no fixed order."""
    tensors = {}
    for file in sorted(folder.rglob("*.safetensors")):
        raw = file.read_bytes()
        tensors[str(file.relative_to(folder))] = raw[8 + int.from_bytes(raw[:8], "little") :]
    return tensors


@pytest.fixture
def retrained(monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """The runs of all retrainings, as they are made."""
    runs: list[Run] = []
    real = foretune.retrain

    def watched(model: Any, tasks: Any, method: Any, run: Run, **more: Any) -> Any:
        runs.append(run)
        return real(model, tasks, method, run, **more)

    monkeypatch.setattr(foretune, "retrain", watched, raising=False)
    return runs


def test_each_repeat_holds_out_other_tasks_and_retrains_on_none_of_them() -> None:
    run = recipe()
    run_recipe(run)
    held_out = []
    for seed in range(2):
        for name in ("none", "peft-ml"):
            record = read(run.folder / "bases" / name / f"seed-{seed}" / "run.json")
            names = {*record["held_out"]["tasks"]}
            assert not names & {*record["tasks"]} and len(names | {*record["tasks"]}) == 10
        held_out.append(names)
    assert len(held_out[0]) == len(held_out[1]) == 2 and held_out[0] != held_out[1]


def test_the_best_trial_is_the_base(retrained: list[Run]) -> None:
    run = recipe("seeds=1")
    base = run_recipe(run)["bases"][1]
    trials_made = [r for r in retrained if r.out is not None and ".trial-" in str(r.out)]
    assert len(trials_made) == 4 and len(retrained) == 4 + 2  # loaded again, and none
    assert not list(run.folder.rglob(".trial-*"))
    record = base["retrain"]
    settings = {"learning_rate": record["learning_rate"], **record["fields"]}
    ways = [(trial["learning_rate"], trial["fields"]) for trial in record["searched"]]
    best = record["searched"][ways.index((record["learning_rate"], record["fields"]))]
    setup = set_up(run, SILENT)
    method = run.entries[1].record(settings)
    again = foretune.retrain(
        setup.model, setup.seen, method, run.retrain_run(), held_out=held_out_of(setup, method)
    )
    assert again.validation_score == best["score"] == record["validation_score"]
    model, _ = load_base(run.folder / base["path"])
    saved = model.state_dict()
    assert all(saved[name].equal(value) for name, value in again.model.state_dict().items())
    config = next((run.folder / "bases/peft-ml/seed-0/adapters").glob("*/adapter_config.json"))
    assert read(config)["base_model_name_or_path"] == str(run.folder / base["path"])


def test_after_shorter_trials_the_best_is_retrained_with_all_steps(retrained: list[Run]) -> None:
    run_recipe(recipe("seeds=1", "retrain.search_steps=2"))
    assert [(r.steps, r.out is None) for r in retrained] == [
        (4, False),
        *[(2, True)] * 4,
        (4, False),
    ]


@pytest.mark.parametrize("moment", ["after a trial", "while the best is moved"])
def test_interrupted_trials_continue_to_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    undisturbed = recipe("seeds=1", "out=undisturbed")
    run_recipe(undisturbed)
    with monkeypatch.context() as patch:
        name = "write_json" if moment == "after a trial" else "put_in_place"
        real, calls = getattr(trials, name), []

        def killed(*args: Any) -> None:
            calls.append(args)
            if len(calls) == 2:
                raise KeyboardInterrupt
            real(*args)

        patch.setattr(trials, name, killed)
        with pytest.raises(KeyboardInterrupt):
            run_recipe(recipe("seeds=1"))
    run_recipe(recipe("seeds=1"), resume=True)
    assert bits(recipe().folder) == bits(undisturbed.folder)
    assert not list(recipe().folder.rglob(".trial-*"))


def test_trials_of_another_recipe_are_not_taken_for_those_of_this_one(folder: Path) -> None:
    retrain_one(recipe(), "peft-ml", Path("one"))
    rows = read(Path("one/search.json"))
    Path("one/search.json").write_text(json.dumps([{**rows[0], "learning_rate": 5.0}]))
    with pytest.raises(UserError, match="has other settings than the recipe"):
        retrain_one(recipe(), "peft-ml", Path("one"), resume=True)


def test_a_base_says_how_it_is_best_adapted(folder: Path) -> None:
    run = recipe("seeds=1")
    comparison = run_recipe(run)
    for base in comparison["bases"]:
        record = read(run.folder / base["path"] / "foretune.json")["adapting"]
        assert record["settings"] == base["adapt"]["by_shots"]
        names = {trial["name"] for trial in base["adapt"]["trials"]}
        assert names == {"head", "lora", "basis"}  # none gets a basis too
        card = (run.folder / base["path"]).parent / "README.md"
        assert "adapted" in card.read_text()


def plan(few: Setting, many: Setting) -> AdaptPlan:
    numbers = {"score": 0.0, "score_before": 0.0, "standard_error": 0.0, "num_tasks": 1}
    settings = [
        PlannedSetting(shots=2, rows=4, setting=few, **numbers),  # type: ignore[arg-type]
        PlannedSetting(shots=None, rows=100, setting=many, **numbers),  # type: ignore[arg-type]
    ]
    return AdaptPlan(settings=settings, run=Run(batch_size=2))


FEW = Setting(method=foretune.Head(learning_rate=0.1), steps=0)
MANY = Setting(method=foretune.LoRA(learning_rate=0.1, lora={"r": 2}), steps=3)

SET_BY_HAND = [
    *("steps=3", "learning_rate=0.1", "lora.r=2"),
    *("batch_size=2", "schedule=constant", "warmup=0"),
]


@pytest.fixture
def base(folder: Path) -> Path:
    """A base with a plan, and new tasks of few and of many rows."""
    fixed = "adapt={method: head, learning_rate: 0.1, steps: 1}"
    retrain_one(recipe("retrain.methods=[none]", fixed), "none", Path("base"))
    record_adapting(Path("base/base"), plan(FEW, MANY).to_dict())
    write_rows("new.npz", {"few": 10, "many": 200})
    return Path("base/base")


def test_tasks_are_adapted_by_their_number_of_rows(base: Path) -> None:
    result = adapt_folder(base, "new.npz", Path("adapters"))
    ways = {
        name: (row["method"]["name"], row["steps"])
        for row in result["adapting"]
        for name in row["tasks"]
    }
    assert ways == {"few": ("head", 0), "many": ("lora", 3)}
    assert "lora_A" not in " ".join(bits_of("few")) and "lora_A" in " ".join(bits_of("many"))
    by_hand = adapt_folder(
        base,
        "new.npz",
        Path("by-hand"),
        [*SET_BY_HAND],
    )
    assert by_hand["adapting"] == []
    assert result["scores"]["many"] == by_hand["scores"]["many"]
    for name, tensor in bits_of("many").items():
        torch.testing.assert_close(tensor, bits_of("many", "by-hand")[name])


def bits_of(task: str, folder: str = "adapters") -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(Path(folder, task, "adapter_model.safetensors"))


def test_shots_that_were_tried_take_their_own_setting(base: Path) -> None:
    result = adapt_folder(base, "new.npz", Path("adapters"), shots=2)
    assert [row["tasks"] for row in result["adapting"]] == [["few", "many"]]
    assert result["adapting"][0]["steps"] == 0


def test_later_tasks_join_in_their_own_way(base: Path) -> None:
    adapt_folder(base, "new.npz", Path("adapters"))
    before = bits(Path("adapters"))
    write_rows("more.npz", {"later": 10, "latest": 200}, seed=1)
    result = adapt_folder(base, "more.npz", Path("adapters"), resume=True)
    assert [row["tasks"] for row in result["adapting"]] == [["later"], ["latest"]]
    assert bits(Path("adapters")).items() >= before.items()
    again = adapt_folder(base, "more.npz", Path("adapters"), resume=True)
    assert again["adapting"] == [] and again["scores"] == result["scores"]
    with pytest.raises(UserError, match="was started with"):
        adapt_folder(base, "more.npz", Path("adapters"), ["steps=5"], resume=True)


def test_a_loaded_base_is_adapted_as_was_chosen(base: Path) -> None:
    model, _ = load_base(base)
    data = np.load("new.npz")
    rows = [{"x": x, "y": int(y)} for x, y in zip(data["x"], data["y"], strict=True)]
    tasks = TaskCollection(
        (Task("few", rows[:4], (), rows[4:10]), Task("many", rows[10:100], (), rows[100:])),
        foretune.Classification(),
    )
    adapted = foretune.adapt(model, tasks)
    assert {task: way.steps for (task, _), way in adapted.settings.items()} == {"few": 0, "many": 3}
    adapted.save("saved")
    assert "lora_A" not in " ".join(bits_of("few", "saved"))
    assert read(Path("saved/many/adapter_config.json"))["r"] == 2
    other = foretune.retrain(model, tasks, foretune.NoRetraining(), Run(steps=1)).model
    with pytest.raises(UserError, match="adapt needs a method"):
        foretune.adapt(other, tasks)  # that was chosen for another base


def test_a_base_of_an_earlier_version_is_adapted_as_before(base: Path) -> None:
    record = read(base / "foretune.json")
    del record["adapting"]
    (base / "foretune.json").write_text(json.dumps(record))
    result = adapt_folder(base, "new.npz", Path("adapters"), ["steps=2"])
    assert result["adapting"] == []
    begun = read(Path("adapters/run.json"))
    assert begun["method"]["name"] == "lora" and begun["method"]["learning_rate"] == 1e-3


def test_a_damaged_plan_is_one_line(base: Path) -> None:
    record_adapting(base, {"run": {}, "settings": [{"shots": 3}]})
    with pytest.raises(UserError, match=r"foretune\.json is damaged: KeyError"):
        adapt_folder(base, "new.npz", Path("adapters"))


class Listening(Console):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


def test_bases_are_compared_each_as_was_chosen_for_it(base: Path) -> None:
    fixed = "adapt={method: head, learning_rate: 0.1, steps: 1}"
    retrain_one(recipe("retrain.methods=[none]", fixed), "none", Path("plain"))
    console = Listening()
    bases = [base, Path("plain")]
    compared = compare_folders(bases, "new.npz", Path("cmp"), shots=[2], console=console)
    planned, plain = compared["bases"]
    assert planned["adapt"]["by_shots"][0]["steps"] == 0
    assert plain["adapt"]["learning_rate"] == 1e-3
    assert any("plain: no way to adapt was chosen; adapting by lora" in s for s in console.lines)
    told = compare_folders(bases, "new.npz", Path("told"), ["method=head", "steps=1"], shots=[2])
    assert all("by_shots" not in entry["adapt"] for entry in told["bases"])
