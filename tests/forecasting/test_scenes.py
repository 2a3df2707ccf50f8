"""Scenes: the focal frame, masks, files, readers; and every way in which they can be wrong."""

from __future__ import annotations

import gzip
import json
import os
import re

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from forecasting.tiny_scenes import STEPS
from foretune.errors import UserError
from foretune.forecasting.junctions import junctions
from foretune.forecasting.objective import Forecast
from foretune.forecasting.pretraining import SceneReconstruction
from foretune.forecasting.readers import load_scenes, read_argoverse2, resampled
from foretune.forecasting.scenes import COLUMNS, check_scene, in_focal_frame, read_npz, save_scenes
from foretune.tasks.objectives import make_objective
from foretune.tasks.task import Task, TaskCollection

HISTORY = STEPS["history_steps"]
LOAD = {**STEPS}


def moved(row, angle, shift):
    rotation = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    turned = {**row, **{name: row[name] @ rotation + shift for name in ("agents", "lanes")}}
    if "headings" in row:
        turned["headings"] = row["headings"] + angle
    return turned


@pytest.mark.parametrize("headings", [False, True])
def test_a_moved_and_turned_scene_is_the_same_scene(headings):
    for seed, row in enumerate(junctions(4, 2)):
        row["agents"] = row["agents"].astype(np.float64)
        row["lanes"] = row["lanes"].astype(np.float64)
        if headings:
            row["headings"] = np.array([0.3, np.nan, -1.0, 2.0])
        row["agents"][2, :HISTORY] = row["agents"][2, HISTORY - 1]  # one that stands
        row["agents"][1, :3] = np.nan
        first = in_focal_frame(row, HISTORY, 150.0)
        second = in_focal_frame(moved(row, 1.0 + seed, [30, -7]), HISTORY, 150.0)
        for name, value in first.items():
            np.testing.assert_allclose(value, second[name], atol=2e-5, err_msg=name)


def test_the_focal_agent_stands_at_the_origin_and_looks_along_x():
    scene = in_focal_frame(junctions(1, 2)[0], HISTORY)
    np.testing.assert_allclose(scene["agent_pose"][0], [0, 0, 1, 0], atol=1e-6)
    assert scene["history"][0, -1, 0] > 0.5
    np.testing.assert_allclose(scene["history"][0, -1, 1], 0, atol=1e-3)
    np.testing.assert_allclose(scene["past"][:, -1], 0)
    steps = np.diff(scene["past"][0], axis=0)
    np.testing.assert_allclose(scene["history"][0, 1:, :2], steps, atol=1e-5)
    lengths = np.linalg.norm(steps, axis=-1)
    np.testing.assert_allclose(scene["history"][0, 2:, 2], np.diff(lengths), atol=1e-5)


def test_what_was_not_observed_is_marked_and_zero():
    row = junctions(1, 2)[0]
    row["agents"][1, 2:5] = np.nan
    row["agents"][1, HISTORY + 3] = np.nan
    row["agents"][2, HISTORY - 1] = np.nan  # so the agent is left out
    row["lanes"][0, -2:] = np.nan
    scene = in_focal_frame(row, HISTORY)
    assert len(scene["kind"]) == 3
    assert scene["history"][1, :, 3].tolist() == [1, 1, 0, 0, 0, 1, 1, 1, 1, 1]
    assert not scene["history"][1, 2:6, :3].any()  # a step needs both of its ends
    assert scene["future"][1, 3].tolist() == [0, 0, 0]
    assert scene["lanes"][0, :, 2].tolist() == [1] * 8 + [0] * 2
    assert all(np.isfinite(value).all() for value in scene.values())


def test_what_is_far_is_left_out():
    row = junctions(1, 2)[0]
    row["agents"][3] += 500
    row["lanes"][1] += 500
    near = in_focal_frame(row, HISTORY, 150.0)
    unlimited = in_focal_frame(row, HISTORY)
    assert len(near["kind"]) == len(unlimited["kind"]) - 1
    assert len(near["lanes"]) == len(unlimited["lanes"]) - 1


def test_history_and_future_of_an_agent_are_never_both_visible():
    row = junctions(1, 4)[0]
    row["agents"][3, HISTORY:] = np.nan
    objective = SceneReconstruction(**STEPS)
    encoded = objective.encode(row, "")
    drawn = [objective.sample(encoded, np.random.default_rng(i)) for i in range(40)]
    for scene in [encoded, *drawn]:
        assert not (scene["keep_history"] & scene["keep_future"]).any()
        assert (scene["keep_history"] ^ scene["keep_future"])[:3].all()
        assert scene["keep_history"][3] and not scene["keep_future"][3]  # there is nothing to hide
    visible_share = np.mean([scene["keep_history"][:3] for scene in drawn], axis=0)
    assert ((visible_share > 0.2) & (visible_share < 0.8)).all()
    lanes = len(encoded["lanes"])
    assert {int(scene["keep_lane"].sum()) for scene in drawn} == {(lanes + 1) // 2}


def test_objectives_survive_json():
    for objective in (Forecast(**STEPS, regression=2.0), SceneReconstruction(**STEPS, radius=None)):
        assert make_objective(**json.loads(json.dumps(objective.to_dict()))) == objective
        assert objective.shared() is objective and objective.chance() is None


# --- files --------------------------------------------------------------------------------------


def collection():
    rows = junctions(3, 6)
    rows[0]["lanes"] = rows[0]["lanes"][:2]
    rows[1]["agents"], rows[1]["kinds"] = rows[1]["agents"][:2], rows[1]["kinds"][:2]
    return TaskCollection((Task("a", rows[:2], (), rows[2:]), Task("b", (), rows[:1])))


def same(first, second):
    assert first.names == second.names
    for task in first:
        for split in ("train", "validation", "test"):
            ours, theirs = task.split(split), second[task.name].split(split)
            assert len(ours) == len(theirs)
            for a, b in zip(ours, theirs, strict=True):
                for name in ("agents", "kinds", "lanes"):
                    np.testing.assert_allclose(a[name], b[name])


def test_npz_gives_back_what_was_saved(tmp_path):
    save_scenes(tmp_path / "s.npz", collection())
    same(collection(), load_scenes(tmp_path / "s.npz", **LOAD))


def test_parquet_is_the_same_format(tmp_path):
    rows = [
        {"task": t.name, "split": s, **{k: v.tolist() for k, v in row.items()}}
        for t in collection()
        for s in ("train", "validation", "test")
        for row in t.split(s)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "s.parquet")
    same(collection(), load_scenes(tmp_path / "s.parquet", **LOAD))


def tracks(tmp_path, lines, name="hall.txt"):
    (tmp_path / name).write_text("\n".join(lines))
    return load_scenes(tmp_path / name, history_steps=3, future_steps=2, stride=1)


def test_tracks_become_windows_cut_by_time(tmp_path):
    # Agent 1 is seen at 20 frames, agent 2 at three of them.
    lines = [f"{10 * k} 1 {k} 0" for k in range(20)] + [f"{10 * k} 2 5 {k}" for k in (1, 2, 3)]
    task = tracks(tmp_path, lines)["hall"]
    assert [len(task.split(s)) for s in ("train", "validation", "test")] == [6, 0, 4]
    assert task.train[0]["agents"].shape == (2, 5, 2)
    np.testing.assert_allclose(task.train[0]["agents"][0, :, 0], range(5))
    seen = ~np.isnan(task.train[0]["agents"][1, :, 0])
    assert seen.tolist() == [False, True, True, True, False]
    last_train = task.train[-1]["agents"][0, -1, 0]
    first_test = task.test[0]["agents"][0, 0, 0]
    assert last_train < first_test  # no step is in both
    assert task.test[-1]["agents"][0, -1, 0] == 19


def test_a_folder_of_gzipped_tracks_is_a_task_each(tmp_path):
    text = "\n".join(f"{k} 7 {k} 1" for k in range(30))
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt.gz").write_bytes(gzip.compress(text.encode()))
    tasks = load_scenes(tmp_path, history_steps=3, future_steps=2)
    assert tasks.names == ["a", "b"]


def scenario(folder, name="x1", split="train", *, centerline=True, drop=()):
    place = folder / split / name
    place.mkdir(parents=True)
    rows = [
        {
            "track_id": track,
            "object_type": kind,
            "timestep": step,
            "position_x": x0 + step,
            "position_y": 2.0 * place_y,
            "heading": 0.5,
            "focal_track_id": "20",
            "city": "austin",
        }
        for place_y, (track, kind, x0) in enumerate(
            [("10", "pedestrian", 5.0), ("20", "vehicle", 0.0), ("30", "static", 9.0)]
        )
        for step in range(110)
        if not (track == "20" and step in (70, 71))
    ]
    rows = [{k: v for k, v in row.items() if k not in drop} for row in rows]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), place / f"scenario_{name}.parquet")
    line = [{"x": float(x), "y": 1.0, "z": 0.0} for x in (0, 4, 10)]
    right = [{"x": float(x), "y": 3.0, "z": 0.0} for x in (0, 4, 10)]
    lane = {"centerline": line} if centerline else {}
    lane |= {"left_lane_boundary": line, "right_lane_boundary": right}
    (place / f"log_map_archive_{name}.json").write_text(json.dumps({"lane_segments": {"5": lane}}))
    return place


def test_argoverse_scenarios_are_read(tmp_path):
    scenario(tmp_path, "x1", "train")
    scenario(tmp_path, "x2", "val", centerline=False)
    tasks = read_argoverse2(tmp_path, lane_points=6)
    task = tasks["austin"]
    assert (len(task.train), len(task.validation), len(task.test)) == (1, 0, 1)
    row = task.train[0]
    assert row["agents"].shape == (3, 110, 2)
    np.testing.assert_allclose(row["agents"][0, :3], [[0, 2], [1, 2], [2, 2]])  # the focal one
    assert np.isnan(row["agents"][0, 70:72]).all()
    assert row["kinds"].tolist() == [0, 1, 3]
    np.testing.assert_allclose(row["headings"], 0.5)
    np.testing.assert_allclose(row["lanes"], [[[x, 1] for x in (0, 2, 4, 6, 8, 10)]], atol=1e-6)
    np.testing.assert_allclose(task.test[0]["lanes"][0, :, 1], 2)  # the middle of two borders
    Forecast().fit(tasks)
    assert load_scenes(tmp_path, history_steps=50, future_steps=60).names == ["austin"]


def test_a_line_is_resampled_at_even_distances():
    line = np.array([[0.0, 0], [3, 0], [3, 1]])
    np.testing.assert_allclose(resampled(line, 5), [[0, 0], [1, 0], [2, 0], [3, 0], [3, 1]])


# --- wrong --------------------------------------------------------------------------------------


def test_broken_scenarios_are_refused(tmp_path):
    scenario(tmp_path / "a", drop=("heading",))
    with pytest.raises(UserError, match="lacks the column heading; it has track_id"):
        read_argoverse2(tmp_path / "a")
    place = scenario(tmp_path / "b")
    next(place.glob("*.json")).write_text("{}")
    with pytest.raises(UserError, match=r"is damaged: KeyError: .lane_segments"):
        read_argoverse2(tmp_path / "b")
    next(place.glob("*.parquet")).write_bytes(b"no")
    with pytest.raises(UserError, match=r"is damaged|cannot read"):
        read_argoverse2(tmp_path / "b")
    with pytest.raises(UserError, match="holds no Argoverse 2 scenario"):
        read_argoverse2(tmp_path / "c")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"agents": np.zeros((2, 5, 2))}, r"shape \(agents, 22, 2\), .* got \(2, 5, 2\)"),
        ({"agents": np.zeros((0, 22, 2))}, r"got \(0, 22, 2\)"),
        ({"kinds": [0]}, "kinds must have one number for each of the 4 agents"),
        ({"kinds": [0, 1, 2, 9]}, "kinds must be 0, 1, 2 or 3; got 9"),
        ({"headings": [0.0]}, "headings must have one number"),
        ({"lanes": np.zeros((3, 2))}, r"lanes must have the shape \(lanes, points, 2\)"),
        ({"focal": slice(9, 10)}, "not observed at the last history step"),
        ({"focal": slice(10, 22)}, "no future step of the focal agent was observed"),
        ({"infinite": True}, "agents holds an infinite number"),
    ],
)
def test_a_wrong_scene_is_named(change, message):
    row = junctions(1, 0)[0]
    if "focal" in change:
        row["agents"][0, change["focal"]] = np.nan
    elif "infinite" in change:
        row["agents"][1, 0] = np.inf
    else:
        row |= change
    tasks = TaskCollection((Task("t", [junctions(1, 0)[0], row]),))
    with pytest.raises(UserError, match=f'^task "t", train scene 2: .*{message}'):
        Forecast(**STEPS).fit(tasks)


def test_a_row_without_agents_is_named():
    with pytest.raises(UserError, match='needs an array "agents"; the example has x'):
        Forecast().fit(TaskCollection((Task("t", [{"x": 1}]),)))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["1 2 3"], "line 1: expected `frame id x y`, got '1 2 3'"),
        (["0 1 0 0", "a b c d"], "line 2"),
        ([""], "is empty"),
        (["0 1 0 0", "1 1 0 0"], "was observed for 5 consecutive steps"),
        (["0 1 0 0"], "was observed for 5 consecutive steps"),
    ],
)
def test_wrong_tracks_are_named(tmp_path, lines, message):
    with pytest.raises(UserError, match=message):
        tracks(tmp_path, lines)


def test_wrong_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        load_scenes(tmp_path / "none", **LOAD)
    with pytest.raises(UserError, match="holds neither Argoverse 2 scenarios"):
        load_scenes(tmp_path, **LOAD)
    for name in ("s.npz", "s.parquet", "s.txt.gz"):
        (tmp_path / name).write_bytes(b"rubbish")
        with pytest.raises(UserError, match=r"is damaged|cannot read"):
            load_scenes(tmp_path / name, **LOAD)
    (tmp_path / "s.xyz").write_text("")
    with pytest.raises(UserError, match=r"scenes must be \.npz, \.parquet"):
        load_scenes(tmp_path / "s.xyz", **LOAD)
    np.savez(tmp_path / "a.npz", task=np.array(["t"]))
    with pytest.raises(UserError, match="lacks agents; it has task"):
        load_scenes(tmp_path / "a.npz", **LOAD)
    agents = np.zeros((1, 1, 22, 2))
    np.savez(tmp_path / "a.npz", agents=agents, task=np.array(["t"]), split=np.array(["dev"]))
    with pytest.raises(UserError, match="split must be one of train, validation, test; got dev"):
        load_scenes(tmp_path / "a.npz", **LOAD)
    np.savez(tmp_path / "a.npz", agents=agents, task=np.array(["t", "u"]), split=np.array(["test"]))
    with pytest.raises(UserError, match="task has 2 rows where agents has 1"):
        load_scenes(tmp_path / "a.npz", **LOAD)
    np.savez(tmp_path / "a.npz", agents=np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match=r"is damaged|cannot read"):
        load_scenes(tmp_path / "a.npz", **LOAD)


def test_a_change_of_length_needs_three_observed_steps():
    row = junctions(1, 2)[0]
    row["agents"][1, 4] = np.nan
    history = in_focal_frame(row, HISTORY)["history"][1]
    assert not history[4:7, 2].any()  # the steps into 4, out of it, and the first one with no other
    assert not history[4:6, :2].any()


def test_only_hidden_parts_are_to_be_reconstructed():
    from foretune.forecasting.model import Reconstruction

    objective = SceneReconstruction(**STEPS)
    rows = [objective.encode(row, "") for row in junctions(3, 5)]
    batch = objective.collate(rows, [0] * 3)
    scene = batch.inputs

    class Spoilt:
        def reconstruct(self, scene):
            def wrong(truth, keep):
                return truth + 9.0 * keep[:, :, None, None]

            return Reconstruction(
                wrong(scene["past"], scene["keep_history"]),
                wrong(scene["future"][..., :2], scene["keep_future"]),
                wrong(scene["lanes"][..., :2], scene["keep_lane"]),
            )

    assert scene["keep_future"].any() and scene["keep_history"].any()
    assert objective.losses(Spoilt(), batch).abs().max() == 0


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("agents", "text", "agents must hold numbers"),
        ("agents", 1j, "agents must hold numbers"),
        ("kinds", "a", "kinds must hold numbers"),
        ("kinds", 0.5, "kinds must be 0, 1, 2 or 3; got 0.5"),
        ("kinds", 7, "kinds must be 0, 1, 2 or 3; got 7"),
        ("headings", np.inf, "headings holds an infinite number"),
        ("lanes", -np.inf, "lanes holds an infinite number"),
    ],
)
def test_a_column_of_other_values_is_refused_by_its_name(column, value, message, tmp_path):
    row = junctions(1, 2)[0]
    scene = {"kinds": np.zeros(4, int), "headings": np.zeros(4), **row}
    scene = {name: scene[name] for name in COLUMNS}
    scene[column] = np.full(np.shape(scene[column]), value)
    steps = (HISTORY, STEPS["future_steps"])
    with pytest.raises(UserError, match=re.escape(message)):
        check_scene(scene, "row 1", *steps)
    columns = {name: np.array([numbers]) for name, numbers in scene.items()}
    np.savez(tmp_path / "x.npz", task=["a"], split=["train"], **columns)
    with pytest.raises(UserError, match=message.split(";")[0]):
        for stored in read_npz(tmp_path / "x.npz").tasks[0].train:
            check_scene(stored, "row 1", *steps)


@pytest.mark.parametrize("cut", [0, 1, 30, 200])
def test_a_truncated_file_is_one_line(cut, tmp_path):
    np.savez(tmp_path / "x.npz", task=["a"], split=["train"], agents=np.zeros((1, 2, 7, 2)))
    content = (tmp_path / "x.npz").read_bytes()
    (tmp_path / "x.npz").write_bytes(content[:cut])
    with pytest.raises(UserError, match=r"x\.npz is damaged"):
        read_npz(tmp_path / "x.npz")


@pytest.mark.parametrize("name", ["x.npz", "x.parquet", "x.txt", "x.txt.gz", "tracks/x.txt"])
def test_a_pipe_is_not_waited_for(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=r"no file|cannot (be )?read"):
        load_scenes(tmp_path / name.partition("/")[0], **LOAD)
