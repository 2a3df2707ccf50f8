"""What rates are chosen by: what a base reaches on tasks that it did not meet."""

from __future__ import annotations

import foretune
from foretune.evaluation.held_out import best, try_rates
from foretune.run import Run
from linear_tasks import Net, family


def test_the_rate_with_the_highest_score_is_taken_of_equals_the_first():
    trials = [{"score": -2.0}, {"score": -1.0, "n": 1}, {"score": -1.0, "n": 2}, {"score": -3.0}]
    assert best(trials) == {"score": -1.0, "n": 1}


def test_a_comparison_adapts_at_the_rate_that_did_best_on_the_held_out_tasks():
    seen, unseen = family(2), family(2, prefix="new", seed=1)
    run = Run(steps=10, batch_size=4, eval_every=0, device="cpu")
    rates = (1e-6, 1e-2, 1e-5)
    found = foretune.compare(
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
    scores = {trial["learning_rate"]: trial["score"] for trial in found["searched"]}
    assert list(scores) == list(rates)
    assert found["learning_rate"] == max(scores, key=scores.__getitem__) == 1e-2
