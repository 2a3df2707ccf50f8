"""Tries every architecture of the catalogue and writes the table of docs/architectures.md.

python benchmarks/architecture_table.py            # try all of them, write the results and the page
python benchmarks/architecture_table.py --check    # is the page that of the committed results?
"""

from __future__ import annotations

import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "architectures.json"
PAGE = HERE.parent / "docs" / "architectures.md"
PACKAGES = ("torch", "transformers", "peft")
HEADER = """\
# Architectures

What works with which architecture of transformers, tried on microscopic models with random weights
({versions}). Written by `make architectures`; a test compares
the table with what happens.

- **bank = one by one**: a batch that mixes three tasks, padding removed, adapters on all layers:
  outputs and gradients equal those of each task alone.
- **stock PEFT**: `peft.PeftModel` loads an adapter folder, reads every tensor of it and gives the
  same outputs.
- **prune**: with all experts kept nothing changes; half of the experts are saved and load with the
  same outputs.
- **frozen prefix**: all blocks but the last are frozen; their cached states give the model's own
  outputs, also after everything that trains has moved.

"by task": tasks are computed one after the other, which is slower and gives the same. "no": refused
or not done, with a message; the numbers refer to the reasons below. "–": nothing to prune. Other
architectures are checked in the same ways when they are used, before any result is trusted.
"""


def tried() -> dict[str, Any]:
    """Group → architecture → check → what happened, with the versions."""
    sys.path.insert(0, str(HERE.parent / "tests"))
    from architectures.catalogue import ARCHITECTURES
    from architectures.checks import CHECKS, outcome

    groups: dict[str, dict[str, dict[str, str]]] = {}
    for name, architecture in ARCHITECTURES.items():
        row = groups.setdefault(architecture.group, {}).setdefault(name, {})
        for check in CHECKS:
            with tempfile.TemporaryDirectory() as folder:
                row[check] = outcome(check, architecture, Path(folder))
    return {"versions": {name: version(name) for name in PACKAGES}, "groups": groups}


def page(results: dict[str, Any]) -> str:
    """The page of these results."""
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    lines = [HEADER.format(versions=versions)]
    reasons: dict[str, int] = {}
    for group, rows in results["groups"].items():
        checks = list(next(iter(rows.values())))
        lines += [f"| {group} | {' | '.join(checks)} |", "|---" * (len(checks) + 1) + "|"]
        for name, row in rows.items():
            lines.append(f"| {name} | {' | '.join(_cell(row[c], reasons) for c in checks)} |")
        lines.append("")
    lines.append("Reasons:\n")
    lines += [f"{number}. {reason}" for reason, number in reasons.items()]
    return "\n".join(lines) + "\n"


def _cell(text: str, reasons: dict[str, int]) -> str:
    """A short word for an outcome, with the number of its reason."""
    outcome, _, reason = text.partition(": ")
    word = {"works, task by task": "by task", "refused": "no"}.get(outcome, outcome)
    return f"{word} ({reasons.setdefault(reason, len(reasons) + 1)})" if reason else word


def main() -> int:
    """Writes the page, or with --check says whether it is up to date."""
    if "--check" not in sys.argv[1:]:
        RESULTS.write_text(json.dumps(tried(), indent=1, ensure_ascii=False) + "\n", "utf-8")
    expected = page(json.loads(RESULTS.read_text("utf-8")))
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(expected, "utf-8")
    elif PAGE.read_text("utf-8") != expected:
        print(f"{PAGE} is not that of {RESULTS}: run make architectures")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
