"""`Source`: where tasks come from. `load_tasks`: read, check, split and complete them."""

from __future__ import annotations

import dataclasses
from array import array
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from foretune.errors import UserError, did_you_mean
from foretune.run import check_at_least, check_one_of, check_seed
from foretune.tasks.candidates import draw_candidates
from foretune.tasks.episodes import Episodes, draw_episodes
from foretune.tasks.example import SPLITS
from foretune.tasks.labels import label_of
from foretune.tasks.messages import check_message_names, with_message_names
from foretune.tasks.readers import HUB_ID, Row, read_rows
from foretune.tasks.responses import GROUP_COLUMNS, group_of
from foretune.tasks.row_store import RowStore
from foretune.tasks.rows import CLASSES, NEEDS, example_of, readable, split_of, task_of
from foretune.tasks.split_names import LEFT_OUT, SplitNames, check_renames
from foretune.tasks.splits import carve, cut_train, draw_tasks
from foretune.tasks.task import Task, TaskCollection

PYTHON_DOCS = "python-docs"

PACKAGED = {
    name: Path(__file__).parents[1] / "data" / f"{name}.jsonl.gz"
    for name in ("land-bank", "land-bank-chats")
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """Where tasks come from and how they are split: the `tasks:` block of a recipe.

    Args:
        source: A file (.jsonl, .json, .csv, .tsv, .parquet, .arrow, .npz) or a folder of those,
            "land-bank" or "land-bank-chats" (votes on statements, in the package), "python-docs"
            (the documentation of the installed Python modules), or an HF dataset ("owner/name",
            with ":config" if it has several).
        task_column: The column that names a row's task.
        group_column: The column that names a row's group, so that splits keep groups together;
            None for "dialogue" or "group" if a row has one.
        unseen: Tasks to hold out: their number, their names, or a second source that holds them;
            None for none.
        turn: With a number of unseen tasks: the tasks are shuffled and cut into groups of that
            size, and the group of this index (modulo the number of groups) is held out; None to
            draw the unseen tasks at random.
        validation: Share of train moved to validation in tasks without validation examples.
        test: Share of train moved to test in tasks without test examples.
        min_rows: Tasks with fewer examples are dropped.
        max_tasks: Maximum number of tasks, drawn with the seed; unseen tasks given by name are
            always kept.
        max_rows: Maximum number of train examples per task, drawn with the seed.
        num_candidates: Candidates per choice example, for examples with a response only; the
            response is one of them.
        candidate_pool: Number of distinct responses from which a task's distractors are drawn;
            None for all.
        candidates_from: "others" for distractors from other groups or tasks, "own" for distractors
            from other examples of the same task.
        candidate_seed: Random seed of the distractors.
        columns: Columns to rename: name in the source → name that foretune expects.
        messages: Other names in conversations: `role` and `content`, the keys under which a turn
            has them, and `roles`, name of a role in the source → "system", "user", "assistant" or
            "tool".
        splits: Names of splits: name in the source → "train", "validation" or "test", or None to
            leave its rows out. The usual names need no entry.
        episodes: N-way K-shot episodes in place of the unseen tasks (of all tasks, without any
            unseen): `number` (100) of `ways` (5) classes with `shots` (1) training and `queries`
            (15) test examples each; None for the tasks as they are.
        seed: Random seed of the draws of tasks, splits, episodes and train examples.

    Raises:
        UserError: A value is out of range; the message names it.
    """

    source: str
    task_column: str = "task"
    group_column: str | None = None
    unseen: int | list[str] | str | None = None
    turn: int | None = None
    validation: float = 0.1
    test: float = 0.2
    min_rows: int = 1
    max_tasks: int | None = None
    max_rows: int | None = None
    num_candidates: int = 20
    candidate_pool: int | None = None
    candidates_from: Literal["others", "own"] = "others"
    candidate_seed: int = 0
    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    messages: dict[str, Any] = dataclasses.field(default_factory=dict)
    splits: dict[str, str | None] = dataclasses.field(default_factory=dict)
    episodes: dict[str, int] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("source", "unseen"):
            if isinstance(getattr(self, name), Path):
                object.__setattr__(self, name, str(getattr(self, name)))
        if not isinstance(self.source, str) or not self.source.strip():
            raise UserError(f"source must be a path or a dataset's name, got {self.source!r}")
        if isinstance(self.unseen, list):  # a task named 7 is called "7"
            unseen: list[Any] = self.unseen
            names = [str(n) if type(n) is int else n for n in unseen]
            object.__setattr__(self, "unseen", names)
        _check_unseen(self.unseen)
        check_at_least("turn", self.turn, 0)
        if self.turn is not None and not isinstance(self.unseen, int):
            raise UserError(
                f"turns need a number of unseen tasks, such as unseen=2; got unseen={self.unseen!r}"
            )
        for name in ("validation", "test"):
            share = getattr(self, name)
            if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share < 1:
                raise UserError(f"{name} is a share from 0 to less than 1, got {share!r}")
        if self.validation + self.test >= 1:
            raise UserError(
                "validation and test must leave rows for train: their sum must be less than 1, "
                f"got {self.validation} + {self.test}"
            )
        check_seed("seed", self.seed)
        check_seed("candidate_seed", self.candidate_seed)
        check_at_least("num_candidates", self.num_candidates, 2)
        check_one_of("candidates_from", self.candidates_from, ("others", "own"))
        check_at_least("candidate_pool", self.candidate_pool, self.num_candidates - 1)
        for name in ("min_rows", "max_tasks", "max_rows"):
            check_at_least(name, getattr(self, name), 1)
        if not isinstance(self.columns, dict):
            raise UserError(
                f"columns must map names in the source to new names, got {self.columns!r}"
            )
        repeated = [n for n, count in Counter(self.columns.values()).items() if count > 1]
        if repeated:
            raise UserError(f'columns renames two columns to "{repeated[0]}"')
        check_message_names(self.messages)
        check_renames(self.splits)
        if self.episodes is not None:
            Episodes.of(self.episodes)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able fields; `Source(**source.to_dict())` restores the source."""
        return dataclasses.asdict(self)


def load_tasks(source: Source, kind: str) -> tuple[TaskCollection, TaskCollection | None]:
    """The (seen, unseen) tasks of a source, without an objective.

    Args:
        source: Where the tasks come from.
        kind: The kind of objective, which determines the fields that a row must have (`NEEDS`).

    Returns:
        Two collections that share no task; the second is None if `source.unseen` is.

    Raises:
        UserError: Bad data; the message names the file and the line, or the task.
    """
    check_one_of("kind", kind, tuple(NEEDS))
    splits = SplitNames(source.splits, "tasks.splits")
    tasks = _read_tasks(source, kind, splits)
    if isinstance(source.unseen, str):
        second = dataclasses.replace(source, source=source.unseen, unseen=None)
        unseen = _read_second(second, kind, tasks, splits)
        splits.check_used(f"{source.source} and {second.source}")
        both = sorted({t.name for t in tasks} & {t.name for t in unseen})
        if both:
            raise UserError(
                f'task "{both[0]}" is in both groups, seen ({source.source}) and unseen '
                f"({second.source}){_and_more(both)}: rename it or remove it from one"
            )
        seen = TaskCollection(tuple(draw_tasks(tasks, source.max_tasks, source.seed)))
        return _finish(seen, source, kind), _finish(
            TaskCollection(tuple(draw_tasks(unseen, source.max_tasks, source.seed))),
            source,
            kind,
            unseen=True,
        )
    splits.check_used(source.source)
    named = source.unseen if isinstance(source.unseen, list) else []
    _check_named(named, tasks, source)
    tasks = draw_tasks(tasks, source.max_tasks, source.seed, keep=named)
    collection = TaskCollection(tuple(tasks))
    if source.unseen is None:
        return _finish(collection, source, kind), None
    _check_number(source, len(tasks))
    count_or_names = source.unseen
    if source.turn is not None and isinstance(count_or_names, int):
        groups = collection.groups(count_or_names, source.seed)
        count_or_names = groups[source.turn % len(groups)]
    seen, held_out = collection.split(count_or_names, source.seed)
    return _finish(seen, source, kind), _finish(held_out, source, kind, unseen=True)


def _read_tasks(source: Source, kind: str, splits: SplitNames) -> list[Task]:
    """All tasks of the source with at least `min_rows` examples, in the order of the data.

    Raises:
        UserError: Bad data, or no task has enough examples.
    """
    store, numbers = _read(source, kind, splits)
    tasks = [
        Task(
            name,
            **{split: store.rows(indices) for split, indices in zip(SPLITS, splits, strict=True)},
        )
        for name, splits in numbers.items()
        if sum(map(len, splits)) >= source.min_rows
    ]
    if not tasks:
        most = max(sum(map(len, splits)) for splits in numbers.values())
        raise UserError(
            f"no task of {source.source} has min_rows={source.min_rows} rows, "
            f"the largest has {most}"
        )
    return tasks


def _read(
    source: Source, kind: str, splits: SplitNames
) -> tuple[RowStore, dict[str, tuple[array[int], ...]]]:
    """All examples of the source, and for each task the indices of those in each of `SPLITS`.

    The first faulty row is reported only after all rows are read: errors of the file or of its
    columns take precedence, because they explain faulty rows.

    Raises:
        UserError: Bad data.
    """
    store = RowStore()
    numbers: dict[str, tuple[array[int], ...]] = {}
    columns: set[str] = set()
    drop = (source.task_column, "split")
    group_columns = (source.group_column,) if source.group_column else GROUP_COLUMNS
    fault: UserError | None = None
    for row in _rows(source, kind, splits):
        columns.update(row.fields)
        if fault is not None:
            continue
        if source.columns:
            row = _renamed(row, source.columns)
        if source.messages:
            row = row._replace(fields=with_message_names(row.fields, source.messages))
        try:
            if (split := split_of(row, splits)) == LEFT_OUT:
                continue
            name = task_of(row, source.task_column)
            for column in group_columns:
                readable(row, column)
            example = example_of(row, kind, drop)
        except UserError as error:
            fault = error
            continue
        if name not in numbers:
            numbers[name] = tuple(array("q") for _ in SPLITS)
        numbers[name][SPLITS.index(split)].append(len(store))
        store.add(example, f"{row.file} {row.unit}", row.number)
    check_renames_of(source, sorted(columns))
    if fault is not None:
        raise fault
    _check_group(source, sorted({source.columns.get(name, name) for name in columns}))
    return store, numbers


def _read_second(second: Source, kind: str, seen: list[Task], splits: SplitNames) -> list[Task]:
    """The tasks of the source of unseen tasks.

    Raises:
        UserError: Bad data, or the source is the name of a task.
    """
    names = [task.name for task in seen]
    guess = did_you_mean(second.source, names)
    if HUB_ID.fullmatch(second.source) or second.source in (PYTHON_DOCS, *PACKAGED):
        guess = ""  # it may well be a source
    if (guess or second.source in names) and not _exists(second.source):
        raise UserError(
            f'unseen="{second.source}" is read as a second source, but there is none; to hold out '
            f'tasks by name write a list, such as unseen=["{second.source}"].'
            + ("" if second.source in names else guess)
        )
    return _read_tasks(second, kind, splits)


def _exists(source: str) -> bool:
    try:
        return Path(source).exists()
    except OSError:  # such as a name that is too long
        return False


def _rows(source: Source, kind: str, splits: SplitNames) -> Iterable[Row]:
    """The rows of a source.

    Raises:
        UserError: There is no such source, or it cannot be read as `kind`.
    """
    if source.source != PYTHON_DOCS:
        return read_rows(str(PACKAGED.get(source.source, source.source)), splits)
    if kind != "choice":
        raise UserError(f"{PYTHON_DOCS} is a collection of choice tasks; got objective kind {kind}")
    from foretune.tasks.python_docs import read_python_docs

    rows = enumerate(read_python_docs(source.seed), start=1)
    return (Row(PYTHON_DOCS, "row", number, fields) for number, fields in rows)


def _renamed(row: Row, names: dict[str, str]) -> Row:
    return row._replace(fields={names.get(k, k): v for k, v in row.fields.items()})


def check_renames_of(source: Source, columns: list[str]) -> None:
    """Checks that the columns to be renamed are there, and their new names are not.

    Raises:
        UserError: One is missing, or a new name is taken.
    """
    for old, new in source.columns.items():
        if old not in columns:
            raise UserError(
                f'columns renames "{old}", which {source.source} does not have; '
                f"it has {', '.join(columns)}.{did_you_mean(old, columns)}"
            )
        if new in columns and new not in source.columns:
            raise UserError(
                f'columns renames "{old}" to "{new}", but {source.source} already has a column '
                f'"{new}": rename that one too'
            )


def _check_group(source: Source, columns: list[str]) -> None:
    if source.group_column and source.group_column not in columns:
        raise UserError(
            f'{source.source} has no column "{source.group_column}" (group_column); '
            f"it has {', '.join(columns)}.{did_you_mean(source.group_column, columns)}"
        )


def _finish(
    tasks: TaskCollection, source: Source, kind: str, unseen: bool = False
) -> TaskCollection:
    """Draw episodes; or carve missing splits, limit the size of train and draw candidates.

    Raises:
        UserError: A task lacks train examples, or an unseen task test examples; or its classes are
            too small for episodes.
    """
    if source.episodes is not None and (unseen or source.unseen is None):
        return draw_episodes(tasks, Episodes.of(source.episodes), source.seed, kind=kind)
    finished = []
    for task in tasks:
        task = carve(
            task,
            validation=source.validation,
            test=source.test,
            seed=source.seed,
            group_column=source.group_column,
            labelled=kind in CLASSES,
            scored=unseen,
        )
        if not task.train:
            raise UserError(f'task "{task.name}" has no train examples, only {_counts(task)}')
        if unseen and not task.test:
            raise UserError(f'unseen task "{task.name}" {_why_no_test(task, source, kind)}')
        finished.append(cut_train(task, source.max_rows, source.seed, labelled=kind in CLASSES))
    collection = TaskCollection(tuple(finished))
    if kind != "choice":
        return collection
    return draw_candidates(
        collection,
        source.num_candidates,
        source.candidate_seed,
        source.candidate_pool,
        source.group_column,
        source.candidates_from == "own",
    )


def _why_no_test(task: Task, source: Source, kind: str) -> str:
    """Why an unseen task has no test rows, and what would give it some."""
    if not source.test:
        return (
            "has no rows of split test and test=0 moves none there: set test to a share such as "
            "0.2, or give rows of that split"
        )
    rows = len(task.train)
    drop = f"add rows, or leave out tasks this small with min_rows={len(task) + 1}"
    groups = {repr(group_of(example, source.group_column)) for example in task.train}
    if rows > 1 and len(groups) == 1 and groups != {"None"}:
        return (
            f"has {rows} rows of one group, which stays together, so none can be held out for "
            f"test: {drop}"
        )
    if rows > 1 and kind in CLASSES:
        labels = len({label_of(example) for example in task.train})
        return (
            f"has {rows} rows with {labels} labels, so none can be held out for test, where a row "
            f"needs a label that training rows have too: {drop}"
        )
    return f"has {rows} training row{'s' * (rows > 1)}, too few to hold one out for test: {drop}"


def _counts(task: Task) -> str:
    return ", ".join(f"{len(task.split(s))} {s}" for s in SPLITS if task.split(s))


def _check_unseen(unseen: Any) -> None:
    if unseen is None or (isinstance(unseen, str) and unseen.strip()):
        return
    if isinstance(unseen, int) and not isinstance(unseen, bool):
        check_at_least("unseen", unseen, 1)
        return
    if not isinstance(unseen, list) or not unseen or not all(isinstance(n, str) for n in unseen):
        raise UserError(
            f"unseen must be a number of tasks, a list of their names or a source, got {unseen!r}"
        )


def _check_number(source: Source, num_tasks: int) -> None:
    if num_tasks == 1:
        raise UserError(
            f"unseen={source.unseen} needs at least 2 tasks, {source.source} has only one"
        )
    count = source.unseen if isinstance(source.unseen, int) else len(set(source.unseen or []))
    if count >= num_tasks:
        raise UserError(
            f"unseen must leave at least one seen task: it holds out {count}, "
            f"but there are {num_tasks} tasks"
        )


def _check_named(named: list[str], tasks: list[Task], source: Source) -> None:
    task_names = dict.fromkeys(task.name for task in tasks)
    for name in named:
        if name not in task_names:
            small = f" with min_rows={source.min_rows}" if source.min_rows > 1 else ""
            raise UserError(
                f'unseen names "{name}", which is not a task of {source.source}{small}.'
                f"{did_you_mean(name, task_names)}"
            )


def _and_more(names: Iterable[str]) -> str:
    count = len(list(names)) - 1
    return f", as are {count} more" if count else ""
