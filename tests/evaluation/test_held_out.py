"""Scores on held-out seen tasks, by which learning rates are chosen."""

from __future__ import annotations

import pytest

import foretune
from foretune.errors import DivergedError
from foretune.evaluation.held_out import best, build_search_tasks, try_rates
from foretune.run import Run
from linear_tasks import Net, family


def test_of_equally_good_rates_the_first_is_taken():
    trials = [{"score": -2.0}, {"score": -1.0, "n": 1}, {"score": -1.0, "n": 2}, {"score": -3.0}]
    assert best(trials) == {"score": -1.0, "n": 1}


def test_a_comparison_adapts_at_the_rate_that_did_best_on_the_held_out_tasks():
    seen, unseen = family(2), family(2, prefix="new", seed=1)
    run = Run(steps=10, batch_size=4, eval_every=0, device="cpu")
    rates = (1e-6, 1e-2, 1e-5)
    adapt = foretune.compare(
        {"none": Net()},
        unseen,
        adapt=foretune.LoRA(lora={"r": 1}),
        run=run,
        shots=(8,),
        seen=seen,
        learning_rates=rates,
    ).to_dict()["bases"][0]["adapt"]
    trials = try_rates(Net(), seen, foretune.LoRA(lora={"r": 1}), rates, run, (8,))
    assert all(len(scores) == 3 for t in trials for scores in t["by_task"].values())
    scores = {trial["learning_rate"]: trial["score"] for trial in adapt["searched"]}
    assert list(scores) == list(rates)
    assert adapt["learning_rate"] == max(scores, key=scores.__getitem__) == 1e-2


def test_a_rate_that_diverges_is_skipped():
    run = Run(steps=5, batch_size=4, eval_every=0, device="cpu")
    trials = try_rates(Net(), family(2), foretune.LoRA(lora={"r": 1}), (1e30, 1e-2), run, (8,))
    assert trials[0]["score"] is None and "learning_rate" in trials[0]["reason"]
    assert best(trials)["learning_rate"] == 1e-2
    with pytest.raises(DivergedError, match="every learning rate"):
        best(trials[:1])


def test_a_trial_does_not_stop_early_on_the_rows_that_it_is_scored_on():
    method, shots = foretune.LoRA(lora={"r": 1}), (8,)
    run = Run(steps=20, batch_size=4, eval_every=1, device="cpu")
    plain = try_rates(Net(), family(2), method, (0.3,), run, shots)
    assert try_rates(Net(), family(2), method, (0.3,), run.replace(patience=1), shots) == plain


def test_each_number_of_shots_counts_once_whatever_its_draws():
    run = Run(steps=5, batch_size=4, eval_every=0, device="cpu")
    method = foretune.LoRA(lora={"r": 1})
    few_shots, all_rows, both = (
        try_rates(Net(), family(2), method, (1e-2,), run, shots)[0]["score"]
        for shots in ((4,), (None,), (4, None))
    )
    assert both == pytest.approx((few_shots + all_rows) / 2)


@pytest.mark.parametrize(("shots", "halved"), [((4, 12), True), ((4, 13), False), ((None,), False)])
def test_half_of_the_training_rows_are_scored_where_the_rest_is_enough(shots, halved):
    tasks = family(2, rows=24, validation=8, test=8)
    for task in build_search_tasks(tasks, shots, 0):
        assert (len(task.train), len(task.validation)) == ((12, 20) if halved else (24, 8))
        remaining = {row["x"].tobytes() for part in (task.train, task.validation) for row in part}
        assert remaining.isdisjoint(row["x"].tobytes() for row in tasks[task.name].test)


def test_groups_of_rows_are_not_cut_in_two():
    rows = [{"x": [float(i)], "y": [0.0], "dialogue": i // 6} for i in range(24)]
    tasks = foretune.TaskCollection((foretune.Task("a", rows),), family(1).objective)
    [task] = build_search_tasks(tasks, (4,), 0, "dialogue")
    sides = [{row["dialogue"] for row in part} for part in (task.train, task.validation)]
    assert all(sides) and sides[0].isdisjoint(sides[1])
