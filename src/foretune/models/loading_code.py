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
    name: str | None,
    base: str,
    adapter: str | None = None,
    num_labels: int | None = None,
    *,
    tokenizer: str | None = None,
    labels: str | None = None,
    has_labels: bool = False,
) -> list[str]:
    """The lines of Python that load a base and, if given, an adapter on it.

    Args:
        name: `class_name` of the base.
        base: Folder of the base.
        adapter: PEFT folder of an adapter on it.
        num_labels: Outputs of the adapter's head if more than the base's.
        tokenizer: Folder of the tokenizer.
        labels: File with the labels of the outputs, in order; null for an output without one.
        has_labels: Whether the config of the base names the labels of its outputs.

    >>> loading_code("BertModel", "base")[1:]
    ['', 'base = BertModel.from_pretrained("base")']
    >>> loading_code("DualTower", "base")[-1]
    'base = AutoModel.from_pretrained("base", trust_remote_code=True)'
    """
    standard, others, classes = [], [], []
    if name is None:
        others.append("from foretune.models.loading import load_base")
        # Neither a class of transformers nor a tower: its code comes with it.
        lines = [f"base, _ = load_base({_quoted(base)}, trust_remote_code=True)"]
        if num_labels is not None:
            others.append("from foretune.models.surgery import match_head")
            lines.append(f"match_head(base, {num_labels}, seed=0)")
    else:
        classes.append(TOWERS.get(name, name))
        wide = f", num_labels={num_labels}, ignore_mismatched_sizes=True"
        options = wide if num_labels is not None else ""
        options += ", trust_remote_code=True" if name in TOWERS else ""
        lines = [f"base = {classes[0]}.from_pretrained({_quoted(base)}{options})"]
    model = "base"
    if adapter is not None:
        model = "model"
        others.append("from peft import PeftModel")
        lines.append(f"model = PeftModel.from_pretrained(base, {_quoted(adapter)})")
    if tokenizer is not None:
        classes.append("AutoTokenizer")
        code = ", trust_remote_code=True" if name in TOWERS else ""
        lines.append(f"tokenizer = AutoTokenizer.from_pretrained({_quoted(tokenizer)}{code})")
    if labels is not None:
        standard += ["import json", "from pathlib import Path"]
        lines.append(f'labels = json.loads(Path({_quoted(labels)}).read_text("utf-8"))')
    if tokenizer is not None and (labels is not None or has_labels):
        lines += ["", f'logits = {model}(**tokenizer("A text", return_tensors="pt")).logits[0]']
    if tokenizer is not None and labels is not None:
        lines += [
            "scores = dict(zip(labels, logits.tolist()))",
            "scores.pop(None, None)  # an output without a label",
            "print(max(scores, key=scores.get))",
        ]
    elif tokenizer is not None and has_labels:
        lines.append(f"print({model}.config.id2label[int(logits.argmax())])")
    if classes:
        others.append(f"from transformers import {', '.join(sorted(classes))}")
    imports = [*standard, *[""] * bool(standard), *sorted(others)]
    return [*imports, "", *lines]


def _quoted(text: str) -> str:
    """A string as Python writes it."""
    return json.dumps(text, ensure_ascii=False)
