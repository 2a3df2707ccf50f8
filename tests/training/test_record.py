"""What a run records of its cost."""

from __future__ import annotations

import pytest
import torch

from foretune.training.record import count, counted, metered


def test_a_block_knows_the_peak_before_and_inside_one_that_it_contains():
    with metered() as outer:
        large = torch.ones(30_000_000)  # 114 MB
        del large
        with metered() as inner:
            pass
    if inner["peak_memory_mb"] is None:
        pytest.skip("the system does not report a peak")
    assert outer["peak_memory_mb"] > inner["peak_memory_mb"] + 50
    with metered() as outer, metered() as inner:
        torch.ones(30_000_000)
    assert outer["peak_memory_mb"] >= inner["peak_memory_mb"]
    assert outer["seconds"] >= inner["seconds"]


def test_a_backward_pass_counts_in_every_block_that_it_is_in():
    with counted() as outer:
        count(5, 1)
        with counted() as inner:
            count(7, 2)
    assert (outer, inner) == ({"tokens": 12, "examples": 3}, {"tokens": 7, "examples": 2})
