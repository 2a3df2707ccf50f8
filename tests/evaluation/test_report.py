"""The report: one well-formed, self-contained, escaped page, whatever the comparison holds."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
import tomllib
from html.parser import HTMLParser
from itertools import product
from pathlib import Path
from urllib.parse import unquote
from xml.etree import ElementTree

import numpy as np
import pytest

import foretune
from foretune import Classification, Task, TaskCollection
from foretune.evaluation.conflict import measure_conflict
from foretune.evaluation.conflict_text import QUESTION
from foretune.evaluation.report import summary_rows, write_report
from foretune.evaluation.report.gain_figure import Collection, gain_against_conflict
from foretune.evaluation.report.links import DOCS
from foretune.evaluation.report.svg import LIGHT, text_width, ticks
from foretune.evaluation.report.view import Mean
from foretune.evaluation.statistics import pairs_and_means, verdict
from foretune.files import COMPARISON_FILE

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
NASTY = """<script>alert("x")</script> & 'co' \x00"""
VOID = {"meta", "br", "hr", "img", "link", "input"}
FORTY = "a label of exactly forty letters, really"


def comparison(
    names=("none", "standard", "peft-ml"),
    *,
    num_tasks=8,
    num_seeds=2,
    shots=(0, 4, 16),
    metric="accuracy",
    label=str.upper,
    spectrum=True,
    task=lambda index: f"task {index}",
):
    """A synthetic comparison in which each base is slightly above the previous one."""
    rng = np.random.default_rng(0)
    offset = 0 if metric == "accuracy" else -3
    records = [
        {
            "base": name,
            "task": task(index),
            "shots": k,
            "seed": seed,
            "score": offset + 0.4 + 0.05 * names.index(name) + float(rng.normal(0, 0.02)),
            "num_rows": 20,
        }
        for name, k, index, seed in product(names, shots, range(num_tasks), range(num_seeds))
    ]
    cost = {"learning_rate": 1e-4, "seconds": 81.2, "tokens": 1_234_567, "examples": 8000}
    cost |= {"peak_memory_mb": 812.0, "trainable_parameters": 3_550_464}
    cost["searched"] = [{"learning_rate": 1e-4, "score": 0.41}, {"learning_rate": 1, "score": None}]
    bases = [
        {
            "name": name,
            "method": name,
            "label": label(name),
            "config": {},
            "model_class": "BertModel",
            "num_labels": None,
            "path": None if name == "none" else f'bases/{name}/"quoted"/base',
            "retrain": None if name == "none" else cost,
            "adapt": cost,
        }
        for name in names
    ]
    pairs, means = pairs_and_means(records, bases)
    rows = [
        {"base": n, "task": task(t), "rank": rank, "score": offset + 0.1 * rank}
        for n, t, rank in product(names, range(2), (1, 2, 4))
    ]
    costs = [
        {"base": n, "rank": rank, "num_tasks": 2, **cost, "trainable_parameters": 100 * (rank or 9)}
        for n, rank in product(names, (1, 2, 4, None))
    ]
    values = [{"base": n, "task": task(0), "module": "m", "values": [2.0, 1.0]} for n in names]
    return {
        "format": 1,
        "foretune": "0.1.0",
        "title": "made up",
        "created": "2026-11-21T10:00:00Z",
        "metric": {"name": metric, "chance": 0.05 if metric == "accuracy" else None},
        "adapt": {"method": "lora", "config": {"r": 8}, "steps": 40, "shots_unit": "rows"},
        "collection": {"num_seen": 40, "num_unseen": num_tasks, "rows_seen": 4000},
        "bases": bases,
        "scores": records,
        "pairs": pairs,
        "means": means,
        "spectrum": {
            "shots": 16,
            "ranks": [1, 2, 4],
            "rows": rows,
            "costs": costs,
            "changes": values,
        }
        if spectrum
        else None,
        "verdict": verdict(pairs, means, bases, metric=metric),
        "recipe": "title: made up\nx: <y> & z\n",
    }


class Page(HTMLParser):
    """A parser that checks the nesting of tags and records tags and text."""

    def __init__(self, html):
        super().__init__()
        self.open_tags, self.tags, self.texts = [], [], []
        self.feed(html)
        self.close()
        assert not self.open_tags

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open_tags.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open_tags.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return " ".join("".join(self.texts).split())


def written(record, folder):
    """The report as (text, parsed page); checks that every figure is valid XML."""
    html = write_report(record, folder).read_text(encoding="utf-8")
    inline = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    files = sorted((folder / "figures").glob("*.svg"))
    assert len(inline) == 2 * len(files) > 0
    for picture in inline + [file.read_text(encoding="utf-8") for file in files]:
        root = ElementTree.fromstring(picture.encode())
        described = [child.text for child in root[:2]]
        assert len(described) == 2 and all(described)
        assert "nan" not in picture.lower()
    return html, Page(html)


def test_page_is_self_contained(tmp_path):
    html, page = written(comparison(), tmp_path)
    assert "url(" not in html and "@import" not in html and "fetch(" not in html
    assert [attributes for tag, attributes in page.tags if tag == "script"] == [{}]
    for tag, attributes in page.tags:
        assert tag not in {"link", "img", "iframe"}
        assert "src" not in attributes
        assert tag == "a" or "href" not in attributes


def test_links_lead_to_files_beside_the_page_and_to_pages_that_exist(tmp_path):
    record = comparison()
    (tmp_path / COMPARISON_FILE).write_text(json.dumps(record))
    (tmp_path / "bases" / "peft-ml" / "é %" / "base").mkdir(parents=True)
    (tmp_path / "adapters" / "peft-ml").mkdir(parents=True)
    record["bases"][2]["path"] = "bases/peft-ml/é %/base"
    _, page = written(record, tmp_path)
    ids = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    for link in links:
        if link.startswith("#"):
            assert link[1:] in ids
        elif link.startswith("https:"):
            name, _, heading = link.removeprefix(DOCS).partition("#")
            text = (ROOT / "docs" / name).read_text("utf-8")
            titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
            assert not heading or heading in [re.sub(r"\W+", "-", t.lower()) for t in titles]
        else:
            assert (tmp_path / unquote(link)).exists()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert DOCS.startswith(project["urls"]["Repository"])
    assert {"comparison.json", "scores.csv", "figures", "adapters/peft-ml"} <= {*links}
    assert "bases/peft-ml/%C3%A9%20%25/base" in links


def test_methods_are_explained_as_the_catalogue_does(tmp_path):
    record = comparison(names=("none", "peft-ml", "a name of the user's"))
    record["adapt"] |= {"methods": ["head", "basis"]}
    _, page = written(record, tmp_path)
    for cls in (foretune.PEFTML, foretune.Head, foretune.FromBasis):
        assert cls.__doc__.partition("\n")[0] in page.text


def test_every_score_is_in_the_csv(tmp_path):
    record = comparison(shots=(0, 4, None), task=lambda index: f'"a", {index}')
    written(record, tmp_path)
    with (tmp_path / "scores.csv").open(encoding="utf-8", newline="") as file:
        rows = [*csv.DictReader(file)]
    assert len(rows) == len(record["scores"])
    for row, score in zip(rows, record["scores"], strict=True):
        assert row["task"] == score["task"] and float(row["score"]) == score["score"]
        assert row["shots"] == ("all" if score["shots"] is None else str(score["shots"]))
        assert row["label"] == score["base"].upper() and row["metric"] == "accuracy"


def test_page_says_the_verdict_first_and_all_sections(tmp_path):
    record = comparison()
    html, page = written(record, tmp_path)
    assert record["verdict"]["best"] is not None
    answer, margins = record["verdict"]["sentence"].split(": ", 1)
    assert f"<h1>{answer}:</h1>" in html and margins in page.text
    assert html.index('class="compared"') < html.index("<h1>") < html.index("<section")
    for heading in ("Before and after", "Against the controls", "Task by task", "How much must"):
        assert heading in page.text
    for phrase in ("What it cost", "81.2 s", "1.23 M", "812 MB", "Use the result", "x: <y> & z"):
        assert phrase in page.text
    assert f'"{tmp_path}/bases/' in page.text
    assert {"few-shot-curves.svg", "differences-16.svg", "task-differences.svg"} <= {
        path.name for path in (tmp_path / "figures").iterdir()
    }


def test_ids_are_unique(tmp_path):
    _, page = written(comparison(), tmp_path)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids)) > 0


@pytest.mark.parametrize("num_tasks", [7, 60])
def test_user_strings_are_escaped(tmp_path, num_tasks):
    record = comparison(
        num_tasks=num_tasks,
        task=lambda index: f"{NASTY}{index}",
        label=lambda name: f"</title>{name}{NASTY}",
    )
    record["title"] = record["recipe"] = record["adapt"]["method"] = NASTY
    html, page = written(record, tmp_path)
    assert html.count("<script") == 1  # which sorts tables
    assert "</title>none" not in html
    assert '<script>alert("x")</script>' in page.text


def test_only_the_best_value_of_a_column_is_bold(tmp_path):
    record = comparison(shots=(16,))
    html, _ = written(record, tmp_path)
    best = max(record["means"], key=lambda row: row["mean"])
    assert re.findall(r"<strong>(.*?)</strong>", html) == [f"{best['mean'] * 100:.1f}"]


def test_only_clear_differences_are_bold(tmp_path):
    record = comparison(shots=(16,))
    for index, pair in enumerate(record["pairs"]):
        pair["p_holm"] = 0.001 if index == 0 else 0.5
    html, _ = written(record, tmp_path)
    table = html[html.index("Paired differences, 16 rows, in") : html.index("<h2>Task by task")]
    assert table.count('<tr class="clear">') == 1


def test_curves_are_distinct_without_colour(tmp_path):
    record = comparison(names=tuple("abcdefg"), spectrum=False)
    write_report(record, tmp_path)
    picture = (tmp_path / "figures" / "few-shot-curves.svg").read_text(encoding="utf-8")
    dashes = re.findall(r"<polyline[^>]*?stroke-linejoin:round(;stroke-dasharray:[^\"]*)?", picture)
    assert len(set(dashes)) == 7
    assert "var(--" not in picture


def test_cost_stands_beside_the_score_of_each_rank(tmp_path):
    _, page = written(comparison(names=("none", "peft-ml")), tmp_path)
    same = "2 tasks81.2 s1.23 M812 MB"  # cells follow each other
    assert f"PEFT-MLrank 110.0{same}100 rank 220.0{same}200" in page.text
    assert f"all weights–{same}900" in page.text


DEGENERATE = {
    "one base": {"names": ("peft-ml",)},
    "one base that is the control": {"names": ("none",), "shots": (0,)},
    "one shot": {"shots": (16,)},
    "all rows": {"shots": (None,)},
    "no controls": {"names": ("a", "b", "c")},
    "only controls": {"names": ("none", "standard")},
    "200 tasks": {"num_tasks": 200, "num_seeds": 1},
    "one task": {"num_tasks": 1, "num_seeds": 1},
    "negative metric": {"metric": "negative squared error"},
    "no spectrum": {"spectrum": False},
    "long labels": {"label": lambda name: f"{FORTY}{name}"},
    "ten bases": {"names": tuple("abcdefghij"), "shots": (1,)},
}


@pytest.mark.parametrize("fields", DEGENERATE.values(), ids=DEGENERATE.keys())
def test_degenerate_comparisons_are_written(tmp_path, fields):
    record = comparison(**fields)
    _, page = written(record, tmp_path)
    assert " ".join(record["verdict"]["sentence"].split()) in page.text
    header, rows = summary_rows(record)
    assert len(rows) == len(record["bases"])
    assert all(len(row) == len(header) for row in rows)


def test_equal_scores_everywhere_are_written(tmp_path):
    record = comparison(shots=(4,))
    for row in record["scores"]:
        row["score"] = 0.0
    record["pairs"], record["means"] = pairs_and_means(record["scores"], record["bases"])
    record["verdict"] = verdict(record["pairs"], record["means"], record["bases"])
    _, page = written(record, tmp_path)
    assert "equal on 8" in page.text


def test_report_is_the_same_when_written_again(tmp_path):
    first = write_report(comparison(), tmp_path).read_bytes()
    assert write_report(comparison(), tmp_path).read_bytes() == first


def test_report_needs_no_pairs_and_no_optional_parts(tmp_path):
    record = comparison(shots=(4,), spectrum=False)
    record |= {"pairs": [], "recipe": "", "collection": {}}
    for base in record["bases"]:
        base |= {"path": None, "retrain": None, "adapt": None}
    _, page = written(record, tmp_path)
    assert "Against the controls" not in page.text and "Use the result" not in page.text


def test_summary_holds_means_and_differences_from_the_controls():
    record = comparison(shots=(0, 16))
    header, rows = summary_rows(record)
    assert header[:3] == ["mean accuracy, %", "before adapting", "16 rows"]
    assert header[3:] == ["over the model as it is, 16 rows", "over STANDARD, 16 rows"]
    assert rows[0][0] == "NONE" and rows[0][3] == ""
    assert re.fullmatch(r"\+\d+\.\d \(\+\d+\.\d to \+\d+\.\d\)", rows[2][3])


def planned(shots, method, steps, **numbers):
    """A row of `by_shots`, as a plan writes it."""
    setting = {"method": {"name": method, "learning_rate": 0.003}, "steps": steps}
    row = {"shots": shots, "rows": 8, "setting": setting, "num_tasks": 12, "learning_rate": 0.003}
    scored = {"score": 0.7, "score_before": 0.65, "standard_error": 0.01}
    return {**row, "method": method, "steps": steps, **scored, **numbers}


def searched(names=("none", "standard", "peft-ml")):
    """A comparison whose bases stopped by held-out scores and adapt as held-out tasks chose."""
    record = comparison(names)
    record["recipe"] = "model: {name: minilm, tower: [64, 64]}\ntasks: {source: data/votes.jsonl}\n"
    for base in record["bases"]:
        if base["retrain"] is not None:
            history = [
                {"step": 50 * i, "adapted_score": 0.5 + 0.02 * i * (4 - i)} for i in range(4)
            ]
            shorter = [{**history[0], "loss": 1.0}, {**history[1], "adapted_score": None}]
            scored = {"validation_score": 0.58, "validation_scores": [0.58, None]}
            curves = {"curve": history, "curves": [history, shorter]}
            base["retrain"] = {**base["retrain"], **scored, **curves}
        few = planned(4, "head", 20), planned(4, "head", 0, score=0.65)
        many = planned(16, "lora", 80, score=0.75), planned(16, "lora", 80, score=0.77)
        repeats = [[few[i], many[i]] for i in range(2)]
        base["adapt"] = {**base["adapt"], "by_shots": repeats[0], "by_repeat": repeats}
    return record


def test_first_line_says_what_was_compared_on_what_and_with_which_model(tmp_path):
    html, page = written(searched(), tmp_path)
    line = (
        "Three ways to prepare a network of 64 and 64 units on minilm for tasks that it has not "
        "seen were compared: NONE, STANDARD and PEFT-ML. The data: votes.jsonl, with 40 tasks "
        "(4,000 rows) to learn from and 8 other tasks to be scored on."
    )
    assert line in page.text
    assert html.index('class="compared"') < html.index("<h1>")
    assert "2 repeats" in page.text


@pytest.mark.parametrize(
    "recipe", ["", "a: [", "just words", "model: null", "model: {file: x/m.py}"]
)
def test_first_line_needs_no_readable_recipe(tmp_path, recipe):
    record = comparison(spectrum=False) | {"recipe": recipe, "collection": {"num_unseen": 1}}
    _, page = written(record, tmp_path)
    assert "The data: 1 task to be scored on." in page.text
    assert ("the model m.py" if "file" in recipe else "a BertModel") in page.text


def test_page_says_how_each_base_is_adapted_by_number_of_shots(tmp_path):
    _, page = written(searched(), tmp_path)
    assert "PEFT-ML, on 12 held-out seen tasks" in page.text
    head, not_at_all = "by head (learning_rate 0.003, 20 steps), 1 of 2 repeats", "not at all, 1 of"
    assert f"4 rows{head}" in page.text and not_at_all in page.text
    assert "16 rowsby lora (learning_rate 0.003, 80 steps)65.076.0+11.01.0" in page.text


def test_curve_of_retraining_is_drawn_for_every_repeat_that_was_scored(tmp_path):
    _, page = written(searched(), tmp_path)
    assert "When retraining stopped" in page.text
    picture = (tmp_path / "figures" / "retraining-curves.svg").read_text(encoding="utf-8")
    root = ElementTree.fromstring(picture.encode())
    lines = [node for node in root.iter() if node.tag.endswith("polyline")]
    assert len(lines) == 2 + 2 * 2  # in the legend; two repeats of two bases
    markers = [node for node in root.iter() if node.tag.endswith(("rect", "polygon"))]
    assert (
        len(markers) == 1 + 2 + 2
    )  # the ground; in the legend; where the first repeats were taken
    assert "4 in all" in picture


def test_task_table_has_the_scores_of_the_focus_and_the_controls(tmp_path):
    record = comparison(shots=(16,), num_tasks=7)
    _, page = written(record, tmp_path)
    cells = {(row["base"], row["task"], row["seed"]): row["score"] for row in record["scores"]}
    means = [
        f"{50 * sum(cells[name, 'task 3', seed] for seed in (0, 1)):.1f}"
        for name in ("peft-ml", "standard", "none")
    ]
    assert "TaskDifferencePEFT-MLSTANDARDNONE" in page.text
    assert re.search(rf"task 3[+−]\d+\.\d{''.join(means)}", page.text)


def test_conflict_is_shown_where_it_was_measured(tmp_path):
    record = comparison()
    rng = np.random.default_rng(0)
    votes = [
        [{"x": [float(i == j) for j in range(9)], "y": int(rng.integers(2))} for i in range(9)]
        for _ in range(12)
    ]
    tasks = [Task(f"p{i}", train=rows) for i, rows in enumerate(votes)]
    objective = Classification()
    collection = TaskCollection(tasks, objective)
    collection = collection.with_objective(objective.fit(collection))
    record["conflict"] = measure_conflict(collection, shots=(2, None)).to_dict()
    record = json.loads(json.dumps(record))
    _, page = written(record, tmp_path)
    assert QUESTION in page.text and "all tasks pooled" in page.text
    assert f"Advice: {record['conflict']['advice']}." in page.text
    record["conflict"] = {"unmeasured": "it cannot be measured for causal-lm"}
    _, page = written(record, tmp_path)
    assert QUESTION not in page.text


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_committed_comparisons_are_written(tmp_path, path):
    record = json.loads(path.read_text("utf-8"))
    if not {"scores", "pairs"} <= record.keys():
        pytest.skip("not a comparison")
    write_report(record, tmp_path)


def gains(number):
    return [
        Collection(
            f"collection <{i}>", Mean(i / 10, i / 10 - 0.05, i / 10 + 0.05), Mean(i / 20, -0.01, 1)
        )
        for i in range(number)
    ]


@pytest.mark.parametrize("width", [720, 340])
@pytest.mark.parametrize("number", [1, 14])
def test_gain_against_conflict_has_a_point_and_a_name_per_collection(number, width):
    picture = gain_against_conflict(gains(number), width, LIGHT, x_title="added R²", y_title="gain")
    root = ElementTree.fromstring(picture.standalone(LIGHT).encode())
    circles = [node for node in root.iter() if node.tag.endswith("circle")]
    texts = [node.text for node in root.iter() if node.tag.endswith("text")]
    assert len(circles) == number
    prefix = "" if width == 720 else "1 "
    assert f"{prefix}collection <0>" in texts and {"added R²", "gain"} <= {*texts}


def test_gain_against_conflict_fills_clear_gains_and_keeps_names_inside():
    clear = [dataclasses.replace(c, gain=Mean(0.2, 0.1, 0.3)) for c in gains(1)]
    collections = [*clear, *gains(9)[1:]]
    picture = gain_against_conflict(collections, 720, LIGHT, x_title="x", y_title="y")
    assert picture.body.count(f"fill:{LIGHT.series[1]};stroke") == 1
    root = ElementTree.fromstring(picture.standalone(LIGHT).encode())
    named = [node for node in root.iter() if (node.text or "").startswith("collection")]
    for node in named:
        if node.tag.endswith("text"):
            assert 0 <= float(node.get("x")) <= 720 - text_width(node.text, 12)
    with pytest.raises(ValueError, match="at least one collection"):
        gain_against_conflict([], 720, LIGHT, x_title="x", y_title="y")


@pytest.mark.parametrize(("low", "high"), [(-1e-9, 1e-9), (0, 1), (-3.2, 1e6), (0.9, 0.91)])
def test_ticks_are_few_and_inside(low, high):
    values = ticks(low, high)
    assert 2 <= len(values) <= 7
    assert low - 1e-9 <= values[0] and values[-1] <= high * (1 + 1e-9) + 1e-12


def test_many_bases_leave_the_first_lines_short(tmp_path: Path) -> None:
    names = ("none", "standard", *(f"m{number}" for number in range(28)))
    record = comparison(names, spectrum=False)
    for base in record["bases"][1:]:
        tried = [{"learning_rate": rate, "score": 0.4} for rate in (1e-4, 1e-3)]
        base["retrain"] = {**base["retrain"], "searched": tried}
    page = write_report(record, tmp_path).read_text("utf-8")
    assert "M4, M5 and 22 more" in page
    assert page.count("took the lowest learning rate that was tried") == 1
