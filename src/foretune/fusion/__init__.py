"""Fusing fine-tuned models: SMILE, and static merging as its controls."""

RECORD_FILE, FORMAT = "fused.json", "foretune-fused-1"  # marks a folder as a fused model
