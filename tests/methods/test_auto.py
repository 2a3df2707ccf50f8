"""`auto` on tasks whose best retraining is known, and the record of its trials."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import foretune
from foretune.claims import output_folder
from foretune.errors import UserError
from foretune.files import write_whole
from foretune.methods.auto import Auto
from foretune.run import Run
from foretune.tasks.objectives.regression import Regression
from foretune.tasks.task import Task, TaskCollection
from foretune.training import verbs
from foretune.training.learners.joint import Learner
from linear_tasks import Net, equal_bits, family

RUN = Run(steps=60, batch_size=8, eval_every=0, device="cpu", weight_decay=0.0)
FAST = {"learning_rate": 0.05}
LORA = {"r": 1, "lora_alpha": 1}
HOW = {
    "adapt": foretune.LoRA(learning_rate=0.02, lora=LORA),
    "adapt_run": Run(steps=5, batch_size=4, device="cpu"),
    "shots": (4,),
}
CONTROLS = [{"name": "none"}, {"name": "standard", **FAST}]


def opposed(num_tasks: int = 6) -> TaskCollection:
    """Pairs of tasks y = ±w x about the model's own function: their mean is a bad place to start.

    The untouched net starts at zero outputs, and pooled training can only go back there, after
    it has chased one sign and the other.
    """
    rng = np.random.default_rng(0)
    tasks = []
    for t in range(num_tasks):
        x = rng.normal(size=(48, 4)).astype(np.float32)
        y = np.ones((48, 3), np.float32) * (10.0 if t % 2 else -10.0)
        rows = [{"x": a, "y": b} for a, b in zip(x, y, strict=True)]
        tasks.append(Task(f"t{t}", rows[:24], rows[24:40], rows[40:]))
    return TaskCollection(tuple(tasks), Regression())


def auto(**fields) -> Auto:
    return Auto(**{"candidates": CONTROLS, "rounds": 1, **HOW, **fields})


def test_it_takes_what_adapts_best():
    together = foretune.retrain(Net(), family(6, offset=0.1), auto(), RUN)
    assert together.choice["chosen"] == "standard learning_rate=0.05"
    assert together.method == foretune.Standard(**FAST)
    harmful = {"name": "standard", "learning_rate": 30.0, "as": "wild"}
    apart = foretune.retrain(
        Net(), family(6, offset=0.1), auto(candidates=[harmful, {"name": "none"}]), RUN
    )
    assert apart.choice["chosen"] == "none"
    assert equal_bits(apart.model.state_dict(), Net().state_dict())


def test_the_choice_is_retrained_on_all_seen_tasks():
    tasks = family(6, offset=0.1)
    chosen = foretune.retrain(Net(), tasks, auto(), RUN)
    plain = foretune.retrain(Net(), tasks, foretune.Standard(**FAST), RUN)
    assert equal_bits(chosen.model.state_dict(), plain.model.state_dict())
    assert chosen.tasks == plain.tasks


def test_trials_never_adapt_to_what_they_were_retrained_on(monkeypatch):
    retrained, adapted = [], []
    real_retrain, real_adapt = verbs.retrain, verbs.adapt

    def retrain(model, tasks, method, run=None, **more):
        if not isinstance(method, Auto):
            retrained.append((set(tasks.names), run.steps))
        return real_retrain(model, tasks, method, run, **more)

    def adapt(model, tasks, *args, **more):
        adapted.append(set(tasks.names))
        assert more["split"] == "validation"
        return real_adapt(model, tasks, *args, **more)

    monkeypatch.setattr(verbs, "retrain", retrain)
    monkeypatch.setattr(verbs, "adapt", adapt)
    tasks = family(7)
    many = [*CONTROLS, {"name": "peft-ml", **FAST, "lora": LORA}, {"name": "reptile", **FAST}]
    verbs.retrain(Net(), tasks, auto(candidates=many, rounds=2), RUN)
    # Four; then the better half and, where they are not in it, the controls; then the end.
    assert [steps for _, steps in retrained][:4] == [15] * 4
    assert {steps for _, steps in retrained[4:-1]} == {30}
    assert 2 <= len(retrained[4:-1]) <= 4 and retrained[-1][1] == 60
    for (seen, _), held in zip(retrained, adapted, strict=False):
        assert not seen & held
        assert seen | held == set(tasks.names)
    assert adapted[0] != adapted[-1]  # another part in the second round
    assert retrained[-1][0] == set(tasks.names)


@pytest.mark.parametrize(("num_tasks", "shots", "draws"), [(6, 4, 3), (24, 4, 1), (6, None, 1)])
def test_few_held_out_tasks_are_adapted_to_in_several_draws(monkeypatch, num_tasks, shots, draws):
    draw_counts = []
    real = verbs.adapt

    def adapt(model, held, *args, **more):
        done = real(model, held, *args, **more)
        draw_counts.append(len(done.scores) / len(held))
        return done

    monkeypatch.setattr(verbs, "adapt", adapt)
    choice = verbs.retrain(Net(), family(num_tasks), auto(shots=(shots,)), RUN).choice
    assert draw_counts == [draws] * 2
    for trial in choice["trials"]:
        assert trial["score"] == pytest.approx(np.mean([*trial["by_task"].values()]))
        assert all(len(scores) == draws for scores in trial["by_task"].values())


def test_controls_stay_to_the_end():
    likes = [{"name": "peft-ml", **FAST, "lora": LORA, "as": f"like {i}"} for i in range(6)]
    bad = {"name": "standard", "learning_rate": 1e-9, "as": "slow"}
    method = auto(candidates=[*CONTROLS, bad, *likes], rounds=3)
    choice = foretune.retrain(Net(), family(6, offset=1.0), method, RUN).choice
    assert choice["rounds"]["none"] == 3
    assert choice["rounds"]["standard learning_rate=0.05"] == 3
    assert choice["rounds"]["slow"] == 1  # of a control's rates the best one
    assert sorted(choice["rounds"][f"like {i}"] for i in range(6))[0] == 1


def test_a_variant_of_a_control_does_not_stand_for_it():
    good = {"name": "standard", **FAST, "average": 0.5, "as": "variant"}
    plain = {"name": "standard", "learning_rate": 1e-9, "as": "plain"}
    like = {"name": "standard", **FAST, "interpolate": 0.9, "as": "another"}
    method = auto(candidates=[{"name": "none"}, plain, good, like], rounds=3)
    choice = foretune.retrain(Net(), family(6, offset=0.1), method, RUN).choice
    assert choice["chosen"] in ("variant", "another")
    assert choice["rounds"]["plain"] == 3


def test_candidates_are_scored_on_examples_that_no_trial_was_trained_on(monkeypatch):
    tasks = family(6, rows=24, validation=8)
    search_tasks = []
    real = verbs.adapt

    def adapt(model, held, *args, **more):
        search_tasks.append((held, more["shots"]))
        return real(model, held, *args, **more)

    monkeypatch.setattr(verbs, "adapt", adapt)

    def rows(part):
        return {row["x"].tobytes() for row in part}

    for shots in ((4,), (4, None)):
        search_tasks.clear()
        verbs.retrain(Net(), tasks, auto(shots=shots), RUN)
        for held, _ in search_tasks:
            for task in held:
                original = tasks[task.name]
                assert not rows(task.train) & rows(task.validation)
                assert rows(task.train) | rows(task.validation) == rows(original.train) | rows(
                    original.validation
                )
                assert (len(task.train), len(task.validation)) == (12, 20)
                assert not task.test


def test_candidates_that_differ_only_in_interpolate_are_trained_once(monkeypatch):
    counted = []
    real = verbs.retrain

    def retrain(model, tasks, method, run=None, **more):
        counted.append(method)
        return real(model, tasks, method, run, **more)

    monkeypatch.setattr(verbs, "retrain", retrain)
    shares = [0.25, 0.5, 1.0]
    many = [{"name": "standard", **FAST, "interpolate": share} for share in shares]
    outcome = verbs.retrain(Net(), family(6), auto(candidates=many), RUN)
    assert len(counted) == 3  # auto, one trial, the end
    scores = outcome.choice["scores"]
    alone = [auto(candidates=[candidate, {"name": "none"}]) for candidate in many]
    for method, name in zip(alone, list(scores), strict=True):
        assert real(Net(), family(6), method, RUN).choice["scores"][name] == scores[name]


def test_the_trials_are_recorded(tmp_path):
    many = [*CONTROLS, {"name": "peft-ml", **FAST, "lora": LORA, "as": "ours"}]
    method = auto(candidates=many, rounds=2)
    outcome = foretune.retrain(Net(), family(6), method, RUN.replace(out=tmp_path / "r"))
    record = json.loads((tmp_path / "r" / "run.json").read_text())
    choice = record["choice"]
    assert record["method"]["name"] == outcome.method.name
    assert set(choice["scores"]) == {"none", "standard learning_rate=0.05", "ours"}
    assert choice["rounds"]["none"] == choice["rounds"]["standard learning_rate=0.05"] == 2
    assert {row["over"] for row in choice["above"]} == set(choice["scores"]) - {choice["chosen"]}
    assert all(row["low"] <= row["difference"] <= row["high"] for row in choice["above"])
    assert choice["cost"]["tokens"] > 0 and choice["cost"]["seconds"] > 0
    assert choice["num_held_out"] == 4 and choice["num_seen"] == 6


def test_progress_goes_on_through_all_trials_and_names_them():
    calls = []
    many = [*CONTROLS, {"name": "peft-ml", **FAST, "lora": LORA, "as": "ours"}]
    foretune.retrain(
        *(Net(), family(6), auto(candidates=many, rounds=2), RUN),
        progress=lambda update, updates, figures: calls.append((update / updates, figures)),
    )
    trials = [(share, figures["doing"]) for share, figures in calls if "doing" in figures]
    assert [share for share, _ in trials] == sorted({share for share, _ in trials})
    assert trials[0][0] < 0.2 and 0.8 < trials[-1][0] < 1
    assert dict.fromkeys(doing for _, doing in trials if "ours" in doing) == dict.fromkeys(
        ["round 1 of 2, ours", "round 2 of 2, ours"]
    )
    assert calls[-1][0] == 1 and "doing" not in calls[-1][1]  # the retraining that follows


def test_an_interrupted_choice_resumes(tmp_path, monkeypatch):
    tasks, many = family(6), [*CONTROLS, {"name": "peft-ml", **FAST, "lora": LORA}]
    method = auto(candidates=many, rounds=2)
    uninterrupted = foretune.retrain(Net(), tasks, method, RUN)
    real, calls = verbs.adapt, []

    def adapt(*args, **more):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **more)

    run = RUN.replace(out=tmp_path / "r")
    with monkeypatch.context() as patch:
        patch.setattr(verbs, "adapt", adapt)
        with pytest.raises(KeyboardInterrupt):
            foretune.retrain(Net(), tasks, method, run)
    shorter = auto(candidates=many, rounds=1)
    with pytest.raises(UserError, match="was started with rounds=2, this run has rounds=1"):
        foretune.retrain(Net(), tasks, shorter, run.replace(resume=True))
    calls.clear()
    calls.extend([1] * 10)
    monkeypatch.setattr(verbs, "adapt", adapt)
    resumed = foretune.retrain(Net(), tasks, method, run.replace(resume=True))
    expected_calls = 10 + len(uninterrupted.choice["trials"]) - 2  # two trials were there
    assert len(calls) == expected_calls
    assert resumed.choice["scores"] == uninterrupted.choice["scores"]
    assert equal_bits(resumed.model.state_dict(), uninterrupted.model.state_dict())
    again = foretune.retrain(Net(), tasks, method, run.replace(resume=True))
    assert again.cost["tokens"] == resumed.cost["tokens"]
    assert len(calls) == expected_calls


def test_overwrite_replaces_what_a_killed_choice_left(tmp_path):
    """Until the final retraining begins, the folder holds only the trials."""
    with pytest.raises(KeyboardInterrupt), output_folder(tmp_path, "retrain") as folder:
        write_whole(folder / "choice.json", '{"about": {}, "trials": []}')
        raise KeyboardInterrupt
    run = RUN.replace(out=tmp_path, overwrite=True, steps=4)
    foretune.retrain(Net(), family(4), auto(), run)
    assert json.loads((tmp_path / "choice.json").read_text())["trials"]


def test_a_candidate_that_diverges_is_left_behind():
    wild = {"name": "standard", "learning_rate": 1e30, "as": "wild"}
    with np.errstate(all="ignore"):
        outcome = foretune.retrain(
            Net(), opposed(), auto(candidates=[wild, {"name": "none"}]), RUN.replace(warmup=0.0)
        )
    assert outcome.choice["chosen"] == "none" and outcome.choice["scores"]["wild"] is None
    with pytest.raises(UserError, match="every candidate"):
        foretune.retrain(Net(), opposed(), auto(candidates=[wild, {**wild, "as": "wilder"}]), RUN)


def test_same_seed_same_choice():
    torch.manual_seed(1)
    first = foretune.retrain(Net(), family(6), auto(), RUN)
    torch.manual_seed(2)
    second = foretune.retrain(Net(), family(6), auto(), RUN)
    assert first.choice["scores"] == second.choice["scores"]
    assert equal_bits(first.model.state_dict(), second.model.state_dict())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"candidates": [{"name": "none"}]}, "at least 2 candidates, got 1"),
        ({"candidates": ["none", "standard"]}, "a mapping with its"),
        ({"candidates": [{"name": "none"}, {"name": "lora"}]}, '"lora" is not one of them'),
        ({"candidates": [{"name": "none"}, {"name": "none"}]}, 'two candidates called "none"'),
        ({"candidates": [{"name": "none"}, {"name": "standrd"}]}, 'Did you mean "standard"'),
        ({"folds": 1}, "folds"),
        ({"rounds": 0}, "rounds"),
        ({"budget": 1.5}, "budget"),
        ({"adapt": {"name": "peft-ml"}}, '"peft-ml" is not one'),
        ({"shots": ()}, "at least one number of shots"),
        ({"shots": 8}, "shots must be a list, got 8"),
        ({"shots": ["all"]}, "shots must be a whole number"),
        ({"adapt_rates": 0.1}, "adapt_rates must be a list"),
        ({"adapt_rates": [0]}, "adapt_rates must be a number above 0"),
        ({"adapt_run": {"stepz": 1}}, 'no field "stepz".*"steps"'),
        ({"adapt_run": 3}, "a mapping of its fields; got 3"),
        ({"candidates": "none"}, "candidates must be a list"),
    ],
)
def test_bad_fields_are_named(fields, message):
    with pytest.raises(UserError, match=message):
        auto(**fields)


def test_bad_tasks_are_named():
    with pytest.raises(UserError, match="only one seen task"):
        foretune.retrain(Net(), family(1), auto(), RUN)
    bare = TaskCollection(
        tuple(Task(t.name, t.train[:1], (), t.test) for t in family(4)), family(1).objective
    )
    with pytest.raises(UserError, match=r"tasks\.validation"):
        foretune.retrain(Net(), bare, auto(), RUN)


def test_a_half_that_lacks_a_label_is_not_cut_off():
    rng = np.random.default_rng(0)

    def rows(labels: str) -> list[dict[str, object]]:
        return [{"x": rng.normal(size=4).astype(np.float32), "y": y} for y in labels]

    # One row of each label: no half has them all.
    cut = [Task(f"t{i}", rows("abc"), rows("abab"), rows("ab")) for i in range(4)]
    tasks = TaskCollection(tuple(cut), foretune.Classification())
    chosen = auto(candidates=[{"name": "none"}, {"name": "standard"}])
    outcome = verbs.retrain(Net(), tasks, chosen, RUN.replace(steps=4))
    assert len(outcome.choice["trials"]) == 2


def test_a_choice_begun_on_other_tasks_is_not_taken_up(tmp_path):
    run = RUN.replace(out=tmp_path, steps=4)
    verbs.retrain(Net(), family(4), auto(), run)
    (tmp_path / "run.json").unlink()
    with pytest.raises(UserError, match=r"was started with tasks=\['task0"):
        verbs.retrain(Net(), family(4, prefix="other"), auto(), run.replace(resume=True))


def test_a_task_held_out_twice_counts_once():
    choice = verbs.retrain(Net(), family(2), auto(rounds=3), RUN.replace(steps=4)).choice
    assert choice["num_held_out"] == 2
    assert all(above["num_tasks"] <= 2 for above in choice["above"])


def test_cost_counts_all_that_went_through_backward_passes(monkeypatch):
    """Retrainings, adaptations at every rate, validations that adapt, and trials that diverge."""
    passed = []
    real = Learner.backward

    def backward(self, step):
        passed.append(step.num_tokens)
        return real(self, step)

    monkeypatch.setattr(Learner, "backward", backward)
    wild = {"name": "standard", "learning_rate": 1e38, "as": "diverges"}
    reptile = {"name": "reptile", **FAST, "inner_steps": 2}
    method = auto(candidates=[*CONTROLS, reptile, wild], rounds=2, adapt_rates=(0.02, 1e38))
    outcome = foretune.retrain(Net(), family(6), method, RUN.replace(eval_every=20))
    assert any(trial["score"] is None for trial in outcome.choice["trials"])
    trained = outcome.cost["tokens"] + outcome.cost["validation_tokens"]
    assert outcome.choice["cost"]["tokens"] + trained == sum(passed)
    assert outcome.choice["cost"]["examples"] == outcome.choice["cost"]["tokens"]  # one a row


def test_validations_that_adapt_are_counted_apart():
    run = RUN.replace(steps=10, eval_every=5)
    reptile = foretune.retrain(Net(), family(4), foretune.Reptile(inner_steps=2), run).cost
    # Two validations, in each two inner steps of four examples for each of four tasks.
    assert reptile["validation_tokens"] == 2 * 2 * 4 * 4
    assert foretune.retrain(Net(), family(4), foretune.PEFTML(), run).cost["validation_tokens"] == 0


def test_how_to_adapt_may_be_a_choice_made_anew_for_each_base():
    ways = ["head", foretune.LoRA(learning_rate=0.02, lora=LORA), {"name": "lora", "lora": LORA}]
    method = auto(adapt=ways, adapt_rates=(1e-3, 1e-1))
    outcome = foretune.retrain(Net(), family(6, offset=0.1), method, RUN)
    for trial in outcome.choice["trials"]:
        [row] = trial["adapt"]
        assert row["shots"] == 4 and row["steps"] <= 5
        assert {row["method"]} <= {"head", "lora"} and row["learning_rate"] in (1e-3, 1e-1, 0.02)
        assert trial["score"] >= row["score_before"] - 1e-9
    fields = {key: value for key, value in method.to_dict().items() if key != "name"}
    assert Auto(**json.loads(json.dumps(fields))) == method


def test_a_list_of_ways_to_adapt_is_checked():
    with pytest.raises(UserError, match="at least one adapt method, got none"):
        auto(adapt=[])
    with pytest.raises(UserError, match='"standard" is not one'):
        auto(adapt=[foretune.Standard()])


def test_further_held_out_tasks_validate_every_retraining(monkeypatch):
    validated = []
    real = verbs.retrain

    def retrain(model, tasks, method, run=None, **more):
        validated.append(more["held_out"])
        return real(model, tasks, method, run, **more)

    monkeypatch.setattr(verbs, "retrain", retrain)
    held = foretune.HeldOut(
        tasks=family(2, prefix="held"), method=foretune.Head(), run=Run(steps=2)
    )
    outcome = foretune.retrain(Net(), family(6), auto(), RUN, held_out=held)
    assert validated and all(part is held for part in validated)
    assert outcome.inputs == {} and len(outcome.choice["trials"]) == 2
