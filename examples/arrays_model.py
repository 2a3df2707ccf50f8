"""A custom model for arrays: any file with a function that returns an nn.Module works.

`inputs` is the number of values in the x of one example: 48 for a window of 8 steps of 6 channels.
"""

from torch import nn


def build(inputs: int = 8, width: int = 32, outputs: int = 2) -> nn.Module:
    """A three-layer perceptron from x, of any shape, to `outputs` logits."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(inputs, width),
        nn.Tanh(),
        nn.Linear(width, width),
        nn.Tanh(),
        nn.Linear(width, outputs),
    )
