"""Fusing fine-tuned models: SMILE, and static merging as its controls."""

RECORD_FILE = "fused.json"  # marks a folder as a fused model
