"""Seconds per query of RTD's store: exact search before and after, and faiss's graph.

python benchmarks/speed/rtd.py

Keys are made up: clusters around a common mean, as hidden states lie. States are looked up one at a
time, as at decoding.

    exact      keys that were converted and centred once
    each call  the same search, which converts and centres all keys in each call, as it was before
    faiss      the graph, mapped from its file beside the store

Exact search is measured where the process keeps freed memory, as the command line does, and where
it returns it to the system, as Python does by default.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timing
import torch
from torch import Tensor

from foretune.decoding import nearest
from foretune.decoding.lookup import Lookup
from foretune.decoding.nearest import CELLS, RERANKED, ExactIndex, neighbour_weights, votes
from foretune.decoding.reference_store import KEY_TYPES, ReferenceStore

KEY = ("part", "entries", "width", "key_type", "memory", "threads")
NEIGHBOURS, TOKENS, QUERIES = 32, 1000, 200  # K, possible values of an entry, states of the recall


def main() -> None:
    parser = timing.parser(__doc__)
    parser.add_argument("--exact", type=int, default=150_000, help="entries, exact search")
    parser.add_argument("--graph", type=int, default=1_000_000, help="entries, faiss's graph")
    parser.add_argument("--width", type=int, default=384)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.quick:
        options.exact, options.graph, options.width = 2000, 2000, 16
        nearest.FLAT = 1000
    results = timing.Results("rtd", KEY, options)
    parts: list[tuple[str, int, str, str, Callable[..., dict[str, Any]]]] = [
        ("exact", options.exact, "float32", "returned", exact_search),
        ("exact", options.exact, "float16", "returned", exact_search),
        ("exact", options.exact, "float32", "kept", exact_search),
        ("exact", options.exact, "float16", "kept", exact_search),
        ("graph", options.graph, "float16", "kept", graph),
    ]
    for part, entries, key_type, memory, measure in parts:
        if memory == "kept":
            timing.begin(options)
        cell = {"part": part, "entries": entries, "width": options.width, "key_type": key_type,
                "memory": memory, "threads": options.threads}  # fmt: skip
        if not results.has(**cell):
            keys, states = points(entries, options.width, KEY_TYPES[key_type])
            results.add({**cell, "repeats": options.repeats, **measure(keys, states, options)})


def points(entries: int, width: int, key_type: torch.dtype) -> tuple[Tensor, Tensor]:
    """(keys (N, d), states (Q, d)) of one distribution with a cluster per 100 entries."""
    random = torch.Generator().manual_seed(0)
    mean = torch.randn(width, generator=random)
    centres = mean + torch.randn(max(1, entries // 100), width, generator=random)
    keys = torch.empty(entries, width, dtype=key_type)
    states = torch.empty(QUERIES, width)
    for part in (*keys.split(100_000), states):
        cluster = torch.randint(len(centres), (len(part),), generator=random)
        noise = torch.randn(len(part), width, generator=random)
        part.copy_(centres[cluster].add_(noise, alpha=0.7))
    return keys, states


def exact_search(keys: Tensor, states: Tensor, options: Any) -> dict[str, Any]:
    index = ExactIndex(keys)
    variants = {
        "exact": lambda: [index.search(state[None], NEIGHBOURS) for state in states[:10]],
        "each call": lambda: [
            convert_and_search(keys, index.centre, state[None], NEIGHBOURS) for state in states[:10]
        ],
    }
    times = timing.interleaved(variants, options.repeats)
    now = answers(keys, *index.search(states, NEIGHBOURS))
    before = answers(keys, *convert_and_search(keys, index.centre, states, NEIGHBOURS))
    own_rows = index.rows is not keys
    return {
        "neighbours": NEIGHBOURS,
        "seconds": {k: round(v / 10, 5) for k, v in timing.seconds(times).items()},
        "each_call_to_exact": timing.ratio(times, "each call", "exact"),
        "same_neighbours": float((now[0] == before[0]).float().mean()),
        "probability_error": float((now[1] - before[1]).abs().max()),
        "keys_mb": round(keys.nbytes / 2**20),
        "held_mb": round((index.norms.nbytes + own_rows * index.rows.nbytes) / 2**20),
    }


def answers(keys: Tensor, squared: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """(places, distribution over made-up tokens) of a search's result."""
    values = torch.randint(TOKENS, (len(keys),), generator=torch.Generator().manual_seed(1))
    weights = neighbour_weights(squared, float(squared.mean()))
    return places, votes(weights, values[places], TOKENS)


def convert_and_search(
    keys: Tensor, centre: Tensor, queries: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """The search of foretune 0.1."""
    moved = queries - centre
    best, places = None, None
    chunk = max(k + RERANKED, CELLS // max(keys.shape[1], len(queries)))
    for start in range(0, len(keys), chunk):
        rows = keys[start : start + chunk].float() - centre
        far = torch.addmm(rows.square().sum(-1), moved, rows.T, alpha=-2)
        low, at = far.topk(min(k + RERANKED, len(rows)), largest=False)
        at = at + start
        if best is not None and places is not None:
            low, at = torch.cat([best, low], 1), torch.cat([places, at], 1)
            low, order = low.topk(min(k + RERANKED, low.shape[1]), largest=False)
            at = at.gather(1, order)
        best, places = low, at
    assert places is not None
    squared = (keys[places].float() - queries[:, None]).square().sum(-1)
    squared, order = squared.sort(dim=1, stable=True)
    return squared[:, :k], places.gather(1, order)[:, :k]


def graph(keys: Tensor, states: Tensor, options: Any) -> dict[str, Any]:
    faiss = nearest.faiss_module()
    faiss.omp_set_num_threads(options.threads)
    count = len(keys)
    lookup = Lookup(neighbours=NEIGHBOURS)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        values = torch.arange(count) % TOKENS
        store = ReferenceStore(keys, values, torch.full((count,), -1.0), torch.zeros_like(values))
        store.save(Path(folder) / "store")
        began = time.process_time()
        store.search(states[:1], lookup, "faiss")
        built = time.process_time() - began
        del store, keys
        store = ReferenceStore.load(Path(folder) / "store")
        began = time.process_time()
        store.search(states[:1], lookup, "faiss")
        opened = time.process_time() - began
        index_bytes = sum(f.stat().st_size for f in (Path(folder) / "store/faiss-1").iterdir())
        store_bytes = (Path(folder) / "store/store.safetensors").stat().st_size
        variants = {
            name: lambda name=name: [store.search(s[None], lookup, name) for s in states[:10]]
            for name in ("exact", "faiss")
        }
        times = timing.interleaved(variants, options.repeats)
        right = {k: store.search(states, dataclasses.replace(lookup, neighbours=k)) for k in (1, 8)}
        right[NEIGHBOURS] = store.search(states, lookup)
        recall = {}
        for k, (_, places) in right.items():
            _, at = store.search(states, dataclasses.replace(lookup, neighbours=k), "faiss")
            hits = (at[0, :, :, None] == places[0, :, None]).sum()
            recall[k] = round(float(hits) / (k * len(states)), 4)
    return {
        "neighbours": NEIGHBOURS,
        "build_seconds": round(built, 1),
        "open_seconds": round(opened, 2),
        "store_mb": round(store_bytes / 2**20),
        "index_mb": round(index_bytes / 2**20),
        "seconds": {k: round(v / 10, 5) for k, v in timing.seconds(times).items()},
        "exact_to_faiss": timing.ratio(times, "exact", "faiss"),
        "recall": recall,
    }


if __name__ == "__main__":
    main()
