"""Which trial of a retraining becomes the base."""

from __future__ import annotations

from foretune.recipes.trials import best_of


def trial(*scores: float | None) -> dict:
    """A trial with these scores of the held-out tasks; None for one that diverged."""
    if scores == (None,):
        return {"score": None, "by_task": None}
    by_task = {f"task{i}": score for i, score in enumerate(scores)}
    return {"score": sum(by_task.values()) / len(by_task), "by_task": by_task}


def test_a_later_trial_that_is_better_within_noise_does_not_replace_an_earlier_one():
    assert best_of([trial(0.6, 0.7, 0.8), trial(0.9, 0.5, 0.8)]) == 0


def test_a_later_trial_that_is_better_by_more_than_a_standard_error_is_taken():
    assert best_of([trial(0.6, 0.7, 0.8), trial(0.7, 0.79, 0.91), trial(0.5, 0.5, 0.5)]) == 1


def test_trials_that_diverged_are_passed_over():
    assert best_of([trial(None), trial(0.1, 0.2), trial(None)]) == 1
    assert best_of([trial(None)]) is None and best_of([]) is None


def test_without_held_out_tasks_the_highest_score_is_taken_and_the_first_of_several():
    scored = [{"score": 0.5, "by_task": None}, {"score": 0.6}, {"score": 0.6}]
    assert best_of(scored) == 1
