"""Checkpoints of Forecast-MAE's authors, and tracks in CSV files."""

from __future__ import annotations

import gzip
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from command_line import call, the_error, the_json
from foretune.forecasting.checkpoints import read_checkpoint
from foretune.forecasting.config import ForecastMAEConfig
from foretune.forecasting.forecasters import load_forecast_mae
from foretune.forecasting.model import ForecastMAE
from foretune.forecasting.readers import load_scenes

SIZES: dict[str, Any] = {
    "width": 16,
    "encoder_depth": 2,
    "decoder_depth": 1,
    "num_heads": 2,
    "history_steps": 10,
    "future_steps": 12,
    "lane_points": 5,
}


def model_of(**changes: Any) -> ForecastMAE:
    torch.manual_seed(0)
    return ForecastMAE(ForecastMAEConfig(**{**SIZES, **changes})).eval()


def as_the_authors_write(model: ForecastMAE, natten: str = "rpb") -> dict[str, torch.Tensor]:
    """The state by the names and shapes of their code, in front of which Lightning puts `net.`."""
    theirs: dict[str, torch.Tensor] = {}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for name in list(state):
        if ".attn.q_proj." in name:
            parts = [state.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
            state[re.sub(r"q_proj\.(\w+)", r"in_proj_\1", name)] = torch.cat(parts)
    for name, value in state.items():
        key = re.sub(r"^(hist|future)_embed\.proj", r"\1_embed.embed.proj", name)
        key = re.sub(r"_embed\.levels\.(\d)\.(\d)\.", r"_embed.levels.\1.blocks.\2.", key)
        key = re.sub(r"_embed\.downsamples\.(\d)\.", r"_embed.levels.\1.downsample.", key)
        key = re.sub(r"_embed\.norms\.(\d)\.", r"_embed.norm\1.", key)
        key = key.replace("attn.rpb", f"attn.{natten}")
        if key.startswith("lane_embed") and value.dim() == 2:
            value = value[..., None]  # a convolution of kernel size 1
        if key in ("lane_type_embed", "lane_mask_token", "future_mask_token", "history_mask_token"):
            value = value[None]
        theirs[f"net.{key}"] = value
    return theirs


@pytest.mark.parametrize("natten", ["rpb", "rel_pos_bias"])
def test_a_checkpoint_of_the_authors_is_the_same_model(tmp_path: Path, natten: str) -> None:
    model = model_of()
    file = tmp_path / "epoch=59.ckpt"
    torch.save({"state_dict": as_the_authors_write(model, natten), "epoch": 59}, file)
    read = read_checkpoint(file, num_heads=2)
    assert read.sizes == model.sizes
    state = read.state_dict()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    result = the_json("forecast", "convert", file, "--num-heads", 2, "--out", tmp_path / "base")
    assert result["parameters"] == sum(p.numel() for p in model.parameters())
    loaded = load_forecast_mae(tmp_path / "base")
    assert all(
        torch.equal(p, q) for p, q in zip(loaded.parameters(), model.parameters(), strict=True)
    )


def test_what_is_no_such_checkpoint_is_said(tmp_path: Path) -> None:
    def refused(content: Any) -> str:
        torch.save(content, tmp_path / "x.ckpt")
        return the_error("forecast", "convert", tmp_path / "x.ckpt", "--out", tmp_path / "base")

    state = as_the_authors_write(model_of())
    assert "it has no norm.weight" in refused({"state_dict": {"fc.weight": torch.ones(2)}})
    assert "holds net2.x, which" in refused({**state, "net2.x": torch.ones(1)})
    assert "pos_embed.0.weight should have shape (16, 4), got (3,)" in refused(
        {**state, "net.pos_embed.0.weight": torch.ones(3)}
    )
    assert "is no state dict" in refused({"state_dict": {"a": 1}})
    assert "holds Python objects beside tensors" in refused({"state_dict": state, "of": Path})
    assert "no checkpoint" in the_error("forecast", "convert", tmp_path / "none.ckpt")
    (tmp_path / "x.ckpt").write_bytes(b"text")
    assert "x.ckpt" in the_error("forecast", "convert", tmp_path / "x.ckpt")
    assert not (tmp_path / "base").exists()


def rows_of(header: str, rate: float = 0.4) -> str:
    lines = [header]
    for step in range(30):
        for agent in ("a7", "b2"):
            x = step * 0.5 + (agent == "b2")
            lines.append(f"{agent},{step * rate:.1f},ped,{x:.2f},{-x:.2f}")
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    "header", ["track_id,timestamp,kind,position_x,position_y", "Agent ID,Time,type,X,Y"]
)
def test_tracks_in_csv_files_are_those_of_text_files(tmp_path: Path, header: str) -> None:
    steps = {"history_steps": 4, "future_steps": 6}
    (tmp_path / "hall.csv").write_text("\ufeff" + rows_of(header), encoding="utf-8")
    plain = [
        f"{step} {agent} {step * 0.5 + agent:.2f} {-(step * 0.5 + agent):.2f}"
        for step in range(30)
        for agent in (0, 1)
    ]
    (tmp_path / "hall.txt").write_text("\n".join(plain))
    [task] = load_scenes(tmp_path / "hall.csv", **steps)
    [expected] = load_scenes(tmp_path / "hall.txt", **steps)
    assert task.name == "hall" and len(task) == len(expected) > 0
    for split in ("train", "validation", "test"):
        for row, other in zip(task.split(split), expected.split(split), strict=True):
            np.testing.assert_array_equal(row["agents"], other["agents"])
    (tmp_path / "more").mkdir()
    with gzip.open(tmp_path / "more" / "yard.csv.gz", "wt") as file:
        file.write(rows_of(header))
    assert [t.name for t in load_scenes(tmp_path / "more", **steps)] == ["yard"]


def test_bad_csv_files_are_one_line(tmp_path: Path) -> None:
    def refused(text: str) -> str:
        (tmp_path / "t.csv").write_text(text)
        line = call("forecast", "pretrain", "--scenes", tmp_path / "t.csv", "--out", tmp_path / "m")
        assert line.exit_code == 2, line.output
        return line.stderr

    assert "no column for y: it may be called y, position_y" in refused("id,t,x,z\n1,0,1,1\n")
    assert "line 3: time, x and y must be numbers, got '1', 'far', '2'" in refused(
        "id,t,x,y\n1,0,1,1\n1,1,far,2\n"
    )
    assert "has no rows" in refused("id,t,x,y\n")
    assert "holds 2 recordings, a, b" in refused("scene,id,t,x,y\na,1,0,1,1\nb,1,1,1,1\n")
    assert "two positions at one time" in refused("id,t,x,y\n1,0,1,1\n1,0,2,2\n")
    assert "is not finite" in refused("id,t,x,y\n1,0,nan,1\n")
