"""The loop: divergence, the choice of the best state, the schedule, the samplers, precision."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from typing import ClassVar

import pytest
import torch

import foretune
from foretune.errors import DivergedError, ForetuneError, UserError
from foretune.run import Run
from foretune.tasks.objectives.regression import Regression
from foretune.tasks.task import Task, TaskCollection
from foretune.training.checkpoint import CheckpointStore
from foretune.training.data import (
    PerTaskSampler,
    PooledSampler,
    TaskData,
    episodes,
    sampler_for,
)
from foretune.training.learners.joint import Learner
from foretune.training.loop import fit, schedule
from linear_tasks import Net, copy_of, equal_bits, family

PEFT_ML = foretune.PEFTML(learning_rate=0.02, adapter_learning_rate=0.02, lora={"r": 2})
STANDARD = foretune.Standard(learning_rate=0.02)


def _run(**changes) -> Run:
    fixed = {"steps": 12, "eval_every": 2, "batch_size": 4, "device": "cpu"}
    return Run(**{**fixed, **changes})


# --- divergence ----------------------------------------------------------------------------------


class NaNFrom(Regression):
    """A regression whose losses of one slot turn to NaN at the n-th batch."""

    def __init__(self, batch: int, slot: int = 1) -> None:
        object.__setattr__(self, "at", [batch, slot, 0])

    def losses(self, model, batch):
        losses = super().losses(model, batch)
        self.at[2] += torch.is_grad_enabled()
        if self.at[2] < self.at[0]:
            return losses
        bad = torch.tensor([slot == self.at[1] for slot in batch.slots])
        return losses * torch.where(bad, math.nan, 1.0)

    __eq__ = object.__eq__
    __hash__ = object.__hash__


@pytest.mark.parametrize("method", [PEFT_ML, foretune.Standard(learning_rate=0.02)])
def test_nan_loss_stops_and_says_where(method, tmp_path):
    tasks = family().with_objective(NaNFrom(7))
    with pytest.raises(
        DivergedError,
        match=r"the loss is nan at step 7, task 'task1': try a lower learning_rate "
        r"\(now 0\.02\), a longer warmup or a smaller max_grad_norm; the last "
        r"checkpoint is in ",
    ) as error:
        foretune.retrain(Net(), tasks, method, _run(out=tmp_path))
    assert isinstance(error.value, ForetuneError) and error.value.exit_code == 1
    assert "\n" not in str(error.value)
    tensors, meta = CheckpointStore(tmp_path).newest()
    assert meta["step"] == 6
    assert all(torch.isfinite(v).all() for v in tensors.values())


def test_after_the_cause_is_mended_the_run_goes_on(tmp_path):
    with pytest.raises(DivergedError):
        foretune.retrain(Net(), family().with_objective(NaNFrom(7)), PEFT_ML, _run(out=tmp_path))
    resumed = foretune.retrain(Net(), family(), PEFT_ML, _run(out=tmp_path, resume=True))
    undisturbed = foretune.retrain(Net(), family(), PEFT_ML, _run())
    assert equal_bits(resumed.model.state_dict(), undisturbed.model.state_dict())


@pytest.mark.parametrize(
    "method",
    [
        PEFT_ML,
        foretune.Reptile(inner_learning_rate=0.01, inner_steps=2),
        foretune.FOMAML(inner_learning_rate=0.01, inner_steps=2, inner="adapter"),
    ],
    ids=lambda m: m.name,
)
def test_nothing_moves_on_a_nan_loss(method):
    model, tasks = Net(), family()
    objective = NaNFrom(1, slot=0)
    run = _run(steps=3)
    data = TaskData.of(tasks, objective)
    learner = method.learner(model, objective, data.keys, run)
    before = copy_of(model)
    sampler = sampler_for(
        data, run, pooled=method.pooled, batches_per_update=learner.batches_per_update
    )
    with pytest.raises(DivergedError, match="task 'task0'"):
        fit(learner, data, sampler, run)
    assert equal_bits(model.state_dict(), before)


def test_infinite_gradients_do_not_replace_the_last_good_checkpoint(tmp_path):
    """A finite loss may have a gradient that is not: the square root at zero."""

    class Root(Regression):
        count: ClassVar = [0]

        def losses(self, model, batch):
            losses = super().losses(model, batch)
            if torch.is_grad_enabled():
                self.count[0] += 1
                if self.count[0] == 8:
                    return losses + (losses - losses).sqrt()
            return losses

    with pytest.raises(
        DivergedError, match=r"the weights of body\.weight are not finite after step 8: try"
    ):
        foretune.retrain(Net(), family().with_objective(Root()), STANDARD, _run(out=tmp_path))
    tensors, meta = CheckpointStore(tmp_path).newest()
    assert meta["step"] == 6
    assert all(torch.isfinite(v).all() for v in tensors.values())


def test_an_overflowing_rate_is_told_while_adapting():
    with pytest.raises(DivergedError, match="a lower learning_rate"):
        foretune.adapt(
            Net(),
            family(),
            foretune.Full(learning_rate=1e38),
            _run(warmup=0.0, schedule="constant", max_grad_norm=None),
        )


# --- the state that is returned ------------------------------------------------------------------


def _wild(**changes) -> Run:
    """Constant and far too high: the score goes up and down, the last one is not the best."""
    return _run(steps=30, schedule="constant", warmup=0.0, eval_rows=None, **changes)


@pytest.mark.parametrize("on_disk", [False, True])
def test_the_best_validated_state_is_returned_not_the_last(on_disk, tmp_path):
    run = _wild(out=tmp_path if on_disk else None)
    outcome = foretune.retrain(Net(), family(), foretune.Standard(learning_rate=0.8), run)
    scores = [entry["score"] for entry in outcome.history]
    assert outcome.validation_score == max(scores) > scores[-1]
    scored = foretune.retrain(
        outcome.model, family(), foretune.NoRetraining(), run.replace(out=None)
    ).validation_score
    assert scored == pytest.approx(outcome.validation_score, rel=1e-5)


def test_without_validation_the_last_state_is_returned():
    off = foretune.retrain(Net(), family(), STANDARD, _run(eval_every=0))
    assert off.validation_score is None
    assert off.history and all("score" not in entry for entry in off.history)
    no_rows = foretune.retrain(Net(), family(validation=0), STANDARD, _run(eval_every=12))
    assert no_rows.validation_score is None
    assert all("score" not in entry for entry in no_rows.history)


def test_every_validation_is_written_down(tmp_path):
    outcome = foretune.retrain(Net(), family(), PEFT_ML, _run(out=tmp_path))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == outcome.history
    assert [entry["step"] for entry in outcome.history] == [2, 4, 6, 8, 10, 12]
    assert all(math.isfinite(entry["loss"] + entry["score"]) for entry in outcome.history)


def test_progress_is_told_after_every_update():
    calls = []
    foretune.retrain(
        Net(), family(), PEFT_ML, _run(), progress=lambda *args: calls.append(args[:2])
    )
    assert calls == [(update, 12) for update in range(1, 13)]


def test_validation_does_not_change_what_is_learnt():
    often = foretune.retrain(Net(), family(validation=0), PEFT_ML, _run(eval_every=1))
    never = foretune.retrain(Net(), family(), PEFT_ML, _run(eval_every=0))
    assert equal_bits(often.model.state_dict(), never.model.state_dict())


# --- schedule ------------------------------------------------------------------------------------


def _rates(kind, steps=10, warmup=0.2):
    run = Run(steps=steps, schedule=kind, warmup=warmup)
    return [schedule(run, step / steps) for step in range(steps)]


def test_schedule_values():
    rise = [0.5, 1.0]
    assert _rates("constant") == pytest.approx([*rise, *[1.0] * 8])
    assert _rates("linear") == pytest.approx([*rise, *[1 - i / 8 for i in range(8)]])
    cosine = [(1 + math.cos(math.pi * i / 8)) / 2 for i in range(8)]
    assert _rates("cosine") == pytest.approx([*rise, *cosine])
    assert _rates("linear", warmup=0.0) == pytest.approx([1 - i / 10 for i in range(10)])


@pytest.mark.parametrize("warmup", [0.0, 0.01, 0.3, 1.0])
@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_no_update_is_wasted_and_none_overshoots(kind, warmup):
    assert all(0 < rate <= 1 for rate in _rates(kind, steps=7, warmup=warmup))


# --- samplers ------------------------------------------------------------------------------------


def _per_task(sizes=(5, 3, 8), batch_size=2, together=None, seed=0, repeat=1):
    keys = [f"task{i}" for i in range(len(sizes))]
    return PerTaskSampler(sizes, batch_size, together, seed, keys, repeat)


@pytest.mark.parametrize("together", [None, 1, 2])
def test_each_epoch_of_a_task_holds_every_row_once(together):
    sampler, sizes = _per_task(together=together), (5, 3, 8)
    drawn = [
        [i for step in range(60) for s, i in sampler.picks(step) if s == slot] for slot in range(3)
    ]
    for slot, size in enumerate(sizes):
        epochs = [drawn[slot][k : k + size] for k in range(0, len(drawn[slot]) - size + 1, size)]
        assert len(epochs) >= 4
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) > 1  # a new order each time


def test_tasks_take_turns():
    slots = [{slot for slot, _ in _per_task(together=2).picks(step)} for step in range(6)]
    assert slots == [{0, 1}, {2, 0}, {1, 2}] * 2


def test_a_small_task_gives_all_it_has():
    assert Counter(s for s, _ in _per_task(sizes=(5, 1, 8), batch_size=4).picks(3)) == {
        0: 4,
        1: 1,
        2: 4,
    }


def test_an_episode_stays_with_its_tasks_and_sees_new_rows():
    sampler = _per_task(sizes=(12, 12, 12), together=1, repeat=3)
    for episode in range(6):
        picks = [sampler.picks(3 * episode + part) for part in range(3)]
        assert {slot for part in picks for slot, _ in part} == {episode % 3}
        assert len({i for part in picks for _, i in part}) == 6


@pytest.mark.parametrize(
    "sampler", [lambda: _per_task(together=2, repeat=2), lambda: PooledSampler((5, 3, 8), 6, 0)]
)
def test_a_sampler_is_a_function_of_the_step(sampler):
    forward, backward = sampler(), sampler()
    steps = list(range(20))
    in_order = [forward.picks(step) for step in steps]
    assert [backward.picks(step) for step in reversed(steps)][::-1] == in_order
    assert all(sampler().picks(step) == in_order[step] for step in (0, 7, 19))


def test_a_tasks_rows_do_not_depend_on_the_other_tasks():
    alone = PerTaskSampler((8,), 2, None, 0, ["task2"])
    among = _per_task()
    for step in range(12):
        assert [i for _, i in alone.picks(step)] == [i for s, i in among.picks(step) if s == 2]


def test_seeds_give_other_orders():
    a, b = (_per_task(sizes=(30, 30, 30), batch_size=30, seed=s).picks(0) for s in (0, 1))
    assert a != b and sorted(a) == sorted(b)
    c, d = (PooledSampler((30, 30), 60, s).picks(0) for s in (0, 1))
    assert c != d and sorted(c) == sorted(d)


def test_pooled_rows_cover_everything_and_mix_tasks():
    sampler = PooledSampler((5, 3, 8), 4, 0)
    drawn = [pick for step in range(12) for pick in sampler.picks(step)]
    everything = sorted((s, i) for s, size in enumerate((5, 3, 8)) for i in range(size))
    for epoch in range(3):
        assert sorted(drawn[16 * epoch : 16 * (epoch + 1)]) == everything
    assert drawn[:16] != drawn[16:32]
    assert any(len({slot for slot, _ in sampler.picks(step)}) > 1 for step in range(4))


def test_standard_retraining_draws_from_all_rows_alike():
    """A task with more rows is seen more often; the other methods see each task equally often."""
    data = TaskData.of(family(rows=[30, 10, 20]), Regression())
    for method, expected in ((STANDARD, {0: 30, 1: 10, 2: 20}), (PEFT_ML, {0: 20, 1: 20, 2: 20})):
        sampler = sampler_for(data, _run(), pooled=method.pooled)
        assert Counter(s for step in range(5) for s, _ in sampler.picks(step)) == expected


BUDGETS = {
    "whole episodes": ([20] * 4, {"steps": 60}),
    "unlike tasks": ([3, 20, 100], {"steps": 60, "batch_size": 8}),
    "two tasks at a time": ([20] * 5, {"steps": 60, "tasks_per_step": 2}),
    "unlike tasks, one at a time": (
        [2, 2, 50],
        {"steps": 30, "batch_size": 16, "tasks_per_step": 1},
    ),
    "fewer steps than an episode": ([20] * 4, {"steps": 4}),
    "no multiple of an episode": ([20, 2, 20, 9], {"steps": 59}),
    "a single step": ([20, 2, 20], {"steps": 1}),
}


@pytest.mark.parametrize("budget", BUDGETS)
def test_every_method_sees_equally_many_examples(budget):
    sizes, fields = BUDGETS[budget]
    tasks = family(len(sizes), rows=sizes)
    run = _run(**{"batch_size": 4, "eval_every": 0, **fields})
    methods = [STANDARD, PEFT_ML]
    for inner in ("all", "adapter"):
        lora = {"r": 1, "lora_alpha": 1}
        methods += [
            episodic(inner=inner, lora=lora, learning_rate=1e-3)
            for episodic in (foretune.Reptile, foretune.FOMAML)
        ]
    examples = [foretune.retrain(Net(), tasks, method, run).cost["examples"] for method in methods]
    assert set(examples) == {examples[0]}


@pytest.mark.parametrize(("num_tasks", "tasks_per_step"), [(4, None), (4, 1), (5, 2), (6, 4)])
@pytest.mark.parametrize("steps", [1, 7, 40, 59])
@pytest.mark.parametrize("length", [1, 5])
def test_episodes_give_each_task_as_many_batches_as_single_steps(
    num_tasks, tasks_per_step, steps, length
):
    run = _run(steps=steps, tasks_per_step=tasks_per_step)
    sizes, keys = [100] * num_tasks, [f"t{i}" for i in range(num_tasks)]
    counts = []
    for repeat in (1, length):
        sampler = PerTaskSampler(sizes, 1, tasks_per_step, 0, keys, repeat)
        numbers = [n for batches in episodes(run, num_tasks, repeat) for n in batches]
        assert len(numbers) == steps
        counts.append(Counter(slot for n in numbers for slot, _ in sampler.picks(n)))
    assert counts[0] == counts[1]
    whole = [*range(0, steps, length)]
    if steps % (length * num_tasks) == 0:
        assert [batches.start for batches in episodes(run, num_tasks, length)] == whole


def test_mean_of_a_pooled_batch_may_be_a_fraction():
    drawn = [len(PooledSampler((5, 3, 8), Fraction(20, 3), 0).picks(step)) for step in range(6)]
    assert drawn == [6, 7, 7, 6, 7, 7]


def test_a_task_without_training_rows_is_refused():
    rows = family().tasks[0].train
    tasks = TaskCollection((Task("a", rows), Task("b", (), (), rows)), Regression())
    with pytest.raises(UserError, match='task "b" has no training examples'):
        foretune.retrain(Net(), tasks, PEFT_ML, _run())


# --- the learner ---------------------------------------------------------------------------------


def test_the_loss_is_the_mean_over_tasks_of_each_tasks_mean():
    tasks = family(rows=[9, 9, 9])
    data = TaskData.of(tasks, Regression())
    model = Net()
    learner = Learner(model, Regression(), learning_rate=0.1)
    picks = [(0, 0), (2, 0), (2, 1), (2, 2)]
    step = data.step(picks, "train", train=True, seed=[0])
    by_slot = learner.backward(step)
    each = Regression().losses(model, step.chunks[0])
    assert by_slot == pytest.approx({0: each[0].item(), 2: each[1:].mean().item()})
    loss = (each[0] + each[1:].mean()) / 2
    expected = torch.autograd.grad(loss, learner.base)
    for p, grad in zip(learner.base, expected, strict=True):
        torch.testing.assert_close(p.grad, grad)


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("budget", [1, 2, 3, 5])
def test_the_gradient_does_not_depend_on_the_chunks(pooled, budget):
    tasks = family(rows=[9, 9, 9])
    data = TaskData.of(tasks, Regression())
    picks = [(0, 0), (2, 0), (2, 1), (2, 2), (1, 4), (1, 5)]
    results = []
    for tokens in (None, budget):
        learner = Learner(Net().double(), Regression(), learning_rate=0.1, pooled=pooled)
        step = data.step(picks, "train", train=True, seed=[0], budget=tokens)
        doubles = [
            replace(c, inputs={k: v.double() for k, v in c.inputs.items()}) for c in step.chunks
        ]
        step = replace(step, chunks=tuple(doubles))
        assert len(step.chunks) == (1 if tokens is None else math.ceil(6 / tokens))
        results.append((learner.backward(step), [p.grad for p in learner.base]))
    assert results[1][0] == pytest.approx(results[0][0])
    torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-12, atol=1e-14)


def test_a_batch_is_sorted_by_slot_with_its_own_rows():
    tasks = family()
    data = TaskData.of(tasks, Regression())
    (batch,) = data.step([(2, 1), (0, 4), (1, 0)], "train", train=True, seed=[0]).chunks
    assert batch.slots == (0, 1, 2)
    for k, (slot, i) in enumerate([(0, 4), (1, 0), (2, 1)]):
        for name in ("x", "y"):
            expected = torch.tensor(tasks.tasks[slot].train[i][name])
            assert torch.equal(batch.inputs[name][k], expected)


# --- precision and other settings ----------------------------------------------------------------


@pytest.mark.parametrize(
    "method",
    [PEFT_ML, STANDARD, foretune.Reptile(inner_steps=2), foretune.FOMAML(inner_steps=2)],
    ids=lambda m: m.name,
)
def test_bf16_trains_and_keeps_float32_weights(method):
    outcome = foretune.retrain(Net(), family(), method, _run(precision="bf16", steps=4))
    assert all(p.dtype == torch.float32 for p in outcome.model.parameters())
    assert all(torch.isfinite(p).all() for p in outcome.model.parameters())
    exact = foretune.retrain(Net(), family(), method, _run(steps=4))
    assert not equal_bits(outcome.model.state_dict(), exact.model.state_dict())
    x = torch.randn(8, 4)
    torch.testing.assert_close(outcome.model(x), exact.model(x), rtol=0.1, atol=0.1)


def test_precision_of_one_run_does_not_stick():
    before = foretune.retrain(Net(), family(), STANDARD, _run())
    foretune.retrain(Net(), family(), STANDARD, _run(precision="bf16"))
    after = foretune.retrain(Net(), family(), STANDARD, _run())
    assert equal_bits(before.model.state_dict(), after.model.state_dict())


@pytest.mark.parametrize(
    ("field", "bad"),
    [
        ("steps", -1), ("steps", 2.5), ("steps", None), ("batch_size", None), ("seed", -1),
        ("seed", "x"), ("tasks_per_step", 0), ("eval_every", -1), ("eval_rows", 0),
        ("tasks_per_wave", 0), ("warmup", 1.5), ("warmup", "a lot"), ("weight_decay", -0.1),
        ("weight_decay", None), ("max_grad_norm", 0), ("schedule", "step"), ("precision", "fp16"),
    ],
)  # fmt: skip
def test_a_bad_setting_is_refused_by_name(field, bad):
    with pytest.raises(UserError, match=f"^{field} .*{bad!r}"):
        Run(**{field: bad})


def test_a_run_survives_json(tmp_path):
    run = _run(out=tmp_path, tasks_per_step=2, precision="bf16")
    assert Run(**json.loads(json.dumps(run.to_dict()))) == run
