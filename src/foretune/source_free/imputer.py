"""An imputer of features over time: what MAPU trains on the source and keeps for the target.

Ragab et al., "Source-Free Domain Adaptation with Temporal Imputation for Time Series Data" (MAPU),
KDD 2023, arXiv:2307.07542: from the features of a window with one stretch masked, those of the
whole window.
"""

from __future__ import annotations

from torch import Tensor, nn


class Imputer(nn.Module):
    """An LSTM over time and a linear layer.

    Args:
        channels: Of the sequence of features.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(channels, channels, batch_first=True)
        self.out = nn.Linear(channels, channels)

    def forward(self, sequence: Tensor) -> Tensor:
        """(n, channels, T) → (n, channels, T)."""
        return self.out(self.lstm(sequence.transpose(1, 2))[0]).transpose(1, 2)
