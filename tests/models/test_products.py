"""Products in oneDNN against float64, whatever the processor: it is only slower on some."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from foretune.adapters.lora import lora_linear
from foretune.models import products
from foretune.models.layout import RowSlots

ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@pytest.fixture
def in_onednn(monkeypatch):
    """Takes oneDNN for all products of two rows and more; the shapes that it multiplied."""
    if not ONEDNN:
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(products, "LEAST", 0)
    monkeypatch.setattr(products, "BLOCKS", (8, 4, 2))
    shapes: list[torch.Size] = []
    real = products._onednn

    def noted(x, weight, bias=None):
        shapes.append(x.shape)
        return real(x, weight, bias)

    monkeypatch.setattr(products, "_onednn", noted)
    return shapes


def near(actual, exact):
    """Within float32's rounding of sums of a few dozen terms."""
    torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=1e-5)


def test_products_of_any_number_of_rows(in_onednn):
    for n in (2, 3, 7, 16, 29):  # not seeded: the tests must pass on every run
        x, gy = torch.randn(n, 10), torch.randn(n, 12)
        weight, bias = torch.randn(12, 10), torch.randn(12)
        near(products.linear(x, weight, bias), F.linear(x.double(), weight.double(), bias.double()))
        near(products.linear(gy, weight.T), gy.double() @ weight.double())
        near(products.weight_gradient(gy, x), gy.double().T @ x.double())
    assert in_onednn


def test_an_adapted_layer_on_random_layouts(in_onednn):
    for _ in range(10):
        slots = tuple(sorted(random.choices(range(5), k=random.randint(1, 9))))
        rows = RowSlots(slots, tuple(random.randint(1, 6) for _ in slots))
        assert rows.lengths is not None
        shapes = [(1, sum(rows.lengths), 10), (12, 10), (12,), (5, 3, 10), (5, 3, 12)]
        exact = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
        ours = [t.detach().float().requires_grad_() for t in exact]
        for x, weight, bias, a, b in (exact, ours):
            y = lora_linear(x, weight, bias, a, b, 0.7, rows)
            (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
        for one, reference in zip(ours, exact, strict=True):
            torch.testing.assert_close(one.grad.double(), reference.grad, rtol=1e-4, atol=1e-4)
    assert in_onednn


def test_few_sizes_are_compiled(in_onednn):
    """oneDNN keeps code for each shape: a megabyte a shape, in runs where no two batches agree."""
    weight = torch.randn(12, 10)
    for n in range(2, 40):
        products.linear(torch.randn(n, 10), weight)
        products.weight_gradient(torch.randn(n, 12), torch.randn(n, 10))
    assert {size for shape in in_onednn for size in shape} == {8, 4, 2, 10, 12}


@pytest.mark.parametrize("kind", ["float64", "bfloat16", "switched off", "fake", "few"])
def test_torch_multiplies_what_onednn_should_not(in_onednn, kind, monkeypatch):
    from torch._subclasses.fake_tensor import FakeTensorMode

    x, weight = torch.randn(8, 10), nn.Parameter(torch.randn(12, 10))
    if kind in ("float64", "bfloat16"):
        x, weight = x.to(getattr(torch, kind)), weight.to(getattr(torch, kind))
    if kind == "switched off":
        monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    if kind == "few":
        monkeypatch.setattr(products, "LEAST", 2**24)
    if kind == "fake":  # whose operations are counted, which torch cannot for oneDNN's
        with FakeTensorMode(), FlopCounterMode(display=False) as counter:
            products.linear(torch.randn(8, 10), torch.randn(12, 10))
        assert counter.get_total_flops() == 2 * 8 * 10 * 12
    else:
        assert products.linear(x, weight).shape == (8, 12)
        assert products.weight_gradient(torch.ones(8, 12).to(x), x).shape == (12, 10)
    assert not in_onednn
