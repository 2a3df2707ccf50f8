"""Small models for arrays, from scratch: an MLP-Mixer for images, a transformer for windows.

Each is made of `nn.Linear` with biases, so that LoRA adapts every layer of it, and calls its last
layer `head`, which it declares in `head_modules` so that it can be drawn anew.

Sources:
    Tolstikhin et al., "MLP-Mixer: An all-MLP Architecture for Vision", 2021, arXiv:2105.01601.
    Block et al., arXiv:2410.22264: a mixer of one block, patch 4, width 512, on CIFAR-10. Their
        LoRA layers drop the biases of the layers that they wrap; here they stay.
    Nie et al., "A Time Series is Worth 64 Words", 2023, arXiv:2211.14730: windows cut in patches.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def mixer(
    side: int = 28,
    channels: int = 1,
    patch: int = 4,
    width: int = 64,
    depth: int = 1,
    token_factor: float = 2.0,
    channel_factor: float = 2.0,
    dropout: float = 0.0,
    shift: int = 0,
    outputs: int = 2,
) -> nn.Module:
    """An MLP-Mixer for square images.

    Args:
        side: Pixels of the image's side, a multiple of `patch`.
        channels: 1 for x (n, side, side) or (n, 1, side, side), else (n, channels, side, side).
        patch: Pixels of a patch's side.
        width: Numbers that stand for a patch.
        depth: Blocks.
        token_factor: Hidden width of the token MLP by the number of patches.
        channel_factor: Hidden width of the channel MLP by `width`.
        dropout: After each layer of the MLPs.
        shift: In training, each image is moved by up to so many pixels either way.
        outputs: Classes.

    Returns:
        A module from images to (n, outputs) logits. The paper's has 325,186 parameters:

    >>> big = mixer(32, 3, width=512, token_factor=4, channel_factor=0.5, dropout=0.1)
    >>> sum(p.numel() for p in big.parameters())
    325186
    """
    if side % patch:
        raise ValueError(f"side must be a multiple of patch, got side={side} and patch={patch}")
    hidden = int((side // patch) ** 2 * token_factor), int(width * channel_factor)
    return Mixer(side, channels, patch, width, depth, hidden, dropout, shift, outputs)


def patch_transformer(
    channels: int = 9,
    steps: int = 128,
    patches: int = 16,
    width: int = 48,
    depth: int = 2,
    heads: int = 4,
    outputs: int = 6,
) -> nn.Module:
    """A transformer for windows of several channels.

    Args:
        channels: Of a window x (n, channels, steps).
        steps: A multiple of `patches`.
        patches: Pieces that a window is cut into; one is a token.
        width: Of a token, a multiple of `heads`.
        depth: Blocks.
        heads: Of attention.
        outputs: Classes.

    Returns:
        A module from windows to (n, outputs) logits.
    """
    if steps % patches or width % heads:
        raise ValueError(
            "steps must be a multiple of patches and width one of heads, got "
            f"steps={steps}, patches={patches}, width={width}, heads={heads}"
        )
    return PatchTransformer(channels, steps, patches, width, depth, heads, outputs)


class Mixer(nn.Module):
    """See `mixer`."""

    head_modules = ("head",)

    def __init__(
        self,
        side: int,
        channels: int,
        patch: int,
        width: int,
        depth: int,
        hidden: tuple[int, int],
        dropout: float,
        shift: int,
        outputs: int,
    ) -> None:
        super().__init__()
        self.side, self.channels, self.patch, self.shift = side, channels, patch, shift
        patches = (side // patch) ** 2
        self.embed = nn.Linear(channels * patch * patch, width)
        self.blocks = nn.ModuleList(
            MixerBlock(patches, width, *hidden, dropout) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(n, outputs) from (n, channels, side, side); the channel may be left out if it is one."""
        n, p, across = len(x), self.patch, self.side // self.patch
        x = x.reshape(n, self.channels, self.side, self.side)
        if self.training and self.shift:
            x = shifted(x, self.shift)
        x = x.reshape(n, self.channels, across, p, across, p)
        x = x.permute(0, 2, 4, 1, 3, 5).reshape(n, across * across, -1)  # (n, patches, c·p·p)
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


def shifted(x: Tensor, most: int) -> Tensor:
    """Images (n, channels, side, side), each moved at random; what comes in repeats the edge."""
    n, _, side, _ = x.shape
    moves = torch.randint(-most, most + 1, (2, n, 1), device=x.device)
    down, right = (torch.arange(side, device=x.device) + moves).clamp(0, side - 1)
    rows = torch.arange(n, device=x.device)[:, None, None]
    return x[rows, :, down[:, :, None], right[:, None, :]].permute(0, 3, 1, 2)


class MixerBlock(nn.Module):
    """Mixes patches channel by channel, then channels patch by patch."""

    def __init__(
        self, patches: int, width: int, token_hidden: int, channel_hidden: int, dropout: float
    ) -> None:
        super().__init__()
        self.token_norm, self.channel_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.token_mlp = MLP(patches, token_hidden, dropout)
        self.channel_mlp = MLP(width, channel_hidden, dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(n, patches, width) from the same."""
        x = x + self.token_mlp(self.token_norm(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channel_mlp(self.channel_norm(x))


class MLP(nn.Module):
    """Two layers over the last dimension, back to its size."""

    def __init__(self, size: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(size, hidden), nn.Linear(hidden, size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.down(self.dropout(F.gelu(self.up(x)))))


class PatchTransformer(nn.Module):
    """See `patch_transformer`."""

    head_modules = ("head",)

    def __init__(
        self,
        channels: int,
        steps: int,
        patches: int,
        width: int,
        depth: int,
        heads: int,
        outputs: int,
    ) -> None:
        super().__init__()
        self.patches = patches
        self.embed = nn.Linear(channels * (steps // patches), width)
        self.positions = nn.Parameter(0.02 * torch.randn(patches, width))
        self.blocks = nn.ModuleList(TransformerBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(n, outputs) from (n, channels, steps)."""
        n, channels, _ = x.shape
        x = x.reshape(n, channels, self.patches, -1).transpose(1, 2).reshape(n, self.patches, -1)
        x = self.embed(x) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


class TransformerBlock(nn.Module):
    """Attention, then an MLP, each on a normalised input and added to it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.o_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.mlp = MLP(width, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        """(n, patches, width) from the same."""
        normed = self.attention_norm(x)
        q, k, v = (
            layer(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.o_proj(mixed)
        return x + self.mlp(self.mlp_norm(x))
