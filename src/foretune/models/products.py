"""Matrix products in the library that computes them fastest on this processor.

PyTorch computes float32 products on x86 in MKL, which uses AVX-512 on Intel's processors only. On
AMD's, oneDNN, which PyTorch ships as well, is about twice as fast; torch.compile calls it by the
same operator.

oneDNN compiles code for every new shape, which takes a millisecond and most of a megabyte, and
keeps it for a thousand shapes. Batches differ in their number of rows, so rows are multiplied in
blocks of few sizes; MKL multiplies what is left.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCKS = (2048, 1024, 512, 256, 128)  # rows
LEAST = 2**24  # multiplications; fewer are not worth an operator more
PLAIN = (Tensor, nn.Parameter)  # neither sharded nor fake


@cache
def onednn_is_faster() -> bool:
    """Whether this is a processor with AVX-512 on which MKL does not use it."""
    cpuinfo = Path("/proc/cpuinfo")
    return (
        platform.machine() == "x86_64"
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and cpuinfo.is_file()
        and "AuthenticAMD" in cpuinfo.read_text("utf-8", "replace")
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same as `torch.nn.functional.linear`, x weightᵀ + bias, but not differentiable.

    Args:
        x: (n, in).
        weight: (out, in).
        bias: (out,) or None.

    Returns:
        (n, out).
    """
    if not _in_onednn(x, weight, len(weight)):
        return F.linear(x, weight, bias)
    y = x.new_empty(len(x), len(weight))
    for rows, is_block in _blocks(len(x)):
        y[rows] = (_onednn if is_block else F.linear)(x[rows], weight, bias)
    return y


def weight_gradient(gy: Tensor, x: Tensor) -> Tensor:
    """(out, in) gyᵀ x, the gradient of a linear layer's weight, for gy (n, out) and x (n, in)."""
    if not _in_onednn(gy, x, x.shape[1]):
        return gy.T @ x
    gradient = None
    for rows, is_block in _blocks(len(x)):
        if gradient is None:
            gradient = _onednn(gy[rows].T, x[rows].T)
        elif is_block:
            gradient += _onednn(gy[rows].T, x[rows].T)
        else:
            gradient.addmm_(gy[rows].T, x[rows])
    assert gradient is not None  # there is at least one block
    return gradient


def _in_onednn(a: Tensor, b: Tensor, width: int) -> bool:
    """Whether oneDNN multiplies these; a is (n, …), and the product has n · … · width terms."""
    return (
        a.dtype == b.dtype == torch.float32
        and a.device.type == "cpu"
        and len(a) >= BLOCKS[-1]
        and a.numel() * width >= LEAST
        and type(a) in PLAIN
        and type(b) in PLAIN
        and bool(torch.backends.mkldnn.enabled)
        and onednn_is_faster()
    )


def _blocks(rows: int) -> Iterator[tuple[slice, bool]]:
    """Slices that make up so many rows, each with whether it has the size of a block.

    >>> list(_blocks(700))
    [(slice(0, 512, None), True), (slice(512, 640, None), True), (slice(640, 700, None), False)]
    """
    start = 0
    for size in BLOCKS:
        while rows - start >= size:
            yield slice(start, start + size), True
            start += size
    if start < rows:
        yield slice(start, rows), False


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y
