"""The adapted layer against a reference of ten lines, on fresh random inputs every time."""

from __future__ import annotations

import contextlib
import random

import pytest
import torch
from torch import Tensor

from foretune.adapters.lora import Layout, lora_linear
from foretune.models.layout import RowSlots

IN, OUT, R, SLOTS = 10, 12, 3, 5


def plain(x, weight, bias, a, b, scale, slots, lengths=None) -> Tensor:
    """Row by row, y = x Wᵀ + bias + s · x Aᵀ Bᵀ; without padding, rows lie along dimension 1."""
    parts = x.unbind() if lengths is None else x[0].split(list(lengths))
    rows_out = [
        part @ weight.T + bias + scale * (part @ a[slot].T) @ b[slot]
        for part, slot in zip(parts, slots, strict=True)
    ]
    return torch.stack(rows_out) if lengths is None else torch.cat(rows_out)[None]


def inputs(dtype, shape):
    # not seeded: the tests must pass on every run
    x = torch.randn(*shape, IN, dtype=dtype, requires_grad=True)
    weight = torch.randn(OUT, IN, dtype=dtype, requires_grad=True)
    bias = torch.randn(OUT, dtype=dtype, requires_grad=True)
    a = torch.randn(SLOTS, R, IN, dtype=dtype, requires_grad=True)
    b = torch.randn(SLOTS, R, OUT, dtype=dtype, requires_grad=True)
    return [x, weight, bias, a, b]


def both(tensors, rows, context=contextlib.nullcontext):
    """Output and gradients of the layer, and of the reference."""
    x, weight, bias, a, b = tensors
    results = []
    for way in (
        lambda: lora_linear(x, weight, bias, a, b, 0.7, rows),
        lambda: plain(x, weight, bias, a, b, 0.7, rows.slots, rows.lengths),
    ):
        for t in tensors:
            t.grad = None
        with context():
            y = way()
        weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape)
        (y.to(torch.float64) * weights).sum().backward()
        grads = [torch.zeros_like(t) if t.grad is None else t.grad for t in tensors]
        results.append([y.detach(), *grads])
    return results


ROWS = {
    "uniform": RowSlots((0, 0, 1, 1, 2, 2, 3, 3, 4, 4)),
    "unlike": RowSlots((0, 1, 1, 1, 2, 3, 3, 4)),
    "absent": RowSlots((1, 1, 3)),
    "neighbours absent": RowSlots((2, 2, 3, 3)),
    "unsorted": RowSlots((3, 0, 3, 1, 1)),
    "one": RowSlots((2,)),
    "without padding": RowSlots((0, 0, 2, 2, 4), (3, 1, 2, 5, 1)),
    "without padding, uniform": RowSlots((0, 1, 2, 3, 4), (2, 2, 2, 2, 2)),
}


@pytest.mark.parametrize("name", ROWS)
def test_it_is_the_plain_sum(name):
    rows = ROWS[name]
    tokens = None if rows.lengths is None else sum(rows.lengths)
    shape = (len(rows.slots), 4) if tokens is None else (1, tokens)
    ours, reference = both(inputs(torch.float64, shape), rows)
    for actual, expected in zip(ours, reference, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_on_random_layouts():
    for _ in range(20):
        slots = tuple(sorted(random.choices(range(SLOTS), k=random.randint(1, 9))))
        lengths = tuple(random.randint(1, 6) for _ in slots)
        ours, reference = both(inputs(torch.float64, (1, sum(lengths))), RowSlots(slots, lengths))
        for actual, expected in zip(ours, reference, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["uniform", "unlike", "absent", "without padding"])
def test_under_autocast_it_is_as_near_as_autocast_is(name):
    """bf16 keeps 8 bits: within 2 % of the largest entry, as the reference under autocast is."""
    rows = ROWS[name]
    tokens = None if rows.lengths is None else sum(rows.lengths)
    shape = (len(rows.slots), 4) if tokens is None else (1, tokens)
    tensors = inputs(torch.float32, shape)
    ours, _ = both(tensors, rows, lambda: torch.autocast("cpu", torch.bfloat16))
    _, exact = both(tensors, rows)
    assert ours[0].dtype == torch.bfloat16
    for actual, expected in zip(ours, exact, strict=True):
        assert (actual.float() - expected).abs().max() < 0.02 * expected.abs().max()
    assert all(grad.dtype == torch.float32 for grad in ours[1:])


def test_gradients_of_chunks_add_up_where_slots_are_absent():
    tensors = inputs(torch.float64, (2, 4))
    x, weight, bias, a, b = tensors
    for slots in ((0, 1), (1, 3)):
        lora_linear(x, weight, bias, a, b, 0.7, RowSlots(slots)).sum().backward()
    grads = a.grad.clone(), b.grad.clone()
    for t in tensors:
        t.grad = None
    for slots in ((0, 1), (1, 3)):
        plain(x, weight, bias, a, b, 0.7, slots).sum().backward()
    torch.testing.assert_close(grads, (a.grad, b.grad), rtol=1e-12, atol=1e-12)


def test_dropout_drops_only_the_adapters_input():
    tensors = inputs(torch.float64, (4, 50))
    rows = RowSlots((0, 1, 2, 3))
    with torch.no_grad():
        full = lora_linear(*tensors, 0.7, rows, dropout=0.0)
        base_only = lora_linear(*tensors[:4], torch.zeros_like(tensors[4]), 0.7, rows, dropout=0.5)
        assert torch.allclose(base_only, tensors[0] @ tensors[1].T + tensors[2])
        mean = sum(lora_linear(*tensors, 0.7, rows, dropout=0.5) for _ in range(400)) / 400
    assert (mean - full).abs().mean() < 0.1 * (full - base_only).abs().mean()


def test_a_frozen_base_gets_no_gradient():
    x, weight, bias, a, b = inputs(torch.float64, (3, 4))
    weight.requires_grad_(False)
    bias.requires_grad_(False)
    lora_linear(x, weight, bias, a, b, 0.7, RowSlots((0, 1, 4))).sum().backward()
    assert weight.grad is None
    assert a.grad is not None


@pytest.mark.parametrize(
    ("rows", "vectors"),
    [(RowSlots((0, 1, 2)), 10), (RowSlots((0, 1), (3, 4)), 8), (RowSlots((0, 1), (3, 4)), 14)],
)
def test_vectors_that_belong_to_no_row_are_refused(rows, vectors):
    with pytest.raises(ValueError, match=f"{vectors} vectors where the batch has"):
        Layout.of(rows, vectors, SLOTS)
