"""The evidence: data, runs and results. A run that was killed goes on where it was.

    python benchmarks/evidence/all.py DATA [COLLECTION ...]    # without names: all of them

To be called in the root of the repository. DATA has the folders that data.py names, and clinc150,
convai2, shakespeare and stories260k.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from catalogue import AUTO, COLLECTIONS, auto_of, recipe_of

EVIDENCE, MADE = Path("benchmarks/evidence"), Path("runs/data")
WITH_BASIS = ("tower", "choice")  # recipes with a basis among the ways to adapt


def python(*words: str | Path) -> None:
    """Runs a Python program; this one stops if that one fails."""
    subprocess.run([sys.executable, *map(str, words)], check=True)


def run(name: str, data: Path) -> None:
    """Runs a collection, and puts its result into benchmarks/results."""
    if name == "shakespeare" and not (MADE / "stories260k").is_dir():
        model = "benchmarks/claims/stories260k.py"
        python(model, data / "stories260k", MADE / "stories260k")
    recipe, settings = recipe_of(name, data, MADE)
    folder = Path("runs/evidence") / name
    command = ("-m", "foretune.cli", "run", recipe, *settings)
    python(*command, "--out", folder, "--resume")
    folders = [folder]
    if name in AUTO:
        folders.append(folder.with_name(f"{name}-auto"))
        python(*command, auto_of(recipe), "--out", folders[-1], "--resume")
    python("benchmarks/publish.py", *folders, f"evidence-{name}")
    if COLLECTIONS[name][0] in WITH_BASIS:
        python(EVIDENCE / "plain.py", folder, name)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path, help="folder of the data")
    parser.add_argument("names", nargs="*", metavar="COLLECTION", help="without names: all of them")
    arguments = parser.parse_args()
    python(EVIDENCE / "data.py", arguments.data, MADE)
    for name in arguments.names or COLLECTIONS:
        run(name, arguments.data)


if __name__ == "__main__":
    main()
