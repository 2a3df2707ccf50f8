"""What the basis is worth: the bases of a finished run, adapted again without it.

    python benchmarks/evidence/plain.py runs/evidence/land-bank land-bank

writes results/plain-land-bank.json. Everything else is as in the run: the bases, the held-out tasks
that choose how each is adapted, the unseen tasks, their draws, the numbers of shots and the seeds.
So the scores are paired with those of the run. Each base is written as it is finished, to
plain.json in the folder of the run; the same command goes on after an interruption.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import foretune
from foretune.evaluation.adapt_search import search
from foretune.evaluation.statistics import pairs_and_means
from foretune.models.loading import load_base
from foretune.recipes.adapting import candidates_of
from foretune.recipes.console import SILENT
from foretune.recipes.schema import Recipe, load_recipe
from foretune.recipes.setup import Setup, set_up

RESULTS = Path(__file__).resolve().parents[1] / "results"


def plain_scores(setup: Setup, run: Path, name: str, seed: int) -> dict[str, Any]:
    """Scores of one base, adapted in the way that its held-out tasks choose without a basis.

    Args:
        setup: The tasks of the repeat.
        run: Folder of the run.
        name: Name of the base.
        seed: Number of the repeat.

    Returns:
        {"scores": as in comparison.json, "plan": as in foretune.json}.
    """
    recipe = setup.recipe
    block, settings = recipe.adapt, recipe.adapt_run(seed=seed)
    base = run / "bases" / name / f"seed-{seed}" / "base"
    model, _ = load_base(base, trust_remote_code=recipe.model.trust_remote_code)
    candidates = [method for method in candidates_of(recipe) if method.name != "basis"]
    assert setup.held_out is not None and setup.unseen is not None
    plan = search(model, setup.held_out, candidates, settings, block.row_counts).plan
    assert plan is not None  # there are several candidates
    compared = foretune.compare(
        {name: model},
        setup.unseen,
        adapt=candidates,
        run=settings,
        shots=tuple(block.row_counts),
        draws=block.draws,
        plans={name: plan},
    ).to_dict()
    # Draws are numbered on from repeat to repeat, as in the comparison of the run.
    repeat = seed // setup.turns
    scores = [
        {**score, "repeat": repeat, "seed": repeat * block.draws + score["seed"]}
        for score in compared["scores"]
        if score["shots"] != 0
    ]
    return {"scores": scores, "plan": plan.to_dict()}


def without_basis(run: Path) -> dict[str, Any]:
    """All bases of a run: {"NAME seed": what `plain_scores` returns}."""
    path = run / "plain.json"
    done: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {}
    recipe = load_recipe(run / "config.yaml")
    assert isinstance(recipe, Recipe)
    first = set_up(recipe, SILENT)
    for seed in range(recipe.seeds):
        turning = recipe.tasks.rotate and seed > 0
        setup = set_up(recipe, SILENT, turn=seed) if turning else first.for_repeat(seed)
        for entry in recipe.entries:
            key = f"{entry.name} {seed}"
            if key not in done:
                done[key] = plain_scores(setup, run, entry.name, seed)
                path.write_text(json.dumps(done), encoding="utf-8")
                print(key, flush=True)
    return done


def main(run: Path, name: str) -> None:
    """Writes results/plain-NAME.json."""
    comparison = json.loads((run / "comparison.json").read_text("utf-8"))
    done = without_basis(run)
    scores = [score for base in done.values() for score in base["scores"]]
    pairs, means = pairs_and_means(scores, comparison["bases"])
    kept = {key: comparison[key] for key in ("title", "metric", "adapt", "collection", "verdict")}
    bases = [
        {key: base[key] for key in ("name", "method", "label")} for base in comparison["bases"]
    ]
    record = json.loads((run / "run.json").read_text("utf-8"))
    result = {
        **kept,
        "bases": bases,
        "scores": scores,
        "pairs": pairs,
        "means": means,
        "plans": {key: base["plan"] for key, base in done.items()},
        "environment": record["environment"],
    }
    target = RESULTS / f"plain-{name}.json"
    target.write_text(json.dumps(result, separators=(",", ":")) + "\n", encoding="utf-8")
    print(target)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
