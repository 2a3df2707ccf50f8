"""Traffic scenes: the plain format, and the focal frame that models use.

An example is a scene, with positions in metres in any frame:

    agents    (A, T, 2)  positions over history and future; NaN where an agent was not observed.
                         The first agent is the focal one, whose future is forecast
    kinds     (A,)       optional, 0 vehicle, 1 pedestrian, 2 cyclist, 3 other
    headings  (A,)       optional, radians at the last history step; NaN takes the direction of
                         motion
    lanes     (L, P, 2)  optional, polylines; NaN after the end of a shorter one, L may be 0

A .npz or .parquet file holds one row per scene, with the columns `task` and `split`
(docs/methods/forecast-peft.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from foretune.errors import UserError
from foretune.formats import damage_named, shortened
from foretune.tasks.example import SPLITS
from foretune.tasks.task import Task, TaskCollection

MOVED_M = 0.1  # a shorter displacement does not determine a heading
COLUMNS = ("agents", "kinds", "headings", "lanes")
Arrays = dict[str, np.ndarray]


def in_focal_frame(
    scene: Mapping[str, Any], history_steps: int, radius: float | None = None
) -> Arrays:
    """A scene with its origin at the focal agent's last history step and x along its heading.

    Agents that were not observed at the last history step are left out, as are agents and lanes
    farther than `radius` metres. The axes stay if the focal agent has neither moved nor a heading.

    Args:
        scene: In the plain format.
        history_steps: Observed steps.
        radius: Greatest distance from the focal agent in metres; None keeps all.

    Returns:
        The tensors of one scene that `foretune.forecasting.model` lists, without the batch axis.
    """
    agents = np.asarray(scene["agents"], np.float64)
    kinds = np.asarray(scene.get("kinds", np.zeros(len(agents))), np.int64)
    recorded = np.asarray(scene.get("headings", np.full(len(agents), np.nan)), np.float64)
    lanes = np.asarray(scene.get("lanes", np.zeros((0, 1, 2))), np.float64).reshape(
        -1, *np.shape(scene.get("lanes", np.zeros((0, 1, 2))))[1:]
    )
    last = history_steps - 1
    headings = np.array([_heading(a[: last + 1], h) for a, h in zip(agents, recorded, strict=True)])
    forward = 0.0 if np.isnan(headings[0]) else headings[0]
    cos, sin = np.cos(forward), np.sin(forward)
    to_frame = np.array([[cos, -sin], [sin, cos]])  # rotates row vectors by -forward
    origin = agents[0, last].copy()
    agents, lanes = (agents - origin) @ to_frame, (lanes - origin) @ to_frame
    keep_agent = ~np.isnan(agents[:, last, 0])
    centres = _lane_centres(lanes)
    keep_lane = ~np.isnan(centres[:, 0])
    if radius is not None:
        keep_agent &= np.linalg.norm(np.nan_to_num(agents[:, last]), axis=-1) <= radius
        keep_lane &= np.linalg.norm(np.nan_to_num(centres), axis=-1) <= radius
    agents, kinds, headings = agents[keep_agent], kinds[keep_agent], headings[keep_agent]
    lanes, centres = lanes[keep_lane], centres[keep_lane]
    relative = np.where(np.isnan(headings), 0.0, headings - forward)
    return {
        **_tracks(agents, last),
        "kind": kinds,
        "agent_pose": _pose(agents[:, last], relative),
        "lanes": _with_flag(lanes - centres[:, None]),
        "lane_pose": _pose(centres, _lane_headings(lanes)),
    }


def _tracks(agents: np.ndarray, last: int) -> Arrays:
    """The history (A, H, 4), past (A, H, 2) and future (A, F, 3) of agents (A, T, 2)."""
    observed = ~np.isnan(agents[..., 0])
    centred = np.nan_to_num(agents - agents[:, last : last + 1])
    past, observed_past = centred[:, : last + 1], observed[:, : last + 1]
    step = np.zeros_like(past)
    has_step = observed_past[:, 1:] & observed_past[:, :-1]
    step[:, 1:] = np.where(has_step[..., None], past[:, 1:] - past[:, :-1], 0)
    length = np.linalg.norm(step, axis=-1)
    change = np.zeros_like(length)
    has_change = has_step[:, 1:] & has_step[:, :-1]
    change[:, 2:] = np.where(has_change, length[:, 2:] - length[:, 1:-1], 0)
    return {
        "history": np.concatenate(
            [step, change[..., None], observed_past[..., None]], -1, dtype=np.float32
        ),
        "past": past.astype(np.float32),
        "future": np.concatenate(
            [centred[:, last + 1 :], observed[:, last + 1 :, None]], -1, dtype=np.float32
        ),
    }


def _heading(history: np.ndarray, recorded: float) -> float:
    """The recorded heading, else the direction of motion from a clearly different position; or NaN.

    The position is the latest one at least MOVED_M away from the last.
    """
    if not np.isnan(recorded):
        return recorded
    displacement = history[-1] - history
    moved = np.flatnonzero(np.linalg.norm(np.nan_to_num(displacement), axis=-1) >= MOVED_M)
    if not len(moved):
        return np.nan
    x, y = displacement[moved[-1]]
    return float(np.arctan2(y, x))


def _lane_centres(lanes: np.ndarray) -> np.ndarray:
    """(L, 2) mean points of lanes (L, P, 2); NaN for a lane without points."""
    present = ~np.isnan(lanes[..., :1])
    count = np.where(present.any(1), present.sum(1), np.nan)
    centres: np.ndarray = np.nansum(lanes, axis=1) / count
    return centres


def _lane_headings(lanes: np.ndarray) -> np.ndarray:
    """(L,) directions from the first to the last point of each lane."""
    ends = [lane[~np.isnan(lane[:, 0])][[0, -1]] for lane in lanes]
    chords = np.array([end - start for start, end in ends]).reshape(-1, 2)
    headings: np.ndarray = np.arctan2(chords[:, 1], chords[:, 0])
    return headings


def _pose(position: np.ndarray, heading: np.ndarray) -> np.ndarray:
    """(n, 4): x, y, cosine and sine of the heading."""
    parts = [position, np.cos(heading)[:, None], np.sin(heading)[:, None]]
    return np.concatenate(parts, -1).astype(np.float32)


def _with_flag(points: np.ndarray) -> np.ndarray:
    """(…, 3): the points, then 1 where there is one; zeros where there is none."""
    present = ~np.isnan(points[..., :1])
    return np.concatenate([np.nan_to_num(points), present], -1).astype(np.float32)


def check_scene(row: Mapping[str, Any], where: str, history_steps: int, future_steps: int) -> None:
    """Check that an example is a scene of so many steps whose focal agent was observed.

    Args:
        row: The example.
        where: Its place in the data, for the message.
        history_steps: Observed steps.
        future_steps: Steps that follow.

    Raises:
        UserError: It is not; the message names what is wrong.
    """
    if "agents" not in row:
        raise UserError(
            f'{where}: a scene needs an array "agents"; the example has {", ".join(row)}'
        )
    row = {c: _numbers(row[c], where, c) for c in COLUMNS if c in row}
    agents = row["agents"].astype(np.float64)
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
    kinds = row.get("kinds", np.zeros(1))
    unknown = kinds[~np.isin(kinds, range(4))]
    if len(unknown):
        raise UserError(f"{where}: kinds must be 0, 1, 2 or 3; got {unknown[0]}")
    lanes = row.get("lanes", np.zeros((0, 1, 2)))
    if lanes.ndim != 3 or lanes.shape[-1] != 2:
        raise UserError(f"{where}: lanes must have the shape (lanes, points, 2); got {lanes.shape}")
    for name, values in row.items():
        if np.isinf(values).any():
            raise UserError(f"{where}: {name} holds an infinite number")
    if np.isnan(agents[0, history_steps - 1]).any():
        raise UserError(
            f"{where}: the focal agent (the first one) was not observed at the last history step; "
            "drop the scene or put another agent first"
        )
    if np.isnan(agents[0, history_steps:]).any(-1).all():
        raise UserError(f"{where}: no future step of the focal agent was observed")


def save_scenes(path: Path | str, tasks: TaskCollection) -> None:
    """Write a collection as one .npz, with small scenes padded by NaN."""
    rows = [(t.name, s, row) for t in tasks for s in SPLITS for row in t.split(s)]
    arrays: Arrays = {
        "task": np.array([name for name, _, _ in rows]),
        "split": np.array([split for _, split, _ in rows]),
    }
    for column in COLUMNS:
        if any(column in row for _, _, row in rows):
            arrays[column] = _stacked([row[column] for _, _, row in rows])
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]


def _stacked(parts: Sequence[Any]) -> np.ndarray:
    """(n, …) arrays of one column, padded by NaN to the largest shape."""
    arrays = [np.asarray(part, np.float32) for part in parts]
    shape = np.max([a.shape for a in arrays], axis=0)
    out = np.full((len(arrays), *shape), np.nan, np.float32)
    for target, a in zip(out, arrays, strict=True):
        target[tuple(slice(n) for n in a.shape)] = a
    return out


def read_npz(path: Path) -> TaskCollection:
    """Read what `save_scenes` wrote; agents and lanes that are entirely NaN are padding.

    Raises:
        UserError: The file cannot be read, or its arrays differ in length.
    """
    if not path.is_file():
        raise UserError(f"no file {path}")
    with damage_named(path), np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    for name, values in arrays.items():
        if not values.ndim:
            raise UserError(f"{path}: {name} is a single value; every column has one per scene")
    return collection_of(path, arrays)


def collection_of(path: Path, columns: Mapping[str, Any]) -> TaskCollection:
    """The collection that a file's columns, with one entry per scene, describe.

    Args:
        path: The file, for the messages.
        columns: Arrays or lists by name.

    Raises:
        UserError: A column is missing or differs in length, or a split is unknown.
    """
    for name in ("agents", "task", "split"):
        if name not in columns:
            raise UserError(f"{path} lacks {name}; it has {', '.join(columns) or 'nothing'}")
    count = len(columns["agents"])
    for name, values in columns.items():
        if len(values) != count:
            raise UserError(f"{path}: {name} has {len(values)} rows where agents has {count}")
    splits_of: dict[str, dict[str, list[Arrays]]] = {}  # by task
    for i in range(count):
        name, split = str(columns["task"][i]), str(columns["split"][i])
        if split not in SPLITS:
            raise UserError(
                f"{path} row {i + 1}: split must be one of {', '.join(SPLITS)}; got {split}"
            )
        where = f"{path} row {i + 1}"
        row = {c: _numbers(columns[c][i], where, c) for c in COLUMNS if c in columns}
        row = _unpadded(row)
        splits_of.setdefault(name, {s: [] for s in SPLITS})[split].append(row)
    if not splits_of:
        raise UserError(f"{path} holds no scenes")
    return TaskCollection(tuple(Task(name, **splits) for name, splits in splits_of.items()))


def _numbers(value: Any, where: str, column: str) -> np.ndarray:
    """The entry of a column as an array.

    Raises:
        UserError: It does not hold real numbers.
    """
    try:
        numbers = np.asarray(value)
    except ValueError:  # lists of unlike lengths
        numbers = np.asarray(None)
    if numbers.dtype.kind not in "biuf":
        raise UserError(f"{where}: {column} must hold numbers, got {shortened(value)}")
    return numbers


def _unpadded(row: Arrays) -> Arrays:
    """A scene without the agents and lanes that are entirely NaN."""
    if row["agents"].ndim != 3:  # check_scene reports it
        return row
    real = np.asarray(~np.isnan(row["agents"]).all((1, 2)))
    row = {k: v[real] if k != "lanes" and len(v) == len(real) else v for k, v in row.items()}
    if "kinds" in row:
        row["kinds"] = np.nan_to_num(row["kinds"])
    if "lanes" in row and row["lanes"].ndim == 3:
        row["lanes"] = row["lanes"][~np.isnan(row["lanes"]).all((1, 2))]
    return row
