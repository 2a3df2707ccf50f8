"""A retraining that is validated by how well its base adapts to held-out tasks."""

from __future__ import annotations

import contextlib

import pytest

import foretune
import tiny_models
from contract.retrain_forms import FORMS, named
from foretune.errors import UserError
from foretune.methods import make
from foretune.run import Run
from foretune.tasks.task import Task, TaskCollection
from foretune.training.adapted_scores import best_scores
from foretune.training.held_out import HeldOut
from linear_tasks import Net, equal_bits, family

RUN = Run(steps=12, eval_every=4, batch_size=4, device="cpu", seed=1)
LORA = {"r": 1, "lora_alpha": 1}
WILD = foretune.Standard(learning_rate=0.8)
CONSTANT = {"schedule": "constant", "warmup": 0.0, "steps": 60, "eval_every": 2}


def held_out(**changes) -> HeldOut:
    method = foretune.LoRA(learning_rate=0.02, lora=LORA)
    fixed = {"tasks": family(3, prefix="held"), "method": method, "run": Run(steps=6)}
    return HeldOut(**{**fixed, **changes})


def retrain(method, *, stop_at=None, held=None, **changes):
    def progress(update, updates, figures):
        if update == stop_at:
            raise RuntimeError("stopped")

    run, held = RUN.replace(**changes), held or held_out()
    return foretune.retrain(Net(), family(), method, run, held_out=held, progress=progress)


def adapted_score(base, held, run, objective=None) -> float:
    """What a validation scores, as one adaptation."""
    tasks = held.tasks if objective is None else held.tasks.with_objective(objective)
    how = {"shots": held.shots, "split": "validation", "score_at": held.score_at}
    scores = best_scores(foretune.adapt(base, tasks, held.method, held.run_in(run), **how).path)
    return sum(scores.values()) / len(scores)


@pytest.mark.parametrize(("name", "fields"), named(FORMS))
def test_the_score_is_that_of_adapting_the_base_that_is_returned(name, fields):
    outcome = retrain(make(name, **fields))
    assert outcome.validation_score == pytest.approx(
        adapted_score(outcome.model, held_out(), RUN), abs=1e-6
    )
    if name == "none":
        assert [*outcome.history] == [{"step": 0, "adapted_score": outcome.validation_score}]
    elif name != "auto":
        assert outcome.history[0]["step"] == 0 and len(outcome.history) >= 4
        assert all("score" not in entry for entry in outcome.history)
    assert outcome.cost["validation_tokens"] > 0


def test_labels_that_all_tasks_share_keep_the_head_of_the_base():
    rows = [{"text": f"the {w}", "label": w} for w in ("red", "blue")] * 6
    objective = foretune.Classification(tokenizer=tiny_models.tokenizer())
    tasks = [Task(name, rows[:8], rows[8:]) for name in ("a", "b", "c")]
    base = tiny_models.bert(num_labels=2, num_hidden_layers=1)
    held = held_out(tasks=TaskCollection(tuple(tasks[2:])), shots=2)
    seen = TaskCollection(tuple(tasks[:2]), objective)
    outcome = foretune.retrain(base, seen, foretune.Standard(), RUN, held_out=held)
    score = adapted_score(outcome.model, held, RUN, outcome.objective)
    assert outcome.validation_score == pytest.approx(score)


def test_validating_does_not_disturb_the_training():
    method = foretune.PEFTML(learning_rate=0.02, lora={"r": 2, "lora_dropout": 0.2})
    validated = retrain(method)
    plain = foretune.retrain(Net(), family(), method, RUN)
    losses = [entry["loss"] for entry in validated.history[1:]]
    assert losses == [entry["loss"] for entry in plain.history]
    assert equal_bits(validated.bank.state_dict(), plain.bank.state_dict())


def test_the_last_state_level_with_the_best_is_returned_and_patience_ends_the_retraining():
    outcome = retrain(WILD, **CONSTANT)
    scores = {entry["step"]: entry["adapted_score"] for entry in outcome.history}
    best = max(scores, key=scores.__getitem__)
    returned = next(s for s, score in scores.items() if score == outcome.validation_score)
    assert best < 60 and best <= returned
    assert outcome.validation_score == sum(outcome.held_out_scores.values()) / 3
    base_score = adapted_score(outcome.model, held_out(), RUN.replace(**CONSTANT))
    assert base_score == outcome.validation_score
    stopped = retrain(WILD, **CONSTANT, patience=3)
    assert stopped.history[-1]["step"] < 60
    assert stopped.history == outcome.history[: len(stopped.history)]
    first = {entry["step"]: entry["adapted_score"] for entry in stopped.history}
    assert max(first, key=first.__getitem__) == stopped.history[-4]["step"]
    assert stopped.cost["examples"] < outcome.cost["examples"]


def test_a_base_that_only_gets_worse_is_returned_as_it_was():
    harmful = foretune.Standard(learning_rate=30.0)
    outcome = retrain(harmful, patience=2)
    assert equal_bits(outcome.model.state_dict(), Net().state_dict())
    none = retrain(foretune.NoRetraining())
    assert outcome.validation_score == none.validation_score


@pytest.mark.parametrize("stop_at", [1, 7, 12, 21])
@pytest.mark.parametrize("name", ["standard", "peft-ml", "fomaml"])
def test_stopped_and_resumed_equals_undisturbed(name, stop_at, tmp_path):
    method = make(name, learning_rate=0.2)
    how = {"schedule": "constant", "steps": 24, "eval_every": 2, "patience": 4}
    undisturbed = retrain(method, **how)
    with contextlib.suppress(RuntimeError):  # it may be over before it is stopped
        retrain(method, stop_at=stop_at, out=tmp_path / "out", **how)
    resumed = retrain(method, out=tmp_path / "out", resume=True, **how)
    assert equal_bits(resumed.model.state_dict(), undisturbed.model.state_dict())
    assert resumed.history == undisturbed.history
    assert resumed.cost["validation_tokens"] == undisturbed.cost["validation_tokens"]


def test_resuming_with_other_held_out_tasks_is_refused(tmp_path):
    with pytest.raises(RuntimeError):
        retrain(WILD, stop_at=5, out=tmp_path / "out")
    other = held_out(tasks=family(2, prefix="held"))
    with pytest.raises(UserError, match="was started with tasks="):
        retrain(WILD, held=other, out=tmp_path / "out", resume=True)


def test_adapting_that_diverges_is_no_validation():
    method = foretune.Head(learning_rate=1e30)
    outcome = retrain(foretune.Standard(), held=held_out(method=method), patience=1)
    assert outcome.validation_score is None
    assert [set(entry) for entry in outcome.history] == [{"step"}, *[{"step", "loss"}] * 3]


def test_no_more_rows_are_scored_than_the_run_says():
    tasks = held_out().with_rows(3, family().objective)
    assert [len(task.validation) for task in tasks] == [3, 3, 3]


def test_held_out_tasks_that_cannot_validate_are_refused():
    tasks = family(2, validation=0)
    with pytest.raises(UserError, match='held-out task "task0" has no validation examples'):
        held_out(tasks=tasks)
    with pytest.raises(UserError, match='task "task0" is both retrained on and held out'):
        retrain(WILD, held=held_out(tasks=family(2)))


def test_patience_without_held_out_tasks_counts_the_validations_on_seen_ones():
    run = RUN.replace(**CONSTANT, patience=3)
    outcome = foretune.retrain(Net(), family(), WILD, run)
    scores = [entry["score"] for entry in outcome.history]
    assert len(scores) < 30 and scores.index(max(scores)) == len(scores) - 4
