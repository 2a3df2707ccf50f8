"""What to do with the result of a comparison: one text for terminal, report and model card.

Paths are as the user typed them, so commands and code run where foretune was called.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from foretune.evaluation.wording import AS_IT_IS
from foretune.files import ADAPTER_CONFIG_FILE, CONFIG_FILE, RECIPE
from foretune.manifest import final_path
from foretune.models.loading_code import folder_code, loading_code

WHERE = (
    "Paths are those of the folder in which foretune was called: run this there, or change the "
    "paths."
)


@dataclasses.dataclass(frozen=True)
class Step:
    """A thing to do with the result.

    Args:
        sentence: What it does; ends with a colon.
        code: A command, or lines of Python.
        language: "shell" or "python".
    """

    sentence: str
    code: str
    language: str

    @property
    def text(self) -> str:
        """The step in plain text, a command on the line of its sentence."""
        return f"{self.sentence}{' ' if self.language == 'shell' else chr(10)}{self.code}"


def advice(comparison: Mapping[str, Any], folder: Path) -> list[Step]:
    """How to load the best base, and how to adapt it to new tasks; empty where none was saved.

    Args:
        comparison: The content of `comparison.json`.
        folder: Its folder.
    """
    base = best_base(comparison)
    if not base.get("path"):
        return []
    label = AS_IT_IS if base["method"] == "none" else base["label"]
    code = "\n".join(load_lines(base, folder))
    steps = [Step(f"To load {label} in Python:", code, "python")]
    if "adapt_with" in comparison:
        path = final_path(_place(base["path"], folder))
        words = ["foretune", "adapt", path, "--tasks", "NEW.jsonl", *comparison["adapt_with"]]
        sentence = "To adapt to new tasks in the same way:"
        steps.append(Step(sentence, shlex.join(words), "shell"))
    return steps


def run_again(comparison: Mapping[str, Any], folder: Path) -> str | None:
    """The command that repeats a run or a comparison; None where it is not recorded."""
    final = Path(final_path(folder))
    name = final.resolve().name if final.name in ("", "..") else final.name
    out = os.path.normpath(final / ".." / f"{name}-again")
    if (folder / RECIPE).is_file():
        return shlex.join(["foretune", "run", str(final / RECIPE), "--out", out])
    if comparison.get("command"):
        return shlex.join([*comparison["command"], "--out", out])
    return None


def best_base(comparison: Mapping[str, Any]) -> dict[str, Any]:
    """The base of the verdict or, without one, that with the highest mean at its shots."""
    verdict = comparison["verdict"]
    rows = [row for row in comparison["means"] if row["shots"] == verdict["shots"]]
    best = verdict["best"] or max(rows, key=lambda row: row["mean"])["base"]
    return next(base for base in comparison["bases"] if base["name"] == best)


def load_lines(base: Mapping[str, Any], folder: Path) -> list[str]:
    """Python that loads a base with the first adapter on it, its tokenizer and its labels.

    Where the files are no longer there, the lines name the folders in which a run writes them.

    Args:
        base: A base of `comparison.json` that has a path.
        folder: The folder of the comparison.
    """
    name, outputs = base["model_class"], base["num_labels"]
    where = _place(base["path"], folder)
    adapters = folder / "adapters" / base["name"]
    if not where.is_dir():
        return loading_code(name, final_path(where), final_path(adapters / "TASK"), outputs)
    files = sorted(adapters.glob(f"*/{ADAPTER_CONFIG_FILE}"))
    files += sorted(adapters.glob(f"*/{CONFIG_FILE}"))  # where all weights were trained
    return folder_code(name, where, files[0].parent if files else None, outputs)


def _place(path: str, folder: Path) -> Path:
    """A base's folder: those of a run are relative to its folder, others to where one works."""
    inside = (folder / path).is_dir() or not Path(path).is_dir()
    return folder / path if inside else Path(path)
