"""Draws the distractors of choice rows that bring a response but no candidates.

A row's distractors are the responses of other rows on its side (seen or unseen) and in its split:
of other groups (dialogues) where rows have a group, else of other tasks. Where those are too few,
rows of other splits help out, then rows of the same group or task.
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

# Up to this many responses a whole permutation of them is drawn for each row, which cannot run
# short; above, rows are drawn at random and the few duplicates thrown away.
PERMUTE_UP_TO = 256
# Rows for which distractors are drawn at once, so that a large task needs no large arrays.
DRAW_ROWS = 2**14
# Up to this many rows a pool is drawn from all their distinct responses, each as likely as any
# other. Above, from rows drawn at random, where a frequent response is likelier: that takes a time
# which does not grow with the rows.
POOL_FROM_ALL_UP_TO = 2**17
POOL_DRAWS = 16  # rows drawn for each response that a pool wants


def draw_candidates(
    collection: TaskCollection,
    num_candidates: int,
    seed: int = 0,
    pool: int | None = None,
    group_column: str | None = None,
    own_task: bool = False,
) -> TaskCollection:
    """The collection with `candidates` and `answer` in the place of every row's `response`.

    Rows that have candidates already stay as they are. What a task gets depends on the seed, on
    its name and on the rows of the collection, not on the order in which tasks are drawn.

    Args:
        collection: Choice tasks of one side (seen or unseen).
        num_candidates: Candidates of each row, the true response included.
        seed: Seeds the distractors and the place of the true response.
        pool: Draw a task's distractors from so many responses only, so that few distinct texts
            must be encoded; None for all.
        group_column: The column that says which rows belong together; None for "dialogue" or
            "group" where a row has one.
        own_task: Draw from the task's own other rows, which makes harder candidates, instead of
            other groups or tasks.

    Raises:
        UserError: There are too few distinct responses.
    """
    import numpy as np

    _check_counts(num_candidates, pool)
    responses = index_responses(collection, group_column, own_task)
    drawings = Drawings(num_candidates, responses.texts)
    tasks, start = [], 0
    for number, task in enumerate(collection):
        splits: dict[str, Sequence[Example]] = {}
        for split_number, split in enumerate(SPLITS):
            rows = task.split(split)
            own = np.arange(start, start + len(rows))
            start += len(rows)
            lacking = responses.lacking[own]
            if not lacking.any():
                splits[split] = rows
                continue
            rng = np.random.default_rng(seed_for(seed, task.name, split))
            origin = Origin(responses, own) if own_task else responses.by_split[split_number]
            if pool is not None:
                origin = Origin(responses, _pool(origin, number, pool, rng))
            drawn = np.zeros((len(rows), num_candidates), dtype=np.int32)
            drawn[lacking, :-1] = _draw(origin, own[lacking], num_candidates - 1, rng, task.name)
            drawn[lacking, -1] = rng.integers(num_candidates, size=lacking.sum())
            splits[split] = _fill(rows, drawn, drawings)
        tasks.append(Task(task.name, **splits))
    return replace(collection, tasks=tuple(tasks))


def _check_counts(num_candidates: int, pool: int | None) -> None:
    if num_candidates < 2:
        raise UserError(f"num_candidates must be at least 2, got {num_candidates}")
    if pool is not None and pool < num_candidates - 1:
        raise UserError(
            f"a candidate pool must hold the {num_candidates - 1} distractors of a row, "
            f"got candidate_pool={pool} with num_candidates={num_candidates}"
        )


def _pool(origin: Origin, task: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """Up to `size` rows with distinct responses: other tasks' first, then all of `origin`."""
    import numpy as np

    responses, source = origin.responses, origin.rows
    if len(source) > POOL_FROM_ALL_UP_TO:
        source = np.unique(rng.choice(source, POOL_DRAWS * size))
    others = source[responses.task[source] != task]
    chosen = np.empty(0, dtype=np.int64)
    for rows in (others, source):
        new = rows[~np.isin(responses.text[rows], responses.text[chosen])]
        _, first = np.unique(responses.text[new], return_index=True)
        chosen = np.concatenate([chosen, rng.permutation(new[first])])[:size]
    return chosen


def _draw(
    origin: Origin, own: np.ndarray, count: int, rng: np.random.Generator, task: str
) -> np.ndarray:
    """(len(own), count) numbers of texts: distinct in a row, none the row's own."""
    import numpy as np

    drawn = np.zeros((len(own), count), dtype=np.int32)
    short: list[int] = []
    for start in range(0, len(own), DRAW_ROWS):
        part = own[start : start + DRAW_ROWS]
        drawn[start : start + len(part)], enough = _draw_at_random(origin, part, count, rng)
        short += (start + np.flatnonzero(~enough)).tolist()
    for i in short:
        drawn[i] = _draw_exactly(origin, own[i], count, rng, task)
    return drawn


def _draw_at_random(
    origin: Origin, own: np.ndarray, count: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """(n, count) numbers of texts, and (n,) whether the row has got enough good ones."""
    import numpy as np

    responses, source = origin.responses, origin.rows
    if len(source) <= PERMUTE_UP_TO:
        picks = source[np.argsort(rng.random((len(own), len(source))), axis=1)]
    else:
        picks = source[rng.integers(len(source), size=(len(own), count + count // 2 + 8))]
    texts = responses.text[picks]
    good = responses.owner[picks] != responses.owner[own][:, None]
    good &= texts != responses.text[own][:, None]
    # A text that cannot be used where it comes first may still be good later: hide the bad first.
    good &= _first_in_row(np.where(good, texts, -1))
    width = min(count, texts.shape[1])
    order = np.argsort(~good, axis=1, kind="stable")[:, :width]
    drawn = np.zeros((len(own), count), dtype=np.int32)
    drawn[:, :width] = np.take_along_axis(texts, order, axis=1)
    return drawn, good.sum(axis=1) >= count


def _first_in_row(values: np.ndarray) -> np.ndarray:
    """True where a value stands in its row for the first time."""
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
    """The distractors of one row where responses are few, nearest choice first."""
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
        f"{len(chosen)} distinct ones: set num_candidates to {len(chosen) + 1} or less, "
        "or add rows or tasks"
    )


def _fill(rows: Sequence[Example], drawn: np.ndarray, drawings: Drawings) -> Sequence[Example]:
    """The rows with their candidates: a view of a view, else a tuple."""
    if isinstance(rows, View):
        return DrawnRows(rows, drawings, drawings.append(drawn))
    texts = drawings.texts.in_memory
    return tuple(complete(row, own, texts) for row, own in zip(rows, drawn.tolist(), strict=True))
