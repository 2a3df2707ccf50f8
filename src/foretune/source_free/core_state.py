"""What an adapted model has that its base has not, as a small folder, and back onto the base.

core.safetensors   the tensors that may differ from the base's: cores, batch normalisation
core.json          method, fingerprint of the rest, labels, ranks where the base is not factored
README.md          what it is
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn

from foretune.adapters.fingerprint import fingerprint
from foretune.errors import UserError
from foretune.source_free.tucker import tucker_layers, tuckerize

STATE, ABOUT, CARD = "core.safetensors", "core.json", "README.md"


def write_core(
    folder: Path,
    model: nn.Module,
    names: list[str],
    *,
    factored: dict[str, Any],
    method: dict[str, Any],
    about: dict[str, Any] | None = None,
) -> None:
    """Writes these tensors of an adapted model.

    Args:
        folder: Exists.
        model: The adapted model.
        names: Of its state, those that may differ from the base's.
        factored: (r_out, r_in) of the layers that the base has whole; {} for a prepared base.
        method: The method's record as a mapping.
        about: More for core.json.
    """
    state = model.state_dict()
    tensors = {name: state[name].detach().cpu().contiguous() for name in names}
    safetensors.torch.save_file(tensors, str(folder / STATE))
    numbers = sum(t.numel() for t in tensors.values())
    written = {
        "method": method,
        "base": str(getattr(model, "name_or_path", "") or ""),
        "rest": _rest(model, names, list(factored)),
        "factored": {name: list(ranks) for name, ranks in factored.items()},
        "numbers": numbers,
        **(about or {}),
    }
    (folder / ABOUT).write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    base = written["base"] or "the base that it was adapted from"
    (folder / CARD).write_text(
        f"---\nlibrary_name: foretune\ntags: [foretune, {method['name']}]\n---\n\n"
        f"# What adapting changed\n\n{numbers:,} numbers that replace those of {base}, by foretune "
        f"({method['name']}, loss {method.get('loss')}). Nothing else of the base changed.\n\n"
        "```python\nfrom foretune.source_free.core_state import load_core\n\n"
        'model = load_core(base, "this folder")\n```\n',
        encoding="utf-8",
    )


def read_about(folder: Path | str) -> dict[str, Any]:
    """What core.json says.

    Raises:
        UserError: The folder holds no adapted state.
    """
    file = Path(folder) / ABOUT
    if not file.is_file():
        raise UserError(f"{folder} holds no adapted state: it has no {ABOUT}")
    try:
        about: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        _ = about["rest"], about["factored"], about["method"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is not readable: {' '.join(str(error).split())}") from error
    return about


def load_core(base: nn.Module, folder: Path | str) -> nn.Module:
    """A copy of the base with the adapted state of a folder in it.

    Args:
        base: The model that was adapted; it is not changed.
        folder: What `Adapted.save` or `foretune sfda adapt` wrote for a task.

    Raises:
        UserError: The folder holds no adapted state, or it belongs to another base.
    """
    about = read_about(folder)
    model = copy.deepcopy(base)
    if about["factored"]:
        tuckerize(model, ranks=about["factored"], fit=False)
    try:
        tensors = safetensors.torch.load_file(str(Path(folder) / STATE))
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{Path(folder) / STATE} is not readable: {' '.join(str(error).split())[:200]}"
        ) from error
    state = model.state_dict()
    wrong = [k for k, v in tensors.items() if k not in state or state[k].shape != v.shape]
    if wrong or _rest(model, list(tensors), list(about["factored"])) != about["rest"]:
        why = f": it has no {wrong[0]} of that shape" if wrong else ": its weights are others"
        raise UserError(
            f"{folder} belongs to another base than the one given{why}; it was adapted from "
            f"{about.get('base') or 'a model in memory'}"
        )
    with torch.no_grad():
        for name, value in tensors.items():
            state[name].copy_(value)
    return model


def _rest(model: nn.Module, moved: list[str], factored: list[str]) -> str:
    """The fingerprint of what adapting leaves alone."""
    assert all(name in tucker_layers(model) for name in factored)
    return fingerprint(model, [*moved, *factored])
