"""How a run chose: learning rates, ways to adapt, the candidates of `auto`, as rows of tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from statistics import fmean
from typing import Any

from foretune.evaluation.report.view import View
from foretune.evaluation.wording import counted, setting_phrase


def adapting(view: View) -> list[dict[str, Any]]:
    """How each base was adapted at each number of shots, as held-out tasks chose in each repeat.

    Scores and standard errors are means over the repeats.
    """
    tables = []
    for base in view.bases:
        record = base.get("adapt") or {}
        repeats = record.get("by_repeat") or [record.get("by_shots") or []]
        rows = []
        for planned in zip(*repeats, strict=False):  # one of each repeat, of the same shots
            ways = Counter(setting_phrase(row["setting"]) for row in planned)
            score, before, error = (
                fmean(row[key] for row in planned)
                for key in ("score", "score_before", "standard_error")
            )
            rows.append(
                {
                    "shots": view.shots_label(planned[0]["shots"]),
                    "ways": [_often(way, number, len(planned)) for way, number in ways.items()],
                    "before": view.scale.level(before),
                    "after": view.scale.level(score),
                    "gain": view.scale.signed(score - before),
                    "error": view.scale.level(error),
                }
            )
        if rows:
            tasks = max(row["num_tasks"] for plan in repeats for row in plan)
            label = f"{base['label']}, on {counted(tasks, 'held-out seen task')}"
            tables.append({"label": label, "rows": rows})
    return tables


def _often(way: str, number: int, of: int) -> str:
    return way if number == of else f"{way}, {number} of {of} repeats"


def searches(view: View) -> list[dict[str, Any]]:
    """One entry per search that tried several rates: base, stage, rates and their scores."""
    listed = []
    for base in view.bases:
        for stage, verb in (("retrain", "retraining"), ("adapt", "adapting")):
            record = base.get(stage) or {}
            tried = record.get("searched") or []
            if tried:
                rows = [_tried(view, trial, record) for trial in tried]
                listed.append({"label": base["label"], "stage": verb, "rows": rows})
    return listed


def choices(view: View) -> list[dict[str, Any]]:
    """What `auto` tried in each repeat: candidates, rounds, scores, lead of the chosen one."""
    tables = []
    for base in view.bases:
        for number, choice in enumerate(base.get("choices") or []):
            above = {row["over"]: row for row in choice["above"]}
            rows = []
            ranked = sorted(choice["scores"].items(), key=lambda s: (s[1] is None, -(s[1] or 0)))
            for name, score in ranked:
                row = above.get(name)
                level = "failed" if score is None else view.scale.level(score)
                ahead = ""
                if row is not None:
                    interval = view.scale.interval(row["low"], row["high"])
                    ahead = f"{view.scale.signed(row['difference'])} ({interval})"
                chosen = name == choice["chosen"]
                rows.append((name, choice["rounds"][name], level, ahead, chosen))
            tables.append({"label": base["label"], "seed": number, "rows": rows})
    return tables


def _tried(
    view: View, trial: Mapping[str, Any], record: Mapping[str, Any]
) -> tuple[str, str, bool]:
    """(what was tried, its score, whether it was chosen)."""
    score = trial.get("score")
    fields = trial.get("fields") or {}
    tried = ", ".join([f"{trial['learning_rate']:g}", *(f"{k} {v}" for k, v in fields.items())])
    same_rate = trial["learning_rate"] == record.get("learning_rate")
    chosen = same_rate and fields == (record.get("fields") or {})
    return tried, "failed" if score is None else view.scale.level(score), chosen
