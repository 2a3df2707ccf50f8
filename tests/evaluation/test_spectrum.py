"""Singular values of what full fine-tuning changed."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from foretune.evaluation.spectrum import KEPT, changes


def made() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 6), nn.Linear(6, 3))


def test_values_are_numpys_of_the_change_over_the_weights_norm():
    base, changed = made(), made()
    with torch.no_grad():
        changed[1].weight += torch.outer(torch.arange(6.0), torch.ones(5))
    found = changes(base, changed)
    before, after = base[1].weight.detach().numpy(), changed[1].weight.detach().numpy()
    wanted = np.linalg.svd(after - before, compute_uv=False) / np.linalg.norm(before)
    assert list(found) == ["1"]  # the layers that moved, no others
    assert found["1"]["values"] == pytest.approx(wanted, abs=1e-6)
    assert found["1"]["values"][0] > 1 > 1e-5 > found["1"]["values"][1]  # of rank one
    assert found["1"]["rank_90"] == 1


def test_size_and_rank_are_of_the_whole_change_and_not_of_the_values_kept():
    base, changed = nn.Linear(100, 100, bias=False), nn.Linear(100, 100, bias=False)
    with torch.no_grad():
        changed.weight.copy_(base.weight + torch.eye(100))  # all singular values are alike
    [found] = changes(base, changed).values()
    assert len(found["values"]) == KEPT < 90 == found["rank_90"]
    assert found["norm"] == pytest.approx(10 / base.weight.norm().item(), rel=1e-5)


def test_a_head_of_another_width_is_left_out():
    base, changed = made(), made()
    changed[2] = nn.Linear(6, 7)
    assert changes(base, changed) == {}
    wider = copy.deepcopy(changed)
    with torch.no_grad():
        wider[0].weight += 1
    assert list(changes(base, wider)) == ["0"]
