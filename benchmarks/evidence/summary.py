"""The evidence on one page: what PEFT-ML gains, against what was measured before any training.

    python benchmarks/evidence/summary.py

Reads benchmarks/results: evidence-NAME.json of each collection (`all.py`), plain-NAME.json where it
was adapted without the basis as well (`plain.py`). Writes evidence.json and
docs/figures/conflict.svg; `publish.py` then puts the tables into the pages.

Fixed before any run: the form is the last layer (LoRA where tasks share no classes), the number of
shots 4 rows per class (16 rows where there are no classes). Holm's correction covers all
differences of the table, of all collections and rivals together.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from foretune.evaluation.conflict import REALISED
from foretune.evaluation.report.gain_figure import Collection, gain_against_conflict
from foretune.evaluation.report.svg import LIGHT
from foretune.evaluation.report.view import Mean
from foretune.evaluation.statistics import holm, paired_difference
from foretune.evaluation.wording import Scale, counted, shots_label, shots_order
from foretune.files import write_whole

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
FIGURE = ROOT / "docs" / "figures" / "conflict.svg"
RAW = "https://raw.githubusercontent.com/foretune/foretune/main/"  # of images in the README
FORMS = ("peft-ml-last-layer", "peft-ml-lora", "peft-ml")  # the first that a collection has
RIVALS = ("standard", "reptile", "fomaml", "none", "factorised-heads")
BEATEN = ("standard", "reptile", "fomaml", "none")  # by goal 1
LEVEL = 0.05  # of the tests, after Holm's correction
PER_CLASS, ROWS = 4, 16  # shots of the table
LEAST, RHO, REGRET = 5, 0.8, 0.005  # the goals
REACHED = {True: "yes", False: "**no**", None: "open"}
RESAMPLES = 4000  # of the bootstrap
FEWEST_RANKED = 8  # collections whose order says anything
PAPER_CONVAI2 = "+4.2 to +7.9"  # points, RoBERTa-large as a cross-encoder (arXiv:2410.22264v1)
Row = dict[str, Any]
Scores = dict[str, np.ndarray]  # base → (tasks, repeats)


def matrices(result: Mapping[str, Any], shots: int | None) -> Scores:
    """The scores of each base, the mean over the draws of a repeat."""
    cells: dict[str, dict[tuple[str, int], list[float]]] = {}
    for score in result["scores"]:
        if score["shots"] == shots:
            place = score["task"], score.get("repeat", score["seed"])
            cells.setdefault(score["base"], {}).setdefault(place, []).append(score["score"])
    return {base: _matrix(of_base) for base, of_base in cells.items()}


def _matrix(cells: Mapping[tuple[str, int], Sequence[float]]) -> np.ndarray:
    tasks, repeats = (sorted(set(axis)) for axis in zip(*cells, strict=True))
    return np.array([[np.mean(cells[task, r]) for r in repeats] for task in tasks])


def difference(a: np.ndarray, b: np.ndarray) -> Row:
    """a − b over tasks and repeats, with interval and p-value."""
    pair = dataclasses.asdict(paired_difference(a, b))
    return {key: pair[key] for key in ("difference", "low", "high", "p_value", "wins", "losses")}


def pair_of(result: Mapping[str, Any], a: str, b: str, shots: int | None) -> Row | None:
    """a − b as the comparison has it."""
    for pair in result["pairs"]:
        if pair["shots"] == shots and {pair["a"], pair["b"]} == {a, b}:
            row = {key: pair[key] for key in ("difference", "low", "high", "p_value")}
            wins = {"wins": pair["wins"], "losses": pair["losses"]}
            if pair["a"] == a:
                return row | wins
            row |= {"difference": -row["difference"], "low": -row["high"], "high": -row["low"]}
            return row | {"wins": wins["losses"], "losses": wins["wins"]}
    return None


def shots_of(result: Mapping[str, Any]) -> int | None:
    """The number of shots of the table, or the nearest that the collection has."""
    goal = PER_CLASS if result["adapt"].get("shots_unit") == "rows per class" else ROWS
    present: set[int | None] = {score["shots"] for score in result["scores"]} - {0}
    return min(present, key=lambda shots: abs(shots_order(shots) - goal))


def collection_row(result: Mapping[str, Any], plain: Mapping[str, Any] | None) -> Row:
    """What one collection says; p-values are not corrected yet."""
    conflict = result["conflict"]  # measured by the run before it trained anything
    shots, names = shots_of(result), [base["name"] for base in result["bases"]]
    form = next(name for name in FORMS if name in names)
    forms = [name for name in names if name.startswith("peft-ml") and name != form]
    scores, before = matrices(result, shots), matrices(result, 0)
    row: Row = {
        "num_seen": result["collection"]["num_seen"],
        "num_unseen": result["collection"]["num_unseen"],
        "num_repeats": int(scores[form].shape[1]),
        "metric": result["metric"]["name"],
        "unit": result["adapt"].get("shots_unit", "rows"),
        "shots": shots,
        "form": form,
        # before it was scaled to what bases realise, a run recorded it as the expected gain
        "conflict": conflict.get("low_rank_gain", conflict.get("expected_gain")),
        "advice": conflict.get("advice"),
        "levels": {name: float(matrix.mean()) for name, matrix in scores.items()},
        "gains": {r: pair for r in RIVALS if (pair := pair_of(result, form, r, shots))},
        "forms": {f: pair for f in forms if (pair := pair_of(result, f, "standard", shots))},
        "by_shots": [
            {"shots": k, "rival": rival, **pair}
            for k in all_shots(result)
            for rival in ("standard", "none")
            if (pair := pair_of(result, form, rival, k))
        ],
        "harm": [
            {"base": base, "shots": k, **difference(matrix, before[base])}
            for k in all_shots(result)
            for base, matrix in matrices(result, k).items()
            if base in before
        ],
        "basis": [],
    }
    if plain is not None:
        row["basis"] = [
            {"base": base, "shots": k, **difference(matrix, without[base])}
            for k in all_shots(plain)
            for without in [matrices(plain, k)]
            for base, matrix in matrices(result, k).items()
            if base in without
        ]
    row["auto"] = [auto_row(result, k) for k in all_shots(result) if "auto" in names]
    return row


def auto_row(result: Mapping[str, Any], shots: int | None) -> Row:
    """How far `auto` is below the fixed methods in hindsight, and above the controls."""
    scores = matrices(result, shots)
    auto = scores.pop("auto")
    best = max(scores, key=lambda base: float(scores[base].mean()))
    level = float(auto.mean())
    return {
        "shots": shots,
        "level": level,
        "best": best,
        "regret": float(scores[best].mean()) - level,
        "regret_by_luck": lead_by_luck(scores),
        "regret_elsewhere": best_elsewhere(scores) - level,
        "over": {
            c: pair for c in ("none", "standard") if (pair := pair_of(result, "auto", c, shots))
        },
    }


def best_elsewhere(scores: Scores) -> float:
    """What the method reaches on a task that is the best of all on the other unseen tasks.

    The best of many in hindsight owes a part of its lead to luck on these very tasks. This errs the
    other way: a task left out is missed by those who are good at it.
    """
    total = {base: matrix.sum() for base, matrix in scores.items()}
    reached = []
    for task in range(len(next(iter(scores.values())))):
        best = max(scores, key=lambda base: total[base] - scores[base][task].sum())
        reached.append(scores[best][task].mean())
    return float(np.mean(reached))


def lead_by_luck(scores: Scores) -> float:
    """How far the best would be above the mean of those near it, if these were equally good.

    Near the best are the methods that are not below it by their whole interval. A bootstrap over
    tasks says it, from their scores without their means.
    """
    by_task = {base: matrix.mean(axis=1) for base, matrix in scores.items()}
    best = max(by_task, key=lambda base: float(by_task[base].mean()))
    near = [b for b in scores if b == best or paired_difference(scores[best], scores[b]).low <= 0]
    alike = np.stack([by_task[base] for base in near])
    alike -= alike.mean(axis=0)
    alike -= alike.mean(axis=1, keepdims=True)
    tasks = alike.shape[1]
    drawn = np.random.default_rng(0).integers(0, tasks, (RESAMPLES, tasks))
    luck = alike[:, drawn].mean(axis=2).max(axis=0).mean()
    return float(luck) * (tasks / (tasks - 1)) ** 0.5  # a bootstrap's spread is too small


def all_shots(result: Mapping[str, Any]) -> list[int | None]:
    """The numbers of shots of a comparison, in order; 0, before adapting, is none of them."""
    return sorted({score["shots"] for score in result["scores"]} - {0}, key=shots_order)


def correct(rows: Sequence[Row]) -> None:
    """Adds `p_holm`, corrected over all these differences, to each."""
    for row, adjusted in zip(rows, holm([row["p_value"] for row in rows]), strict=True):
        row["p_holm"] = adjusted


def is_above(row: Row) -> bool:
    """Whether a difference is clearly above zero."""
    return row["low"] > 0 and row["p_holm"] < LEVEL


def is_below(row: Row) -> bool:
    """Whether a difference is clearly below zero."""
    return row["high"] < 0 and row["p_holm"] < LEVEL


def summarise(results: Path) -> Row:
    """The content of evidence.json, from the results in a folder."""
    collections: dict[str, Row] = {}
    for path in sorted(results.glob("evidence-*.json")):
        name = path.stem.removeprefix("evidence-")
        plain = results / f"plain-{name}.json"
        collections[name] = collection_row(
            json.loads(path.read_text("utf-8")),
            json.loads(plain.read_text("utf-8")) if plain.exists() else None,
        )
    rows = collections.values()
    correct([gain for row in rows for gain in row["gains"].values()])
    correct([gain for row in rows for gain in row["forms"].values()])
    correct([gain for row in rows for gain in row["by_shots"]])
    correct([harm for row in rows for harm in row["harm"]])
    correct([gain for row in rows for gain in row["basis"]])
    correct([pair for row in rows for auto in row["auto"] for pair in auto["over"].values()])
    return {"claim": "evidence.summary", "collections": collections}


def with_conflict(summary: Row) -> dict[str, Row]:
    """The collections with a measured conflict and a gain over standard, most conflict first.

    Those whose score is not an accuracy are left out: their gains are in other units.
    """
    rows = {n: r for n, r in summary["collections"].items() if r["metric"] == "accuracy"}
    rows = {n: r for n, r in rows.items() if r["conflict"] and "standard" in r["gains"]}
    return dict(sorted(rows.items(), key=lambda item: -item[1]["conflict"][0]))


def in_order(summary: Row) -> Iterator[tuple[str, Row]]:
    """All collections, most conflict first, those without a measurement last."""
    yield from (first := with_conflict(summary)).items()
    yield from ((n, r) for n, r in summary["collections"].items() if n not in first)


def shown(row: Row | None, scale: Scale) -> str:
    """`+1.2 (+0.3 to +2.0)`, in bold where it is clear after the correction."""
    if row is None:
        return ""
    text = f"{scale.signed(row['difference'])} ({scale.interval(row['low'], row['high'])})"
    return f"**{text}**" if is_above(row) or is_below(row) else text


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def gains_table(summary: Row) -> str:
    """One line per collection: what was predicted, and PEFT-ML minus each rival."""
    head = ["collection", "tasks seen / unseen", "conflict", "advice"]
    head += [f"− {rival.replace('-', ' ')}" for rival in RIVALS]
    rows = []
    for name, row in in_order(summary):
        scale, conflict = Scale(row["metric"]), row["conflict"]
        cells = [name, f"{row['num_seen']} / {row['num_unseen']}"]
        cells.append("" if not conflict else _conflict(conflict, scale))
        cells.append(row["advice"] or "")
        rows.append([*cells, *[shown(row["gains"].get(rival), scale) for rival in RIVALS]])
    return table(head, rows)


def _conflict(conflict: Sequence[float], scale: Scale) -> str:
    mean, low, high = conflict
    return f"{scale.signed(mean)} ({scale.interval(low, high)})"


def shots_table(summary: Row) -> str:
    """One line per collection: PEFT-ML minus standard retraining at every number of shots."""
    cells = {
        (name, gain["shots"]): shown(gain, Scale(row["metric"]))
        for name, row in summary["collections"].items()
        for gain in row["by_shots"]
        if gain["rival"] == "standard"
    }
    columns = sorted({shots for _, shots in cells}, key=shots_order)
    head = ["collection", *["all" if shots is None else str(shots) for shots in columns]]
    rows = [[name, *[cells.get((name, k), "") for k in columns]] for name, _ in in_order(summary)]
    return table(head, rows)


def convai2_table(summary: Row) -> str:
    """The paper's own task, beside the paper's number."""
    row = summary["collections"].get("convai2")
    if row is None:
        return "No result yet."
    cells = {(gain["shots"], gain["rival"]): gain for gain in row["by_shots"]}
    head = [
        "rows of a new persona",
        "PEFT-ML − standard",
        "PEFT-ML − none",
        "the paper, − standard",
    ]
    lines = [
        [
            "all" if shots is None else str(shots),
            *[shown(cells.get((shots, r)), Scale(row["metric"])) for r in ("standard", "none")],
            PAPER_CONVAI2 if shots is None else "",
        ]
        for shots in sorted({shots for shots, _ in cells}, key=shots_order)
    ]
    return table(head, lines)


def levels_table(summary: Row) -> str:
    """Scores of every base after adapting, the other forms against standard, adapting itself."""
    bases: dict[str, None] = {}
    for _, row in in_order(summary):
        bases |= dict.fromkeys(row["levels"])
    others = dict.fromkeys(f for _, row in in_order(summary) for f in row["forms"])
    head = ["collection", "shots", "repeats", *bases]
    head += [*[f"{form} − standard" for form in others], "adapting PEFT-ML − not adapting"]
    rows = []
    for name, row in in_order(summary):
        scale = Scale(row["metric"])
        cells = [name, shots_label(row["shots"], row["unit"]), str(row["num_repeats"])]
        cells += [scale.level(row["levels"][b]) if b in row["levels"] else "" for b in bases]
        cells += [shown(row["forms"].get(form), scale) for form in others]
        here = [h for h in row["harm"] if (h["base"], h["shots"]) == (row["form"], row["shots"])]
        rows.append([*cells, shown(here[0] if here else None, scale)])
    return table(head, rows)


def named(summary: Row, rows: Sequence[tuple[str, Row]]) -> str:
    """`land-bank standard 4 −1.2 (…)` of each, or nothing."""
    texts = []
    for name, row in rows:
        scale = Scale(summary["collections"][name]["metric"])
        interval = scale.interval(row["low"], row["high"])
        texts.append(f"{name}, {row['base']}, {shots_label(row['shots'])}: {interval}")
    return "; ".join(texts)


def goals_table(summary: Row) -> str:
    """What was aimed at, and whether it was reached."""
    rows, collections = summary["collections"].values(), summary["collections"]
    beating = [
        name
        for name, row in collections.items()
        if all(rival in row["gains"] and is_above(row["gains"][rival]) for rival in BEATEN)
    ]
    lines: list[tuple[str, bool | None, str]] = [
        (
            f"PEFT-ML beats standard, Reptile, FOMAML and none on at least {LEAST} collections, "
            "each interval above zero after correction",
            len(beating) >= LEAST,
            f"{len(beating)} of {len(collections)}" + (": " + ", ".join(beating)) * bool(beating),
        )
    ]
    bases = [(name, gain) for name, row in collections.items() for gain in row["basis"]]
    if bases:
        better = {n for n, g in bases if is_above(g) and g["base"] == collections[n]["form"]}
        worse = [(n, g) for n, g in bases if is_below(g)]
        measured = sum(bool(row["basis"]) for row in rows)
        lines.append(
            (
                "with the basis among the choices, adapting beats plain adapting of the same base "
                f"on at least {LEAST} collections and is clearly below it nowhere",
                len(better) >= LEAST and not worse,
                f"better on {len(better)} of {measured}; clearly below in {len(worse)} of "
                f"{len(bases)} cells. {named(summary, worse)}".strip(),
            )
        )
    harm = [(name, cell) for name, row in collections.items() for cell in row["harm"]]
    below = [(n, h) for n, h in harm if is_below(h)]
    alone = sum(h["high"] < 0 for _, h in harm)
    lines.append(
        (
            "adapting is nowhere clearly below not adapting",
            not below,
            f"clearly below in {len(below)} of {len(harm)} cells (base, collection, number of "
            f"shots); {counted(alone, 'interval')} below zero before correction. "
            f"{named(summary, below)}".rstrip(),
        )
    )
    if autos := [auto for _, auto in of_auto(summary)]:
        regret = float(np.mean([auto["regret"] for auto in autos]))
        worse_auto = sum(is_below(pair) for auto in autos for pair in auto["over"].values())
        tried = {name for name, _ in of_auto(summary)}
        lines.append(
            (
                "mean regret of `auto` at most 0.5 points, nowhere clearly below none or standard",
                regret <= REGRET and not worse_auto if len(tried) >= LEAST else None,
                f"{100 * regret:.1f} points over {counted(len(autos), 'cell')} of "
                f"{counted(len(tried), 'collection')}; clearly "
                f"below in {worse_auto or 'none'}",
            )
        )
    if len(found := with_conflict(summary)) >= FEWEST_RANKED:
        rho = spearman(summary)
        lines.append(
            (
                "the conflict measured before training and the gain: Spearman correlation of "
                f"{RHO} or more",
                rho >= RHO,
                f"{rho:.2f} over {counted(len(found), 'collection')}",
            )
        )
    return table(
        ["goal", "reached", "numbers"],
        [[goal, REACHED[reached], said] for goal, reached, said in lines],
    )


def of_auto(summary: Row) -> list[tuple[str, Row]]:
    """(collection, cell) of `auto`, where the score is an accuracy."""
    rows = [(n, row) for n, row in in_order(summary) if row["metric"] == "accuracy"]
    return [(name, auto) for name, row in rows for auto in row["auto"]]


def auto_table(summary: Row) -> str:
    """One line per collection and number of shots: `auto` beside the fixed methods."""
    rows = of_auto(summary)
    if not rows:
        return "No result yet."
    scale = Scale("accuracy")
    lines = [
        [
            name,
            shots_label(auto["shots"]),
            scale.level(auto["level"]),
            f"{auto['best']} {scale.level(auto['level'] + auto['regret'])}",
            *[
                f"{100 * auto[key]:z.1f}"
                for key in ("regret", "regret_by_luck", "regret_elsewhere")
            ],
            *[shown(auto["over"].get(c), scale) for c in ("none", "standard")],
        ]
        for name, auto in rows
    ]
    means = [
        f"{100 * float(np.mean([auto[key] for _, auto in rows])):.1f}"
        for key in ("regret", "regret_by_luck", "regret_elsewhere")
    ]
    head = ["collection", "shots", "`auto`", "best fixed method", "regret", "by luck alone"]
    head += ["picked on the other tasks", "− none", "− standard"]
    return table(head, [*lines, ["mean", "", "", "", *means, "", ""]])


def spearman(summary: Row) -> float:
    """Rank correlation of measured conflict and gain over standard."""
    rows = with_conflict(summary).values()
    conflict = [row["conflict"][0] for row in rows]
    return float(stats.spearmanr(conflict, [r["gains"]["standard"]["difference"] for r in rows])[0])


def realised(summary: Row, without: str = "") -> float:
    """The gain over standard as a share of the conflict: least squares through the origin.

    Args:
        summary: The content of evidence.json.
        without: A collection to leave out.
    """
    rows = [row for name, row in with_conflict(summary).items() if name != without]
    conflict = np.array([row["conflict"][0] for row in rows])
    gains = np.array([row["gains"]["standard"]["difference"] for row in rows])
    return float(conflict @ gains / (conflict @ conflict))


def realised_sentence(summary: Row) -> str:
    """How well the conflict foretells the gain, in points."""
    rows = with_conflict(summary)
    errors = [
        realised(summary, name) * row["conflict"][0] - row["gains"]["standard"]["difference"]
        for name, row in rows.items()
    ]
    return (
        f"The gain is {realised(summary):.2f} of the conflict, by least squares through the "
        f"origin; `foretune plan` expects {REALISED}. Where this share is fitted to the other "
        f"collections alone, the expectation of a collection errs by "
        f"{100 * float(np.mean(np.abs(errors))):.1f} points on average, "
        f"{100 * float(np.max(np.abs(errors))):.1f} at most."
    )


def pays_sentence(summary: Row) -> str:
    """The finding in one sentence, for the README."""
    rows = summary["collections"]
    gains = {n: r["gains"]["standard"] for n, r in rows.items() if "standard" in r["gains"]}
    above = [n for n, g in gains.items() if is_above(g)]
    clear = sorted((gains[n]["difference"], n) for n in above if rows[n]["metric"] == "accuracy")
    loses = [n for n, g in gains.items() if is_below(g)]
    if not gains:
        return "No collection has a result yet."
    if not clear:
        return (
            f"Measured so far on {counted(len(gains), 'collection')}: PEFT-ML is clearly above "
            "standard retraining on none."
        )
    best, least = clear[-1], clear[0]
    said = (
        f"On {len(above)} of {counted(len(gains), 'collection')} PEFT-ML is clearly above standard "
        f"retraining after Holm's correction, by {100 * least[0]:.1f} ({least[1]}) to "
        f"{100 * best[0]:.1f} points ({best[1]}); it is clearly below on {len(loses) or 'none'}."
    )
    if len(with_conflict(summary)) >= FEWEST_RANKED:
        number = counted(len(with_conflict(summary)), "collection")
        said += (
            " The gains are in the order of the conflict that `foretune plan` measures: Spearman's "
            f"rho is {spearman(summary):.2f} over {number}."
        )
    return said


def figure(summary: Row) -> str:
    """The picture: gain over standard retraining against the expected gain."""
    points = [
        Collection(name, Mean(*row["conflict"]), Mean(g["difference"], g["low"], g["high"]))
        for name, row in with_conflict(summary).items()
        for g in [row["gains"]["standard"]]
    ]
    drawn = gain_against_conflict(
        points,
        760,
        LIGHT,
        x_title="conflict measured by foretune plan, before any training (points)",
        y_title="PEFT-ML − standard retraining, unseen tasks (points)",
        title="Gain of PEFT-ML against measured conflict",
    )
    return drawn.standalone(LIGHT)


def picture(summary: Row, folder: str) -> str:
    """The picture as Markdown; nothing as long as there is nothing to show."""
    if not (points := with_conflict(summary)):
        return "*(No collection has both a measured conflict and a gain yet.)*"
    described = (
        "Gain of PEFT-ML over standard retraining against the conflict measured before any "
        "training, " + counted(len(points), "collection")
    )
    return f"![{described}]({folder}figures/conflict.svg)"


TABLES: dict[str, Callable[[Row], str]] = {
    "gains": gains_table,
    "shots": shots_table,
    "convai2": convai2_table,
    "levels": levels_table,
    "auto": auto_table,
    "goals": goals_table,
    "pays": pays_sentence,
    "realised": realised_sentence,
    "picture": partial(picture, folder=""),
    "picture in README": partial(picture, folder=f"{RAW}docs/"),
}


def main() -> None:
    """Writes evidence.json and the picture."""
    summary = summarise(RESULTS)
    write_whole(RESULTS / "evidence.json", json.dumps(summary, indent=1) + "\n")
    if with_conflict(summary):
        write_whole(FIGURE, figure(summary))
    print(goals_table(summary))


if __name__ == "__main__":
    main()
