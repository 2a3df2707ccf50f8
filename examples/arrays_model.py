"""A model of your own for arrays: any file with a function that returns an nn.Module will do.

`inputs` is how many numbers a row's x holds: 48 for a window of 8 steps of 6 channels.
"""

from torch import nn


def build(inputs: int = 8, width: int = 32, outputs: int = 2) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(inputs, width),
        nn.Tanh(),
        nn.Linear(width, width),
        nn.Tanh(),
        nn.Linear(width, outputs),
    )
