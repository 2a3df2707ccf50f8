"""Interleaved timing, and result files that grow cell by cell.

A machine that is shared changes its speed by the minute, so variants are timed in turns, in a new
order each time, and what is reported is the median of the ratios of one turn. Time is the CPU time
of the process: with one thread it is much steadier than the clock on the wall.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from foretune.allocator import keep_freed_memory
from foretune.training.record import environment

RESULTS = Path(__file__).resolve().parents[1] / "results"

Times = dict[str, list[float]]


def interleaved(variants: Mapping[str, Callable[[], object]], repeats: int) -> Times:
    """CPU seconds of each variant in each turn, after one turn that does not count."""
    rng = random.Random(0)
    times: Times = {name: [] for name in variants}
    for turn in range(repeats + 1):
        order = list(variants)
        rng.shuffle(order)
        for name in order:
            start = time.process_time()
            variants[name]()
            if turn:
                times[name].append(time.process_time() - start)
    return times


def ratio(times: Times, name: str, floor: str) -> dict[str, float]:
    """Median, least and greatest of the turns' ratios."""
    found = [a / b for a, b in zip(times[name], times[floor], strict=True)]
    return {
        "median": round(statistics.median(found), 3),
        "low": round(min(found), 3),
        "high": round(max(found), 3),
    }


def seconds(times: Times) -> dict[str, float]:
    """Median CPU seconds of each variant."""
    return {name: round(statistics.median(values), 4) for name, values in times.items()}


class Results:
    """A result file; a row that is there already is not measured again.

    Args:
        name: Of the benchmark: benchmarks/results/speed-<name>.json.
        key: The fields that tell rows apart.
        options: Of the command line.
        about: What holds for all rows.
    """

    def __init__(
        self, name: str, key: Iterable[str], options: argparse.Namespace, **about: Any
    ) -> None:
        folder = Path(options.out) if options.out else RESULTS
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"speed-{name}.json"
        self.key = tuple(key)
        self.again = options.again
        self.data = {
            "benchmark": name,
            "command": f"python benchmarks/speed/{name.replace('-', '_')}.py",
            "machine": environment(),
            **about,
            "rows": [],
        }
        if self.path.is_file():
            self.data["rows"] = json.loads(self.path.read_text("utf-8"))["rows"]

    def has(self, **cell: Any) -> bool:
        return not self.again and self._find(cell) is not None

    def add(self, row: dict[str, Any]) -> None:
        """Keeps this row, in the place of one with the same key, and writes the file."""
        old = self._find(row)
        rows = self.data["rows"]
        if old is None:
            rows.append(row)
        else:
            rows[rows.index(old)] = row
        lines = ",\n ".join(json.dumps(r) for r in rows)
        head = json.dumps({k: v for k, v in self.data.items() if k != "rows"})
        self.path.write_text(f'{head[:-1]}, "rows": [\n {lines}\n]}}\n', encoding="utf-8")
        print(json.dumps(row), flush=True)

    def _find(self, cell: Mapping[str, Any]) -> dict[str, Any] | None:
        for row in self.data["rows"]:
            if all(row.get(k) == cell.get(k) for k in self.key):
                return row
        return None


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The options that all speed benchmarks share."""
    found = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--threads", type=int, default=1)
    found.add_argument("--repeats", type=int, default=5)
    found.add_argument("--quick", action="store_true", help="tiny models: does it run at all?")
    found.add_argument("--again", action="store_true", help="measure rows that are there already")
    found.add_argument("--out", help="folder for the result file; the committed one by default")
    return found


def begin(options: argparse.Namespace) -> None:
    """Threads, seed, and memory handled as the command line of foretune does."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    keep_freed_memory()
