"""Synthetic junctions: scenes with several equally likely futures, which the lanes reveal."""

from __future__ import annotations

import numpy as np

from foretune.forecasting.scenes import Arrays

STEP_S, RADIUS_M, NUM_AGENTS = 0.4, 8.0, 4
HISTORY_STEPS, FUTURE_STEPS, LANE_POINTS, MAX_LANES = 10, 12, 10, 6
TURNS = (1, 0, -1)  # quarter turns to the left; 0 is straight on


def junctions(count: int, seed: int) -> list[Arrays]:
    """Scenes of four agents on the four arms of a junction, each arm open as an exit or closed.

    The focal agent takes one of its open exits at random; only the lanes show which exits are
    open. A scene has 10 history and 12 future steps of 0.4 s and up to 6 lanes of 10 points.

    Args:
        count: Number of scenes.
        seed: Random seed of the scenes.

    >>> junctions(1, 0)[0]["agents"].shape
    (4, 22, 2)
    """
    rng = np.random.default_rng(seed)
    return [_junction(rng) for _ in range(count)]


def _junction(rng: np.random.Generator) -> Arrays:
    turns = [t for t in TURNS if rng.random() < 0.6] or [int(rng.choice(TURNS))]
    open_arms = {(turn + 2) % 4 for turn in turns}  # arm k is arm 0 rotated by k quarters
    agents, lanes = [], []
    for arm in range(NUM_AGENTS):
        # The path from arm k to arm j is that from arm 0 to arm j - k, rotated.
        exits = [t for t in TURNS if (t + 2 + arm) % 4 in open_arms | {0}]
        if arm == 0:
            exits = turns
            lanes += [_path(np.linspace(0, 30, LANE_POINTS), turn) for turn in turns]
        turn = int(rng.choice(exits)) if exits else 0
        lanes.append(_rotated(_path(np.linspace(-40, 0, LANE_POINTS), 0), arm))
        agents.append(_rotated(_path(_distances(rng), turn), arm))
    angle = rng.uniform(0, 2 * np.pi)
    rotation = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    shift = rng.uniform(-100, 100, 2)
    lanes = lanes[:MAX_LANES]
    return {
        "agents": (np.array(agents) @ rotation + shift).astype(np.float32),
        "kinds": np.zeros(NUM_AGENTS, np.int64),
        "lanes": (np.array(lanes) @ rotation + shift).astype(np.float32),
    }


def _distances(rng: np.random.Generator) -> np.ndarray:
    """(T,) distance along the path in m, 0 where the junction begins."""
    time = STEP_S * (np.arange(HISTORY_STEPS + FUTURE_STEPS) - HISTORY_STEPS + 1)
    speed, acceleration = rng.uniform(4, 9), rng.uniform(-0.3, 0.3)
    distances: np.ndarray = -rng.uniform(1, 10) + speed * time + acceleration * time**2 / 2
    return distances


def _path(distances: np.ndarray, turn: int) -> np.ndarray:
    """(n, 2) positions on the path that comes from below and turns at (0, -RADIUS_M)."""
    if turn == 0:
        return np.stack([np.zeros_like(distances), distances - RADIUS_M], -1)
    arc = np.clip(distances / RADIUS_M, 0, np.pi / 2)
    after = np.maximum(distances - RADIUS_M * np.pi / 2, 0)
    x = RADIUS_M * (1 - np.cos(arc)) + after
    y = -RADIUS_M + RADIUS_M * np.sin(arc) + np.minimum(distances, 0)
    return np.stack([-turn * x, y], -1)


def _rotated(points: np.ndarray, quarters: int) -> np.ndarray:
    """(n, 2) points rotated by quarter turns to the left."""
    for _ in range(quarters):
        points = np.stack([-points[:, 1], points[:, 0]], -1)
    return points
