"""Draws the distractors of choice rows that bring a response but no candidates.

A row's distractors are the responses of other rows on its side (seen or unseen) and in its split:
of other groups (dialogues) where rows have a group, else of other tasks. Where those are too few,
rows of other splits help out, then rows of the same group or task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from foretune.errors import UserError
from foretune.tasks.seeds import seed_for
from foretune.tasks.task import SPLITS, Example, Task, TaskCollection

if TYPE_CHECKING:
    import numpy as np

GROUP_COLUMNS = ("dialogue", "group")
# Up to this many responses a whole permutation of them is drawn for each row, which cannot run
# short; above, rows are drawn at random and the few duplicates thrown away.
PERMUTE_UP_TO = 256


@dataclass(frozen=True)
class _Responses:
    """Every row of a collection, as arrays; `text[i]` is the index of row i's response in `texts`.

    `owner` is what a row's distractors must not share: its group, or its task without groups.
    """

    texts: list[str]
    text: np.ndarray
    owner: np.ndarray
    task: np.ndarray
    split: np.ndarray


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
    responses = _index(collection, group_column, own_task)
    tasks, start = [], 0
    for number, task in enumerate(collection):
        splits: dict[str, Sequence[Example]] = {}
        for split_number, split in enumerate(SPLITS):
            rows = task.split(split)
            own = np.arange(start, start + len(rows))
            start += len(rows)
            own = own[[("candidates" not in row) for row in rows]] if len(rows) else own
            if not len(own):
                splits[split] = rows
                continue
            rng = np.random.default_rng(seed_for(seed, task.name, split))
            allowed = responses.split == split_number
            if own_task:
                allowed &= responses.task == number
            source = np.flatnonzero(allowed)
            if pool is not None:
                source = _pool(responses, number, source, pool, rng)
            drawn = _draw(responses, own, source, num_candidates - 1, rng, task.name)
            places = rng.integers(num_candidates, size=len(own))
            splits[split] = _fill(rows, drawn, places, responses.texts)
        tasks.append(Task(task.name, **splits))
    return replace(collection, tasks=tuple(tasks))


def true_response(row: Example) -> str:
    """The right answer of a choice row, before or after its candidates are drawn."""
    text: str = row["candidates"][row["answer"]] if "candidates" in row else row["response"]
    return text


def group_of(row: Example, group_column: str | None) -> Any:
    """What says which rows of a task belong together (a dialogue's number); None without."""
    columns = GROUP_COLUMNS if group_column is None else (group_column,)
    return next((row[c] for c in columns if c in row), None)


def _check_counts(num_candidates: int, pool: int | None) -> None:
    if num_candidates < 2:
        raise UserError(f"num_candidates must be at least 2, got {num_candidates}")
    if pool is not None and pool < num_candidates - 1:
        raise UserError(
            f"a candidate pool must hold the {num_candidates - 1} distractors of a row, "
            f"got candidate_pool={pool} with num_candidates={num_candidates}"
        )


def _index(collection: TaskCollection, group_column: str | None, own_task: bool) -> _Responses:
    import numpy as np

    texts: dict[str, int] = {}
    owners: dict[tuple[int, str], int] = {}
    table: list[tuple[int, int, int, int]] = []
    for number, task in enumerate(collection):
        for split_number, split in enumerate(SPLITS):
            for row in task.split(split):
                response = true_response(row)
                # With distractors from the own task only the row itself is out of bounds.
                group = len(table) if own_task else group_of(row, group_column)
                owner = owners.setdefault((number, repr(group)), len(owners))
                text = texts.setdefault(response, len(texts))
                table.append((text, owner, number, split_number))
    columns = np.asarray(table, dtype=np.int64).T
    return _Responses(list(texts), *columns)


def _pool(
    responses: _Responses, task: int, source: np.ndarray, size: int, rng: np.random.Generator
) -> np.ndarray:
    """Up to `size` rows with distinct responses: other tasks' first, then all of `source`."""
    import numpy as np

    others = source[responses.task[source] != task]
    chosen = np.empty(0, dtype=np.int64)
    for rows in (others, source):
        new = rows[~np.isin(responses.text[rows], responses.text[chosen])]
        _, first = np.unique(responses.text[new], return_index=True)
        chosen = np.concatenate([chosen, rng.permutation(new[first])])[:size]
    return chosen


def _draw(
    responses: _Responses,
    own: np.ndarray,
    source: np.ndarray,
    count: int,
    rng: np.random.Generator,
    task: str,
) -> np.ndarray:
    """(len(own), count) indices into `responses.texts`: distinct in a row, none the row's own."""
    import numpy as np

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
    drawn = np.zeros((len(own), count), dtype=np.int64)
    drawn[:, :width] = np.take_along_axis(texts, order, axis=1)
    for i in np.flatnonzero(good.sum(axis=1) < count):
        drawn[i] = _draw_exactly(responses, own[i], source, count, rng, task)
    return drawn


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
    responses: _Responses,
    row: int,
    source: np.ndarray,
    count: int,
    rng: np.random.Generator,
    task: str,
) -> np.ndarray:
    """The distractors of one row where responses are few, nearest choice first."""
    import numpy as np

    foreign = responses.owner != responses.owner[row]
    levels = (source[foreign[source]], np.flatnonzero(foreign), np.arange(len(foreign)))
    chosen = np.empty(0, dtype=np.int64)
    for rows in levels:
        new = np.setdiff1d(responses.text[rows], np.append(chosen, responses.text[row]))
        chosen = np.concatenate([chosen, rng.permutation(new)])[:count]
        if len(chosen) == count:
            return chosen
    raise UserError(
        f'task "{task}": {count + 1} candidates need {count} other responses, but there are '
        f"{len(chosen)} distinct ones: set num_candidates to {len(chosen) + 1} or less, "
        "or add rows or tasks"
    )


def _fill(
    rows: Sequence[Example], drawn: np.ndarray, places: np.ndarray, texts: list[str]
) -> tuple[Example, ...]:
    """The rows with their candidates; the response is now candidates[answer]."""
    draws = iter(zip(drawn.tolist(), places.tolist(), strict=True))
    filled: list[Mapping[str, Any]] = []
    for row in rows:
        if "candidates" in row:
            filled.append(row)
            continue
        ids, place = next(draws)
        candidates = [texts[i] for i in ids]
        candidates.insert(place, row["response"])
        kept = {key: value for key, value in row.items() if key != "response"}
        filled.append({**kept, "candidates": candidates, "answer": place})
    return tuple(filled)
