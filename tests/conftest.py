"""What must hold before any test imports torch or transformers."""

from __future__ import annotations

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
from hypothesis import settings

torch.set_num_threads(1)

# The same examples each time; `make fuzz` draws new ones, and more (FORETUNE_FUZZ=examples).
settings.register_profile("fixed", derandomize=True, database=None, deadline=None, max_examples=40)
settings.register_profile(
    "fuzz", deadline=None, max_examples=int(os.environ.get("FORETUNE_FUZZ", "0")) or 1
)
settings.load_profile("fuzz" if os.environ.get("FORETUNE_FUZZ") else "fixed")


def pytest_collection_finish() -> None:
    """What is imported by now stays: no search for garbage passes over it again."""
    gc.collect()
    gc.freeze()
