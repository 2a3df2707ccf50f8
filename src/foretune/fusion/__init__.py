"""Fusing fine-tuned models: SMILE, and the static merges as its controls. A wing."""
