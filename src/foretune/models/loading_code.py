"""The lines of Python that load a base and an adapter, for pages that are left beside them."""

from __future__ import annotations

import json


def class_name(model: object) -> str | None:
    """The class of transformers that loads the model; None where foretune's own loader must."""
    package = type(model).__module__.partition(".")[0]
    return type(model).__name__ if package == "transformers" else None


def loading_code(
    name: str | None, base: str, adapter: str | None = None, num_labels: int | None = None
) -> list[str]:
    """Lines of Python.

    Args:
        name: What `class_name` says of the base.
        base: Its folder.
        adapter: A PEFT folder on it, if any.
        num_labels: Outputs of the adapter's head where they are more than the base's.

    >>> loading_code("BertModel", "base")[1:]
    ['', 'base = BertModel.from_pretrained("base")']
    """
    where = json.dumps(base, ensure_ascii=False)  # its quoting is Python's here
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
