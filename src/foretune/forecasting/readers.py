"""Readers of scenes: plain files, tracks (`frame id x y`, or CSV), and folders of Argoverse 2."""

from __future__ import annotations

import gzip
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from foretune.errors import UserError
from foretune.forecasting.csv_tracks import read_csv_points
from foretune.forecasting.scenes import Arrays, collection_of, read_npz
from foretune.formats import damage_named, read_json
from foretune.tasks.example import SPLITS
from foretune.tasks.task import Task, TaskCollection

TRAIN, VALIDATION = 0.5, 0.6  # ends of these splits as shares of a recording; the rest is test
AV2_KINDS = {"vehicle": 0, "bus": 0, "pedestrian": 1, "cyclist": 2, "motorcyclist": 2}
AV2_SPLITS = {"train": "train", "val": "test"}  # Argoverse's test split has no futures
AV2_STEPS, AV2_HISTORY = 110, 50
TRACKS = (".csv", ".csv.gz", ".txt", ".txt.gz")  # ends of the names of files of tracks


def load_scenes(
    path: Path | str,
    *,
    history_steps: int,
    future_steps: int,
    lane_points: int = 20,
    stride: int = 4,
) -> TaskCollection:
    """Read scenes from a file or folder of any supported format.

    Args:
        path: .npz or .parquet in the plain format; a file of tracks (.csv, .txt, also gzipped) or
            a folder of them, one task per file; a folder of Argoverse 2, one task per city.
        history_steps: Tracks: observed steps.
        future_steps: Tracks: steps that follow.
        lane_points: Argoverse 2: points per lane after resampling.
        stride: Tracks: steps between two scenes of one track.

    Returns:
        A collection without an objective.

    Raises:
        UserError: The path does not exist, has an unsupported format or holds no scenes.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise UserError(f"cannot read scenes from {path}: no such file or folder")
    if path.is_dir():
        if any(path.rglob("scenario_*.parquet")):
            return read_argoverse2(path, lane_points=lane_points)
        files = sorted(file for end in TRACKS for file in path.rglob(f"*{end}"))
        if not files:
            raise UserError(
                f"{path} holds neither Argoverse 2 scenarios (scenario_*.parquet) nor tracks "
                f"({', '.join(f'*{end}' for end in TRACKS)})"
            )
        return read_tracks(files, history_steps, future_steps, stride=stride)
    if path.suffix == ".npz":
        return read_npz(path)
    if path.suffix == ".parquet":
        return read_parquet(path)
    if path.name.endswith(TRACKS):
        return read_tracks([path], history_steps, future_steps, stride=stride)
    raise UserError(
        f"{path}: scenes must be .npz, .parquet, tracks in {', '.join(TRACKS)}, or a folder of "
        "tracks or of Argoverse 2 scenarios"
    )


def read_parquet(path: Path) -> TaskCollection:
    """Read the plain format as parquet: one row per scene, with arrays as nested lists.

    Raises:
        UserError: pyarrow is missing, or the file cannot be read or lacks a column.
    """
    columns: dict[str, Any] = {k: list(v) for k, v in _parquet(path).items()}
    for name in set(columns) - {"task", "split"}:
        columns[name] = [np.array(value, np.float64) for value in columns[name]]
    if "lanes" in columns:
        columns["lanes"] = [v.reshape(-1, 1, 2) if not v.size else v for v in columns["lanes"]]
    return collection_of(path, columns)


def _parquet(path: Path) -> dict[str, list[Any]]:
    """The columns of a parquet file.

    Raises:
        UserError: pyarrow is missing, or the file cannot be read.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            f"{path}: reading parquet needs pyarrow: pip install 'foretune[scenes]'"
        ) from error
    try:
        columns: dict[str, list[Any]] = pyarrow.parquet.read_table(path).to_pydict()
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise UserError(f"cannot read {path}: {' '.join(str(error).split())}") from error
    return columns


def read_tracks(
    files: list[Path], history_steps: int, future_steps: int, *, stride: int = 4
) -> TaskCollection:
    """Read tracks: one task per file, one scene per complete window.

    A text file has lines `frame id x y`; a CSV file has a header, whose columns are recognised by
    their names (`COLUMNS`), and times instead of frames if it has those.

    A window is complete if one track, the focal agent, was observed at all of its steps; the other
    agents are those observed at the last history step. The first half of a recording, by time, is
    train, the next tenth validation, the rest test; windows that cross a border are left out.

    Args:
        files: Text files, gzipped or not, with positions in metres.
        history_steps: Observed steps.
        future_steps: Steps that follow.
        stride: Steps between two windows of one track.

    Raises:
        UserError: A file cannot be read, is empty or has a line that is not four numbers, or no
            file has a complete window.
    """
    tasks = []
    for file in files:
        rows: dict[str, list[Arrays]] = {split: [] for split in SPLITS}
        for split, row in _windows(
            _points(file), history_steps, history_steps + future_steps, stride
        ):
            rows[split].append(row)
        if any(rows.values()):
            name = next(file.name.removesuffix(end) for end in TRACKS if file.name.endswith(end))
            tasks.append(Task(name, **rows))
    if not tasks:
        raise UserError(
            f"no track in {files[0]}{' …' if len(files) > 1 else ''} was observed for "
            f"{history_steps + future_steps} consecutive steps"
        )
    return TaskCollection(tuple(tasks))


def _points(file: Path) -> np.ndarray:
    """(n, 4): frame, id, x, y.

    Raises:
        UserError: The file cannot be read, is empty or has a line that is not four numbers.
    """
    if not file.is_file():
        raise UserError(f"{file} is a pipe or a device, which cannot be read")
    if ".csv" in file.suffixes:
        return read_csv_points(file)
    opener = gzip.open if file.suffix == ".gz" else open
    points = []
    try:
        with opener(file, "rt", encoding="utf-8") as lines:
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
                points.append((frame, agent, x, y))
    except (OSError, UnicodeDecodeError, EOFError) as error:
        raise UserError(f"cannot read {file}: {' '.join(str(error).split())}") from error
    if not points:
        raise UserError(f"{file} is empty")
    return np.array(points)


def _windows(
    points: np.ndarray, history_steps: int, steps: int, stride: int
) -> Iterator[tuple[str, Arrays]]:
    """(split, scene) of each complete window; points are (n, 4) as `_points` returns them."""
    tracks: dict[float, dict[float, tuple[float, float]]] = defaultdict(dict)
    agents_at: dict[float, list[float]] = defaultdict(list)
    for frame, agent, x, y in points.tolist():
        tracks[agent][frame] = (x, y)
        agents_at[frame].append(agent)
    gaps = Counter(
        gap for track in tracks.values() for gap in np.diff(sorted(track)).tolist() if gap > 0
    )
    if not gaps:
        return
    period = gaps.most_common(1)[0][0]
    begin, end = points[:, 0].min(), points[:, 0].max()
    unobserved = (np.nan, np.nan)
    for agent, track in tracks.items():
        for start in sorted(track)[::stride]:
            frames = [start + period * k for k in range(steps)]
            if not all(frame in track for frame in frames):
                continue
            split = _split_of(frames[0], frames[-1], begin, end)
            if split is None:
                continue
            others = [a for a in agents_at[frames[history_steps - 1]] if a != agent]
            agents = [[tracks[a].get(f, unobserved) for f in frames] for a in [agent, *others]]
            yield (
                split,
                {
                    "agents": np.array(agents, np.float32),
                    "kinds": np.ones(len(agents), np.int64),
                },
            )


def _split_of(first: float, last: float, begin: float, end: float) -> str | None:
    """The split of a window of frames in a recording; None if it crosses a border."""
    borders = [begin + share * (end - begin) for share in (0, TRAIN, VALIDATION, 1)]
    for name, low, high in zip(SPLITS, borders, borders[1:], strict=False):
        if low <= first and (last <= high if name == "test" else last < high):
            return name
    return None


def read_argoverse2(folder: Path | str, *, lane_points: int = 20) -> TaskCollection:
    """Read scenarios of the Argoverse 2 motion forecasting data: one task per city.

    A scenario is a folder with `scenario_ID.parquet` and `log_map_archive_ID.json`: 50 history and
    60 future steps at 10 Hz. Scenarios below a folder `train` are train examples; those below
    `val`, or below neither, are test examples, since Argoverse's own test split has no futures.

    Args:
        folder: Holds scenarios at any depth.
        lane_points: Points per lane centre line after resampling.

    Raises:
        UserError: There is no scenario, or a file cannot be read or lacks a column.
    """
    folder = Path(folder)
    rows: dict[str, dict[str, list[Arrays]]] = {}
    for file in sorted(folder.rglob("scenario_*.parquet")):
        places = [p for p in file.relative_to(folder).parts if p in AV2_SPLITS]
        split = AV2_SPLITS[places[-1]] if places else "test"
        city, row = read_scenario(file, lane_points=lane_points)
        rows.setdefault(city, {s: [] for s in SPLITS})[split].append(row)
    if not rows:
        raise UserError(f"{folder} holds no Argoverse 2 scenarios (scenario_*.parquet)")
    return TaskCollection(tuple(Task(city, **splits) for city, splits in rows.items()))


def read_scenario(file: Path, *, lane_points: int = 20) -> tuple[str, Arrays]:
    """Read one scenario as (city, scene), with the focal track as the first agent.

    Raises:
        UserError: A file cannot be read or lacks a column, or the focal track is missing.
    """
    table = _parquet(file)
    columns = ("track_id", "object_type", "timestep", "position_x", "position_y", "heading")
    for name in (*columns, "focal_track_id"):
        if name not in table:
            raise UserError(f"{file} lacks the column {name}; it has {', '.join(table)}")
    focal = table["focal_track_id"][0] if table["focal_track_id"] else None
    names = list(dict.fromkeys([focal, *table["track_id"]]))
    agents = np.full((len(names), AV2_STEPS, 2), np.nan, np.float32)
    kinds = np.full(len(names), 3, np.int64)
    headings = np.full(len(names), np.nan, np.float32)
    index_of = {name: i for i, name in enumerate(names)}
    for track, kind, step, x, y, heading in zip(*(table[n] for n in columns), strict=True):
        i = index_of[track]
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
    """(L, points, 2) centre lines of a map's lanes.

    Raises:
        UserError: The map cannot be read.
    """
    content = read_json(archive, dict[str, Any])
    with damage_named(archive):
        lines = [_centre_line(segment, points) for segment in content["lane_segments"].values()]
    return np.array(lines, np.float32).reshape(-1, points, 2)


def _centre_line(segment: dict[str, Any], points: int) -> np.ndarray:
    """(points, 2) centre line of a lane; maps without one give the two boundaries instead."""
    if "centerline" in segment:
        return resampled(_line(segment["centerline"]), points)
    sides = (segment["left_lane_boundary"], segment["right_lane_boundary"])
    middle: np.ndarray = np.mean([resampled(_line(side), points) for side in sides], axis=0)
    return middle


def _line(points: list[dict[str, float]]) -> np.ndarray:
    """(n, 2) from points with the keys x and y."""
    return np.array([(point["x"], point["y"]) for point in points])


def resampled(line: np.ndarray, points: int) -> np.ndarray:
    """(points, 2) evenly spaced along a polyline (n, 2)."""
    along = np.concatenate([[0], np.linalg.norm(np.diff(line, axis=0), axis=1).cumsum()])
    distances = np.linspace(0, along[-1], points)
    return np.stack([np.interp(distances, along, line[:, axis]) for axis in (0, 1)], -1)
