"""Benchmarks of general ability, as lm-eval (EleutherAI's lm-evaluation-harness) scores them."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import logging
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from foretune.errors import UserError, did_you_mean
from foretune.evaluation.forgetting import Measured, check_predicts_tokens
from foretune.models.calls import eval_no_grad
from foretune.models.routing import routed
from foretune.models.seeding import seed_generators
from foretune.tasks.uncounted import uncounted

BATCH = 8  # requests at once
FILES = (".yaml", ".yml")
GROUP = re.compile(r"^group:\s*['\"]?([^'\"#\n]+?)['\"]?\s*$", re.MULTILINE)
SEED = 1234  # lm-eval's, for the examples in a prompt


class Benchmarks:
    """Tasks of lm-eval, with their examples.

    Args:
        names: Names of tasks or groups that lm-eval knows, or paths of task files (`.yaml`).
        max_examples: Examples that are scored of each task; None for all.

    Raises:
        UserError: lm-eval is not installed, a task is unknown, or its file or data cannot be read.
    """

    def __init__(self, names: Sequence[str], max_examples: int | None = None) -> None:
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise UserError(
                "forgetting.benchmarks needs lm-eval: pip install 'foretune[eval]'"
            ) from error
        self.max_examples = max_examples
        files = [name for name in names if name.endswith(FILES)]
        with _quiet(), uncounted():
            manager = _manager() if len(files) < len(names) else TaskManager(include_defaults=False)
            for name in names:
                _check_name(name, manager.all_tasks)
            self._loaded: Any = {}
            for name in names:
                self._loaded = _merged(self._loaded, _load(manager, name), name)
        for task in self._loaded["tasks"].values():
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=SEED)

    @property
    def digest(self) -> str:
        """Of the tasks' settings and examples."""
        return hashlib.sha256("\0".join(map(_described, self._tasks.values())).encode()).hexdigest()

    @property
    def _tasks(self) -> dict[str, Any]:
        tasks: dict[str, Any] = self._loaded["tasks"]
        return tasks

    def try_on(self, model: nn.Module, tokenizer: Any) -> None:
        """Scores two examples of each task.

        Raises:
            UserError: As `measure`.
        """
        self._measure(model, tokenizer, 2)

    def measure(self, model: nn.Module, tokenizer: Any) -> list[Measured]:
        """The scores of a decoder, one for each metric of each task.

        Prompts are plain texts: no chat template is applied.

        Raises:
            UserError: The model does not predict tokens, lm-eval cannot score it, or a task has no
                metric that it knows.
        """
        return self._measure(model, tokenizer, self.max_examples)

    def _measure(self, model: nn.Module, tokenizer: Any, most: int | None) -> list[Measured]:
        from lm_eval import evaluate
        from lm_eval.models.huggingface import HFLM

        check_predicts_tokens(model, tokenizer)
        with _quiet(), _fixed_randomness(), eval_no_grad(model), routed(None, None):
            scorer = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH)
            try:
                results = evaluate(
                    lm=scorer,
                    task_dict=self._loaded,
                    limit=most,
                    bootstrap_iters=0,
                    log_samples=True,
                )
            except Exception as error:
                raise UserError(f"lm-eval: {_first_line(error)}") from error
        measured: list[Measured] = []
        for name in self._tasks:
            of_task = [*_measures(name, results["results"][name], results)]
            if not of_task:
                raise UserError(f"forgetting.benchmarks: lm-eval knows no metric of task {name}")
            measured += of_task
        return measured


@functools.cache
def _manager() -> Any:
    """lm-eval's, of all its tasks: it reads a thousand files, in seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _load(manager: Any, name: str) -> Any:
    """The tasks of a name or file.

    Raises:
        UserError: They cannot be loaded.
    """
    try:
        group = GROUP.search(Path(name).read_text("utf-8")) if name.endswith(FILES) else None
        if group is None:
            return manager.load([name])
        beside = type(manager)(include_path=str(Path(name).parent), include_defaults=False)
        return beside.load([group[1]])
    except Exception as error:  # whatever a data set or a task file may raise
        hint = " (its data must be at hand, or on the hub and HF_HUB_OFFLINE not set)"
        from_outside = isinstance(error, OSError)
        raise UserError(
            f"forgetting.benchmarks: {name} cannot be loaded: {_first_line(error)}"
            f"{hint if from_outside else ''}"
        ) from error


def _merged(first: Mapping[str, Any], second: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The tasks of both.

    Raises:
        UserError: One is in both.
    """
    twice = first.get("tasks", {}).keys() & second["tasks"].keys()
    if twice:
        raise UserError(
            f"forgetting.benchmarks: {name} brings a second task {min(twice)}: leave one out, or "
            "give it another name"
        )
    return {key: {**first.get(key, {}), **part} for key, part in second.items()}


def _check_name(name: str, task_names: Sequence[str]) -> None:
    """Checks that a task is there.

    Raises:
        UserError: It is not.
    """
    if name.endswith(FILES):
        if not Path(name).is_file():
            raise UserError(f"forgetting.benchmarks: {name} does not exist")
    elif name not in task_names:
        raise UserError(
            f"forgetting.benchmarks: lm-eval has no task {name}; `lm-eval ls tasks` lists them."
            f"{did_you_mean(name, task_names)}"
        )


def _measures(
    name: str, scores: Mapping[str, Any], results: Mapping[str, Any]
) -> Iterator[Measured]:
    samples = results["samples"].get(name, [])
    for key, score in scores.items():
        metric, _, kind = key.partition(",")
        if not kind or "stderr" in metric or not isinstance(score, (int, float)):
            continue
        values = [s.get(metric) for s in samples if s.get("filter", "none") == kind]
        by_example = None
        if values and all(isinstance(value, (int, float)) for value in values):
            by_example = np.array(values, dtype=float)
            # Some metrics are no mean over examples, such as a perplexity.
            if not np.isclose(by_example.mean(), score, rtol=1e-6, atol=1e-9):
                by_example = None
        yield Measured(
            name=name,
            metric=metric if kind == "none" else f"{metric}, {kind}",
            score=float(score),
            by_example=by_example,
            num_examples=len(values) or int(scores.get("sample_len", 0)),
            higher_is_better=results["higher_is_better"].get(name, {}).get(metric) is not False,
        )


def _described(task: Any) -> str:
    settings = json.dumps(task.dump_config(), default=str, sort_keys=True)
    examples = [list(task.eval_docs)]
    if task.get_config("num_fewshot"):
        examples.append(list(task.fewshot_docs() or ()))
    return settings + json.dumps(examples, default=str)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Inside the block lm-eval logs errors alone and shows no bars."""
    loggers = [logging.getLogger("lm_eval"), logging.getLogger("lm-eval")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def _fixed_randomness() -> Iterator[None]:
    """Inside the block random numbers are the same each time; afterwards they go on as before."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(0)
        np.random.seed(SEED)
        seed_generators(SEED)
        try:
            yield
        finally:
            random.setstate(of_python)
            np.random.set_state(of_numpy)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
