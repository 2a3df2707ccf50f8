"""Collections of the evidence, from public files to the rows that foretune reads.

    python benchmarks/evidence/data.py SHARED_FOLDER OUT_FOLDER

    written                               from SHARED_FOLDER                  a task is
    senate-{95,100,103,108,117}.npz       senate/senate-N.npz                 a senator
    uber-taiwan.npz                       opinions/uber-taiwan.jsonl.gz       a participant
    toxcast.npz                           toxcast/toxcast_data.csv.gz         an assay
    har.npz, omniglot-pairs.npz           as benchmarks/claims/data.py        a person, a pair

Items without text that an English encoder can read (roll calls, Chinese statements, chemicals) are
fixed random vectors: what is known of an item is then only how the seen tasks answered it. The
other conversations, ConvAI2 and CLINC150 are read as they are.

Sources:
    Senate: Lewis et al., Voteview, 300 contested roll calls of each congress, drawn at random.
    Uber Taiwan: Polis, gathered by The Computational Democracy Project, CC BY 4.0.
    ToxCast: Richard et al., Chemical Research in Toxicology 2016. Per assay all active chemicals
        and as many inactive ones, so that accuracy says something; assays with 60 or more actives.
"""

from __future__ import annotations

import csv
import gzip
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

SEED = 0
WIDTH = 128  # numbers in the vector of an item
CONGRESSES = (95, 100, 103, 108, 117)
LEAST_ACTIVES = 60


def item_vectors(num_items: int) -> np.ndarray:
    """(num_items, WIDTH) float32, the same for the same number of items."""
    drawn = np.random.default_rng(SEED).standard_normal((num_items, WIDTH))
    return (0.7 * drawn).astype(np.float32)


def senate(shared: Path, congress: int) -> dict[str, np.ndarray]:
    """Columns task, split, x and y of one congress; y is 1 for yea."""
    with np.load(shared / "senate" / f"senate-{congress}.npz") as stored:
        roll = stored["roll"].astype(int)
        x = item_vectors(300)[roll]
        return {"task": stored["task"], "split": stored["split"], "x": x, "y": stored["y"] * 1}


def uber_taiwan(shared: Path) -> dict[str, np.ndarray]:
    """Columns task, split, x and y of the conversation in Chinese; y is 1 for agree.

    Left out: participants without a train row of each kind.
    """
    with gzip.open(shared / "opinions" / "uber-taiwan.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    kinds = {(row["task"], row["label"]) for row in rows if row["split"] == "train"}
    both = {task for task, _ in kinds if {(task, "agree"), (task, "disagree")} <= kinds}
    rows = [row for row in rows if row["task"] in both]
    places = {text: i for i, text in enumerate(sorted({row["text"] for row in rows}))}
    vectors = item_vectors(len(places))
    return {
        "task": np.array([row["task"] for row in rows]),
        "split": np.array([row["split"] for row in rows]),
        "x": vectors[[places[row["text"]] for row in rows]],
        "y": np.array([int(row["label"] == "agree") for row in rows]),
    }


def toxcast(shared: Path) -> dict[str, np.ndarray]:
    """Columns task, split, x and y of assays, half of each assay's rows active (y = 1)."""
    with gzip.open(shared / "toxcast" / "toxcast_data.csv.gz", "rt", encoding="utf-8") as lines:
        header, *rows = csv.reader(lines)
    table = np.array([[float(v) if v else np.nan for v in row[1:]] for row in rows])
    vectors = item_vectors(len(rows))
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []
    for assay, outcomes in zip(header[1:], table.T, strict=True):
        active, inactive = np.flatnonzero(outcomes == 1), np.flatnonzero(outcomes == 0)
        size = min(len(active), len(inactive), 200)
        if size < LEAST_ACTIVES:
            continue
        rng = np.random.default_rng([SEED, len(parts)])
        items = np.concatenate([rng.permutation(active)[:size], rng.permutation(inactive)[:size]])
        items = rng.permutation(items)
        split = np.where(rng.random(len(items)) < 0.3, "test", "train")
        parts.append((np.full(len(items), assay), split, vectors[items], outcomes[items]))
    task, split, x, y = (np.concatenate(column) for column in zip(*parts, strict=True))
    return {"task": task, "split": split, "x": x, "y": y.astype(int)}


def claims_data() -> Any:
    """The module benchmarks/claims/data.py."""
    path = Path(__file__).parents[1] / "claims" / "data.py"
    spec = importlib.util.spec_from_file_location("claims_data", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(shared: Path, out: Path) -> None:
    """Writes every collection whose file is not there yet."""
    out.mkdir(parents=True, exist_ok=True)
    makers = {f"senate-{n}": lambda n=n: senate(shared, n) for n in CONGRESSES}
    makers |= {"uber-taiwan": lambda: uber_taiwan(shared), "toxcast": lambda: toxcast(shared)}
    makers["har"] = lambda: claims_data().har(shared)
    makers["omniglot-pairs"] = lambda: claims_data().omniglot_pairs(shared)
    for name, make in makers.items():
        file = out / f"{name}.npz"
        if not file.exists():
            np.savez_compressed(file, **make())
            print(file)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
