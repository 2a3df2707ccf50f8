"""Fusing fine-tuned models: SMILE, and static merging as its controls."""

from foretune.files import FUSED_FILE as RECORD_FILE

__all__ = ["FORMAT", "MODEL_TYPE", "RECORD_FILE"]

FORMAT = "foretune-fused-2"
# In the folder's config.json: transformers refuses it by this name, which says what to do.
MODEL_TYPE = "foretune-fused: load it with foretune.load_fused(FOLDER)"
