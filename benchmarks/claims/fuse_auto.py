"""`fuse auto` and the advice of `fuse`: what held-out rows choose, on rows that were never seen.

python benchmarks/claims/fuse_auto.py --data FOLDER/clinc150/clinc150.jsonl.gz

Models as in smile.py: CLINC150 domains of 15 intents, 10 training rows an intent; the last of
MiniLM's six blocks in full or by LoRA (four domains), or by LoRA for two domains alone. The
samples are a file of the validation rows, sorted by domain and label as exported files
often are. Foretune 0.1 advised gate=activations routing=sequence with the first 16 rows of each
domain; now rows are drawn at random over labels, one part makes the gates, the other is held out,
and every fusion is measured on it. All are then scored on 300 test rows of each domain.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from claims import smile

RESULT = Path(__file__).resolve().parents[1] / "results" / "fuse_auto.json"
COUNTS = {"train": 150, "validation": 300, "test": 300}
FIRST = 16  # rows per task that 0.1 read
SETTINGS: dict[str, dict[str, Any]] = {
    "full": {"kind": "full", "domains": smile.DOMAINS},
    "lora": {"kind": "lora", "domains": smile.DOMAINS},
    "pair": {"kind": "lora", "domains": smile.DOMAINS[:2]},
}
BEFORE = "0.1: gate=activations routing=sequence, first 16 rows"
DIFF = "smile routing_use_diff=false"


class Rows:
    """The rows of the domains as the model is called with them, by their text."""

    def __init__(self, given: Any, domains: Any) -> None:
        self.sorted: list[dict[str, Any]] = []
        self.inputs: dict[tuple[str, str], dict[str, Any]] = {}
        for task in domains:
            batch = given.together(task, "validation")
            texts = given.texts[task, "validation"]
            for i, row in enumerate(texts):
                self.inputs[task, row["text"]] = {key: value[i] for key, value in batch.items()}
            for row in sorted(texts, key=lambda row: str(row["label"])):
                self.sorted.append({"task": task, "text": row["text"], "label": row["label"]})

    def batches(self, task: str, texts: Any, *, labels: bool) -> list[dict[str, Any]]:
        """Batches of 32 rows."""
        import torch

        rows = [self.inputs[task, text] for text in texts]
        return [
            {
                key: torch.stack([row[key] for row in rows[start : start + 32]])
                for key in rows[0]
                if labels or key != "labels"
            }
            for start in range(0, len(rows), 32)
        ]

    def first(self, task: str) -> list[dict[str, Any]]:
        """The first rows of a domain in the file, as 0.1 read them."""
        texts = [row["text"] for row in self.sorted if row["task"] == task]
        return self.batches(task, texts[:FIRST], labels=False)

    def drawn(self, domains: Any, seed: int) -> Any:
        """As the command draws them from the file."""
        from foretune.fusion.sample_rows import Samples, read_samples

        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "samples.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" for row in self.sorted), "utf-8")
            drawn = read_samples(file, domains, 64, seed)
        return Samples(
            {t: self.batches(t, texts, labels=False) for t, texts in drawn.gate.items()},
            {
                t: self.batches(t, [row.text for row in rows], labels=True)
                for t, rows in drawn.held_out.items()
            },
        )


def fusions(base: Any, tuned: Any, samples: Any, rows: Rows) -> Iterator[tuple[str, Any]]:
    """(name, fused model) of all that is scored on test rows, one at a time."""
    import foretune
    from foretune import SMILE

    fuse = functools.partial(foretune.fuse, allow_unverified=True)
    yield "average", fuse(base, tuned, foretune.Average())
    yield "task-arithmetic", fuse(base, tuned, foretune.TaskArithmetic())
    yield "ties", fuse(base, tuned, foretune.TIES())
    fused = fuse(base, tuned, SMILE())
    for routing in ("token", "sequence", "task"):
        fused.routing.granularity = routing
        name = "smile routing=task" if routing == "task" else f"smile gate=weights {routing}"
        yield name.replace("weights ", "weights routing="), fused.set_experts(None)
    yield DIFF, fuse(base, tuned, SMILE(routing_use_diff=False))
    fused = fuse(base, tuned, SMILE(gate="activations"), samples=samples.gate)
    for routing in ("token", "sequence"):
        fused.routing.granularity = routing
        yield f"smile gate=activations routing={routing}", fused
    first = {task: rows.first(task) for task in tuned}
    old = SMILE(gate="activations", routing="sequence")
    yield BEFORE, fuse(base, tuned, old, samples=first)


def one_seed(given: Any, seed: int, setting: Mapping[str, Any]) -> dict[str, Any]:
    """What was measured on held-out rows, and all fusions on test rows."""
    from foretune.fusion.comparison import compare_fusions
    from foretune.fusion.scoring import row_scores

    domains, base = setting["domains"], given.base(seed)
    start = time.process_time()
    tuned = {
        task: smile.tune(base, given.together(task, "train"), setting["kind"], seed)
        for task in domains
    }
    rows = Rows(given, domains)
    samples = rows.drawn(domains, seed)
    tuning, start = time.process_time() - start, time.process_time()
    measured = compare_fusions(base, tuned, samples, allow_unverified=True).to_dict()
    measuring = time.process_time() - start
    test = {task: given.rows[task, "test"] for task in domains}
    scores = {"separate models": {}}
    for task, model in tuned.items():
        right = [
            (
                model(**{k: v for k, v in b.items() if k != "labels"}).logits.argmax(-1)
                == b["labels"]
            )
            for b in test[task]
        ]
        scores["separate models"][task] = sum(int(r.sum()) for r in right) / COUNTS["test"]
    for name, fused in fusions(base, tuned, samples, rows):
        scores[name] = {t: statistics.mean(row_scores(fused, t, test[t])) for t in domains}
    means = {name: statistics.mean(by.values()) for name, by in scores.items()}
    kind = f"{setting['kind']} of {len(domains)}"
    print(f"{kind}, seed {seed}", {n: round(100 * m, 1) for n, m in means.items()}, file=sys.stderr)
    print("  chosen", measured["chosen"], "; untold", measured["chosen_untold"], file=sys.stderr)
    seconds = {"tuning": tuning, "measuring": measuring}
    return {"seed": seed, "measured": measured, "test": scores, "seconds": seconds}


# --- tables -------------------------------------------------------------------------------------


def table(result: Mapping[str, Any], setting: str) -> str:
    """Held-out and test accuracy of every fusion, of the old advice and of the choices."""
    seeds = result["settings"][setting]
    held_out = [{c["name"]: c["mean"] for c in seed["measured"]["candidates"]} for seed in seeds]
    test = [{n: statistics.mean(s.values()) for n, s in seed["test"].items()} for seed in seeds]
    lines = ["| | held-out rows, % | test rows, % | each seed |", "|---" * 4 + "|"]

    def line(label: str, names: list[str]) -> str:
        values = [100 * scores[name] for scores, name in zip(test, names, strict=True)]
        before = [scores.get(name) for scores, name in zip(held_out, names, strict=True)]
        shown = "" if None in before else f"{100 * statistics.mean(before):.1f}"  # type: ignore[type-var]
        each = " / ".join(f"{value:.1f}" for value in values)
        return f"| {label} | {shown} | {statistics.mean(values):.1f} | {each} |"

    labels = {"separate models": "each task's own model", DIFF: f"{DIFF}, by token"}
    for name in test[0]:
        if name != BEFORE:
            lines.append(line(labels.get(name, name), [name] * len(seeds)))
    lines.append(line(f"advice of {BEFORE}", [BEFORE] * len(seeds)))
    untold = [seed["measured"]["chosen_untold"] for seed in seeds]
    lines.append(line("**advice now, the task not told**", untold))
    lines.append(line("**`fuse auto`**", [seed["measured"]["chosen"] for seed in seeds]))
    chosen = "; ".join(
        f"seed {seed['seed']}: {seed['measured']['chosen']}, and not told {name}"
        for seed, name in zip(seeds, untold, strict=True)
    )
    return "\n".join([*lines, "", f"Chosen: {chosen}."])


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    name: functools.partial(table, setting=name) for name in SETTINGS
}


def main() -> None:
    """Runs the seeds and writes the result."""
    import torch

    from foretune.training.record import environment

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", required=True, help="clinc150.jsonl.gz")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS))
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {"claim": "fuse_auto", "settings": {}, "counts": COUNTS}
    result |= {"steps": smile.STEPS, "rates": smile.RATES}
    given = smile.Given(options.data, COUNTS)
    for name in options.settings:
        result["settings"][name] = []
        for seed in range(options.seeds):
            result["settings"][name].append(one_seed(given, seed, SETTINGS[name]))
            text = json.dumps(result | {"environment": environment()}, indent=1)
            options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
