"""Encoders of Forecast-MAE that turn one agent's track or one lane's polyline into one token.

symbol  here             meaning
n       tracks or lanes  real ones only; padding is removed before
t       steps
d       width            token width
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LEVELS = 3
KERNELS, DEPTHS, HEADS, MLP_RATIO = (3, 3, 5), (2, 2, 2), (2, 4, 8), 3


class DropPath(nn.Module):
    """Stochastic depth: drops a residual branch for a random share of the examples in training.

    Args:
        rate: Probability of dropping the branch.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """(n, …) → (n, …), unchanged in expectation."""
        if not self.training or self.rate == 0:
            return x
        keep = 1 - self.rate
        mask = torch.empty(len(x), *[1] * (x.dim() - 1), device=x.device).bernoulli_(keep)
        return x * mask.to(x.dtype) / keep


class Mlp(nn.Module):
    """Linear, GELU, Linear.

    Args:
        width: Input and output width.
        hidden: Hidden width.
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

    At the ends of a track the window is shifted inwards, so every step has `kernel` neighbours.
    The bias depends on the relative position. Parameter names are those of natten before 0.17.

    Args:
        width: Width of a step.
        heads: Attention heads.
        kernel: Odd window size; in a track shorter than this all steps attend to each other.
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
    """Pre-norm transformer layer: neighbourhood attention and an MLP."""

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
    """A convolution of kernel size 3 as one matrix product, which is much faster on a CPU.

    Args:
        inputs: Input channels.
        outputs: Output channels.
        stride: 1, or 2 to halve the number of steps.
        bias: Whether to add a bias.
    """

    channels_last = True  # read by the adapter bank

    def __init__(self, inputs: int, outputs: int, stride: int = 1, bias: bool = True) -> None:
        super().__init__(inputs, outputs, 3, stride=stride, padding=1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(n, t, inputs) → (n, ⌈t / stride⌉, outputs)."""
        windows = F.pad(x, (0, 0, 1, 1)).unfold(1, 3, self.stride[0]).flatten(2)
        return F.linear(windows, self.weight.flatten(1), self.bias)


class Halve(nn.Module):
    """Halves the number of steps and doubles the width."""

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
        channels: Channels of a step.
        width: Token width; the three levels have a quarter, a half and all of it.
        drop_path: Stochastic-depth rate of the last layer; rises linearly from 0 at the first.
    """

    def __init__(self, channels: int, width: int, drop_path: float) -> None:
        super().__init__()
        widths = [width // 4, width // 2, width]
        rates = torch.linspace(0, drop_path, sum(DEPTHS), device="cpu").split(DEPTHS)
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
        features: list[Tensor] = []
        for i in range(LEVELS):
            x = self.levels[i](x)
            features.append(self.lateral_convs[i](self.norms[i](x)))
            if i + 1 < LEVELS:
                x = self.downsamples[i](x)
        newest = _top_down_sum(features)[:, -2:]  # all that the last step's convolution reads
        out: Tensor = self.fpn_conv(newest)[:, -1]
        return out


def _top_down_sum(levels: Sequence[Tensor]) -> Tensor:
    """(n, t, width): the finest level plus the coarser ones, upsampled level by level."""
    out = levels[-1].transpose(1, 2)
    for level in reversed(levels[:-1]):
        upsampled = F.interpolate(out, size=level.shape[1], mode="linear", align_corners=False)
        out = level.transpose(1, 2) + upsampled
    return out.transpose(1, 2)


class LaneEncoder(nn.Module):
    """A polyline → a token by a PointNet: each point's features are joined with their maximum.

    Args:
        channels: Channels of a point.
        width: Token width.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.first_conv = _pointwise(channels, width, 2 * width)
        self.second_conv = _pointwise(4 * width, 2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(n, points, channels) → (n, width)."""
        n = len(x)
        points = self.first_conv(x.flatten(0, 1)).unflatten(0, (n, -1))
        polyline = points.amax(1, keepdim=True).expand_as(points)
        joined = self.second_conv(torch.cat([polyline, points], 2).flatten(0, 1))
        out: Tensor = joined.unflatten(0, (n, -1)).amax(1)
        return out


def _pointwise(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, hidden),
        nn.BatchNorm1d(hidden),
        nn.ReLU(),
        nn.Linear(hidden, outputs),
    )
