"""Puts the result of an experiment into benchmarks/results/, and its figures into docs/figures/.

foretune run reproduce-linear --out runs/reproduce-linear
python benchmarks/claims/publish_theory.py runs/reproduce-linear theory-linear
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def publish(run: Path, name: str) -> list[Path]:
    """Copies a run's result.json, with versions and machine, and its figures as NAME-PANEL.svg.

    Args:
        run: Folder of a finished `foretune run` of an experiment.
        name: Of the result file.

    Returns:
        The files written.
    """
    result = json.loads((run / "result.json").read_text("utf-8"))
    result["environment"] = json.loads((run / "run.json").read_text("utf-8"))["environment"]
    target = ROOT / "benchmarks" / "results" / f"{name}.json"
    text = json.dumps(result, ensure_ascii=False, separators=(",", ":"))
    target.write_text(text + "\n", encoding="utf-8")
    written = [target]
    for figure in sorted((run / "figures").glob("*.svg")):
        copy = ROOT / "docs" / "figures" / f"{name}-{figure.name}"
        copy.parent.mkdir(exist_ok=True)
        written.append(Path(shutil.copyfile(figure, copy)))
    return written


if __name__ == "__main__":
    for path in publish(Path(sys.argv[1]), sys.argv[2]):
        print(path.relative_to(ROOT))
