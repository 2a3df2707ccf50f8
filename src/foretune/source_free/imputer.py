"""MAPU's temporal imputer: trained on the source, frozen on the target.

Ragab et al., "Source-Free Domain Adaptation with Temporal Imputation for Time Series Data" (MAPU),
KDD 2023, arXiv:2307.07542. It predicts the features of a full window from those of the same window
with one stretch masked.
"""

from __future__ import annotations

from torch import Tensor, nn


class Imputer(nn.Module):
    """An LSTM over time, then a linear layer.

    Args:
        channels: Channels of the feature sequence.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(channels, channels, batch_first=True)
        self.out = nn.Linear(channels, channels)

    def forward(self, sequence: Tensor) -> Tensor:
        """Imputed features (n, channels, T) of features of masked windows (n, channels, T)."""
        return self.out(self.lstm(sequence.transpose(1, 2))[0]).transpose(1, 2)
