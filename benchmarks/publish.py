"""Writes the comparison of a finished run to benchmarks/results/ and its table into the docs.

python benchmarks/publish.py runs/bench-quickstart quickstart    # after a run
python benchmarks/publish.py runs/a runs/b convai2               # one recipe, run in parts
python benchmarks/publish.py benchmarks/results/a.json runs/b a  # more bases for a result
python benchmarks/publish.py                                     # tables of the committed results
python benchmarks/publish.py --check                             # are the tables up to date?
python benchmarks/publish.py --recompute                         # after a change of the statistics
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from claims import variants
from foretune.evaluation.statistics import pairs_and_means, verdict
from foretune.evaluation.wording import Scale, counted, shots_label, shots_order
from foretune.theory.experiment import markdown, tables

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
DOCS = HERE.parent / "docs"
KINDS = "results|spectrum|theory|claim|variants"
PAGES = (HERE.parent / "README.md", *sorted(DOCS.rglob("*.md")))


def publish(runs: Sequence[Path], name: str) -> Path:
    """Copies the relevant parts of the runs' comparison.json, with versions and machine.

    Args:
        runs: Folders of runs, or results that are here already.
        name: Name of the result.
    """
    results = [run if run.suffix == ".json" else run / "comparison.json" for run in runs]
    comparison = joined([json.loads(result.read_text("utf-8")) for result in results])
    record = json.loads((runs[0] if runs[0] == results[0] else runs[0] / "run.json").read_text())
    kept = {key: value for key, value in comparison.items() if key != "recipe"}
    for base in kept["bases"]:
        base["path"] = None
    kept["spectrum"] = smaller(kept.get("spectrum"))
    # The recipe as it was run, without the paths of this machine.
    lines = [line for line in comparison["recipe"].splitlines() if not line.startswith("out:")]
    kept["recipe"] = "\n".join(without_folder(line) for line in lines)
    kept["environment"] = record["environment"]
    target = RESULTS / f"{name}.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(kept, separators=(",", ":")) + "\n", encoding="utf-8")
    return target


def joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One comparison of the bases of all parts, run separately on the same tasks and seeds."""
    first, *others = parts
    if not others:
        return first
    cells = [{(s["task"], s["shots"], s["seed"]) for s in part["scores"]} for part in parts]
    if any(other != cells[0] for other in cells[1:]):
        raise SystemExit("the runs are not of the same unseen tasks, shots and seeds")
    bases = [base for part in parts for base in part["bases"]]
    scores = [score for part in parts for score in part["scores"]]
    pairs, means = pairs_and_means(scores, bases)
    unit = first["adapt"].get("shots_unit", "rows")
    found = verdict(pairs, means, bases, metric=first["metric"]["name"], shots_unit=unit)
    recipe = "\n# and, run apart:\n".join(part["recipe"] for part in parts)
    changed = {"bases": bases, "scores": scores, "pairs": pairs, "means": means, "verdict": found}
    return {**first, **changed, "recipe": recipe}


def smaller(spectrum: dict[str, Any] | None) -> dict[str, Any] | None:
    """The spectrum with its changes averaged over tasks."""
    if spectrum is None:
        return None
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in spectrum["changes"]:
        found.setdefault((row["base"], row["module"]), []).append(row)
    means = [
        {
            "base": base,
            "task": "mean",
            "module": module,
            "values": [
                round(fmean(column), 7) for column in zip(*(r["values"] for r in rows), strict=True)
            ],
            "norm": round(fmean(row["norm"] for row in rows), 7),
            "rank_90": fmean(row["rank_90"] for row in rows),
        }
        for (base, module), rows in found.items()
    ]
    return {**spectrum, "changes": means}


def without_folder(line: str) -> str:
    """`  source: /some/where/valid.jsonl.gz` → `  source: valid.jsonl.gz`."""
    key, colon, value = line.partition("source: ")
    return key + colon + Path(value).name if colon else line


def table(result: dict[str, Any]) -> str:
    """Means and each base's difference from the controls, with its interval, as Markdown."""
    shots = sorted({mean["shots"] for mean in result["means"]}, key=shots_order)
    unit = result["adapt"].get("shots_unit", "rows")
    scale = Scale(result["metric"]["name"])
    means = {(mean["base"], mean["shots"]): mean for mean in result["means"]}
    adapted = [k for k in shots if k != 0]
    most = ([k for k in adapted if k] or adapted)[-1]
    columns = [("none", most), *[("standard", k) for k in adapted]]
    head = ["base", *[shots_label(k, unit) for k in shots]]
    head += [f"− {control}, {shots_label(k, unit)}" for control, k in columns]
    head.append("seconds")
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for base in result["bases"]:
        cells = [base["label"]]
        for k in shots:
            mean = means.get((base["name"], k))
            cells.append("" if mean is None else scale.level(mean["mean"]))
        cells += [difference(result, base["name"], control, k, scale) for control, k in columns]
        cells.append(f"{(base['retrain'] or {}).get('cpu_seconds', 0):.0f}")
        lines.append("| " + " | ".join(cells) + " |")
    collection = result["collection"]
    turns = f" in each of {collection['turns']} turns" if "turns" in collection else ""
    numbers = {score.get("repeat", score["seed"]) for score in result["scores"]}
    repeats = counted(len(numbers), "repeat")
    pairs, levels, metric = result["pairs"], result["means"], result["metric"]["name"]
    said = verdict(pairs, levels, result["bases"], metric=metric, shots_unit=unit)
    lines += [
        "",
        f"{scale.axis.capitalize()}; differences with 95 % intervals; "
        f"{collection['num_seen']} tasks seen, {collection['num_unseen']} unseen{turns}, "
        f"{repeats}; seconds of CPU time of one retraining. {said['sentence']}",
    ]
    return "\n".join(lines)


def difference(
    result: dict[str, Any], base: str, control: str, shots: int | None, scale: Scale
) -> str:
    """`+1.2 (+0.3 to +2.0)` for base − control."""
    for pair in result["pairs"]:
        if pair["shots"] != shots or {pair["a"], pair["b"]} != {base, control}:
            continue
        sign = 1 if pair["a"] == base else -1
        ends = sorted((sign * pair["low"], sign * pair["high"]))
        return f"{scale.signed(sign * pair['difference'])} ({scale.interval(*ends)})"
    return ""


def spectrum_table(result: dict[str, Any]) -> str:
    """Each base's score by adapter rank, and the rank and size of a full fine-tune's change."""
    spectrum = result["spectrum"]
    ranks = spectrum["ranks"]
    scale = Scale(result["metric"]["name"])
    scores: dict[tuple[str, int], list[float]] = {}
    for row in spectrum["rows"]:
        scores.setdefault((row["base"], row["rank"]), []).append(row["score"])
    head = ["base", *[f"rank {rank}" for rank in ranks], "rank needed", "90 % of ΔW", "‖ΔW‖ / ‖W‖"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for base in result["bases"]:
        means = [sum(s) / len(s) for s in (scores[base["name"], rank] for rank in ranks)]
        needed = next(r for r, mean in zip(ranks, means, strict=True) if mean >= max(means) - 0.01)
        changes = [change for change in spectrum["changes"] if change["base"] == base["name"]]
        lines.append(
            "| "
            + " | ".join(
                [
                    base["label"],
                    *[scale.level(mean) for mean in means],
                    str(needed),
                    f"{fmean(change['rank_90'] for change in changes):.1f}" if changes else "",
                    f"{fmean(change['norm'] for change in changes):.4f}" if changes else "",
                ]
            )
            + " |"
        )
    if spectrum.get("costs"):
        lines += ["", *rank_costs(spectrum)]
    return "\n".join(lines)


def rank_costs(spectrum: dict[str, Any]) -> list[str]:
    """The cost of adapting one task at each rank and with all weights, averaged over bases."""
    ranks = [*spectrum["ranks"], None]
    of_rank = {r: [cost for cost in spectrum["costs"] if cost["rank"] == r] for r in ranks}
    rows: dict[str, Callable[[dict[str, Any]], float]] = {
        "trained parameters per task": lambda cost: cost["trainable_parameters"],
        "tokens per task": lambda cost: cost["tokens"] / cost["num_tasks"],
        "CPU seconds per task": lambda cost: cost["cpu_seconds"] / cost["num_tasks"],
        "peak memory, MB": lambda cost: cost["peak_memory_mb"],
    }
    head = ["adapting", *[f"rank {r}" for r in ranks[:-1]], "all weights"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for label, of in rows.items():
        means = [sum(map(of, of_rank[r])) / len(of_rank[r]) for r in ranks]
        cells = [f"{mean:.1f}" if label.startswith("CPU") else f"{mean:,.0f}" for mean in means]
        lines.append("| " + " | ".join([label, *cells]) + " |")
    return lines


def theory_table(result: dict[str, Any], name: str) -> str:
    """One panel of an experiment: what the paper says, the conditions, the table, the result."""
    for panel, shown, finding in tables(result):
        if panel.name == name:
            said = f"**{panel.title}.** *The paper:* {panel.paper} *Here:* {panel.here}"
            return "\n\n".join([said, markdown(shown), f"*Result:* {finding}"])
    raise SystemExit(f"no panel {name} in the result")


def with_tables(text: str) -> str:
    """Regenerates each part of a page between `<!-- KIND NAME -->` and `<!-- end -->`.

    Kinds: `results` and `spectrum` of a comparison, `theory` of a panel of an experiment, `claim`
    of a table that a script in `claims/` or `evidence/` makes from its result, `variants` of all
    results `claims-*`.
    """
    made: dict[str, Callable[[], str]] = {"variants against rivals": variants.variants_table}
    for path in sorted(RESULTS.glob("*.json")):
        result = json.loads(path.read_text("utf-8"))
        for panel in result["panels"] if "experiment" in result else ():
            made[f"theory {path.stem} {panel}"] = partial(theory_table, result, panel)
        if "claim" in result:
            script = result["claim"] if "." in result["claim"] else f"claims.{result['claim']}"
            tables_of = importlib.import_module(script).TABLES
            for name, write in tables_of.items():
                made[f"claim {path.stem} {name}"] = partial(write, result)
            continue
        made[f"results {path.stem}"] = partial(table, result)
        made[f"spectrum {path.stem}"] = partial(spectrum_table, result)

    def write(mark: re.Match[str]) -> str:
        if mark["name"] not in made:
            raise SystemExit(f"<!-- {mark['name']} --> names no table that a result has")
        return f"<!-- {mark['name']} -->\n{made[mark['name']]()}\n<!-- end -->"

    marks = re.findall(rf"<!-- (?:{KINDS}) .* -->|<!-- end -->", text)
    if [mark == "<!-- end -->" for mark in marks] != [False, True] * (len(marks) // 2):
        raise SystemExit(f"a table has no mark of its end, or an end no table: {marks}")
    return re.sub(rf"<!-- (?P<name>(?:{KINDS}) .*) -->[ \t]*\n(?s:.*?)<!-- end -->", write, text)


def recompute() -> None:
    """Computes pairs, means and verdict of every committed comparison anew, from its scores."""
    for path in sorted(RESULTS.glob("*.json")):
        result = json.loads(path.read_text("utf-8"))
        if {"scores", "pairs"} <= result.keys():
            pairs, means = pairs_and_means(result["scores"], result["bases"])
            shots, metric = result["verdict"]["shots"], result["metric"]["name"]
            unit = result["adapt"].get("shots_unit", "rows")
            said = verdict(pairs, means, result["bases"], shots, metric=metric, shots_unit=unit)
            result |= {"pairs": pairs, "means": means, "verdict": said}
        elif result.get("claim") == "evidence.aa_trial":
            judgements = importlib.import_module("evidence.aa_trial").judgements
            for collection in result["collections"].values():
                collection["judged"] = judgements(collection["scores"], result["settings"]["seeds"])
        else:
            continue
        path.write_text(json.dumps(result, separators=(",", ":")) + "\n", encoding="utf-8")


def main(arguments: list[str]) -> int:
    if len(arguments) == 1 and arguments[0] not in ("--check", "--recompute"):
        raise SystemExit(__doc__)
    if arguments == ["--recompute"]:
        recompute()
    if len(arguments) > 1:
        *runs, name = arguments
        print(publish([Path(run) for run in runs], name))
    stale = [
        page
        for page in PAGES
        if page.exists() and with_tables(page.read_text()) != page.read_text()
    ]
    for page in stale:
        if arguments == ["--check"]:
            print(f"{page.name} is older than benchmarks/results: run benchmarks/publish.py")
        else:
            page.write_text(with_tables(page.read_text("utf-8")), encoding="utf-8")
    return int(bool(stale) and arguments == ["--check"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
