"""The probe separates what can be separated, and does not believe noise."""

from __future__ import annotations

import math

import torch

from foretune.decoding.logistic import logistic_probe


def test_it_separates_clusters_and_moving_or_scaling_states_changes_nothing():
    random = torch.Generator().manual_seed(0)
    classes = torch.arange(90) % 3
    states = torch.randn(90, 4, generator=random) * 0.2 + torch.eye(4)[classes]
    log_p = logistic_probe(states, classes, states, 3)
    assert (log_p.argmax(-1) == classes).all()
    torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(90))
    moved = logistic_probe(states * 100 + 7, classes, states * 100 + 7, 3)
    torch.testing.assert_close(moved, log_p, rtol=0.02, atol=0.02)


def test_it_agrees_with_the_optimum_of_its_own_loss():
    random = torch.Generator().manual_seed(1)
    states, classes = torch.randn(60, 3, generator=random), torch.arange(60) % 2
    log_p = logistic_probe(states, classes, states, 2, penalties=(0.1,))
    # With labels that are noise, no guess may be far better than the prior.
    loss = -log_p.gather(1, classes[:, None]).mean()
    assert 0.9 * math.log(2) < loss <= math.log(2)


def test_one_class_or_few_examples_are_no_error():
    log_p = logistic_probe(torch.randn(2, 3), torch.zeros(2).long(), torch.randn(4, 3), 1)
    assert log_p.shape == (4, 1)
