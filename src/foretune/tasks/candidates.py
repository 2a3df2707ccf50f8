"""Draw the distractors of choice examples that have a response but no candidates.

An example's distractors are responses of other examples on its side (seen or unseen) and in its
split: from other groups (dialogues) if examples have groups, else from other tasks. If those are
too few, responses of other splits are added, then responses of the same group or task.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from foretune.errors import UserError
from foretune.tasks.drawn_rows import Drawings, DrawnRows, complete
from foretune.tasks.example import SPLITS, Example
from foretune.tasks.responses import Origin, index_responses
from foretune.tasks.row_store import View
from foretune.tasks.seeds import seed_for
from foretune.tasks.task import Task, TaskCollection

if TYPE_CHECKING:
    import numpy as np

# Up to this many responses a full permutation is drawn for each example, which cannot run short;
# above, examples are drawn at random and the few duplicates discarded.
PERMUTE_UP_TO = 256
# Examples per batch of draws, so that a large task needs no large arrays.
DRAW_ROWS = 2**14
# Up to this many examples a pool is drawn uniformly from all their distinct responses. Above, it is
# drawn from randomly drawn examples, where frequent responses are likelier: that takes a time
# independent of the number of examples.
POOL_FROM_ALL_UP_TO = 2**17
POOL_DRAWS = 16  # examples drawn per response of a pool


def draw_candidates(
    collection: TaskCollection,
    num_candidates: int,
    seed: int = 0,
    pool: int | None = None,
    group_column: str | None = None,
    own_task: bool = False,
) -> TaskCollection:
    """The collection with `candidates` and `answer` instead of each example's `response`.

    Examples that have candidates already are unchanged. A task's draws depend on the seed, on its
    name and on the examples of the collection, not on the order in which tasks are drawn.

    Args:
        collection: Choice tasks of one side (seen or unseen).
        num_candidates: Candidates per example, the true response included.
        seed: Random seed of the distractors and of the place of the true response.
        pool: Number of responses from which a task's distractors are drawn, so that few distinct
            texts must be encoded; None for all.
        group_column: The column that names an example's group; None for "dialogue" or "group" if
            an example has one.
        own_task: Draw from other examples of the same task, which makes harder candidates, instead
            of other groups or tasks.

    Raises:
        UserError: There are too few distinct responses.
    """
    import numpy as np

    _check_counts(num_candidates, pool)
    responses = index_responses(collection, group_column, own_task)
    drawings = Drawings(num_candidates, responses.texts)
    tasks, start = [], 0
    for task_index, task in enumerate(collection):
        splits: dict[str, Sequence[Example]] = {}
        for split_index, split in enumerate(SPLITS):
            examples = task.split(split)
            rows = np.arange(start, start + len(examples))
            start += len(examples)
            lacking = responses.lacking[rows]
            if not lacking.any():
                splits[split] = examples
                continue
            rng = np.random.default_rng(seed_for(seed, task.name, split))
            origin = Origin(responses, rows) if own_task else responses.by_split[split_index]
            if pool is not None:
                origin = Origin(responses, _pool(origin, task_index, pool, rng))
            drawn = np.zeros((len(examples), num_candidates), dtype=np.int32)
            drawn[lacking, :-1] = _draw(origin, rows[lacking], num_candidates - 1, rng, task.name)
            drawn[lacking, -1] = rng.integers(num_candidates, size=lacking.sum())
            splits[split] = _fill(examples, drawn, drawings)
        tasks.append(Task(task.name, **splits))
    return replace(collection, tasks=tuple(tasks))


def _check_counts(num_candidates: int, pool: int | None) -> None:
    if num_candidates < 2:
        raise UserError(f"num_candidates must be at least 2, got {num_candidates}")
    if pool is not None and pool < num_candidates - 1:
        raise UserError(
            f"a candidate pool must hold the {num_candidates - 1} distractors of an example, "
            f"got candidate_pool={pool} with num_candidates={num_candidates}"
        )


def _pool(origin: Origin, task_index: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """(at most size,) indices of examples with distinct responses, other tasks' first."""
    import numpy as np

    responses, source = origin.responses, origin.rows
    if len(source) > POOL_FROM_ALL_UP_TO:
        source = np.unique(rng.choice(source, POOL_DRAWS * size))
    from_other_tasks = source[responses.task[source] != task_index]
    chosen = np.empty(0, dtype=np.int64)
    for rows in (from_other_tasks, source):
        new = rows[~np.isin(responses.text[rows], responses.text[chosen])]
        _, first = np.unique(responses.text[new], return_index=True)
        chosen = np.concatenate([chosen, rng.permutation(new[first])])[:size]
    return chosen


def _draw(
    origin: Origin, rows: np.ndarray, count: int, rng: np.random.Generator, task: str
) -> np.ndarray:
    """(n, count) indices of texts for n examples: distinct, and none the example's own."""
    import numpy as np

    drawn = np.zeros((len(rows), count), dtype=np.int32)
    short: list[int] = []
    for start in range(0, len(rows), DRAW_ROWS):
        part = rows[start : start + DRAW_ROWS]
        drawn[start : start + len(part)], enough = _draw_at_random(origin, part, count, rng)
        short += (start + np.flatnonzero(~enough)).tolist()
    for i in short:
        drawn[i] = _draw_exactly(origin, rows[i], count, rng, task)
    return drawn


def _draw_at_random(
    origin: Origin, rows: np.ndarray, count: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """(n, count) indices of texts, and (n,) whether an example has enough valid ones."""
    import numpy as np

    responses, source = origin.responses, origin.rows
    if len(source) <= PERMUTE_UP_TO:
        picks = source[np.argsort(rng.random((len(rows), len(source))), axis=1)]
    else:
        picks = source[rng.integers(len(source), size=(len(rows), count + count // 2 + 8))]
    texts = responses.text[picks]
    valid = responses.owner[picks] != responses.owner[rows][:, None]
    valid &= texts != responses.text[rows][:, None]
    # A text may be invalid at its first occurrence but valid later: mask invalid ones first.
    valid &= _first_in_row(np.where(valid, texts, -1))
    width = min(count, texts.shape[1])
    order = np.argsort(~valid, axis=1, kind="stable")[:, :width]
    drawn = np.zeros((len(rows), count), dtype=np.int32)
    drawn[:, :width] = np.take_along_axis(texts, order, axis=1)
    return drawn, valid.sum(axis=1) >= count


def _first_in_row(values: np.ndarray) -> np.ndarray:
    """(n, m) true where a value of `values` (n, m) occurs in its row for the first time."""
    import numpy as np

    order = np.argsort(values, axis=1, kind="stable")
    ranked = np.take_along_axis(values, order, axis=1)
    new = np.ones_like(ranked, dtype=bool)
    new[:, 1:] = ranked[:, 1:] != ranked[:, :-1]
    first = np.empty_like(new)
    np.put_along_axis(first, order, new, axis=1)
    return first


def _draw_exactly(
    origin: Origin, row: int, count: int, rng: np.random.Generator, task: str
) -> np.ndarray:
    """(count,) texts of distractors of one example if responses are few, preferred origin first.

    Raises:
        UserError: There are fewer than `count` other responses.
    """
    import numpy as np

    responses = origin.responses
    owner = responses.owner[row]
    chosen = np.empty(0, dtype=np.int64)
    for texts in (
        origin.texts_beside(owner),
        responses.all.texts_beside(owner),
        np.arange(len(responses.texts)),
    ):
        new = np.setdiff1d(texts, np.append(chosen, responses.text[row]))
        chosen = np.concatenate([chosen, rng.permutation(new)])[:count]
        if len(chosen) == count:
            return chosen
    raise UserError(
        f'task "{task}": {count + 1} candidates need {count} other responses, but there are '
        f"only {len(chosen)} distinct ones: set num_candidates to {len(chosen) + 1} or less, "
        "or add rows or tasks"
    )


def _fill(examples: Sequence[Example], drawn: np.ndarray, drawings: Drawings) -> Sequence[Example]:
    """The examples with their candidates: a view of a view, else a tuple."""
    if isinstance(examples, View):
        return DrawnRows(examples, drawings, drawings.append(drawn))
    texts = drawings.texts.in_memory
    return tuple(
        complete(example, numbers, texts)
        for example, numbers in zip(examples, drawn.tolist(), strict=True)
    )
