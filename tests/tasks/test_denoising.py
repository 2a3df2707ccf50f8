"""Denoising as an objective, and SaRA on a UNet of diffusers."""

from __future__ import annotations

import builtins

import numpy as np
import pytest
import torch
from torch import nn

import foretune
from foretune import Denoising, Full, Run, SaRA, Task, TaskCollection, UserError, load_sparse
from foretune.evaluation.samples import draw_samples, save_sheet
from foretune.models.loading import load_module
from foretune.tasks.objectives import denoising, make_objective

pytest.importorskip("diffusers")
SHAPE = (1, 8, 8)
RUN = Run(steps=4, batch_size=4, device="cpu")
UNET = """\
import torch
from diffusers import UNet2DModel

def build(channels=8):
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1,
        block_out_channels=(channels, channels), norm_num_groups=4, add_attention=False,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )
"""


class Zero(nn.Module):
    """Predicts no noise, or a multiple of its input."""

    def __init__(self, factor=0.0):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(float(factor)))

    def forward(self, noisy, t):
        return self.factor * noisy


def images(count=8, seed=0):
    rng = np.random.default_rng(seed)
    return [{"x": rng.uniform(-1, 1, SHAPE).astype("f4")} for _ in range(count)]


def tasks(objective=None):
    tasks = [Task(name, images(8, i), (), images(4, i + 9)) for i, name in enumerate("ab")]
    return TaskCollection(tuple(tasks), objective or Denoising(num_steps=10))


@pytest.fixture
def unet(tmp_path):
    file = tmp_path / "unet.py"
    file.write_text(UNET)
    return load_module(file)


def test_loss_is_the_mean_squared_error_of_the_noise():
    objective = Denoising(num_steps=10)
    row = objective.encode(images(1)[0], "a")
    drawn = objective.sample(row, np.random.default_rng(0))
    batch = objective.collate([drawn], [0])
    loss = objective.losses(Zero(), batch)
    assert loss.item() == pytest.approx(float(np.square(drawn["noise"]).mean()), rel=1e-5)


def test_noisy_array_follows_the_schedule():
    objective, seen = Denoising(num_steps=10), []

    class Recorder(Zero):
        def forward(self, noisy, t):
            seen.append((noisy.detach(), t))
            return noisy

    batch = objective.collate([objective.encode(r, "a") for r in images(2)], [0, 1])
    objective.losses(Recorder(), batch)
    [(noisy, t)] = seen
    left = objective.scheduler().alphas_cumprod[t].view(-1, 1, 1, 1)
    clean = batch.inputs["x"].repeat_interleave(4, 0)
    expected = left.sqrt() * clean + (1 - left).sqrt() * batch.inputs["noise"].flatten(0, 1)
    torch.testing.assert_close(noisy, expected)
    assert left[0] > left[3]  # the timesteps of an example are spread, early to late


@pytest.mark.parametrize("num_steps", [10, 100, 1000])
@pytest.mark.parametrize("schedule", denoising.SCHEDULES)
def test_every_schedule_goes_from_clean_to_noise(num_steps, schedule):
    left = Denoising(num_steps=num_steps, schedule=schedule).scheduler().alphas_cumprod
    assert left[0] > 0.9 and left[-1] < 0.05


def test_training_draws_depend_on_the_seed_and_scores_do_not():
    objective = Denoising(num_steps=10)
    row = objective.encode(images(1)[0], "a")
    first, second = (objective.collate([row], [0]) for _ in range(2))
    assert torch.equal(first.inputs["noise"], second.inputs["noise"])
    first, again, second = (objective.sample(row, np.random.default_rng(s)) for s in (0, 0, 1))
    assert np.array_equal(first["noise"], again["noise"])
    assert not np.array_equal(first["noise"], second["noise"])


def test_two_methods_under_one_seed_see_the_same_noise():
    met = []

    class Recorder(Denoising):
        def collate(self, rows, slots):
            met[-1].extend(row["noise"] for row in rows if "noise" in row)
            return super().collate(rows, slots)

    for rate in (1e-3, 1e-2):
        met.append([])
        foretune.adapt(Zero(), tasks(Recorder(num_steps=10)), Full(learning_rate=rate), RUN)
    assert met[0] and all(np.array_equal(a, b) for a, b in zip(*met, strict=True))


def test_wrong_shapes_and_fields_are_refused():
    class Short(Zero):
        def forward(self, noisy, t):
            return self.factor * noisy[..., 1:]

    with pytest.raises(UserError, match=r"shape \(1, 8, 7\) for an array of shape \(1, 8, 8\)"):
        foretune.adapt(Short(), tasks(), Full(), RUN)
    with pytest.raises(UserError, match="schedule must be one of linear"):
        Denoising(schedule="cosine")
    with pytest.raises(UserError, match="num_steps must be a whole number not below 1, got 0"):
        make_objective("denoising", num_steps=0)
    with pytest.raises(UserError, match='train row 1: an array "x" is missing'):
        Denoising().fit(TaskCollection((Task("a", [{"y": 1}]),)))


def test_missing_diffusers_is_one_line(monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name.startswith("diffusers"):
            raise ImportError(name)
        return real(name, *rest)

    denoising._scheduler.cache_clear()
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"needs diffusers: pip install 'foretune\[diffusion\]'"):
        Denoising(num_steps=7).scheduler()


def test_a_unet_is_adapted_and_loaded_bit_by_bit(unet, tmp_path):
    method = SaRA(fraction=0.2, learning_rate=0.01)
    adapted = foretune.adapt(unet, tasks(), method, RUN)
    adapted.save(tmp_path / "out")
    assert set(adapted.scores) == {("a", 0), ("b", 0)}
    for name in "ab":
        model = adapted.models[name, 0]
        loaded = load_sparse(unet, tmp_path / "out" / name)
        pairs = zip(loaded.parameters(), model.parameters(), strict=True)
        assert all(torch.equal(p, q) for p, q in pairs)
        kernels = [n for n in adapted.learners[name, 0].delta.support if n.endswith("conv1.weight")]
        assert kernels and any(
            not torch.equal(unet.get_parameter(n), model.get_parameter(n)) for n in kernels
        )


def test_samples_are_seeded_and_make_a_sheet(unet, tmp_path):
    objective = Denoising(num_steps=4)
    first, again, second_seed = (
        draw_samples(unet, objective, SHAPE, 3, seed=seed) for seed in (0, 0, 1)
    )
    assert first.shape == (3, *SHAPE) and np.abs(first).max() <= 1
    assert np.array_equal(first, again) and not np.array_equal(first, second_seed)
    path = save_sheet({"a": first, "b": first[:2]}, tmp_path / "sheet.png", scale=2)
    from PIL import Image

    assert Image.open(path).size == (2 * (3 * 10 - 2), 2 * (2 * 10 - 2))
    with pytest.raises(UserError, match="a sheet needs greyscale images"):
        save_sheet({"a": np.zeros((1, 3, 8, 8))}, tmp_path / "x.png")
