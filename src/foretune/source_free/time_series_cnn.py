"""The convolutional classifier of sensor windows that time-series adaptation benchmarks use.

Ragab et al., "AdaTime: A Benchmarking Suite for Domain Adaptation on Time Series Data", TKDD 2023,
arXiv:2203.08321: three blocks of convolution, batch normalisation, ReLU and pooling, a mean over
time and a linear classifier. The channels are in → mid → 2·mid → features.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from foretune.run import check_at_least, check_int


class TimeSeriesCNN(nn.Module):
    """Three convolutional blocks and a linear head.

    Args:
        channels: Channels of a window.
        classes: Number of classes.
        mid: Output channels of the first block.
        features: Output channels of the last block.
        kernel_size: Kernel size of the first convolution; the others have 8.
        stride: Stride of the first convolution.
        dropout: Dropout probability after the first block.

    Attributes:
        sizes: The arguments; `TimeSeriesCNN(**sizes)` has the same architecture.
        temporal: Name of the module that outputs the feature sequence (n, features, T).

    Raises:
        UserError: A size below 1 or a negative dropout.
    """

    head_modules = ("head",)
    temporal = "blocks"

    def __init__(
        self,
        channels: int,
        classes: int,
        *,
        mid: int = 64,
        features: int = 128,
        kernel_size: int = 5,
        stride: int = 1,
        dropout: float = 0.5,
    ) -> None:
        sizes = {"channels": channels, "classes": classes, "mid": mid, "features": features}
        for name, value in {**sizes, "kernel_size": kernel_size, "stride": stride}.items():
            check_int(name, value, 1)
        check_at_least("dropout", dropout, 0)
        super().__init__()
        self.sizes: dict[str, Any] = {
            "channels": channels,
            "classes": classes,
            "mid": mid,
            "features": features,
            "kernel_size": kernel_size,
            "stride": stride,
            "dropout": dropout,
        }
        self.blocks = nn.Sequential(
            _block(channels, mid, kernel_size, stride, dropout),
            _block(mid, 2 * mid, 8, 1, 0.0),
            _block(2 * mid, features, 8, 1, 0.0),
        )
        self.pool = nn.AdaptiveAvgPool1d(1)
        self.head = nn.Linear(features, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, classes) of windows (n, channels, length)."""
        return self.head(self.pool(self.blocks(x)).flatten(1))


def _block(inputs: int, outputs: int, kernel_size: int, stride: int, dropout: float) -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(inputs, outputs, kernel_size, stride, padding=kernel_size // 2, bias=False),
        nn.BatchNorm1d(outputs),
        nn.ReLU(),
        nn.MaxPool1d(2, 2, padding=1),
        nn.Dropout(dropout),
    )
