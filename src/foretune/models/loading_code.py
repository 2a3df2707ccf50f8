"""The lines of Python that load a base and an adapter, for the pages written beside them."""

from __future__ import annotations

import json

# Classes of towers, whose code lies in their folder → the class of transformers that loads them.
TOWERS = {
    "TowerForSequenceClassification": "AutoModelForSequenceClassification",
    "DualTower": "AutoModel",
    "TowerForArrays": "AutoModel",
}


def class_name(model: object) -> str | None:
    """The model's class if transformers loads it; None where foretune's own loader is needed."""
    name, package = type(model).__name__, type(model).__module__.partition(".")[0]
    return name if package == "transformers" or name in TOWERS else None


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
    >>> loading_code("DualTower", "base")[-1]
    'base = AutoModel.from_pretrained("base", trust_remote_code=True)'
    """
    where = json.dumps(base, ensure_ascii=False)  # quoted as in Python
    if name is None:
        imports = ["from foretune.models.loading import load_base"]
        lines = [f"base, _ = load_base({where})"]
        if num_labels is not None:
            imports.append("from foretune.models.surgery import match_head")
            lines.append(f"match_head(base, {num_labels}, seed=0)")
    else:
        loader = TOWERS.get(name, name)
        imports = [f"from transformers import {loader}"]
        wide = f", num_labels={num_labels}, ignore_mismatched_sizes=True"
        options = wide if num_labels is not None else ""
        options += ", trust_remote_code=True" if name in TOWERS else ""
        lines = [f"base = {loader}.from_pretrained({where}{options})"]
    if adapter is not None:
        imports.insert(0, "from peft import PeftModel")
        shown = json.dumps(adapter, ensure_ascii=False)
        lines.append(f"model = PeftModel.from_pretrained(base, {shown})")
    return [*imports, "", *lines]
