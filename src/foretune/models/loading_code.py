"""The lines of Python that load a base and an adapter, for the pages written beside them."""

from __future__ import annotations

import json


def class_name(model: object) -> str | None:
    """The transformers class that loads the model; None where foretune's own loader is needed."""
    package = type(model).__module__.partition(".")[0]
    return type(model).__name__ if package == "transformers" else None


def loading_code(
    name: str | None, base: str, adapter: str | None = None, num_labels: int | None = None
) -> list[str]:
    """The lines of Python that load a base and, if given, an adapter on it.

    Args:
        name: `class_name` of the base.
        base: Folder of the base.
        adapter: PEFT folder of an adapter on it.
        num_labels: Outputs of the adapter's head if more than the base's.

    >>> loading_code("BertModel", "base")[1:]
    ['', 'base = BertModel.from_pretrained("base")']
    """
    where = json.dumps(base, ensure_ascii=False)  # quoted as in Python
    if name is None:
        imports = ["from foretune.models.loading import load_base"]
        lines = [f"base, _ = load_base({where})"]
        if num_labels is not None:
            imports.append("from foretune.models.surgery import match_head")
            lines.append(f"match_head(base, {num_labels}, seed=0)")
    else:
        imports = [f"from transformers import {name}"]
        wide = f", num_labels={num_labels}, ignore_mismatched_sizes=True"
        lines = [f"base = {name}.from_pretrained({where}{wide if num_labels is not None else ''})"]
    if adapter is not None:
        imports.insert(0, "from peft import PeftModel")
        shown = json.dumps(adapter, ensure_ascii=False)
        lines.append(f"model = PeftModel.from_pretrained(base, {shown})")
    return [*imports, "", *lines]
