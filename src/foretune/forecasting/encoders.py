"""Encoders of Forecast-MAE that turn one agent's track or one lane's polyline into one token.

symbol  here             meaning
n       tracks or lanes  those that are there; padding never comes here
t       steps
d       width            of a token
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LEVELS = 3
KERNELS, DEPTHS, HEADS, MLP_RATIO = (3, 3, 5), (2, 2, 2), (2, 4, 8), 3


class DropPath(nn.Module):
    """Leaves a residual branch out for some of the examples while training (stochastic depth).

    Args:
        rate: Share of the examples.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """(n, …) → (n, …), the mean unchanged."""
        if not self.training or self.rate == 0:
            return x
        keep = 1 - self.rate
        kept = torch.empty(len(x), *[1] * (x.dim() - 1), device=x.device).bernoulli_(keep)
        return x * kept.to(x.dtype) / keep


class Mlp(nn.Module):
    """Linear, GELU, Linear.

    Args:
        width: Of input and output.
        hidden: In between.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(…, width) → (…, width)."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class NeighbourAttention(nn.Module):
    """Each step attends to the `kernel` steps nearest to it (Hassani et al., arXiv:2204.07143).

    At the borders the window is moved inwards, so every step has `kernel` neighbours. The bias
    depends on the distance. Names of parameters are those of natten before 0.17.

    Args:
        width: Of a step.
        heads: Attention heads.
        kernel: Odd number of neighbours; a shorter track has all its steps as neighbours.
    """

    def __init__(self, width: int, heads: int, kernel: int) -> None:
        super().__init__()
        self.heads, self.kernel = heads, kernel
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.rpb = nn.Parameter(nn.init.trunc_normal_(torch.empty(heads, 2 * kernel - 1), std=0.02))

    def forward(self, x: Tensor) -> Tensor:
        """(n, t, width) → (n, t, width)."""
        n, t, width = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        step = torch.arange(t, device=x.device)
        first = (step - self.kernel // 2).clamp(0, max(t - self.kernel, 0))[:, None]
        near = (step >= first) & (step < first + self.kernel)
        distance = (step - step[:, None]).clamp(1 - self.kernel, self.kernel - 1) + self.kernel - 1
        bias = self.rpb[:, distance].masked_fill(~near, float("-inf"))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.expand(n, -1, -1, -1))
        mixed: Tensor = self.proj(out.transpose(1, 2).reshape(n, t, width))
        return mixed


class NeighbourLayer(nn.Module):
    """Neighbourhood attention and an MLP, each behind a norm."""

    def __init__(self, width: int, heads: int, kernel: int, drop_path: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = NeighbourAttention(width, heads, kernel)
        self.mlp = Mlp(width, MLP_RATIO * width)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(n, t, width) → (n, t, width)."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        out: Tensor = x + self.drop_path(self.mlp(self.norm2(x)))
        return out


class Conv3(nn.Conv1d):
    """A convolution over three steps as one matrix product, which a CPU does much faster.

    Args:
        inputs: Numbers in a step.
        outputs: Numbers in a step of the result.
        stride: 1, or 2 for half as many steps.
        bias: Whether there is one.
    """

    channels_last = True  # read by the adapter bank

    def __init__(self, inputs: int, outputs: int, stride: int = 1, bias: bool = True) -> None:
        super().__init__(inputs, outputs, 3, stride=stride, padding=1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(n, t, inputs) → (n, ⌈t / stride⌉, outputs)."""
        windows = F.pad(x, (0, 0, 1, 1)).unfold(1, 3, self.stride[0]).flatten(2)
        return F.linear(windows, self.weight.flatten(1), self.bias)


class Halve(nn.Module):
    """Half as many steps of twice the width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.reduction = Conv3(width, 2 * width, stride=2, bias=False)
        self.norm = nn.LayerNorm(2 * width)

    def forward(self, x: Tensor) -> Tensor:
        """(n, t, width) → (n, ⌈t/2⌉, 2 width)."""
        out: Tensor = self.norm(self.reduction(x))
        return out


class AgentEncoder(nn.Module):
    """A track → a token: three levels of neighbourhood attention, joined by a feature pyramid.

    Args:
        channels: Numbers in a step.
        width: Of the token; the levels have a quarter, a half and the whole of it.
        drop_path: Of the last layer; it rises linearly from 0.
    """

    def __init__(self, channels: int, width: int, drop_path: float) -> None:
        super().__init__()
        widths = [width // 4, width // 2, width]
        rates = torch.linspace(0, drop_path, sum(DEPTHS)).split(DEPTHS)
        self.proj = Conv3(channels, widths[0])
        self.levels = nn.ModuleList(
            nn.Sequential(*(NeighbourLayer(w, h, k, float(r)) for r in part))
            for w, h, k, part in zip(widths, HEADS, KERNELS, rates, strict=True)
        )
        self.downsamples = nn.ModuleList(Halve(w) for w in widths[:-1])
        self.norms = nn.ModuleList(nn.LayerNorm(w) for w in widths)
        self.lateral_convs = nn.ModuleList(Conv3(w, width) for w in widths)
        self.fpn_conv = Conv3(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(n, t, channels) → (n, width)."""
        x = self.proj(x)
        found: list[Tensor] = []
        for i in range(LEVELS):
            x = self.levels[i](x)
            found.append(self.lateral_convs[i](self.norms[i](x)))
            if i + 1 < LEVELS:
                x = self.downsamples[i](x)
        newest = _from_the_top(found)[:, -2:]  # all that the last step's convolution reads
        out: Tensor = self.fpn_conv(newest)[:, -1]
        return out


def _from_the_top(levels: Sequence[Tensor]) -> Tensor:
    """(n, t, width): each level plus the coarser ones, stretched to its length."""
    out = levels[-1].transpose(1, 2)
    for level in reversed(levels[:-1]):
        stretched = F.interpolate(out, size=level.shape[1], mode="linear", align_corners=False)
        out = level.transpose(1, 2) + stretched
    return out.transpose(1, 2)


class LaneEncoder(nn.Module):
    """A polyline → a token, as PointNet does: what is said of a point knows all the others.

    Args:
        channels: Numbers in a point.
        width: Of the token.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.first_conv = _pointwise(channels, width, 2 * width)
        self.second_conv = _pointwise(4 * width, 2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(n, points, channels) → (n, width)."""
        n = len(x)
        points = self.first_conv(x.flatten(0, 1)).unflatten(0, (n, -1))
        whole = points.amax(1, keepdim=True).expand_as(points)
        mixed = self.second_conv(torch.cat([whole, points], 2).flatten(0, 1))
        out: Tensor = mixed.unflatten(0, (n, -1)).amax(1)
        return out


def _pointwise(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, hidden),
        nn.BatchNorm1d(hidden),
        nn.ReLU(),
        nn.Linear(hidden, outputs),
    )
