"""Seeds torch's generators."""

from __future__ import annotations

import torch


def seed_generators(seed: int) -> None:
    """Seeds the generators of the devices in use.

    `torch.manual_seed` also queues a call, with a stack trace, for each kind of device that has not
    been used: milliseconds, for each update and each model.
    """
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)
