"""The statistics against naive loops, SciPy and hand-worked examples; what the verdict says."""

from __future__ import annotations

import re
import time
from itertools import product

import numpy as np
import pytest
from scipy import stats

from foretune.evaluation.crossed import Layout, half_width, p_value
from foretune.evaluation.statistics import (
    compare_pairs,
    holm,
    mean_interval,
    paired_difference,
    pairs_and_means,
    signed_rank_test,
    verdict,
)
from foretune.evaluation.verdict import contrast, tasks_needed

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


def test_interval_equals_the_two_way_layout_by_hand():
    values = np.array([[5.0, 7.0], [4.0, 5.0], [9.0, 10.0], [2.0, 5.0]])
    tasks = 2 * np.var(values.mean(axis=1), ddof=1)  # mean squares of the two-way layout
    seeds = 4 * np.var(values.mean(axis=0), ddof=1)
    rest = values - values.mean(axis=1, keepdims=True) - values.mean(axis=0) + values.mean()
    luck = seeds - (rest**2).sum() / 3
    squares = tasks * stats.t.ppf(0.975, 3) ** 2 + luck * stats.t.ppf(0.975, 1) ** 2
    half = np.sqrt(squares / 8)
    paired = paired_difference(values, np.zeros((4, 2)))
    expected = (values.mean() - half, values.mean() + half)
    assert luck > 0
    assert (paired.low, paired.high) == pytest.approx(expected)


def test_shared_seed_noise_widens_the_interval():
    rng = np.random.default_rng(0)
    tasks = rng.normal(size=(50, 1))
    _, low, high = mean_interval(tasks + np.zeros((1, 5)))
    _, wide_low, wide_high = mean_interval(tasks + 3 * rng.normal(size=(1, 5)))
    assert wide_high - wide_low > 3 * (high - low)


def test_one_seed_gives_the_t_interval_of_the_tasks():
    values = np.random.default_rng(0).normal(size=(9, 1))
    expected = stats.ttest_1samp(values[:, 0], 0).confidence_interval()
    assert mean_interval(values)[1:] == pytest.approx((expected.low, expected.high))


def test_one_task_gives_the_t_interval_of_the_seeds():
    values = np.random.default_rng(0).normal(size=(1, 4))
    expected = stats.ttest_1samp(values[0], 0).confidence_interval()
    assert mean_interval(values)[1:] == pytest.approx((expected.low, expected.high))


def test_the_interval_of_a_mean_stays_within_zero_and_one():
    _, low, high = mean_interval([[1.0], [1.0], [0.0]])
    assert (low, high) == (0.0, 1.0)
    assert mean_interval([[1.0], [1.0], [-0.1]])[2] > 1


def test_the_interval_of_a_difference_of_shares_stays_within_one() -> None:
    paired = paired_difference([[1.0], [0.0]], [[0.0], [0.5]])
    assert (paired.low, paired.high) == (-1.0, 1.0)


def null_scores(rng, num_tasks, num_seeds, *, luck, noise=0.03, steps=0):
    """Scores (num_tasks, num_seeds) of a base that is no better than another, in accuracy.

    Its tasks vary by 3 points, its retrainings by `luck`, single scores by `noise`.
    """
    values = 0.7 + rng.normal(0, 0.03, (num_tasks, 1)) + rng.normal(0, luck, (1, num_seeds))
    values = values + rng.normal(0, noise, (num_tasks, num_seeds))
    return np.round(values * steps) / steps if steps else values


@pytest.mark.parametrize("steps", [0, 20])
@pytest.mark.parametrize("num_seeds", [1, 2, 3, 5])
@pytest.mark.parametrize("num_tasks", [6, 12, 40])
def test_intervals_cover_the_difference_as_often_as_they_say(num_tasks, num_seeds, steps):
    """Luck of a retraining 0.4 points, but 0 with one seed, whose interval leaves it out."""
    rng, covered, trials = np.random.default_rng(0), 0, 1500
    fields = {"luck": 0.004 * (num_seeds > 1), "steps": steps}
    for _ in range(trials):
        a, b = (null_scores(rng, num_tasks, num_seeds, **fields) for _ in range(2))
        paired = paired_difference(a, b)
        covered += paired.low <= 0 <= paired.high
    assert 0.93 <= covered / trials <= 0.97


def test_paired_difference_ignores_what_both_share():
    rng = np.random.default_rng(0)
    hard = rng.normal(0, 10, size=(20, 1))
    a, b = hard + 0.5 + rng.normal(0, 0.1, (20, 3)), hard + rng.normal(0, 0.1, (20, 3))
    paired = paired_difference(a, b)
    assert paired.difference == pytest.approx((a - b).mean())
    assert 0.3 < paired.low < paired.difference < paired.high < 0.7
    assert (paired.num_tasks, paired.num_seeds) == (20, 3)


def test_p_value_is_the_larger_of_the_signed_rank_test_and_the_t_test():
    rng = np.random.default_rng(3)
    a = np.concatenate([rng.normal(0.2, 1, (15, 1)), rng.normal(5, 1, (15, 1))], axis=1)
    b = rng.normal(0, 1, (15, 1))
    for column in a.T[:, :, None]:
        tests = stats.wilcoxon(column - b, axis=0), stats.ttest_rel(column, b)
        expected = max(float(test.pvalue.item()) for test in tests)
        assert paired_difference(column, b).p_value == pytest.approx(expected)


@pytest.mark.parametrize("num_seeds", [1, 2, 4])
def test_the_interval_of_one_minus_p_reaches_zero(num_seeds):
    values = 0.3 + np.random.default_rng(0).normal(size=(9, num_seeds))
    layout = Layout.of(values)
    p = p_value(layout.mean, layout.errors())
    assert half_width(layout.errors(), 1 - p) == pytest.approx(layout.mean)


def test_luck_without_differences_between_tasks_is_a_t_test_of_the_repeats():
    luck = np.array([0.1, 0.3, 0.2, 0.4])
    layout = Layout.of(np.tile(luck, (6, 1)))
    expected = stats.ttest_1samp(luck, 0)
    assert p_value(layout.mean, layout.errors()) == pytest.approx(expected.pvalue)


@pytest.mark.parametrize("size", [1, 5, 9, 13])
def test_p_value_with_ties_counts_all_signs(size):
    rng = np.random.default_rng(size)
    differences = rng.integers(1, 4, size) * rng.choice([-1, 1], size)
    ranks = stats.rankdata(np.abs(differences))
    sums = np.array(list(product([0, 1], repeat=size))) @ ranks
    positive = ranks[differences > 0].sum()
    tail = min((sums <= positive).mean(), (sums >= positive).mean())
    assert signed_rank_test(differences) == pytest.approx(min(1.0, 2 * tail))


@pytest.mark.parametrize("size", [60, 300, 600])
def test_p_value_of_many_tasks_is_near_the_normal_approximation(size):
    differences = np.random.default_rng(0).normal(0.05, 1, size)
    expected = stats.wilcoxon(differences, method="approx").pvalue
    assert signed_rank_test(differences) == pytest.approx(expected, abs=0.01)


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


def test_each_pair_has_its_own_luck():
    """One base whose retrainings differ by ten times as much leaves the others' interval alone."""
    rng = np.random.default_rng(0)
    tables = {
        name: np.tile(spread * rng.normal(size=4), (5, 1))
        for name, spread in {"a": 0.01, "b": 0.01, "wild": 0.1}.items()
    }
    pairs = {(x, y): (tables[x], tables[y]) for x, y in [("a", "b"), ("a", "wild"), ("b", "wild")]}
    for (x, y), pair in compare_pairs(pairs).items():
        alone = stats.ttest_1samp(tables[x][0] - tables[y][0], 0)
        interval = alone.confidence_interval(0.95)
        assert (pair["low"], pair["high"]) == pytest.approx((interval.low, interval.high))


def test_draws_of_one_retraining_are_no_repeats():
    records = scores({"none": 0, "standard": 0.02}, num_tasks=9, num_seeds=4, shots=(4,))
    in_pairs, _ = pairs_and_means([{**row, "repeat": row["seed"] // 2} for row in records], BASES)
    once, _ = pairs_and_means([{**row, "repeat": 0} for row in records], BASES)
    assert (in_pairs[0]["num_seeds"], once[0]["num_seeds"]) == (2, 1)
    apart, _ = pairs_and_means(records, BASES)
    assert in_pairs[0]["difference"] == pytest.approx(apart[0]["difference"])


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
    assert (
        "4 unseen tasks (fewer than 7: with 3 pairs compared, too few to be sure of anything)"
        in judged["sentence"]
    )


@pytest.mark.parametrize("num_bases", [2, 3, 5, 8])
def test_the_tasks_needed_are_the_fewest_with_which_a_perfect_base_is_taken(num_bases):
    names = ["none", *(f"m{i}" for i in range(1, num_bases))]
    bases = [{"name": n, "method": n, "label": n} for n in names]
    needed = tasks_needed(num_bases * (num_bases - 1) // 2)

    def best(num_tasks):
        effects = dict.fromkeys(names, 0.0) | {names[-1]: 0.5}
        return judge(effects, bases=bases, num_tasks=num_tasks, noise=0.01)["best"]

    assert (best(needed - 1), best(needed)) == (None, names[-1])


ONCE = "1 repeat; another retraining may rank them differently: run with seeds=3"


@pytest.mark.parametrize(
    ("effects", "start"),
    [
        ((0.0, 0.02, 0.08), "Of these checkpoints take the one of PEFT-ML: +"),
        ((0.0, -0.03, -0.08), "Keep the model as it is: none of these checkpoints beats it"),
        ((0.0, 0.004, 0.005), "The data cannot tell: of these checkpoints the one of "),
    ],
)
def test_one_repeat_speaks_of_checkpoints_and_never_of_a_method(effects, start):
    judged = judge(dict(zip(BASE_NAMES, effects, strict=True)), num_seeds=1)
    first = judged["sentence"].split(". ")[0]
    assert judged["sentence"].startswith(start)
    assert ONCE in first and "Take" not in judged["sentence"]
    assert judged["about"] == "checkpoints"


def test_several_repeats_speak_of_methods():
    judged = judge({"none": 0.0, "standard": 0.02, "peft-ml": 0.08})
    assert judged["about"] == "methods"
    assert "checkpoint" not in judged["sentence"] and ONCE not in judged["sentence"]


def test_a_base_is_contrasted_with_named_rivals_either_way_round():
    pairs, _ = pairs_and_means(scores({"none": 0.0, "standard": 0.02, "peft-ml": 0.08}), BASES)
    ahead = contrast(pairs, "peft-ml", "standard", 16)
    behind = contrast(pairs, "standard", "peft-ml", 16)
    assert ahead is not None and behind is not None
    assert ahead.better and behind.worse and behind.low == -ahead.high
    assert contrast(pairs, "peft-ml", "reptile", 16) is None


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
