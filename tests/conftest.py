"""What must hold before any test imports torch or transformers."""

from __future__ import annotations

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
