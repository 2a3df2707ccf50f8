"""Singular values of what full fine-tuning changed."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import foretune
from foretune.adapters.config import lora_scale
from foretune.evaluation import spectrum
from foretune.evaluation.spectrum import MAX_VALUES, changes
from linear_tasks import Net, family


def small_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 6), nn.Linear(6, 3))


def test_values_are_numpys_of_the_change_over_the_weights_norm():
    base, changed = small_network(), small_network()
    with torch.no_grad():
        changed[1].weight += torch.outer(torch.arange(6.0), torch.ones(5))
    spectra = changes(base, changed)
    before, after = base[1].weight.detach().numpy(), changed[1].weight.detach().numpy()
    expected = np.linalg.svd(after - before, compute_uv=False) / np.linalg.norm(before)
    assert list(spectra) == ["1"]  # the layers that changed, no others
    assert spectra["1"]["values"] == pytest.approx(expected, abs=1e-6)
    assert spectra["1"]["values"][0] > 1 > 1e-5 > spectra["1"]["values"][1]  # rank one
    assert spectra["1"]["rank_90"] == 1


def test_norm_and_rank_are_of_all_values_not_only_of_the_recorded_ones():
    base, changed = nn.Linear(100, 100, bias=False), nn.Linear(100, 100, bias=False)
    with torch.no_grad():
        changed.weight.copy_(base.weight + torch.eye(100))  # all singular values are alike
    [spectrum] = changes(base, changed).values()
    assert len(spectrum["values"]) == MAX_VALUES < 90 == spectrum["rank_90"]
    assert spectrum["norm"] == pytest.approx(10 / base.weight.norm().item(), rel=1e-5)


def test_a_head_of_another_width_is_left_out():
    base, changed = small_network(), small_network()
    changed[2] = nn.Linear(6, 7)
    assert changes(base, changed) == {}
    wider = copy.deepcopy(changed)
    with torch.no_grad():
        wider[0].weight += 1
    assert list(changes(base, wider)) == ["0"]


@pytest.mark.parametrize("rslora", [False, True])
def test_the_scale_is_the_same_at_every_rank(monkeypatch, rslora):
    scales = []

    def adapt(model, tasks, method, run, **options):
        if isinstance(method, foretune.LoRA):
            scales.append(lora_scale(method.lora))
        return foretune.Adapted({}, {}, {}, {}, "")

    monkeypatch.setattr(spectrum.verbs, "adapt", adapt)
    lora = {"r": 4, "lora_alpha": 16, "use_rslora": rslora}
    spectrum.measure(
        {"base": Net()},
        family(),
        adapt=foretune.LoRA(lora=lora),
        full=foretune.Full(),
        run=foretune.Run(),
        shots=None,
        ranks=(1, 2, 8),
    )
    assert scales == [8.0 if rslora else 4.0] * 3
