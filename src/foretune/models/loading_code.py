"""The lines of Python that load a base and an adapter, for the pages written beside them."""

from __future__ import annotations

import json
from pathlib import Path

from foretune.files import ADAPTER_CONFIG_FILE, CONFIG_FILE, LABELS_FILE, TOKENIZER_CONFIG_FILE
from foretune.manifest import final_path

# Classes of towers, whose code lies in their folder → the class of transformers that loads them.
TOWERS = {
    "TowerForSequenceClassification": "AutoModelForSequenceClassification",
    "DualTower": "AutoModel",
    "TowerForArrays": "AutoModel",
}

WIDTH = 80  # of a line that fits a page


def class_name(model: object) -> str | None:
    """The model's class if transformers loads it; None where foretune's own loader is needed."""
    name, package = type(model).__name__, type(model).__module__.partition(".")[0]
    return name if package == "transformers" or name in TOWERS else None


def folder_code(
    name: str | None, base: Path, task: Path | None = None, num_labels: int | None = None
) -> list[str]:
    """The lines of Python that load a base and what was trained on it, as their folders have it.

    With the tokenizer and, of a classifier of texts, the labels.

    Args:
        name: `class_name` of the base.
        base: Folder of the base.
        task: Folder of an adapter on it, or of a model all of whose weights were trained.
        num_labels: Outputs of the adapter's head if more than the base's.
    """
    where = final_path(base)
    tokenizer = where if (base / TOKENIZER_CONFIG_FILE).is_file() else None
    if task is not None:
        file = task / LABELS_FILE
        labels = final_path(file) if file.is_file() else None
        if (task / ADAPTER_CONFIG_FILE).is_file():
            adapter = final_path(task)
            return loading_code(
                name, where, adapter, num_labels, tokenizer=tokenizer, labels=labels
            )
        if (task / CONFIG_FILE).is_file():
            return loading_code(name, final_path(task), tokenizer=tokenizer, labels=labels)
    has_labels = _names_labels(base / CONFIG_FILE)
    return loading_code(name, where, tokenizer=tokenizer, has_labels=has_labels)


def _names_labels(config: Path) -> bool:
    """Whether a config names the labels of a classifier's outputs."""
    try:
        names = json.loads(config.read_text("utf-8"))["id2label"]
        return any(str(names[key]) != f"LABEL_{key}" for key in names)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def loading_code(
    name: str | None,
    base: str,
    adapter: str | None = None,
    num_labels: int | None = None,
    *,
    tokenizer: str | None = None,
    labels: str | None = None,
    has_labels: bool = False,
    subfolder: str | None = None,
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
        subfolder: Where in a repository of the Hub the adapter is, or the base if there is none;
            None for its root.

    >>> loading_code("BertModel", "base")[1:]
    ['', 'base = BertModel.from_pretrained("base")']
    >>> loading_code("DualTower", "base")[-1]
    'base = AutoModel.from_pretrained("base", trust_remote_code=True)'
    """
    standard, others, classes = [], [], []
    code = ["trust_remote_code=True"] * (name in TOWERS)
    place = [] if subfolder is None else [f"subfolder={_quoted(subfolder)}"]
    if name is None:
        others.append("from foretune.models.loading import load_base")
        # Neither a class of transformers nor a tower: its code comes with it.
        lines = [_assigned("base, _", "load_base", _quoted(base), "trust_remote_code=True")]
        if num_labels is not None:
            others.append("from foretune.models.surgery import match_head")
            lines.append(f"match_head(base, {num_labels}, seed=0)")
    else:
        classes.append(TOWERS.get(name, name))
        options = [_quoted(base)]
        if num_labels is not None:
            options += [f"num_labels={num_labels}", "ignore_mismatched_sizes=True"]
        options += [*code, *(place if adapter is None else [])]
        lines = [_assigned("base", f"{classes[0]}.from_pretrained", *options)]
    model = "base"
    if adapter is not None:
        model = "model"
        others.append("from peft import PeftModel")
        options = ["base", _quoted(adapter), *place]
        lines.append(_assigned("model", "PeftModel.from_pretrained", *options))
    if tokenizer is not None:
        classes.append("AutoTokenizer")
        options = [_quoted(tokenizer), *code]
        lines.append(_assigned("tokenizer", "AutoTokenizer.from_pretrained", *options))
    if labels is not None:
        standard += ["import json", "from pathlib import Path"]
        text = f'Path({_quoted(labels)}).read_text("utf-8")'
        lines.append(_assigned("labels", "json.loads", text))
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


def _assigned(target: str, function: str, *arguments: str) -> str:
    """An assignment of a call, on three lines where it is long for one."""
    line = f"{target} = {function}({', '.join(arguments)})"
    if len(line) <= WIDTH:
        return line
    return f"{target} = {function}(\n    {', '.join(arguments)}\n)"


def _quoted(text: str) -> str:
    """A string as Python writes it."""
    return json.dumps(text, ensure_ascii=False)
