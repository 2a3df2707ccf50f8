"""Writes report.html, scores.csv and figures/*.svg from a comparison."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from foretune.claims import MARKS, claim_file
from foretune.evaluation.conflict_text import (
    QUESTION,
    about_tasks,
    conflict_rows,
    expectation,
)
from foretune.evaluation.forgetting_text import QUESTION as FORGETTING
from foretune.evaluation.forgetting_text import forgetting_rows, forgetting_sentences
from foretune.evaluation.report.advice import WHERE, advice, run_again
from foretune.evaluation.report.choices import adapting, choices, searches
from foretune.evaluation.report.figure import NARROW, Figure
from foretune.evaluation.report.figures import all_figures, forest_name
from foretune.evaluation.report.intro import compared, facts, headline
from foretune.evaluation.report.links import files, methods, pages, results
from foretune.evaluation.report.svg import DARK, LIGHT, PAGE, Ink
from foretune.evaluation.report.task_scores import COLUMNS, score_table, scores_csv
from foretune.evaluation.report.view import View
from foretune.evaluation.verdict import Contrast
from foretune.evaluation.wording import (
    choice_sentences,
    counted,
    edge_sentences,
    p_text,
)
from foretune.files import REPORT_FILE, SCORES_TABLE, write_whole
from foretune.printable import printable

WIDE_PX, NARROW_PX = 720, 340  # The page shows the one that fits, so that text stays readable.


def write_report(comparison: Mapping[str, Any], folder: Path) -> Path:
    """Writes `folder`/report.html, one self-contained file; scores.csv and figures/*.svg beside it.

    Args:
        comparison: The content of `comparison.json`.
        folder: Created if missing; an earlier report in it is replaced.

    Returns:
        The path of report.html.
    """
    view = View(comparison)
    folder = Path(folder)
    # All of them before the first is written.
    texts = {SCORES_TABLE: scores_csv(comparison), REPORT_FILE: _page(view, folder)}
    for name, figure in all_figures(view, WIDE_PX, LIGHT).items():
        texts[f"figures/{name}.svg"] = figure.standalone(LIGHT)
    for name in texts:
        claim_file(folder / name, overwrite=True, marks=(*MARKS, ",".join(COLUMNS[:4]).encode()))
    for name, text in texts.items():
        write_whole(folder / name, text)
    return folder / REPORT_FILE


def _page(view: View, folder: Path) -> str:
    here = resources.files("foretune.evaluation.report")
    environment = jinja2.Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    environment.filters["tight"] = lambda text: text.replace(" %", "\u00a0%")
    template = environment.from_string((here / "template.html.j2").read_text(encoding="utf-8"))
    style = (here / "style.css").read_text(encoding="utf-8")
    comparison = view.comparison
    script = (here / "sort.js").read_text(encoding="utf-8")
    answer, margins, rest = headline(view)
    return template.render(
        title=comparison["title"],
        style=Markup(_variables("light", LIGHT) + _variables("dark", DARK) + style),
        script=Markup(script),
        answer=answer,
        margins=margins,
        rest=rest,
        compared=compared(view),
        facts=facts(view),
        conflict=_conflict(view),
        forgetting=_forgetting(view),
        figures=_inline_figures(view),
        means=_means_table(view),
        differences=_differences(view),
        tasks=score_table(view),
        table_file=SCORES_TABLE,
        methods=methods(view),
        costs=[_costs(base) for base in view.bases],
        rank_costs=_rank_costs(view),
        adapting=adapting(view),
        searches=searches(view),
        choices=choices(view),
        took=[*choice_sentences(view.bases), *edge_sentences(view.bases)],
        steps=advice(comparison, folder),
        where=WHERE,
        again=run_again(comparison, folder),
        files=files(folder),
        results=results(view, folder),
        pages=pages(),
        recipe=comparison.get("recipe") or "",
        view=view,
        created=comparison.get("created", ""),
        version=comparison.get("foretune", ""),
        format=comparison.get("format", ""),
    )


def _variables(scheme: str, ink: Ink) -> str:
    """The colours of one scheme as CSS variables, which page and figures share."""
    names = {"text": ink.text, "muted": ink.muted, "line": ink.line, "paper": ink.paper}
    names |= {f"series-{index}": color for index, color in enumerate(ink.series)}
    rule = ":root{" + "".join(f"--{name}:{color};" for name, color in names.items()) + "}\n"
    return rule if scheme == "light" else f"@media (prefers-color-scheme: dark){{{rule}}}\n"


def _inline_figures(view: View) -> dict[str, Markup]:
    wide, narrow = all_figures(view, WIDE_PX, PAGE), all_figures(view, NARROW_PX, PAGE)
    assert NARROW_PX < NARROW <= WIDE_PX
    return {
        name: Markup('<div class="wide">{}</div><div class="narrow">{}</div>').format(
            _markup(wide[name], f"{name}-wide"), _markup(narrow[name], f"{name}-narrow")
        )
        for name in wide
    }


def _markup(figure: Figure, key: str) -> Markup:
    return Markup(figure.inline(key))  # The figures escape what they write.


def _means_table(view: View) -> dict[str, Any]:
    leaders = {shots: view.leader(shots) for shots in view.shots}
    rows = [
        (view.labels[name], [_mean_cell(view, name, k, leaders[k] == name) for k in view.shots])
        for name in view.names
    ]
    return {"columns": [view.shots_label(shots) for shots in view.shots], "rows": rows}


def _mean_cell(
    view: View, name: str, shots: int | None, highest: bool
) -> tuple[str, str, bool] | None:
    mean = view.means.get((name, shots))
    if mean is None:
        return None
    level = view.scale.level
    return level(mean.mean), f"{level(mean.low)} to {level(mean.high)}", highest


def _differences(view: View) -> list[dict[str, Any]]:
    """One block per number of shots; the one that the verdict is about comes first."""
    blocks = []
    for shots in sorted(view.shots, key=lambda k: k != view.judged):
        groups = view.against_controls(shots)
        if groups:
            label = view.shots_label(shots)
            tables = [
                (view.rival(b), [_difference_row(view, pair) for pair in members])
                for b, members in groups
            ]
            block = {"label": label, "figure": forest_name(shots), "groups": tables}
            blocks.append({**block, "judged": shots == view.judged})
    return blocks


def _difference_row(view: View, pair: Contrast) -> dict[str, Any]:
    return {
        "a": view.labels[pair.a],
        "difference": view.scale.signed(pair.difference),
        "interval": view.scale.interval(pair.low, pair.high),
        "p": p_text(pair.p_holm),
        "record": f"{pair.wins} / {pair.ties} / {pair.losses}",
        "is_clear": pair.better or pair.worse,
    }


def _conflict(view: View) -> dict[str, Any] | None:
    """What was measured before retraining, as a table and in words; None where nothing was."""
    conflict = view.comparison.get("conflict")
    if not conflict or "unmeasured" in conflict:
        return None
    header, *rows = conflict_rows(conflict)
    return {
        "question": QUESTION,
        "about": about_tasks(conflict),
        "header": header,
        "rows": rows,
        "expectation": expectation(conflict).splitlines(),
    }


def _forgetting(view: View) -> dict[str, Any] | None:
    """What became of general texts and benchmarks, as tables and in words; None without any."""
    forgetting = view.comparison.get("forgetting")
    if not forgetting:
        return None
    return {
        "question": FORGETTING,
        "sentences": forgetting_sentences(forgetting["measures"], view.labels),
        "tables": [_measure(measure, view.labels) for measure in forgetting["measures"]],
    }


def _measure(measure: Mapping[str, Any], labels: Mapping[str, str]) -> dict[str, Any]:
    header, *rows = forgetting_rows(measure, labels)
    adapters = max((row.get("adapters", 0) for row in measure["bases"]), default=0)
    caption = f"{counted(measure['examples'], 'example')}, first repeat. "
    if adapters:
        caption += f"Adapted: the mean over {counted(adapters, 'adapter')} of unseen tasks. "
    caption += "Changes from the model as it was, with 95 % intervals over examples."
    return {"name": measure["name"], "caption": caption, "header": header, "rows": rows}


def _costs(base: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "label": base["label"],
        "retrain": _cost(base, "retrain"),
        "adapt": _cost(base, "adapt"),
    }


def _cost(base: Mapping[str, Any], stage: str) -> list[str]:
    cost = base.get(stage) or {}
    rates = cost.get("learning_rates") or [cost.get("learning_rate")]
    rates = [*rates, *(row["learning_rate"] for row in cost.get("by_shots") or [])]
    distinct = dict.fromkeys(f"{rate:g}" for rate in rates if rate is not None)
    return [", ".join(distinct) or "–", *_cost_cells(cost)]


def _cost_cells(cost: Mapping[str, Any]) -> list[str]:
    writers = {
        "seconds": _duration,
        "tokens": _large,
        "peak_memory_mb": lambda mb: f"{mb / 1024:.1f} GB" if mb >= 1024 else f"{mb:.0f} MB",
        "trainable_parameters": _large,
    }
    return ["–" if cost.get(k) is None else write(cost[k]) for k, write in writers.items()]


def _rank_costs(view: View) -> list[dict[str, Any]]:
    """Score and cost of each base at each rank of the spectrum, and with all weights."""
    scores = view.rank_scores()
    rows_by_base: dict[str, list[list[str]]] = {name: [] for name in view.names}
    for cost in (view.comparison.get("spectrum") or {}).get("costs") or []:
        base_scores = scores.get((cost["base"], cost["rank"]))
        level = "–"
        if base_scores is not None:
            level = view.scale.level(sum(base_scores) / len(base_scores))
        rank = "all weights" if cost["rank"] is None else f"rank {cost['rank']}"
        tasks = counted(cost["num_tasks"], "task")
        rows_by_base[cost["base"]].append([rank, level, tasks, *_cost_cells(cost)])
    return [
        {"label": view.labels[name], "rows": rows} for name, rows in rows_by_base.items() if rows
    ]


def _duration(seconds: float) -> str:
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def _large(number: float) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:g}"
