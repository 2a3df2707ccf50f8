"""Standard retraining against itself: how often does the verdict take a side?

    python benchmarks/evidence/aa_trial.py DATA     # writes results/aa-trial.json

Two retrainings that differ in nothing but their seed are compared as a method and its control would
be, with the model as it is beside them. Every seed holds out other seen tasks and searches anew:
its rate of retraining, how long to retrain, and how to adapt, with the recipe `tower.yaml` at half
of its steps. Each base then adapts to the same examples of the same unseen tasks. 40 pairs of seeds
are judged with one repeat a side, 40 pairs of three seeds with three. A collection whose data are
not in DATA is left out, by name; a trial that was interrupted continues.
"""

from __future__ import annotations

import argparse
import json
import runpy
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np

import foretune
from foretune.evaluation.crossed import Layout
from foretune.evaluation.statistics import pairs_and_means, verdict
from foretune.evaluation.verdict import contrast
from foretune.evaluation.wording import setting_phrase
from foretune.files import write_whole
from foretune.recipes.console import Console
from foretune.recipes.runner import SavedBases, plans_of
from foretune.recipes.schema import Recipe, load_recipe
from foretune.recipes.setup import need_unseen, set_up
from foretune.recipes.stages import base_stage

HERE = Path(__file__).resolve().parent
RESULT = HERE.parent / "results" / "aa-trial.json"
COMMAND = "python benchmarks/evidence/aa_trial.py DATA"
COLLECTIONS = ("land-bank", "senate-100")
SEEDS, REPEATS, PAIRS, SHOTS = 16, 3, 40, 4
METHODS = ("none", "standard")
SETTINGS = (
    f"retrain.methods=[{', '.join(METHODS)}]",
    *("retrain.steps=400", "retrain.eval_every=100", "seeds=1"),
    *("adapt.methods=[head, lora]", "adapt.steps=40", "adapt.search_tasks=16"),
    f"adapt.shots=[{SHOTS}]",
)
Scores = dict[str, dict[str, list[list[float]]]]  # method -> seed -> (num_tasks, num_draws)


def recipe_of(name: str, data: Path, runs: Path) -> Recipe | None:
    """The recipe of a collection; None where its data are not at hand."""
    if name.startswith("senate"):
        number = name.removeprefix("senate-")
        if not (data / "senate" / f"senate-{number}.npz").is_file():
            return None
        source = runs / f"{name}.npz"
        if not source.is_file():
            columns = runpy.run_path(str(HERE / "data.py"))["senate"](data, int(number))
            source.parent.mkdir(parents=True, exist_ok=True)
            np.savez_compressed(source, **columns)
        settings = [f"tasks.source={source}", "tasks.unseen=33"]
    else:
        source = data / "opinions" / f"{name}.jsonl.gz"
        if not source.is_file():
            return None
        settings = [f"tasks.source={source}", "tasks.unseen=94", "model.name=minilm"]
    return load_recipe(HERE / "tower.yaml", [f"name={name}", *settings, *SETTINGS])


def measure(recipe: Recipe, out: Path, num_seeds: int, console: Console) -> dict[str, Any]:
    """Makes the bases of every seed in `out`, and adapts all of them to the same examples.

    Returns:
        The unseen `tasks`, the `scores`, and what the searches `chose`.
    """
    first = set_up(recipe, console)
    unseen = need_unseen(first)
    entries = [entry for entry in recipe.entries if entry.name in METHODS]
    scores: Scores = {name: {} for name in METHODS}
    chose: dict[str, Counter[str]] = {"retraining": Counter(), "adapting": Counter()}
    for seed in range(num_seeds):
        setup = first.for_repeat(seed)
        made = entries if seed == 0 else entries[1:]  # the model as it is needs no other seed
        stages = {e.name: base_stage(setup, e, seed, out, console) for e in made}
        standard = stages["standard"]
        chose["retraining"][f"{standard['retrain']['learning_rate']:g}"] += 1
        for row in standard["adapting"]["plan"]["settings"]:
            chose["adapting"][setting_phrase(row["setting"])] += 1
        bases, path = SavedBases(recipe, out, seed), out / f"scores-{seed}.json"
        if not path.is_file():
            record = foretune.compare(
                {name: bases[name] for name in stages},
                unseen,
                adapt=foretune.LoRA(),
                run=recipe.adapt_run(),
                shots=(SHOTS,),
                draws=REPEATS,
                plans=plans_of(stages),
            ).to_dict()
            write_whole(path, json.dumps(_tables(record, unseen.names)))
        for name, table in json.loads(path.read_text("utf-8")).items():
            scores[name][str(seed)] = table
    chosen = {stage: dict(counts.most_common()) for stage, counts in chose.items()}
    return {"tasks": unseen.names, "chose": chosen, "scores": scores}


def _tables(record: Mapping[str, Any], tasks: Sequence[str]) -> dict[str, list[list[float]]]:
    """The scores after adapting of each base: (num_tasks, num_draws)."""
    cells = {
        (row["base"], row["task"], row["seed"]): round(row["score"], 4)
        for row in record["scores"]
        if row["shots"] == SHOTS
    }
    return {
        base["name"]: [[cells[base["name"], task, d] for d in range(REPEATS)] for task in tasks]
        for base in record["bases"]
    }


def sides(num_seeds: int, repeats: int, number: int = PAIRS) -> list[tuple[list[int], list[int]]]:
    """Pairs of disjoint groups of seeds; with one repeat, each seed is in as many pairs as another.

    >>> sides(4, 1, 4)
    [([0], [2]), ([1], [3]), ([0], [1]), ([1], [2])]
    """
    if repeats == 1:
        half = num_seeds // 2
        apart = [(i, i + half) for i in range(half)]
        apart += [(i, (i + k) % num_seeds) for k in range(1, half) for i in range(num_seeds)]
        return [([i], [j]) for i, j in apart[:number]]
    rng = np.random.default_rng(0)
    pairs: list[tuple[list[int], list[int]]] = []
    while len(pairs) < number:
        groups = rng.permutation(num_seeds)[: num_seeds // repeats * repeats].reshape(-1, repeats)
        pairs += combinations(groups.tolist(), 2)
    return pairs[:number]


def judge(scores: Scores, a: Sequence[int], b: Sequence[int]) -> dict[str, Any]:
    """Compares the retrainings of seeds `a`, as a method, with those of seeds `b`, its control.

    Returns:
        The sides, their difference with its interval, and which of them a verdict takes.
    """
    none = ("none", [0] * len(a))
    of_base = {"none": none, "standard": ("standard", b), "method": ("standard", a)}
    records = [
        {"base": base, "task": str(task), "shots": SHOTS, "seed": repeat, "score": draws[repeat]}
        for base, (name, seeds) in of_base.items()
        for repeat, seed in enumerate(seeds)
        for task, draws in enumerate(scores[name][str(seed)])
    ]
    bases = [{"name": base, "method": base, "label": base} for base in of_base]
    pairs, means = pairs_and_means(records, bases)
    pair = contrast(pairs, "method", "standard", SHOTS)
    assert pair is not None
    best = verdict(pairs, means, bases)["best"]
    return {
        "a": list(a),
        "b": list(b),
        "difference": round(pair.difference, 5),
        "low": round(pair.low, 5),
        "high": round(pair.high, 5),
        "taken": best == "method",
        "clear": pair.better or pair.worse,
    }


def judgements(scores: Scores, num_seeds: int) -> dict[str, list[dict[str, Any]]]:
    """Every pair of sides, each judged as a method against the other, by the number of repeats."""
    return {
        str(repeats): [
            judge(scores, *two) for a, b in sides(num_seeds, repeats) for two in ((a, b), (b, a))
        ]
        for repeats in (1, REPEATS)
    }


def luck(scores: Scores) -> float:
    """Standard deviation of a retraining's mean score beyond the noise, in accuracy."""
    tables = list(scores["standard"].values())
    means = np.array([[np.mean(draws) for draws in table] for table in tables]).T
    return float(np.sqrt(max(Layout.of(means).luck, 0.0)))


def run(
    data: Path,
    runs: Path,
    result_path: Path,
    console: Console,
    names: Sequence[str] = COLLECTIONS,
) -> dict[str, Any]:
    """The trial of all collections; writes the result after each, beside what it has of others."""
    result: dict[str, Any] = {
        "claim": "evidence.aa_trial",
        "command": COMMAND,
        "settings": {"seeds": SEEDS, "shots": SHOTS, "recipe": "tower.yaml", "changes": SETTINGS},
        "collections": {},
    }
    if result_path.exists():
        earlier = json.loads(result_path.read_text("utf-8"))
        if earlier["settings"] == json.loads(json.dumps(result["settings"])):
            result = earlier
    for name in names:
        if name in result["collections"]:
            continue
        recipe = recipe_of(name, data, runs)
        if recipe is None:
            print(f"left out {name}: its data are not in {data}", file=sys.stderr)
            continue
        measured = measure(recipe, runs / name, SEEDS, console)
        judged = judgements(measured["scores"], SEEDS)
        result["collections"][name] = {
            **measured,
            "luck": round(luck(measured["scores"]), 5),
            "judged": judged,
        }
        write_whole(result_path, json.dumps(result, separators=(",", ":")) + "\n")
    return result


def table(result: Mapping[str, Any]) -> str:
    """One line per collection and number of repeats."""
    lines = [
        "| collection | unseen tasks | luck of a retraining | repeats | judgements "
        '| "Take" over the other | differences, root mean square |',
        "|---|---|---|---|---|---|---|",
    ]
    for (name, collection), repeats in product(result["collections"].items(), ("1", str(REPEATS))):
        judged = collection["judged"][repeats]
        taken = sum(side["taken"] for side in judged)
        spread = np.sqrt(np.mean([side["difference"] ** 2 for side in judged]))
        lines.append(
            f"| {name} | {len(collection['tasks'])} | {100 * collection['luck']:.1f} points "
            f"| {repeats} | {len(judged)} | {taken} ({100 * taken / len(judged):.1f} %) "
            f"| {100 * spread:.1f} points |"
        )
    return "\n".join(lines)


def choices(result: Mapping[str, Any]) -> str:
    """What the searches of the seeds chose."""
    lines = ["| collection | rate of retraining (seeds) | how to adapt (seeds) |", "|---|---|---|"]
    for name, collection in result["collections"].items():
        cells = [
            ", ".join(f"{what} ({count})" for what, count in collection["chose"][stage].items())
            for stage in ("retraining", "adapting")
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


TABLES: dict[str, Callable[[Mapping[str, Any]], str]] = {"pairs": table, "choices": choices}


def main() -> None:
    """Reads the command line."""
    from foretune.cli.progress import StderrConsole

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="folder with opinions/ and senate/")
    parser.add_argument("--runs", type=Path, default=Path("runs/aa-trial"))
    parser.add_argument("--only", choices=COLLECTIONS, help="one of the collections")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    names = [arguments.only] if arguments.only else COLLECTIONS
    data, runs, out = arguments.data, arguments.runs, arguments.out
    print(table(run(data, runs, out, StderrConsole(), names)))


if __name__ == "__main__":
    main()
