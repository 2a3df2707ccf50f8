"""Tracks in CSV files as people have them: a header, a row for each agent and time."""

from __future__ import annotations

import csv
import gzip
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from foretune.errors import UserError

# What is read → names that its column may have, the likelier first, without case, spaces and _.
COLUMNS = {
    "time": ("frame", "frame_id", "timestep", "timestamp", "timestamp_ms", "time", "t", "step"),
    "id": ("track_id", "agent_id", "object_id", "vehicle_id", "pedestrian_id", "id"),
    "x": ("x", "position_x", "pos_x", "x_center", "center_x", "x_m", "utm_x"),
    "y": ("y", "position_y", "pos_y", "y_center", "center_y", "y_m", "utm_y"),
}
RECORDINGS = ("recordingid", "recording", "sceneid", "scene", "scenarioid", "sequenceid")


def read_csv_points(file: Path) -> np.ndarray:
    """(n, 4): the step, from 0 and by the most common distance in time, the track, x and y in m.

    Rows whose position is empty are unobserved and left out.

    Raises:
        UserError: The file cannot be read, has no header with such columns, or a cell is no number.
    """
    opener = gzip.open if file.suffix == ".gz" else open
    points: list[tuple[float, float, float, float]] = []
    tracks: dict[str, float] = {}
    try:
        with opener(file, "rt", encoding="utf-8-sig", newline="") as lines:
            rows = csv.reader(lines)
            header = next(rows, [])
            places = _places(file, header)
            recording = next((i for i, n in enumerate(header) if _plain(n) in RECORDINGS), None)
            recordings: set[str] = set()
            for number, row in enumerate(rows, 2):
                cells = [row[place].strip() if place < len(row) else "" for place in places]
                if not any(row) or "" in cells[2:]:
                    continue
                if recording is not None and recording < len(row):
                    recordings.add(row[recording])
                time, name, x, y = cells
                track = tracks.setdefault(name, float(len(tracks)))
                try:
                    points.append((float(time), track, float(x), float(y)))
                except ValueError:
                    raise UserError(
                        f"{file} line {number}: time, x and y must be numbers, got "
                        f"{time!r}, {x!r}, {y!r}"
                    ) from None
    except (OSError, UnicodeDecodeError, EOFError, csv.Error) as error:
        raise UserError(f"cannot read {file}: {' '.join(str(error).split())}") from error
    if not points:
        raise UserError(f"{file} has no rows")
    if len(recordings) > 1:
        raise UserError(
            f"{file} holds {len(recordings)} recordings, {', '.join(sorted(recordings)[:3])}, "
            "and a file is one of them: write a file for each"
        )
    array = np.array(points)
    if len(np.unique(array[:, :2], axis=0)) < len(array):
        raise UserError(f"{file}: a track has two positions at one time; a file is one recording")
    if not np.isfinite(array).all():
        raise UserError(f"{file} holds a time or position that is not finite")
    array[:, 0] = _steps(array)
    return array


def _places(file: Path, header: Sequence[str]) -> list[int]:
    """The places of time, id, x and y in a header.

    Raises:
        UserError: One of them is missing.
    """
    plain = [_plain(name) for name in header]
    places = []
    for what, names in COLUMNS.items():
        place = next((plain.index(_plain(n)) for n in names if _plain(n) in plain), None)
        if place is None:
            raise UserError(
                f"{file} has no column for {what}: it may be called {', '.join(names)}; it has "
                f"{', '.join(header)}"
            )
        places.append(place)
    return places


def _plain(name: str) -> str:
    return name.strip().casefold().replace("_", "").replace(" ", "")


def _steps(points: np.ndarray) -> np.ndarray:
    """(n,) whole steps from the first time on, by the most common distance within a track."""
    gaps: Counter[float] = Counter()
    for track in np.unique(points[:, 1]):
        times = np.unique(points[points[:, 1] == track, 0])
        gaps.update(round(float(b - a), 6) for a, b in pairwise(times))
    period = gaps.most_common(1)[0][0] if gaps else 1.0
    steps: np.ndarray = np.round((points[:, 0] - points[:, 0].min()) / period)
    return steps
