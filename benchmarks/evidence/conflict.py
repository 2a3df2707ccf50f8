"""What `foretune plan` foretells of every collection, without training anything.

    python benchmarks/evidence/conflict.py SHARED_FOLDER    # writes results/conflict.json

To be called in the root of the repository, after data.py and, for Shakespeare, stories260k.py.

The conflict of the seen tasks of each recipe: on the inputs that tasks share, or else on features
of the recipe's model. Seconds are those of one CPU core, reading the data and the model included.
A collection that is in the result already is measured again only if it is named.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from catalogue import COLLECTIONS, recipe_of

from foretune.evaluation.conflict import Conflict
from foretune.files import write_whole
from foretune.recipes.conflict import recipe_conflict
from foretune.recipes.console import SILENT
from foretune.recipes.schema import load_recipe
from foretune.recipes.setup import set_up
from foretune.training.record import environment

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "benchmarks" / "results" / "conflict.json"
COMMAND = "python benchmarks/evidence/conflict.py SHARED_FOLDER"


def measured(name: str, shared: Path, made: Path) -> dict[str, Any]:
    """The conflict of a collection, with its recipe."""
    path, settings = recipe_of(name, shared, made)
    begin = time.perf_counter()
    setup = set_up(load_recipe(ROOT / path, settings), SILENT)
    conflict = recipe_conflict(setup, SILENT)
    seconds = round(time.perf_counter() - begin, 1)
    fields = conflict.to_dict() if isinstance(conflict, Conflict) else {"unmeasured": conflict}
    return {"recipe": path, "seconds": seconds, **fields}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("shared", type=Path, help="folder of the data")
    parser.add_argument("names", nargs="*", help="collections to measure again; none: the missing")
    parser.add_argument("--made", type=Path, default=Path("runs/data"), help="made by data.py")
    arguments = parser.parse_args()
    result: dict[str, Any] = {"collections": {}}
    if RESULT.exists():
        result = json.loads(RESULT.read_text("utf-8"))
    collections = result["collections"]
    for name in arguments.names or [name for name in COLLECTIONS if name not in collections]:
        collections[name] = measured(name, arguments.shared, arguments.made)
        print(name, collections[name].get("advice"), collections[name].get("expected_gain"))
        ordered = {name: collections[name] for name in COLLECTIONS if name in collections}
        result = {"command": COMMAND, "environment": environment(), "collections": ordered}
        write_whole(RESULT, json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
