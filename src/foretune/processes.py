"""The rank of this process, as set by `accelerate launch` or torchrun. Needs no torch."""

from __future__ import annotations

import os

from foretune.errors import UserError


def num_processes() -> int:
    """Number of processes of the job; 1 without a launcher."""
    return int(os.environ["WORLD_SIZE"]) if {"RANK", "WORLD_SIZE"} <= os.environ.keys() else 1


def process_rank() -> int:
    """Rank of this process in the job; only rank 0 writes and prints."""
    return int(os.environ["RANK"]) if num_processes() > 1 else 0


def local_rank() -> int:
    """Rank of this process on its machine."""
    return int(os.environ.get("LOCAL_RANK", 0)) if num_processes() > 1 else 0


def num_local_processes() -> int:
    """Number of processes of the job on this machine, which share its memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if num_processes() > 1 else 1


def base_is_sharded() -> bool:
    """Whether the launcher asked for FSDP (`accelerate launch --use_fsdp --fsdp_version 2`).

    Raises:
        UserError: The launcher asked for FSDP version 1.
    """
    asked = os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true", "yes")
    if asked and os.environ.get("FSDP_VERSION") != "2":
        raise UserError("a base is sharded by FSDP2 only: launch with --fsdp_version 2")
    return asked and num_processes() > 1
