"""How to adapt is chosen on held-out tasks: the simplest candidate that chance does not exclude."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import foretune
from foretune.errors import DivergedError, UserError
from foretune.evaluation import adapt_search
from foretune.evaluation.adapt_candidates import at_rates, candidates, validation_method
from foretune.evaluation.adapt_search import halving, num_adaptations, search
from foretune.run import Run
from foretune.tasks.objectives.classification import Classification
from foretune.tasks.objectives.regression import Regression
from foretune.tasks.task import Task, TaskCollection
from foretune.training import verbs
from foretune.training.adapt_plan import AdaptPlan, PlannedSetting, Setting
from foretune.training.adapted_scores import simplest
from foretune.training.outcome import Adapted
from linear_tasks import Net, equal_bits, family

RUN = Run(steps=16, batch_size=8, eval_every=0, device="cpu", weight_decay=0.0)
LORA = {"r": 1, "lora_alpha": 1}


def noisy(num_tasks: int = 8) -> TaskCollection:
    """Tasks whose answers are noise about zero, where the net is already: to adapt is to harm."""
    rng = np.random.default_rng(0)
    tasks = []
    for t in range(num_tasks):
        x, y = rng.normal(size=(40, 4)).astype("f4"), rng.normal(size=(40, 3)).astype("f4")
        rows = [{"x": a, "y": b} for a, b in zip(x, y, strict=True)]
        tasks.append(Task(f"t{t}", rows[:8], rows[8:], ()))
    return TaskCollection(tuple(tasks), Regression())


def silent() -> Net:
    """A net whose outputs are zero."""
    net = Net()
    net.out.weight.data.zero_()
    net.out.bias.data.zero_()
    return net


@pytest.mark.parametrize("method", [foretune.LoRA(lora=LORA), foretune.Head(pull=0.1)])
def test_the_path_at_a_step_is_a_run_of_that_many_steps(method):
    tasks, run = family(3), Setting(method=method, steps=16).run(RUN)
    whole = foretune.adapt(Net(), tasks, method, run, shots=8, score_at=(0, 5, 16))
    assert [*whole.path] == [0, 5, 16] and whole.path[16] == whole.scores
    for steps in (0, 5):
        part = foretune.adapt(Net(), tasks, method, run.replace(steps=steps), shots=8)
        assert part.scores == whole.path[steps]
    unwatched = foretune.adapt(Net(), tasks, method, run, shots=8)
    assert unwatched.scores == whole.scores
    assert all(equal_bits(unwatched.tensors[k], whole.tensors[k]) for k in whole.tensors)


class Halfway(foretune.Full):
    """Full fine-tuning that goes half of the way."""

    interpolate = 0.5


@pytest.mark.parametrize("method", [foretune.Full(learning_rate=0.01), Halfway(learning_rate=0.01)])
def test_a_path_of_whole_models_scores_what_a_run_of_that_length_returns(method):
    tasks, run = family(2), Setting(method=method, steps=8).run(RUN)
    whole = foretune.adapt(Net(), tasks, method, run, score_at=(4,))
    part = foretune.adapt(Net(), tasks, method, run.replace(steps=4))
    assert whole.path[4] == part.scores != whole.scores


def test_adapting_in_0_steps_saves_adapters_that_equal_the_base(tmp_path):
    tasks, method = family(2), foretune.Head()
    adapted = foretune.adapt(Net(), tasks, method, RUN.replace(steps=0, out=tmp_path / "out"))
    assert (tmp_path / "out" / "task0" / "adapter_model.safetensors").is_file()
    longer = foretune.adapt(Net(), tasks, method, RUN, score_at=(0,))
    assert adapted.scores == longer.path[0]
    with pytest.raises(UserError, match="steps must be a whole number not below 1, got 0"):
        foretune.retrain(Net(), tasks, foretune.Standard(), RUN.replace(steps=0))


def test_a_path_beyond_the_last_step_or_with_early_stopping_is_refused():
    with pytest.raises(UserError, match="score_at takes steps from 0 to 16, got 17"):
        foretune.adapt(Net(), family(), foretune.Head(), RUN, score_at=(17,))
    with pytest.raises(UserError, match="patience=2 stops some"):
        foretune.adapt(Net(), family(), foretune.Head(), RUN.replace(patience=2), score_at=(4,))


def test_the_simplest_setting_within_one_standard_error_of_the_best_is_taken():
    best = np.array([0.6, 0.7, 0.9, 0.8])
    behind = np.array([0.0, 0.1, 0.0, 0.1])  # 0.05 behind, with a standard error of 0.029
    assert simplest(np.stack([best - behind, best])) == 1
    noisier = np.array([-0.3, 0.5, -0.2, 0.2])  # as far behind on average, but 0.18 uncertain
    assert simplest(np.stack([best - noisier, best])) == 0
    assert simplest(np.stack([best - behind, best - noisier, best])) == 1
    assert simplest(np.stack([best, best])) == 0
    assert simplest(np.array([[0.5], [0.6], [0.6]])) == 1  # a single task: the best


def test_where_adapting_harms_not_adapting_is_chosen():
    tasks = noisy()
    result = search(silent(), tasks, candidates(["head", "lora"]), RUN, (2, None))
    for planned in result.plan.settings:
        assert planned.setting.steps == 0
        assert planned.score == planned.score_before and planned.standard_error == 0
    assert min(trial["path"]["16"] for trial in result.trials) < result.score - 0.1


def test_where_adapting_helps_it_is_chosen_with_its_best_steps():
    methods = candidates([{"lora": {"lora": LORA, "learning_rate": 0.03}}])
    [planned] = search(Net(), family(8, offset=1.0), methods, RUN, (None,)).plan.settings
    assert planned.setting.steps == 16 and planned.setting.method == methods[0]
    assert planned.score > planned.score_before + planned.standard_error
    assert planned.rows == 24 and planned.num_tasks == 8


def signs(num_tasks: int = 4) -> TaskCollection:
    """Tasks of labelled arrays, whose score is an accuracy."""
    rng = np.random.default_rng(0)
    rows = [{"x": x, "y": int((x[:2] > 0).sum())} for x in rng.normal(size=(40, 4)).astype("f4")]
    tasks = [Task(f"t{t}", rows[:20], rows[20:], ()) for t in range(num_tasks)]
    return TaskCollection(tuple(tasks), Classification())


@pytest.mark.parametrize(
    ("tasks", "step"), [(signs(), 4), (noisy(4), 8)], ids=["accuracy", "squared error"]
)
def test_an_accuracy_is_chosen_by_the_loss_and_another_score_by_itself(monkeypatch, tasks, step):
    # By the score the best step is 8, by the loss it is 4; 16 is the worst by both.
    values = {0: (0.5, 1.0), 4: (0.6, 0.2), 8: (0.9, 0.8), 16: (0.4, 2.0)}
    real = verbs.adapt_variants

    def adapt(*args, **more):
        results = real(*args, **more)
        for adapted in results:
            for steps, by_task in adapted.path.items():
                score, loss = values.get(steps, (0.3, 3.0))
                adapted.path[steps] = dict.fromkeys(by_task, score)
                if adapted.path_losses:
                    assert adapted.path_losses[steps].keys() == by_task.keys()
                    adapted.path_losses[steps] = dict.fromkeys(by_task, loss)
        return results

    monkeypatch.setattr(verbs, "adapt_variants", adapt)
    result = search(Net(), tasks, candidates(["head"]), RUN, (4,))
    [planned] = result.plan.settings
    assert planned.setting.steps == step
    assert (planned.score, planned.score_before) == pytest.approx((values[step][0], 0.5))
    assert result.score == planned.score
    assert ("losses" in result.trials[0]) == (tasks.objective.kind == "classification")


def test_candidates_are_dropped_by_the_loss_too(monkeypatch):
    # The worse half by accuracy is the better one by loss.
    monkeypatch.setattr(adapt_search, "MIN_PART", 2)
    real = verbs.adapt_variants

    def adapt(model, tasks, methods, *args, **more):
        results = real(model, tasks, methods, *args, **more)
        for method, adapted in zip(methods, results, strict=True):
            accuracy = method.learning_rate
            adapted.path = {s: dict.fromkeys(path, accuracy) for s, path in adapted.path.items()}
            adapted.path_losses = {
                s: dict.fromkeys(path, 1 + accuracy if s else 2.0)
                for s, path in adapted.path.items()
            }
        return results

    monkeypatch.setattr(verbs, "adapt_variants", adapt)
    methods = candidates([{"head": {"search": {"learning_rate": [0.1, 0.2, 0.3, 0.4]}}}])
    result = search(Net(), signs(4), methods, RUN, (4,))
    assert [trial["num_tasks"] for trial in result.trials] == [4, 4, 2, 2]
    assert result.plan.settings[0].setting.method.learning_rate == 0.1


def test_a_base_without_finite_losses_is_refused(monkeypatch):
    broken = Net()
    broken.out.bias.data[0] = torch.inf
    with pytest.raises(
        DivergedError, match='task "t0", validation row 1: the loss is nan after step 0'
    ):
        search(broken, signs(2), candidates(["head"]), RUN, (4,))


def test_the_losses_of_a_path_are_those_of_the_examples_that_are_scored():
    tasks = signs(2)
    adapted = foretune.adapt(
        Net(), tasks, foretune.Head(), RUN, shots=4, split="validation", score_at=(0, 16)
    )
    objective = tasks.objective.fit(tasks)
    for task in tasks:
        rows = [objective.encode(row, task.name) for row in task.validation]
        losses = objective.losses(Net(), objective.collate(rows, [0] * len(rows)))
        assert adapted.path_losses[0][task.name, 0] == pytest.approx(float(losses.mean().detach()))
    assert adapted.path_losses[16] != adapted.path_losses[0]


def test_of_the_candidates_within_one_standard_error_each_at_its_best_step_the_simplest_is_taken(
    monkeypatch,
):
    # Task by task: the second rate is barely better than the first at its best step, 8.
    noise = np.array([0.1, -0.1, 0.1, -0.1])
    values = {3e-3: {8: 0.5 + noise, 4: 0.45 + noise}, 3e-2: {8: 0.51 - noise}}

    def adapt(model, tasks, methods, run, *, score_at, **more):
        results = []
        for method in methods:
            by_step = {}
            for steps in score_at:
                scores = values[method.learning_rate].get(steps, np.zeros(4))
                by_step[steps] = {
                    (f"t{t}", 0): scores[t] for t in range(4) if f"t{t}" in tasks.names
                }
            results.append(Adapted({}, {}, {}, {}, {}, path=by_step))
        return results

    monkeypatch.setattr(verbs, "adapt_variants", adapt)
    methods = candidates([{"head": {"search": {"learning_rate": [3e-3, 3e-2]}}}])
    [planned] = search(Net(), noisy(4), methods, RUN, (None,)).plan.settings
    assert (planned.setting.method.learning_rate, planned.setting.steps) == (3e-3, 8)


def test_a_candidate_that_diverges_is_skipped_and_recorded():
    wild = foretune.Head(learning_rate=1e30)
    good = foretune.Head(learning_rate=0.03)
    result = search(Net(), family(4), [good, wild], RUN, (8,))
    assert result.plan.settings[0].setting.method == good
    assert result.trials[1]["score"] is None and "learning_rate" in result.trials[1]["reason"]
    [left] = search(Net(), family(4), [wild], RUN, (8,)).plan.settings
    assert left.setting.steps == 0
    with pytest.raises(DivergedError):
        search(Net(), family(4), wild, RUN, (8,))


def test_halving_keeps_the_winner_and_tries_it_on_all_tasks(monkeypatch):
    monkeypatch.setattr(adapt_search, "MIN_PART", 2)
    rates = (1e-5, 2e-5, 3e-5, 4e-5, 5e-2, 6e-5, 7e-5, 8e-5)
    methods = [foretune.Head(learning_rate=rate) for rate in rates]
    result = search(Net(), family(8, offset=1.0), methods, RUN, (None,))
    tried = {trial["config"]["learning_rate"]: trial["num_tasks"] for trial in result.trials}
    assert sorted(tried.values()) == [2] * 4 + [4] * 2 + [8] * 2
    assert tried[5e-2] == 8
    assert result.plan.settings[0].setting.method.learning_rate == 5e-2
    alone = search(Net(), family(8, offset=1.0), [methods[4]], RUN, (None,))
    assert result.score == pytest.approx(alone.score)


def test_the_last_quarter_is_tried_on_further_draws():
    methods = [foretune.Head(learning_rate=rate) for rate in (1e-5, 2e-5, 5e-2, 4e-5, 3e-5)]
    result = search(Net(), family(8, offset=1.0), methods, RUN, (4, None))
    draws = [(t["shots"], t["config"]["learning_rate"], t["draws"]) for t in result.trials]
    assert (4, 5e-2, 3) in draws and (None, 5e-2, 1) in draws
    assert sorted(number for shots, _, number in draws if shots == 4) == [1, 1, 1, 3, 3]
    assert all(len(scores) == 3 + 1 for scores in result.by_task.values())
    once = search(Net(), family(8, offset=1.0), methods, RUN, (4,), draws=1)
    assert {trial["draws"] for trial in once.trials} == {1}


def with_basis() -> torch.nn.Module:
    """A net with the basis of a few seen tasks."""
    model = Net()
    basis = foretune.fit_basis(model, family(4), foretune.LoRA(learning_rate=0.03, lora=LORA), RUN)
    foretune.set_basis(model, basis)
    return model


VARIANTS = {
    "head": [foretune.Head(learning_rate=0.03), foretune.Head(learning_rate=0.003, pull=0.5)],
    "lora": [foretune.LoRA(learning_rate=rate, lora=LORA) for rate in (0.03, 0.003)],
    "basis": [foretune.FromBasis(strength=s, free=1.0) for s in (10, 0.3)],
}


@pytest.mark.parametrize("name", VARIANTS)
def test_side_by_side_each_method_gives_what_it_gives_alone(name):
    methods, model, tasks = VARIANTS[name], with_basis(), family(3, prefix="new", seed=1)
    options = {"shots": 4, "draws": 2, "score_at": (0, 5, 16)}
    together = verbs.adapt_variants(model, tasks, methods, RUN, **options)
    for method, adapted in zip(methods, together, strict=True):
        alone = foretune.adapt(model, tasks, method, RUN, **options)
        assert adapted.scores == pytest.approx(alone.scores, rel=1e-4)
        assert adapted.num_rows == alone.num_rows
        for step, scores in alone.path.items():
            assert adapted.path[step] == pytest.approx(scores, rel=1e-4)
        for key, tensors in alone.tensors.items():
            for part, value in tensors.items():
                torch.testing.assert_close(adapted.tensors[key][part], value, rtol=1e-3, atol=1e-5)
    assert together[0].scores != pytest.approx(together[1].scores, rel=1e-3)


def test_candidates_that_differ_in_a_rate_alone_share_their_steps(monkeypatch):
    calls = []
    real = verbs.adapt_variants

    def adapt(model, tasks, methods, run, **more):
        calls.append(([method.learning_rate for method in methods], more["score_at"]))
        return real(model, tasks, methods, run, **more)

    monkeypatch.setattr(verbs, "adapt_variants", adapt)
    methods = candidates(["head", {"lora": {"lora": LORA}}])
    search(Net(), family(8), methods, RUN, (None,))
    stops = [1, 2, 4, 8, 16]
    assert calls == [([3e-3, 1e-2, 3e-2], [0, *stops]), ([1e-3, 3e-3, 1e-2], stops)]


def test_a_path_goes_no_further_than_to_the_step_after_its_best(monkeypatch):
    monkeypatch.setattr(adapt_search, "MIN_PART", 2)
    calls = []
    real = verbs.adapt_variants

    def adapt(model, tasks, methods, run, **more):
        results = real(model, tasks, methods, run, **more)
        calls.append((len(tasks), run.steps))
        best = {0: 0.5, 1: 0.6, 2: 0.9, 4: 0.8, 8: 0.7, 16: 1.0 if len(tasks) > 2 else 0.1}
        for adapted in results:
            adapted.path = {s: dict.fromkeys(path, best[s]) for s, path in adapted.path.items()}
        return results

    monkeypatch.setattr(verbs, "adapt_variants", adapt)
    result = search(Net(), family(4), candidates(["head"]), RUN, (4,))
    assert calls == [(2, 16), (2, 4), (4, 4)]  # a half, the other one, further draws of all
    assert result.plan.settings[0].setting.steps == 2
    assert {len(trial["path"]) for trial in result.trials} == {5}


def test_a_part_is_collated_once_for_all_scores_along_a_path(monkeypatch):
    scored = []
    real = Classification.collate

    def collate(self, rows, slots):
        scored.append(len(rows))
        return real(self, rows, slots)

    monkeypatch.setattr(Classification, "collate", collate)
    tasks, steps = signs(4), (0, 2, 4, 8, 16)
    options = {"split": "validation", "score_at": steps}
    adapted = foretune.adapt(Net(), tasks, foretune.Head(learning_rate=0.1), RUN, **options)
    assert (
        scored.count(4 * 20) == 1 and len(scored) == 1 + 16
    )  # the rows that are scored, the steps
    assert adapted.path_losses[2] != adapted.path_losses[16]


def test_halving_tries_every_task_once():
    for num_candidates in (1, 2, 3, 12, 40):
        for num_tasks in (1, 5, 31, 32, 100):
            rounds = halving(num_candidates, num_tasks)
            assert sum(size for _, size in rounds) == num_tasks
            assert rounds[0][0] == num_candidates and rounds[-1][0] > 0


def test_nothing_but_training_and_validation_rows_of_the_held_out_tasks_is_read(monkeypatch):
    calls = []
    real = verbs.adapt_variants

    def adapt(model, tasks, *args, **more):
        calls.append((tasks.names, more["split"]))
        return real(model, tasks, *args, **more)

    monkeypatch.setattr(verbs, "adapt_variants", adapt)
    tasks = family(4)
    plain = search(Net(), tasks, candidates(["head"]), RUN, (4,))
    assert all(set(names) <= set(tasks.names) and split == "validation" for names, split in calls)
    scrambled = TaskCollection(
        tuple(Task(t.name, t.train, t.validation, t.test[:0]) for t in tasks), tasks.objective
    )
    assert search(Net(), scrambled, candidates(["head"]), RUN, (4,)).trials == plain.trials


def test_a_trial_does_not_stop_early_on_the_rows_that_it_is_scored_on():
    plain = search(Net(), family(2), foretune.Head(learning_rate=0.3), RUN, (8,))
    run = RUN.replace(patience=1, eval_every=1)
    stopped = search(Net(), family(2), foretune.Head(learning_rate=0.3), run, (8,))
    assert stopped.by_task == plain.by_task


def test_each_number_of_shots_counts_once_whatever_its_draws():
    few, whole, both = (
        search(Net(), family(2), foretune.Head(learning_rate=1e-2), RUN, shots)
        for shots in ((4,), (None,), (4, None))
    )
    assert both.score == pytest.approx((few.score + whole.score) / 2)
    assert [len(scores) for scores in both.by_task.values()] == [3 + 1, 3 + 1]


def test_a_search_reports_its_cost():
    cost = search(Net(), family(2), candidates(["head"]), RUN, (8,)).cost
    assert cost["examples"] == num_adaptations(3, 2) * 16 * 8  # steps, rows
    assert {"seconds", "cpu_seconds", "peak_memory_mb", "tokens"} <= set(cost)


def test_candidates_are_sorted_by_simplicity():
    names = ["sara", {"lora": {"search": {"lora.r": [4, 2], "pull": [0, 1.0]}}}, "head"]
    records = candidates(names, learning_rates=(0.1, 0.01), lora={"r": 8, "lora_alpha": 4})
    assert [r.name for r in records] == ["head"] * 2 + ["lora"] * 8 + ["sara"] * 2
    assert [r.learning_rate for r in records[:2]] == [0.01, 0.1]
    lora = [(r.lora["r"], r.pull, r.learning_rate) for r in records[2:10]]
    assert lora[:4] == [(2, 1.0, 0.01), (2, 1.0, 0.1), (2, 0, 0.01), (2, 0, 0.1)]
    assert all(record.lora["lora_alpha"] == 4 for record in records[2:10])
    fixed = candidates([{"lora": {"learning_rate": 0.5}}], learning_rates=(0.1,))
    assert [record.learning_rate for record in fixed] == [0.5]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("lora2", 'no method "lora2" for adapt'),
        ("peft-ml", "peft-ml is a method for retrain"),
        ({"head": {"rank": 1}}, 'head has no field "rank"'),
        ({"head": {"search": {"pull": 1}}}, "search of head maps fields to lists of values"),
    ],
)
def test_a_bad_candidate_is_refused(entry, message):
    with pytest.raises(UserError, match=message):
        candidates([entry])


def test_a_base_that_no_candidate_fits_is_refused(monkeypatch):
    monkeypatch.setattr(foretune.Head, "fits", lambda self, model: False)
    with pytest.raises(UserError, match="cannot be adapted by any of the candidates: head"):
        search(Net(), family(2), candidates(["head"]), RUN, (8,))


def test_a_retraining_is_validated_by_the_middle_of_the_plain_methods():
    methods = candidates(["head", "lora"])
    head = validation_method(methods, foretune.PEFTML(form="last-layer"))
    assert (head.name, head.learning_rate) == ("head", 1e-2)
    assert validation_method(methods, foretune.Standard()).name == "lora"
    assert validation_method(methods[:3], foretune.Standard()).name == "head"


def planned(shots, rows, steps) -> PlannedSetting:
    setting = Setting(method=foretune.LoRA(lora={"r": 2}, pull=0.1), steps=steps)
    return PlannedSetting(
        shots=shots,
        rows=rows,
        setting=setting,
        score=0.75,
        score_before=0.5,
        standard_error=0.125,
        num_tasks=30,
    )


def test_a_plan_survives_json_and_answers_by_the_number_of_rows():
    run = Run(batch_size=16, weight_decay=0.0, max_grad_norm=None, seed=3)
    plan = AdaptPlan(settings=(planned(2, 4, 5), planned(8, 16, 10), planned(None, 80, 0)), run=run)
    read = AdaptPlan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert read.to_dict() == plan.to_dict()
    assert [read.setting_for(rows).steps for rows in (1, 7, 9, 35, 36, 10_000)] == [
        5,
        5,
        10,
        10,
        0,
        0,
    ]
    assert read.at_shots(None).steps == 0 and read.at_shots(3) is None
    adapted = read.run_for(read.setting_for(16), Run(seed=1, steps=99))
    assert (adapted.seed, adapted.steps, adapted.batch_size) == (1, 10, 16)
    assert (adapted.schedule, adapted.warmup, adapted.max_grad_norm) == ("constant", 0.0, None)


def compared(**how):
    seen, unseen = family(4), family(3, prefix="new", seed=1)
    return foretune.compare({"none": Net()}, unseen, run=RUN, seen=seen, **how).to_dict()


def test_a_comparison_adapts_by_what_was_best_on_the_held_out_tasks():
    methods = at_rates(foretune.LoRA(lora=LORA), (1e-6, 3e-2, 1e-5))
    record = compared(adapt=methods, shots=(8,))
    adapt = record["bases"][0]["adapt"]
    assert (adapt["learning_rate"], adapt["searched"]) == (None, [])
    [row] = adapt["by_shots"]
    assert (row["shots"], row["method"], row["learning_rate"]) == (8, "lora", 3e-2)
    assert [trial["config"]["learning_rate"] for trial in adapt["trials"]] == [1e-6, 1e-5, 3e-2]
    assert adapt["search"]["examples"] > 0
    run = Setting.from_dict(row["setting"]).run(RUN)
    method = foretune.LoRA(lora=LORA, learning_rate=3e-2)
    alone = foretune.adapt(Net(), family(3, prefix="new", seed=1), method, run, shots=8)
    scores = {(s["task"], s["seed"]): s["score"] for s in record["scores"] if s["shots"] == 8}
    assert scores == alone.scores
    assert {s["task"] for s in record["scores"] if s["shots"] == 0} == {t for t, _ in scores}
    assert record["adapt"]["method"] == "search" and record["adapt"]["methods"] == ["lora"]


def test_a_comparison_with_plans_does_not_search():
    plan = AdaptPlan(settings=(planned(8, 8, 4),), run=RUN)
    adapt = compared(adapt=foretune.Head(), shots=(8, None), plans={"none": plan})["bases"][0][
        "adapt"
    ]
    assert "search" not in adapt
    assert [row["steps"] for row in adapt["by_shots"]] == [4]
    assert adapt["examples"] == 2 * 3 * 4 * 8  # numbers of shots, tasks, steps, rows
    fixed = compared(adapt=foretune.Head(), shots=(8,), plans={"other": plan})["bases"][0]["adapt"]
    assert fixed["learning_rate"] == foretune.Head().learning_rate and "by_shots" not in fixed
    with pytest.raises(
        UserError, match='plans has none for base "none" \\(other\\): pass a single'
    ):
        compared(adapt=[foretune.Head()], shots=(8,), plans={"other": plan})


def test_a_fixed_way_to_adapt_is_taken_as_it_is():
    adapt = compared(adapt=foretune.Head(), learning_rates=(0.1,), shots=(8,))["bases"][0]["adapt"]
    assert adapt["learning_rate"] == 0.1 and "by_shots" not in adapt


def test_a_search_without_seen_tasks_is_refused():
    with pytest.raises(UserError, match="how to adapt is searched on seen tasks"):
        foretune.compare({"none": Net()}, family(2), adapt=candidates(["head"]), run=RUN)
