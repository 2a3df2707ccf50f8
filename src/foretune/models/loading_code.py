"""The lines of Python that load a base and an adapter, for pages that are left beside them."""

from __future__ import annotations

import json

AUTO = {
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForImageClassification": "AutoModelForImageClassification",
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForConditionalGeneration": "AutoModelForSeq2SeqLM",
}


def class_name(model: object) -> str | None:
    """The class of a Hugging Face model by its name; None for any other module."""
    return type(model).__name__ if hasattr(model, "save_pretrained") else None


def loading_code(name: str | None, base: str, adapter: str | None = None) -> list[str]:
    """Lines of Python.

    Args:
        name: What `class_name` says of the base.
        base: Its folder.
        adapter: A PEFT folder on it, if any.

    >>> loading_code("BertModel", "base")[1:]
    ['', 'base = AutoModel.from_pretrained("base")']
    """
    where = json.dumps(base, ensure_ascii=False)  # its quoting is Python's here
    if name is None:
        imports = ["from foretune.models.loading import load_base"]
        lines = [f"base, _ = load_base({where})"]
    else:
        auto = next((auto for end, auto in AUTO.items() if name.endswith(end)), "AutoModel")
        imports = [f"from transformers import {auto}"]
        lines = [f"base = {auto}.from_pretrained({where})"]
    if adapter is not None:
        imports.insert(0, "from peft import PeftModel")
        shown = json.dumps(adapter, ensure_ascii=False)
        lines.append(f"model = PeftModel.from_pretrained(base, {shown})")
    return [*imports, "", *lines]
