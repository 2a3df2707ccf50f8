"""Readers of scenes: the plain files, folders of Argoverse 2, and tracks `frame id x y`."""

from __future__ import annotations

import gzip
import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from foretune.errors import UserError
from foretune.forecasting.scenes import Arrays, collected, read_npz
from foretune.tasks.example import SPLITS
from foretune.tasks.task import Task, TaskCollection

TRAIN, VALIDATION = 0.5, 0.6  # of a recording's time; the rest is test
AV2_KINDS = {"vehicle": 0, "bus": 0, "pedestrian": 1, "cyclist": 2, "motorcyclist": 2}
AV2_SPLITS = {"train": "train", "val": "test"}  # its own test split has no futures
AV2_STEPS, AV2_HISTORY = 110, 50


def load_scenes(
    path: Path | str,
    *,
    history_steps: int,
    future_steps: int,
    lane_points: int = 20,
    stride: int = 4,
) -> TaskCollection:
    """Reads scenes, whatever kind of file or folder they are in.

    Args:
        path: .npz or .parquet in the plain format; a file of tracks (.txt, .txt.gz) or a folder of
            them, each a task; a folder of Argoverse 2 scenarios, each city a task.
        history_steps: Observed steps, for tracks.
        future_steps: Steps that follow, for tracks.
        lane_points: Points that each lane is sampled at, for Argoverse 2.
        stride: Steps between two scenes of one track, for tracks.

    Returns:
        A collection without an objective.

    Raises:
        UserError: There is no such file, or it holds no scene.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise UserError(f"no scenes in {path}: no such file or folder")
    if path.is_dir():
        if any(path.rglob("scenario_*.parquet")):
            return read_argoverse2(path, lane_points=lane_points)
        files = sorted([*path.rglob("*.txt"), *path.rglob("*.txt.gz")])
        if not files:
            raise UserError(
                f"{path} holds neither Argoverse 2 scenarios (scenario_*.parquet) nor tracks "
                "(*.txt, *.txt.gz)"
            )
        return read_tracks(files, history_steps, future_steps, stride=stride)
    if path.suffix == ".npz":
        return read_npz(path)
    if path.suffix == ".parquet":
        return read_parquet(path)
    if path.name.endswith((".txt", ".txt.gz")):
        return read_tracks([path], history_steps, future_steps, stride=stride)
    raise UserError(
        f"{path}: scenes are .npz, .parquet, tracks in .txt or .txt.gz, or a folder of Argoverse 2"
    )


def read_parquet(path: Path) -> TaskCollection:
    """The plain format with a row a scene and its arrays as nested lists.

    Raises:
        UserError: pyarrow is missing, or it is no such file.
    """
    columns: dict[str, Any] = {k: list(v) for k, v in _parquet(path).items()}
    for name in set(columns) - {"task", "split"}:
        columns[name] = [np.array(value, np.float64) for value in columns[name]]
    if "lanes" in columns:
        columns["lanes"] = [v.reshape(-1, 1, 2) if not v.size else v for v in columns["lanes"]]
    return collected(path, columns)


def _parquet(path: Path) -> dict[str, list[Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            f"{path}: reading parquet needs pyarrow; pip install 'foretune[scenes]' would do"
        ) from error
    try:
        found: dict[str, list[Any]] = pyarrow.parquet.read_table(path).to_pydict()
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise UserError(f"cannot read {path}: {' '.join(str(error).split())}") from error
    return found


# --- tracks ---------------------------------------------------------------------------------------


def read_tracks(
    files: list[Path], history_steps: int, future_steps: int, *, stride: int = 4
) -> TaskCollection:
    """One task for each file of lines `frame id x y`: windows in which one track is complete.

    The focal agent is that track; the others are all that were observed at its last history step.
    By time the first half of a recording is train, the next tenth validation, the rest test; a
    window across a border is left out.

    Args:
        files: Text files, gzipped or not; metres.
        history_steps: Observed steps.
        future_steps: Steps that follow.
        stride: Steps between two windows of one track.

    Raises:
        UserError: A line that is not four numbers, or no window in any file.
    """
    tasks = []
    for file in files:
        rows: dict[str, list[Arrays]] = {split: [] for split in SPLITS}
        for split, row in _windows(
            _points(file), history_steps, history_steps + future_steps, stride
        ):
            rows[split].append(row)
        if any(rows.values()):
            tasks.append(Task(file.name.split(".txt")[0], **rows))
    if not tasks:
        raise UserError(
            f"no track in {files[0]}{' …' if len(files) > 1 else ''} was observed for "
            f"{history_steps + future_steps} steps in a row"
        )
    return TaskCollection(tuple(tasks))


def _points(file: Path) -> np.ndarray:
    """(n, 4): frame, id, x, y."""
    open_ = gzip.open if file.suffix == ".gz" else open
    found = []
    try:
        with open_(file, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                parts = line.replace(",", " ").split()
                if not parts:
                    continue
                try:
                    frame, agent, x, y = map(float, parts)
                except ValueError:
                    raise UserError(
                        f"{file} line {number}: expected `frame id x y`, got {line.strip()!r}"
                    ) from None
                found.append((frame, agent, x, y))
    except (OSError, UnicodeDecodeError, EOFError) as error:
        raise UserError(f"cannot read {file}: {' '.join(str(error).split())}") from error
    if not found:
        raise UserError(f"{file} is empty")
    return np.array(found)


def _windows(
    points: np.ndarray, history_steps: int, steps: int, stride: int
) -> Iterator[tuple[str, Arrays]]:
    tracks: dict[float, dict[float, tuple[float, float]]] = defaultdict(dict)
    seen: dict[float, list[float]] = defaultdict(list)
    for frame, agent, x, y in points.tolist():
        tracks[agent][frame] = (x, y)
        seen[frame].append(agent)
    gaps = Counter(
        gap for track in tracks.values() for gap in np.diff(sorted(track)).tolist() if gap > 0
    )
    if not gaps:
        return
    period = gaps.most_common(1)[0][0]
    begin, end = points[:, 0].min(), points[:, 0].max()
    nowhere = (np.nan, np.nan)
    for agent, track in tracks.items():
        for start in sorted(track)[::stride]:
            frames = [start + period * k for k in range(steps)]
            if not all(frame in track for frame in frames):
                continue
            split = _split_of(frames[0], frames[-1], begin, end)
            if split is None:
                continue
            others = [a for a in seen[frames[history_steps - 1]] if a != agent]
            agents = [[tracks[a].get(f, nowhere) for f in frames] for a in [agent, *others]]
            yield (
                split,
                {
                    "agents": np.array(agents, np.float32),
                    "kinds": np.ones(len(agents), np.int64),
                },
            )


def _split_of(first: float, last: float, begin: float, end: float) -> str | None:
    borders = [begin + share * (end - begin) for share in (0, TRAIN, VALIDATION, 1)]
    for name, low, high in zip(SPLITS, borders, borders[1:], strict=False):
        if low <= first and (last <= high if name == "test" else last < high):
            return name
    return None


# --- Argoverse 2 ----------------------------------------------------------------------------------


def read_argoverse2(folder: Path | str, *, lane_points: int = 20) -> TaskCollection:
    """Scenarios of Argoverse 2's motion forecasting data; one task for each city.

    A scenario is a folder with `scenario_ID.parquet` and `log_map_archive_ID.json`, at 10 Hz, 50
    steps of history and 60 of future. Folders `train` and `val` above it become train and test rows
    (the test split proper has no futures); a scenario in neither becomes a test row.

    Args:
        folder: Holds scenarios at any depth.
        lane_points: Points that each lane's middle line is sampled at.

    Raises:
        UserError: A file cannot be read or lacks a column.
    """
    folder = Path(folder)
    rows: dict[str, dict[str, list[Arrays]]] = {}
    for file in sorted(folder.rglob("scenario_*.parquet")):
        places = [p for p in file.relative_to(folder).parts if p in AV2_SPLITS]
        split = AV2_SPLITS[places[-1]] if places else "test"
        city, row = read_scenario(file, lane_points=lane_points)
        rows.setdefault(city, {s: [] for s in SPLITS})[split].append(row)
    if not rows:
        raise UserError(f"{folder} holds no Argoverse 2 scenario (scenario_*.parquet)")
    return TaskCollection(tuple(Task(city, **splits) for city, splits in rows.items()))


def read_scenario(file: Path, *, lane_points: int = 20) -> tuple[str, Arrays]:
    """(city, scene) of one scenario; its focal track comes first.

    Raises:
        UserError: A file cannot be read or lacks a column, or the focal track is missing.
    """
    table = _parquet(file)
    needed = ("track_id", "object_type", "timestep", "position_x", "position_y", "heading")
    for name in (*needed, "focal_track_id"):
        if name not in table:
            raise UserError(f"{file} lacks the column {name}; it has {', '.join(table)}")
    focal = table["focal_track_id"][0] if table["focal_track_id"] else None
    names = list(dict.fromkeys([focal, *table["track_id"]]))
    agents = np.full((len(names), AV2_STEPS, 2), np.nan, np.float32)
    kinds = np.full(len(names), 3, np.int64)
    headings = np.full(len(names), np.nan, np.float32)
    place = {name: i for i, name in enumerate(names)}
    for track, kind, step, x, y, heading in zip(*(table[n] for n in needed), strict=True):
        i = place[track]
        if 0 <= step < AV2_STEPS:
            agents[i, step], kinds[i] = (x, y), AV2_KINDS.get(kind, 3)
        if step == AV2_HISTORY - 1:
            headings[i] = heading
    if np.isnan(agents[0]).all():
        raise UserError(f"{file}: its focal track {focal} has no rows")
    city = str(table["city"][0]) if "city" in table else "argoverse2"
    archive = file.with_name(f"log_map_archive_{file.stem.removeprefix('scenario_')}.json")
    lanes = _lanes(archive, lane_points)
    return city, {"agents": agents, "kinds": kinds, "headings": headings, "lanes": lanes}


def _lanes(archive: Path, points: int) -> np.ndarray:
    try:
        segments = json.loads(archive.read_text("utf-8"))["lane_segments"].values()
        lines = [_middle_line(segment, points) for segment in segments]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"cannot read the map {archive}: {type(error).__name__} {' '.join(str(error).split())}"
        ) from error
    return np.array(lines, np.float32).reshape(-1, points, 2)


def _middle_line(segment: dict[str, Any], points: int) -> np.ndarray:
    """(points, 2): the lane's middle, which some maps say and others give by its two borders."""
    if "centerline" in segment:
        return resampled(_line(segment["centerline"]), points)
    sides = (segment["left_lane_boundary"], segment["right_lane_boundary"])
    middle: np.ndarray = np.mean([resampled(_line(side), points) for side in sides], axis=0)
    return middle


def _line(said: list[dict[str, float]]) -> np.ndarray:
    return np.array([(point["x"], point["y"]) for point in said])


def resampled(line: np.ndarray, points: int) -> np.ndarray:
    """(points, 2) on a polyline at even distances along it."""
    along = np.concatenate([[0], np.linalg.norm(np.diff(line, axis=0), axis=1).cumsum()])
    wanted = np.linspace(0, along[-1], points)
    return np.stack([np.interp(wanted, along, line[:, axis]) for axis in (0, 1)], -1)
