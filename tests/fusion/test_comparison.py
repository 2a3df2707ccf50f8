"""What held-out rows say of several fusions, and what is chosen and advised by them."""

from __future__ import annotations

import math
import random
import statistics
from typing import Any

import pytest
import torch

import foretune
import tiny_models
from foretune import SMILE, Average, TaskArithmetic, UserError
from foretune.fusion.advice import advice, table_of
from foretune.fusion.comparison import Candidate, Comparison, compare_fusions, gap, method_of
from foretune.fusion.sample_rows import SampleRow, Samples
from fusion.fused_models import adapted, ids, linears, output

WORDS = {"a": "the cat sat on a mat", "b": "red dog blue one two three"}


def texts(task: str) -> list[str]:
    words = WORDS[task].split()
    return [f"{x} {y}" for x in words for y in words]


def labelled(model: Any, task: str) -> list[SampleRow]:
    """Rows whose labels are what a model answers."""
    tokenizer = tiny_models.tokenizer()
    rows = []
    for text in texts(task):
        answer = output(model, tokenizer([text], return_tensors="pt")).argmax(-1).item()
        rows.append(SampleRow(text, label=f"LABEL_{answer}"))
    return rows


def classifiers() -> tuple[Any, dict[str, Any]]:
    base = tiny_models.bert(num_labels=3)
    tuned = {name: linears(base, seed) for seed, name in enumerate("ab", 1)}
    for seed, model in enumerate(tuned.values()):
        with torch.no_grad():
            model.classifier.weight.add_(0.5 + seed)
    return base, tuned


def samples(rows: dict[str, list[SampleRow]]) -> Samples:
    gate = {task: [row.text for row in part[:9]] for task, part in rows.items()}
    return Samples(gate, {task: part[9:] for task, part in rows.items()})


def by_name(comparison: Comparison) -> dict[str, Candidate]:
    return {candidate.name: candidate for candidate in comparison.candidates}


def test_scores_are_those_of_the_fused_models() -> None:
    base, tuned = classifiers()
    rows = {task: labelled(model, task) for task, model in tuned.items()}
    tokenizer, method = tiny_models.tokenizer(), SMILE(gate_k=4)
    comparison = compare_fusions(base, tuned, samples(rows), method, tokenizer=tokenizer)
    assert comparison.measure == "accuracy" and comparison.own_heads
    scored = by_name(comparison)
    assert scored["separate models"].mean == 1.0
    for name in ("average", "smile gate=activations routing=sequence"):
        method = method_of(scored[name])
        options: dict[str, Any] = {}
        if name != "average":
            options = {"samples": samples(rows).gate, "tokenizer": tokenizer}
        fused = foretune.fuse(base, tuned, method, **options)
        for task in "ab":
            fused.set_task(task)
            right = [
                fused.model(**tokenizer([row.text], return_tensors="pt")).logits.argmax(-1).item()
                == int(row.label[-1])
                for row in rows[task][9:]
            ]
            assert scored[name].scores[task] == right
    # every task has its own head, so naming it costs nothing and loses nothing
    assert comparison.chosen.name == "smile routing=task"
    assert comparison.to_dict()["chosen_untold"] != "smile routing=task"


def test_rows_without_labels_are_scored_by_what_each_tasks_own_model_answers() -> None:
    base, tuned = classifiers()
    rows = {task: [SampleRow(text) for text in texts(task)] for task in tuned}
    comparison = compare_fusions(base, tuned, samples(rows), tokenizer=tiny_models.tokenizer())
    same = {task: labelled(model, task) for task, model in tuned.items()}
    accuracy = compare_fusions(base, tuned, samples(same), tokenizer=tiny_models.tokenizer())
    assert comparison.measure == "agreement"
    assert [c.scores for c in comparison.candidates] == [c.scores for c in accuracy.candidates]


def test_language_models_are_scored_by_their_likelihood_and_not_told_the_task() -> None:
    base = tiny_models.llama()
    tuned = {name: adapted(base, seed, ["q_proj", "up_proj"]) for seed, name in enumerate("ab")}
    rows = {t: [SampleRow(text, text.split()[0] + " ") for text in texts(t)] for t in tuned}
    tokenizer = tiny_models.tokenizer()
    comparison = compare_fusions(base, tuned, samples(rows), tokenizer=tokenizer)
    assert comparison.measure == "log-likelihood" and not comparison.own_heads
    scored = by_name(comparison)["separate models"].scores["b"]
    prompt = tokenizer("the ")["input_ids"]
    start = len(prompt) - (prompt[-1] in (tokenizer.sep_token_id, tokenizer.eos_token_id))
    for row, score in zip(rows["b"][9:], scored, strict=True):
        tokens = tokenizer([row.text], return_tensors="pt")["input_ids"]
        predicted = output(tuned["b"], {"input_ids": tokens}).log_softmax(-1)[0, :-1]
        picked = predicted.gather(1, tokens[0, 1:, None])[:, 0]
        assert score == pytest.approx(picked[start - 1 :].mean().item(), abs=1e-4)
    assert comparison.chosen.name != "smile routing=task"
    header, lines = table_of(comparison.to_dict())
    assert header == ["log-likelihood per token, nats", "a", "b", "mean"]
    assert lines[-1][0] == "smile routing=task (told the task)"


def test_a_methods_own_settings_are_measured() -> None:
    base, tuned = classifiers()
    rows = samples({task: labelled(model, task) for task, model in tuned.items()})
    options = {"tokenizer": tiny_models.tokenizer()}
    scored = by_name(compare_fusions(base, tuned, rows, SMILE(k=2, gate_k=3), **options))
    assert scored["smile gate=weights routing=token"].method["k"] == 2
    scored = by_name(compare_fusions(base, tuned, rows, TaskArithmetic(scale=3.0), **options))
    assert scored["task-arithmetic"].method["scale"] == 3.0
    assert scored["ties"].method == foretune.TIES().to_dict()


def test_models_without_an_answer_to_score_are_refused() -> None:
    base = tiny_models.bert()
    tuned = {name: linears(base, seed) for seed, name in enumerate("ab")}
    rows = samples({task: [SampleRow(text) for text in texts(task)] for task in tuned})
    with pytest.raises(UserError, match="scored by classifiers and by models that generate text"):
        compare_fusions(base, tuned, rows, tokenizer=tiny_models.tokenizer())
    base, tuned = classifiers()
    with pytest.raises(UserError, match="no tokenizer: give tokenizer="):
        compare_fusions(base, tuned, rows)


def test_what_smile_cannot_fuse_is_said_and_the_static_merges_are_measured() -> None:
    base = tiny_models.bert(num_labels=3)
    tuned = {}
    for seed, name in enumerate("ab"):
        tuned[name] = linears(base, seed, size=0.0)
        with torch.no_grad():
            tuned[name].bert.embeddings.word_embeddings.weight.add_(0.1 * (seed + 1))
    rows = samples({task: labelled(model, task) for task, model in tuned.items()})
    comparison = compare_fusions(base, tuned, rows, tokenizer=tiny_models.tokenizer())
    assert "smile was not measured: no linear layer differs" in comparison.notes[0]
    assert comparison.chosen.name in ("average", "task-arithmetic", "ties")
    with pytest.raises(UserError, match="no linear layer differs"):
        compare_fusions(base, tuned, rows, SMILE(), tokenizer=tiny_models.tokenizer())


# --- the choice and the words ---------------------------------------------------------------------


def comparison(means: dict[str, float], *, own_heads: bool = False, rows: int = 100) -> Comparison:
    """Candidates of which so many rows, at random, are right as the mean says."""

    def right(mean: float, seed: str) -> list[float]:
        scores = [float(i < round(mean * rows)) for i in range(rows)]
        random.Random(seed).shuffle(scores)
        return scores

    records = {
        "average": Average().to_dict(),
        "ties": foretune.TIES().to_dict(),
        "smile gate=weights routing=token": SMILE().to_dict(),
        "smile routing=task": SMILE(routing="task").to_dict(),
    }
    candidates = [
        Candidate(name, records.get(name), {task: right(mean, name + task) for task in "tu"})
        for name, mean in means.items()
    ]
    return Comparison("accuracy", candidates, own_heads)


def test_the_simplest_within_one_standard_error_is_chosen() -> None:
    close = comparison({"average": 0.79, "ties": 0.80, "smile gate=weights routing=token": 0.78})
    assert (close.best.name, close.chosen.name) == ("ties", "average")
    apart = comparison({"average": 0.60, "ties": 0.70, "smile gate=weights routing=token": 0.80})
    assert apart.best is apart.chosen and apart.chosen.name.startswith("smile")
    average, _, smile = apart.candidates
    difference, error = gap(smile, average)
    variances = [
        statistics.variance(
            [x - y for x, y in zip(smile.scores[t], average.scores[t], strict=True)]
        )
        for t in "tu"
    ]
    assert difference == pytest.approx(0.2)
    assert error == pytest.approx(math.sqrt(sum(variances) / 100) / 2)
    assert apart.to_dict()["candidates"][0]["behind_best"] == pytest.approx([0.2, error])


def test_advice_follows_from_the_table_alone() -> None:
    measured = comparison(
        {"average": 0.86, "ties": 0.89, "smile gate=weights routing=token": 0.83}, rows=1000
    ).to_dict()
    assert advice(measured, None) == ["Best: ties."]
    [_, line] = advice(measured, "smile gate=weights routing=token")
    assert "is 6.0 (standard error 1.1) behind the best: `foretune fuse auto` takes ties" in line
    close = comparison({"average": 0.79, "ties": 0.80}).to_dict()
    assert advice(close, "ties") == [
        "Best: ties. Simplest within one standard error of it (4.0): average."
    ]
    told = {"average": 0.7, "smile gate=weights routing=token": 0.75, "smile routing=task": 0.9}
    unnamed = comparison(told).to_dict()
    assert unnamed["chosen"] == "smile gate=weights routing=token"
    assert "smile routing=task is 15.0 better" in advice(unnamed, None)[1]
    named = comparison(told, own_heads=True).to_dict()
    assert named["chosen"] == "smile routing=task"
    assert "Without being told: smile gate=weights routing=token." in advice(named, None)[1]
    # told the task, experts need no gate, so they come before those that have one
    told["smile routing=task"] = 0.74
    assert comparison(told, own_heads=True).chosen.name == "smile routing=task"
    assert comparison(told).chosen.name == "smile gate=weights routing=token"


def test_gate_takes_tokens_from_all_of_a_tasks_texts() -> None:
    from foretune.fusion import activation_gate

    recorder = activation_gate._InputRecorder(limit=50)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    layer = next(
        iter(
            foretune.fusion.mixture.expert_layers(
                foretune.fuse(model, {"a": linears(model, 1)}, SMILE()).model
            ).values()
        )
    )
    for i in range(20):
        recorder("x", layer, torch.full((10, 4), float(i)), torch.ones(1))
    values = recorder.inputs_of("x")[:, 0]
    assert len(values) == 50 and len(values.unique()) > 12 and ids().shape == (3, 7)
