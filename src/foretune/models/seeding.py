"""Seeds torch's generators. Importing this module does not import torch."""

from __future__ import annotations


def seed_generators(seed: int) -> None:
    """Seeds the generators of the CPU and, where there is one, of CUDA or MPS.

    `torch.manual_seed` also queues a call, with a stack trace, for each kind of device that is not
    there: milliseconds, for each update and each model.
    """
    import torch

    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(seed)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)
