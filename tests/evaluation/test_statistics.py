"""The statistics against naive loops, SciPy and hand-worked examples; what the verdict says."""

from __future__ import annotations

import re
import time
from itertools import product

import numpy as np
import pytest
from scipy import stats

from foretune.evaluation.statistics import (
    holm,
    mean_interval,
    paired_difference,
    pairs_and_means,
    verdict,
)

BASES = [
    {"name": "none", "method": "none", "label": "No retraining"},
    {"name": "standard", "method": "standard", "label": "Standard"},
    {"name": "peft-ml", "method": "peft-ml", "label": "PEFT-ML"},
]


BASE_NAMES = [base["name"] for base in BASES]


def scores(effects, *, num_tasks=24, num_seeds=3, shots=(0, 16), noise=0.02, seed=0):
    """Records of bases whose scores differ by `effects` on average."""
    rng = np.random.default_rng(seed)
    level = rng.normal(0.4, 0.1, num_tasks)
    return [
        {
            "base": base,
            "task": f"t{task:02d}",
            "shots": k,
            "seed": s,
            "score": float(level[task] + effect + rng.normal(0, noise)),
        }
        for (base, effect), k, task, s in product(
            effects.items(), shots, range(num_tasks), range(num_seeds)
        )
    ]


def judge(effects, *, bases=BASES, shots=None, metric="accuracy", **fields):
    pairs, means = pairs_and_means(scores(effects, **fields), bases)
    return verdict(pairs, means, bases, shots, metric=metric)


def naive_interval(values, num_resamples, rng):
    """The crossed bootstrap as a plain loop."""
    num_tasks, num_seeds = values.shape
    means = []
    for _ in range(num_resamples):
        tasks = rng.integers(num_tasks, size=num_tasks)
        seeds = rng.integers(num_seeds, size=num_seeds)
        means.append(np.mean([[values[t, s] for s in seeds] for t in tasks]))
    return np.quantile(means, [0.025, 0.975])


def test_interval_equals_naive_crossed_bootstrap():
    rng = np.random.default_rng(1)
    # Strong task and seed effects: resampling cells, or tasks alone, would give other intervals.
    values = rng.normal(size=(12, 1)) + 2 * rng.normal(size=(1, 4)) + rng.normal(size=(12, 4))
    mean, low, high = mean_interval(values, num_resamples=20_000)
    naive_low, naive_high = naive_interval(values, 4_000, rng)
    assert mean == pytest.approx(values.mean())
    assert (low, high) == pytest.approx((naive_low, naive_high), abs=0.1)


def test_shared_seed_noise_widens_the_interval():
    rng = np.random.default_rng(0)
    tasks = rng.normal(size=(50, 1))
    _, low, high = mean_interval(tasks + np.zeros((1, 5)))
    _, wide_low, wide_high = mean_interval(tasks + 3 * rng.normal(size=(1, 5)))
    assert wide_high - wide_low > 3 * (high - low)


def test_one_seed_resamples_tasks_only():
    values = np.random.default_rng(0).normal(size=(30, 1))
    _, low, high = mean_interval(values)
    expected = stats.bootstrap(
        (values[:, 0],), np.mean, method="percentile", n_resamples=20_000, rng=0
    ).confidence_interval
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=0.02)


def test_coverage_on_normal_data():
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(200):
        values = rng.normal(size=(25, 1)) + 0.3 * rng.normal(size=(25, 3))
        _, low, high = mean_interval(values, num_resamples=500)
        inside += low < 0 < high
    assert 0.88 <= inside / 200 <= 0.99


def test_paired_difference_ignores_what_both_share():
    rng = np.random.default_rng(0)
    hard = rng.normal(0, 10, size=(20, 1))
    a, b = hard + 0.5 + rng.normal(0, 0.1, (20, 3)), hard + rng.normal(0, 0.1, (20, 3))
    paired = paired_difference(a, b)
    assert paired.difference == pytest.approx((a - b).mean())
    assert 0.3 < paired.low < paired.difference < paired.high < 0.7
    assert (paired.num_tasks, paired.num_seeds, paired.few) == (20, 3, False)


def test_p_value_equals_scipy_on_task_means():
    rng = np.random.default_rng(3)
    a, b = rng.normal(0.3, 1, (15, 4)), rng.normal(0, 1, (15, 4))
    expected = stats.wilcoxon(a.mean(axis=1), b.mean(axis=1)).pvalue
    assert paired_difference(a, b).p_value == pytest.approx(expected)


def test_ties_leave_the_test_exact():
    a = np.zeros((14, 1))
    a[:5, 0] = [0.1, 0.2, 0.3, 0.4, 0.5]
    # Five of five moved tasks: 2 of the 2 ** 5 signs are as far out.
    assert paired_difference(a, np.zeros((14, 1))).p_value == pytest.approx(2 / 2**5)


def test_wins_losses_ties_are_counted_over_tasks_and_forgive_rounding():
    a = np.array([[0.1 + 0.2], [0.5], [0.2], [0.9]])
    b = np.array([[0.3], [0.4], [0.6], [0.1]])
    paired = paired_difference(a, b)
    assert (paired.wins, paired.losses, paired.ties) == (2, 1, 1)


def test_seed_order_does_not_break_ties():
    scores = np.array([0.1, 0.7, 0.3])
    a, b = np.tile(scores, (8, 1)), np.tile(scores[::-1], (8, 1))
    paired = paired_difference(a, b)
    assert (paired.ties, paired.p_value) == (8, 1.0)


def test_equal_scores_have_p_one_and_an_empty_interval():
    paired = paired_difference(np.full((7, 2), 0.5), np.full((7, 2), 0.5))
    assert (paired.difference, paired.low, paired.high, paired.p_value) == (0.0, 0.0, 0.0, 1.0)


@pytest.mark.parametrize(("num_tasks", "few"), [(1, True), (5, True), (6, False)])
def test_few_tasks_are_flagged_and_still_compared(num_tasks, few):
    paired = paired_difference(np.ones((num_tasks, 1)), np.zeros((num_tasks, 1)))
    assert (paired.few, paired.difference) == (few, 1.0)


def test_same_seed_same_interval():
    a, b = np.random.default_rng(0).normal(size=(2, 9, 3))
    assert paired_difference(a, b, seed=4) == paired_difference(a, b, seed=4)
    assert paired_difference(a, b, seed=4) != paired_difference(a, b, seed=5)


def test_thousands_of_tasks_in_seconds():
    a, b = np.random.default_rng(0).normal(size=(2, 5000, 3))
    start = time.perf_counter()
    paired_difference(a, b)
    assert time.perf_counter() - start < 15


def test_bad_scores_are_named():
    with pytest.raises(ValueError, match=r"\(3, 2\) and \(2, 3\)"):
        paired_difference(np.ones((3, 2)), np.ones((2, 3)))
    with pytest.raises(ValueError, match=r"\(num_tasks, num_seeds\), got \(3,\)"):
        paired_difference(np.ones(3), np.ones(3))
    with pytest.raises(ValueError, match=r"1 scores that are not finite, shape \(2, 1\)"):
        mean_interval([[1.0], [float("nan")]])


def test_holm_by_hand():
    # 0.01 × 4; 0.013 × 3; 0.03 × 2 lifts 0.04 × 1.
    assert holm([0.04, 0.01, 0.03, 0.013]) == pytest.approx([0.06, 0.04, 0.06, 0.04])


def test_holm_stays_below_one_and_takes_nothing():
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
    with pytest.raises(ValueError, match="between 0 and 1"):
        holm([0.5, float("nan")])


def test_pairs_put_controls_on_the_right_whatever_the_order():
    records = scores({"none": 0, "standard": 0, "peft-ml": 0}, num_tasks=6, shots=(16,))
    pairs, means = pairs_and_means(records, BASES)
    expected = {("standard", "none"), ("peft-ml", "none"), ("peft-ml", "standard")}
    assert {(pair["a"], pair["b"]) for pair in pairs} == expected
    again, _ = pairs_and_means(records, BASES[::-1])
    assert {(pair["a"], pair["b"]) for pair in again} == expected
    assert [row["base"] for row in means] == ["none", "standard", "peft-ml"]


def test_holm_runs_over_the_pairs_of_one_number_of_shots():
    pairs, _ = pairs_and_means(scores({"none": 0, "standard": 0.01, "peft-ml": 0.02}), BASES)
    for shots in (0, 16):
        at_shots = [pair for pair in pairs if pair["shots"] == shots]
        assert [p["p_holm"] for p in at_shots] == pytest.approx(
            holm([p["p_value"] for p in at_shots])
        )


def test_only_shared_tasks_and_seeds_are_compared():
    records = scores({"none": 0, "standard": 0}, num_tasks=8, shots=(4,))
    shared = [r for r in records if r["base"] == "none" or (r["task"] != "t00" and r["seed"] < 2)]
    pairs, _ = pairs_and_means(shared, BASES)
    assert (pairs[0]["num_tasks"], pairs[0]["num_seeds"]) == (7, 2)


def test_missing_cell_is_named():
    records = scores({"none": 0, "standard": 0}, num_tasks=8, shots=(4,))
    del records[-1]
    with pytest.raises(ValueError, match=r"'standard' \(4 rows\) .* task 't07' seed 2$"):
        pairs_and_means(records, BASES)


def test_double_and_foreign_scores_are_refused():
    records = scores({"none": 0}, num_tasks=2, shots=(4,))
    with pytest.raises(ValueError, match="two scores for base 'none'"):
        pairs_and_means([*records, records[0]], BASES)
    with pytest.raises(ValueError, match="base 'nones'; the bases are none, standard"):
        pairs_and_means([{**records[0], "base": "nones"}], BASES)


def test_all_rows_come_after_finite_shots():
    _, means = pairs_and_means(scores({"none": 0}, num_tasks=3, shots=(None, 16, 0)), BASES)
    assert [row["shots"] for row in means] == [0, 16, None]


def test_verdict_of_a_clear_win():
    judged = judge({"none": 0.0, "standard": 0.02, "peft-ml": 0.08})
    assert (judged["best"], judged["shots"]) == ("peft-ml", 16)
    start = r"Take PEFT-ML: \+[5-7]\.\d points over Standard \(95 % interval \+\d\.\d to \+\d\.\d\)"
    assert re.match(start, judged["sentence"])
    assert "over the model as it is (+" in judged["sentence"]
    assert judged["sentence"].endswith("with 16 rows per task, 24 unseen tasks, 3 repeats.")


def test_verdict_of_a_clear_loss_keeps_the_model_and_says_by_how_much():
    judged = judge({"none": 0.0, "standard": -0.03, "peft-ml": -0.08})
    assert judged["best"] == "none"
    assert judged["sentence"].startswith("Keep the model as it is: no retraining beats it")
    assert "Clearly behind it: Standard −" in judged["sentence"]
    assert re.search(r"PEFT-ML −[78]\.\d", judged["sentence"])


def test_verdict_when_the_data_cannot_tell():
    judged = judge({"none": 0.0, "standard": -0.001, "peft-ml": 0.004}, noise=0.1)
    assert judged["best"] is None
    assert judged["sentence"].startswith("The data cannot tell:")
    assert "95 % interval −" in judged["sentence"]


def test_verdict_when_standard_wins_reports_the_losing_peft_ml():
    judged = judge({"none": 0.0, "standard": 0.08, "peft-ml": 0.03})
    assert judged["best"] == "standard"
    assert "Clearly behind it: PEFT-ML −" in judged["sentence"]


def test_a_method_level_with_standard_is_not_taken_over_it():
    judged = judge({"none": 0.0, "standard": 0.06, "peft-ml": 0.061})
    assert judged["best"] == "standard"
    assert "Not clearly different: PEFT-ML" in judged["sentence"]


def test_few_tasks_never_prove_anything():
    judged = judge({"none": 0.0, "standard": 0.1, "peft-ml": 0.3}, num_tasks=4, noise=0.001)
    assert judged["best"] is None
    assert "4 unseen tasks (fewer than 6, too few to be sure of anything)" in judged["sentence"]


def test_an_interval_above_zero_that_holm_rejects_is_explained():
    pairs, means = pairs_and_means(scores({"none": 0.0, "standard": 0.05}), BASES)
    judged = verdict([{**pair, "p_holm": 0.08} for pair in pairs], means, BASES)
    assert judged["best"] is None
    assert "but p = 0.080 after Holm's correction" in judged["sentence"]


def test_verdict_in_another_metric():
    judged = judge({"none": 0.0, "standard": 0.1}, metric="log-likelihood per token")
    assert "log-likelihood per token over the model as it is" in judged["sentence"]
    assert "points" not in judged["sentence"]


def test_verdict_at_chosen_shots_and_without_controls():
    bases = [{"name": n, "method": "custom", "label": n.upper()} for n in ("a", "b")]
    judged = judge({"a": 0.0, "b": 0.1}, bases=bases, shots=0)
    assert (judged["best"], judged["shots"]) == ("b", 0)
    assert "over A" in judged["sentence"] and "before adapting" in judged["sentence"]
    with pytest.raises(ValueError, match=r"nothing was measured at 7 shots; there are \[0, 16\]"):
        judge({"a": 0.0, "b": 0.1}, bases=bases, shots=7)


def test_verdict_of_one_base_and_of_all_rows_only():
    judged = judge({"peft-ml": 0.0}, shots=None)
    assert judged["best"] is None
    assert judged["sentence"].startswith("Only PEFT-ML was measured")
    _, means = pairs_and_means(scores({"none": 0}, num_tasks=3, shots=(None,)), BASES)
    assert verdict([], means, BASES)["shots"] is None
    _, means = pairs_and_means(scores({"none": 0}, num_tasks=3, shots=(0, None)), BASES)
    assert verdict([], means, BASES)["shots"] is None  # 0 is before adapting


@pytest.mark.parametrize("effects", [(0.0, 0.02, 0.08), (0.0, 0.08, 0.03), (0.0, -0.1, -0.02)])
def test_verdict_does_not_depend_on_which_way_pairs_are_stored(effects):
    pairs, means = pairs_and_means(scores(dict(zip(BASE_NAMES, effects, strict=True))), BASES)
    turned = [
        {
            **pair,
            "a": pair["b"],
            "b": pair["a"],
            "difference": -pair["difference"],
            "low": -pair["high"],
            "high": -pair["low"],
            "wins": pair["losses"],
            "losses": pair["wins"],
        }
        for pair in pairs
    ]
    assert verdict(turned, means, BASES) == verdict(pairs, means, BASES)
