"""Which process of a job this is, as `accelerate launch` and torchrun say it. Needs no torch."""

from __future__ import annotations

import os

from foretune.errors import UserError


def num_processes() -> int:
    """Processes of the job; 1 without a launcher."""
    return int(os.environ["WORLD_SIZE"]) if {"RANK", "WORLD_SIZE"} <= os.environ.keys() else 1


def process_rank() -> int:
    """The number of this process among them; the first has 0, and it alone writes and prints."""
    return int(os.environ["RANK"]) if num_processes() > 1 else 0


def local_rank() -> int:
    """The number of this process among those on its machine."""
    return int(os.environ.get("LOCAL_RANK", 0)) if num_processes() > 1 else 0


def num_local_processes() -> int:
    """Processes of the job on this machine, which share its memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if num_processes() > 1 else 1


def base_is_sharded() -> bool:
    """Whether the launcher asked for FSDP (`accelerate launch --use_fsdp --fsdp_version 2`).

    Raises:
        UserError: It asked for version 1.
    """
    asked = os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true", "yes")
    if asked and os.environ.get("FSDP_VERSION") != "2":
        raise UserError("a base is sharded by FSDP2 only: launch with --fsdp_version 2")
    return asked and num_processes() > 1
