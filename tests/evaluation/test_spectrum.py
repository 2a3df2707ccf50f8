"""Singular values of what full fine-tuning changed."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from foretune.evaluation.spectrum import singular_values


def made() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 6), nn.Linear(6, 3))


def test_values_are_numpys_of_the_change_over_the_weights_norm():
    base, changed = made(), made()
    with torch.no_grad():
        changed[1].weight += torch.outer(torch.arange(6.0), torch.ones(5))
    found = singular_values(base, changed)
    before, after = base[1].weight.detach().numpy(), changed[1].weight.detach().numpy()
    wanted = np.linalg.svd(after - before, compute_uv=False) / np.linalg.norm(before)
    assert list(found) == ["1"]  # the layers that moved, no others
    assert found["1"] == pytest.approx(wanted, abs=1e-6)
    assert found["1"][0] > 1 > 1e-5 > found["1"][1]  # of rank one


def test_a_head_of_another_width_is_left_out():
    base, changed = made(), made()
    changed[2] = nn.Linear(6, 7)
    assert singular_values(base, changed) == {}
    wider = copy.deepcopy(changed)
    with torch.no_grad():
        wider[0].weight += 1
    assert list(singular_values(base, wider)) == ["0"]
