"""Traffic scenes: the plain format, and the focal frame in which a model sees them.

A row is a scene, with numbers in metres in any frame:

    agents    (A, T, 2)  positions over history and future; NaN where an agent was not observed.
                         The first agent is the focal one, whose future is forecast
    kinds     (A,)       0 vehicle, 1 pedestrian, 2 cyclist, 3 other
    headings  (A,)       optional, radians at the last history step; NaN (or left out) takes the
                         direction of motion
    lanes     (L, P, 2)  polylines, NaN after the end of a shorter one; L may be 0

In a file, .npz or .parquet, the rows of a collection stand under each other with `task` and `split`
(docs/methods/forecast-peft.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from foretune.errors import UserError
from foretune.tasks.example import SPLITS
from foretune.tasks.task import Task, TaskCollection

MOVED_M = 0.1  # a shorter way says nothing of a heading
COLUMNS = ("agents", "kinds", "headings", "lanes")
Arrays = dict[str, np.ndarray]


def in_focal_frame(
    row: Mapping[str, Any], history_steps: int, radius: float | None = None
) -> Arrays:
    """A scene as the model sees it: origin at the focal agent's last step, its heading along x.

    Agents that were not observed at the last history step are left out, and what is farther than
    `radius` metres. A focal agent that has not moved and has no heading keeps the frame's axes.

    Returns:
        The tensors of one scene that `foretune.forecasting.model` lists, without batch.
    """
    agents = np.asarray(row["agents"], np.float64)
    kinds = np.asarray(row.get("kinds", np.zeros(len(agents))), np.int64)
    headings = np.asarray(row.get("headings", np.full(len(agents), np.nan)), np.float64)
    lanes = np.asarray(row.get("lanes", np.zeros((0, 1, 2))), np.float64).reshape(
        -1, *np.shape(row.get("lanes", np.zeros((0, 1, 2))))[1:]
    )
    last = history_steps - 1
    known = np.array([_heading(a[: last + 1], h) for a, h in zip(agents, headings, strict=True)])
    forward = 0.0 if np.isnan(known[0]) else known[0]
    cos, sin = np.cos(forward), np.sin(forward)
    to_frame = np.array([[cos, -sin], [sin, cos]])  # row vectors times this turn by -forward
    origin = agents[0, last].copy()
    agents, lanes = (agents - origin) @ to_frame, (lanes - origin) @ to_frame
    there = ~np.isnan(agents[:, last, 0])
    middle = _lane_middles(lanes)
    near = ~np.isnan(middle[:, 0])
    if radius is not None:
        there &= np.linalg.norm(np.nan_to_num(agents[:, last]), axis=-1) <= radius
        near &= np.linalg.norm(np.nan_to_num(middle), axis=-1) <= radius
    agents, kinds, known = agents[there], kinds[there], known[there]
    lanes, middle = lanes[near], middle[near]
    relative = np.where(np.isnan(known), 0.0, known - forward)
    return {
        **_tracks(agents, last),
        "kind": kinds,
        "agent_pose": _pose(agents[:, last], relative),
        "lanes": _with_flag(lanes - middle[:, None]),
        "lane_pose": _pose(middle, _lane_headings(lanes)),
    }


def _tracks(agents: np.ndarray, last: int) -> Arrays:
    seen = ~np.isnan(agents[..., 0])
    centred = np.nan_to_num(agents - agents[:, last : last + 1])
    past, observed = centred[:, : last + 1], seen[:, : last + 1]
    step = np.zeros_like(past)
    both = observed[:, 1:] & observed[:, :-1]
    step[:, 1:] = np.where(both[..., None], past[:, 1:] - past[:, :-1], 0)
    length = np.linalg.norm(step, axis=-1)
    change = np.zeros_like(length)
    steady = both[:, 1:] & both[:, :-1]
    change[:, 2:] = np.where(steady, length[:, 2:] - length[:, 1:-1], 0)
    return {
        "history": np.concatenate(
            [step, change[..., None], observed[..., None]], -1, dtype=np.float32
        ),
        "past": past.astype(np.float32),
        "future": np.concatenate(
            [centred[:, last + 1 :], seen[:, last + 1 :, None]], -1, dtype=np.float32
        ),
    }


def _heading(history: np.ndarray, given: float) -> float:
    """The heading given, or the direction from the last position at some distance; else NaN."""
    if not np.isnan(given):
        return given
    way = history[-1] - history
    far = np.flatnonzero(np.linalg.norm(np.nan_to_num(way), axis=-1) >= MOVED_M)
    return float(np.arctan2(way[far[-1], 1], way[far[-1], 0])) if len(far) else np.nan


def _lane_middles(lanes: np.ndarray) -> np.ndarray:
    there = ~np.isnan(lanes[..., :1])
    count = np.where(there.any(1), there.sum(1), np.nan)
    middles: np.ndarray = np.nansum(lanes, axis=1) / count
    return middles


def _lane_headings(lanes: np.ndarray) -> np.ndarray:
    ends = [lane[~np.isnan(lane[:, 0])][[0, -1]] for lane in lanes]
    way = np.array([end[1] - end[0] for end in ends]).reshape(-1, 2)
    turned: np.ndarray = np.arctan2(way[:, 1], way[:, 0])
    return turned


def _pose(position: np.ndarray, heading: np.ndarray) -> np.ndarray:
    parts = [position, np.cos(heading)[:, None], np.sin(heading)[:, None]]
    return np.concatenate(parts, -1).astype(np.float32)


def _with_flag(points: np.ndarray) -> np.ndarray:
    seen = ~np.isnan(points[..., :1])
    return np.concatenate([np.nan_to_num(points), seen], -1).astype(np.float32)


def check_scene(row: Mapping[str, Any], where: str, history_steps: int, future_steps: int) -> None:
    """Raises UserError unless the row is a scene of so many steps whose focal agent was observed.

    Args:
        row: The row.
        where: Where it stands, for the message.
        history_steps: Steps that were observed.
        future_steps: Steps that follow.
    """
    if "agents" not in row:
        raise UserError(f'{where}: a scene needs an array "agents"; the row has {", ".join(row)}')
    agents = np.asarray(row["agents"], np.float64)
    steps = history_steps + future_steps
    if agents.ndim != 3 or agents.shape[1:] != (steps, 2) or not len(agents):
        raise UserError(
            f"{where}: agents must have the shape (agents, {steps}, 2), for {history_steps} "
            f"history and {future_steps} future steps; got {agents.shape}"
        )
    for name in ("kinds", "headings"):
        if name in row and np.shape(row[name]) != (len(agents),):
            raise UserError(
                f"{where}: {name} must have one number for each of the {len(agents)} agents; got "
                f"the shape {np.shape(row[name])}"
            )
    kinds = np.asarray(row.get("kinds", [0]))
    if kinds.min() < 0 or kinds.max() > 3:
        raise UserError(f"{where}: kinds are 0 to 3; got {kinds.min()} to {kinds.max()}")
    lanes = np.asarray(row.get("lanes", np.zeros((0, 1, 2))))
    if lanes.ndim != 3 or lanes.shape[-1] != 2:
        raise UserError(f"{where}: lanes must have the shape (lanes, points, 2); got {lanes.shape}")
    if np.isinf(agents).any() or np.isinf(lanes).any():
        raise UserError(f"{where}: a position is infinite")
    if np.isnan(agents[0, history_steps - 1]).any():
        raise UserError(
            f"{where}: the focal agent (the first one) was not observed at the last history step; "
            "leave the scene out or make another agent the first"
        )
    if np.isnan(agents[0, history_steps:]).any(-1).all():
        raise UserError(f"{where}: no future step of the focal agent was observed")


def save_scenes(path: Path | str, tasks: TaskCollection) -> None:
    """Writes a collection as one .npz, short scenes padded by NaN."""
    rows = [(t.name, s, row) for t in tasks for s in SPLITS for row in t.split(s)]
    arrays: Arrays = {
        "task": np.array([name for name, _, _ in rows]),
        "split": np.array([split for _, split, _ in rows]),
    }
    for column in COLUMNS:
        if any(column in row for _, _, row in rows):
            arrays[column] = _stacked([row[column] for _, _, row in rows], column)
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]


def _stacked(parts: Sequence[Any], column: str) -> np.ndarray:
    arrays = [np.asarray(part, np.float32) for part in parts]
    shape = np.max([a.shape for a in arrays], axis=0)
    out = np.full((len(arrays), *shape), np.nan, np.float32)
    for place, a in zip(out, arrays, strict=True):
        place[tuple(slice(n) for n in a.shape)] = a
    return out


def read_npz(path: Path) -> TaskCollection:
    """Reads `save_scenes`; agents and lanes that are NaN all over are padding.

    Raises:
        UserError: It is no such file, or arrays of unlike length.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"cannot read {path} as .npz: {' '.join(str(error).split())}") from error
    return collected(path, arrays)


def collected(path: Path, columns: Mapping[str, Any]) -> TaskCollection:
    """The collection of columns that have one entry for each scene.

    Raises:
        UserError: A column is missing or has another length, or a split is unknown.
    """
    for name in ("agents", "task", "split"):
        if name not in columns:
            raise UserError(f"{path} lacks {name}; it has {', '.join(columns) or 'nothing'}")
    count = len(columns["agents"])
    for name, values in columns.items():
        if len(values) != count:
            raise UserError(f"{path}: {name} has {len(values)} rows where agents has {count}")
    found: dict[str, dict[str, list[Arrays]]] = {}
    for i in range(count):
        name, split = str(columns["task"][i]), str(columns["split"][i])
        if split not in SPLITS:
            raise UserError(f"{path} row {i + 1}: split is one of {', '.join(SPLITS)}; got {split}")
        row = _unpadded({c: np.asarray(columns[c][i]) for c in COLUMNS if c in columns})
        found.setdefault(name, {s: [] for s in SPLITS})[split].append(row)
    if not found:
        raise UserError(f"{path} holds no scene")
    return TaskCollection(tuple(Task(name, **rows) for name, rows in found.items()))


def _unpadded(row: Arrays) -> Arrays:
    if row["agents"].ndim != 3:  # said in one line by check_scene
        return row
    there = np.asarray(~np.isnan(row["agents"]).all((1, 2)))
    row = {k: v[there] if k != "lanes" and len(v) == len(there) else v for k, v in row.items()}
    if "kinds" in row:
        row["kinds"] = np.nan_to_num(row["kinds"]).astype(np.int64)
    if "lanes" in row and row["lanes"].ndim == 3:
        row["lanes"] = row["lanes"][~np.isnan(row["lanes"]).all((1, 2))]
    return row
