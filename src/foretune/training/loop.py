"""The only training loop, for all methods and verbs: draw, update, validate, checkpoint."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from foretune.errors import DivergedError, UserError
from foretune.models.seeding import seed_generators
from foretune.run import Run
from foretune.training.adapted_scores import is_level
from foretune.training.checkpoint import CheckpointStore
from foretune.training.data import Sampler, TaskData, episodes
from foretune.training.learners.joint import Learner
from foretune.training.process_group import Partition
from foretune.training.record import counted
from foretune.training.sharding import local_tensor
from foretune.training.stopping import EarlyStopping

Progress = Callable[[int, int, dict[str, Any]], None]  # (update, num_updates, latest figures)
AdaptedScores = Callable[[], dict[str, float] | None]  # held-out task → score


def fit(
    learner: Learner,
    data: TaskData,
    sampler: Sampler,
    run: Run,
    *,
    validate: bool = True,
    adapted_scores: AdaptedScores | None = None,
    stopping: EarlyStopping | None = None,
    progress: Progress | None = None,
    partition: Partition | None = None,
    at_step: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Trains the learner and leaves it in its best validated state.

    With held-out tasks it is the last state that is level with the best: not below it by more than
    one standard error of their difference over these tasks. A search for the highest of ten means
    would pick by luck a base that has hardly been trained.

    A learner that averages its base ends with the mean instead, and takes all steps.

    Args:
        learner: What to update and how; its bank has the slots of this process's partition.
        data: The examples of each slot.
        sampler: Draws the examples of each of the `run.steps` batches.
        run: Budget, random seed, folder.
        validate: Select the final state by validation; False takes the last.
        adapted_scores: How well the base as it stands adapts to held-out tasks, by task; None if
            adapting diverged. The training is validated by their mean instead of the validation
            examples, also before the first update. Called while neither bank nor caches are
            attached to the model.
        stopping: Stops slots, each by its own validation examples.
        progress: Called after every update.
        partition: This process's part of the training; None for all of it.
        at_step: Called with the number of updates so far: before the first, and after each.

    Returns:
        "history": one dict per validation (step, loss, and score or adapted_score); "best_step",
        "best_score" of the state that is taken: None without a score; "peak": the validation with
        the highest score (step, score and, of held-out tasks, by_task); "by_task": the scores of
        held-out tasks in the state that is taken, else None; "tokens", "examples": totals of the
        training; "validation_tokens": those of backward passes in validations, which adapt.

    Raises:
        DivergedError: A loss is not finite; names the step and task. The checkpoints stay.
    """
    accelerator = make_accelerator(run)
    partition = partition or Partition(data)
    learner.place(accelerator.device, partition)
    learner.autocast = accelerator.autocast
    learner.start(run)
    store = CheckpointStore(run.out, partition)
    per_update = learner.batches_per_update
    batches = episodes(run, len(data), per_update)
    num_updates = len(batches)
    period = max(1, round((run.eval_every or math.ceil(run.steps / 10)) / per_update))
    validate = validate and run.eval_every != 0
    record: dict[str, Any] = {
        "history": [],
        "best_step": None,
        "best_score": None,
        "peak": None,
        "by_task": None,
        "tokens": 0,
        "examples": 0,
        "validation_tokens": 0,
        "step": 0,
    }
    record |= _restored(learner, store) if run.resume else {}
    losses: list[float] = []
    full_rate = learner.learning_rate or learner.bank_learning_rate
    with contextlib.ExitStack() as ready:
        validation = _Validation(
            learner, partition, run, store, record, ready, adapted_scores if validate else None
        )
        learner.model.train()
        ready.enter_context(learner.ready())
        if validation.adapted_scores is not None and not record["history"]:
            validation.keep([], validate)
        if at_step is not None and record["step"] == 0:
            at_step(0)
        for update in range(record["step"], num_updates):
            if validate and _is_over(record, run, learner):
                break
            seed = run.seed * 1_000_003 + update
            seed_generators(seed)
            numbers = batches[update]
            picks = [sampler.picks(number) for number in numbers]
            if stopping is not None:
                picks = [stopping.active(part) for part in picks]
                if not picks[0]:
                    break
            budget = learner.token_budget
            rate = schedule(run, update / num_updates)
            steps = [
                partition.step(part, seed=[run.seed, number, 1], budget=budget)
                for number, part in zip(numbers, picks, strict=True)
            ]
            by_slot = learner.update(steps, run, rate, seed)
            _check_finite(by_slot, update, data, learner, run)
            if learner.average:
                learner.add_to_mean(update, num_updates)
            loss = sum(by_slot.values()) / len(by_slot)
            losses.append(loss)
            tokens = torch.tensor(sum(step.num_tokens for step in steps))
            record["tokens"] += int(partition.group.sum(tokens))
            record["examples"] += sum(step.num_rows for step in steps)
            record["step"] = update + 1
            if (update + 1) % period == 0 or update + 1 == num_updates:
                validation.keep(losses, validate)
                losses = []
                if stopping is not None:
                    scores = scores_after(
                        update + 1, learner, data, "validation", run.eval_rows, run
                    )
                    stopping.update(update + 1, scores)
            if at_step is not None:
                at_step(update + 1)
            if progress is not None:
                progress(
                    update + 1,
                    num_updates,
                    {
                        "loss": loss,
                        "score": _latest_score(record),
                        "learning_rate": rate * full_rate,
                    },
                )
        if learner.average:
            learner.take_mean()
            of_mean = validation.scores() if validate else {}
            mean = sum(of_mean.values()) / len(of_mean) if of_mean else None
            by_task = dict(of_mean) if of_mean and validation.adapted_scores is not None else None
            record |= {"best_step": num_updates, "best_score": mean, "by_task": by_task}
    if stopping is not None:
        stopping.restore()
    if record["best_step"] not in (None, num_updates):
        best = store.best(record["best_step"])
        assert best is not None
        learner.load_state(best)
    learner.model.eval()
    return record


@dataclass
class _Validation:
    """Scores the state of a training, and keeps its checkpoints.

    Args:
        learner: What is trained.
        partition: This process's part of it.
        run: The run.
        store: The checkpoints.
        record: The record of the training, which it updates.
        ready: What is attached to the model; closed while a copy adapts.
        adapted_scores: As in `fit`.
    """

    learner: Learner
    partition: Partition
    run: Run
    store: CheckpointStore
    record: dict[str, Any]
    ready: contextlib.ExitStack
    adapted_scores: AdaptedScores | None

    def keep(self, losses: Sequence[float], validate: bool) -> None:
        """Validates, adds to the history, and keeps a checkpoint."""
        record, run = self.record, self.run
        _check_weights(self.learner, self.partition, record["step"], run)
        entry: dict[str, Any] = {"step": record["step"]}
        if losses:
            entry["loss"] = sum(losses) / len(losses)
        scores = self.scores() if validate else {}
        if scores:
            score = sum(scores.values()) / len(scores)
            entry["score" if self.adapted_scores is None else "adapted_score"] = score
            self._select(score, scores)
        record["history"].append(entry)
        if run.out is not None or record["best_step"] == record["step"]:
            state = self.learner.state(optimizers=run.out is not None)
            self.store.save(record["step"], state, record)

    def scores(self) -> Mapping[Any, float]:
        """The scores of the current state by slot or held-out task; none without any to score."""
        with counted() as spent:
            if self.adapted_scores is None:
                scores: Mapping[Any, float] = _scores(
                    self.learner, self.partition, self.run, self.record["step"]
                )
            else:
                self.ready.close()
                scores = self.adapted_scores() or {}
                self.ready.enter_context(self.learner.ready())
        group = self.partition.group
        self.record["validation_tokens"] += int(group.sum(torch.tensor(spent["tokens"])))
        return scores

    def _select(self, score: float, scores: Mapping[Any, float]) -> None:
        """Takes the current state if it has the highest score or, after adapting, is level."""
        record, by_task = self.record, None if self.adapted_scores is None else dict(scores)
        peak = record["peak"]
        if peak is None or score > peak["score"]:
            record["peak"] = {"step": record["step"], "score": score, "by_task": by_task}
        elif by_task is None or not is_level(by_task, peak["by_task"]):
            return
        record |= {"best_step": record["step"], "best_score": score, "by_task": by_task}


def _latest_score(record: dict[str, Any]) -> float | None:
    """The score of the last validation."""
    latest = record["history"][-1] if record["history"] else {}
    return latest.get("score", latest.get("adapted_score"))


def _is_over(record: dict[str, Any], run: Run, learner: Learner) -> bool:
    """Whether `run.patience` validations in a row have not improved on the best."""
    if not run.patience or record["peak"] is None or learner.average:
        return False
    since = [entry for entry in record["history"] if entry["step"] > record["peak"]["step"]]
    return len(since) >= run.patience


def schedule(run: Run, done: float) -> float:
    """The factor of the learning rates after the fraction `done` of the updates."""
    if run.warmup and done < run.warmup:
        # The first update must move, so the rise starts one step above zero.
        return min(1.0, (done * run.steps + 1) / (run.warmup * run.steps))
    if run.schedule == "constant":
        return 1.0
    left = (1 - done) / (1 - run.warmup) if run.warmup < 1 else 1.0
    return left if run.schedule == "linear" else 0.5 * (1 - math.cos(math.pi * left))


def check_device(device: str | None) -> None:
    """Checks that a device is there, before anything is written.

    Raises:
        UserError: It is not.
    """
    kind, _, number = (device or "cpu").partition(":")
    if kind == "cuda":
        available = int(number or 0) < torch.cuda.device_count()
    elif kind == "mps":
        available = torch.backends.mps.is_available()
    else:
        backend = getattr(torch, kind, None)
        available = kind == "cpu" or (backend is not None and backend.is_available())
    if not available:
        others = f"{torch.cuda.device_count()} CUDA devices" if torch.cuda.is_available() else "cpu"
        raise UserError(f"device={device} is not available: torch finds only {others}; omit device")


def make_accelerator(run: Run) -> Accelerator:
    """Accelerate's device and precision for this run; runs of one process may differ in both.

    Raises:
        UserError: The device of the run is not available.
    """
    # Private: nothing public lets one process choose its device and precision again.
    AcceleratorState._reset_state(reset_partial_state=True)
    precision = "bf16" if run.precision == "bf16" else "no"
    kind, _, number = (run.device or "").partition(":")
    if kind == "cuda" and number and int(number) < torch.cuda.device_count():
        torch.cuda.set_device(int(number))
    accelerator = Accelerator(mixed_precision=precision, cpu=kind == "cpu")
    device = accelerator.device
    if kind and kind != device.type:
        raise UserError(
            f"device={run.device} is not available: torch finds only {device.type}; omit device"
        )
    return accelerator


def _restored(learner: Learner, store: CheckpointStore) -> dict[str, Any]:
    newest = store.newest()
    if newest is None:
        return {}
    tensors, meta = newest
    learner.load_state(tensors)
    return meta


def _scores(learner: Learner, partition: Partition, run: Run, step: int) -> dict[int, float]:
    """The validation scores of all slots; each process scores its own."""
    local_scores = {}
    with partition.group.raise_together():
        if partition.slots or partition.sharded:
            local_scores = scores_after(
                step, learner, partition.local_data, "validation", run.eval_rows, run
            )
    return partition.gather_scores(local_scores if partition.slots else {})


def _check_finite(
    by_slot: dict[int, float], update: int, data: TaskData, learner: Learner, run: Run
) -> None:
    for slot, loss in by_slot.items():
        if not math.isfinite(loss):
            what = f"the loss is {loss} at step {update + 1}, task {data.slots[slot].key!r}"
            raise _diverged(what, learner, run)


def scores_after(
    step: int, learner: Learner, data: TaskData, split: str, max_rows: int | None, run: Run
) -> dict[int, float]:
    """The scores of all slots after so many steps of training.

    Raises:
        DivergedError: A score is not finite; the message names task, row and step.
    """
    with naming_step(step, learner, run):
        return learner.score(data, split, max_rows)


@contextlib.contextmanager
def naming_step(step: int, learner: Learner, run: Run) -> Iterator[None]:
    """Names the step in the error of a score or loss that is not finite.

    Raises:
        DivergedError: One in the block is not finite; the message names task, row and step.
    """
    try:
        yield
    except DivergedError as error:
        diverged = _diverged(f"{error} after step {step}", learner, run)
        raise diverged from error


def _check_weights(learner: Learner, partition: Partition, step: int, run: Run) -> None:
    """A finite loss may have an infinite gradient; its result must not become a checkpoint."""
    what = next(_not_finite(learner, partition.local_data, step), None)
    partition.group.raise_on_all(None if what is None else _diverged(what, learner, run))


def _not_finite(learner: Learner, data: TaskData, step: int) -> Iterator[str]:
    for name, p in learner.model.named_parameters():
        if p.requires_grad and not torch.isfinite(local_tensor(p)).all():
            yield f"the weights of {name} are not finite after step {step}"
    for p in () if learner.bank is None else learner.bank.parameters():
        for slot in torch.nonzero(~torch.isfinite(p).flatten(1).all(1)).flatten().tolist():
            yield f"the adapter is not finite after step {step}, task {data.slots[slot].key!r}"


def _diverged(what: str, learner: Learner, run: Run) -> DivergedError:
    rate = learner.learning_rate or learner.bank_learning_rate
    checkpoint = f"; the last checkpoint is in {run.out}" if run.out is not None else ""
    return DivergedError(
        f"{what}: try a lower learning_rate (now {rate:g}), a longer warmup or a smaller "
        f"max_grad_norm{checkpoint}"
    )
