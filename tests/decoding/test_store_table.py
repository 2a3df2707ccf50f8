"""The table of a store: every rival is scored on the same rows, the way that it says."""

from __future__ import annotations

import math

import pytest
import torch

import tiny_models
from foretune.decoding.lookup import Lookup
from foretune.decoding.model_scores import states_and_log_probs
from foretune.decoding.reference_store import ReferenceStore
from foretune.decoding.references import read_references
from foretune.decoding.store_controls import (
    ReferenceLM,
    calibrated,
    nearest_mean,
    train_lora,
)
from foretune.decoding.store_table import evaluate_store
from foretune.errors import UserError

WORDS = [w for w in tiny_models.WORDS if len(w) > 1]
ROWS = [{"prompt": f"the {b} {a}", "label": f"{a}"} for a in ("red", "blue") for b in WORDS]
TEXTS = [{"text": " ".join(WORDS[(i * k) % len(WORDS)] for k in range(1, 8))} for i in range(1, 9)]


def tokenizer():
    return tiny_models.tokenizer(special=False)


def by_method(result):
    return {row["method"]: row for row in result["rows"]}


def test_accuracy_of_the_model_alone_is_counted_by_hand():
    model = tiny_models.llama()
    store = ReferenceStore.build(model, ROWS[::2], tokenizer=tokenizer())
    table = by_method(evaluate_store(model, tokenizer(), store, ROWS[1::2], lora_steps=0, shots=0))
    ids = torch.tensor([*store.labels["blue"], *store.labels["red"]])
    right, losses = [], []
    for row in ROWS[1::2]:
        logits = (
            model(torch.tensor([tokenizer()(row["prompt"])["input_ids"]]))
            .logits[0, -1, ids]
            .detach()
        )
        wanted = ["blue", "red"].index(row["label"])
        right.append(int(logits.argmax()) == wanted)
        losses.append(-float(torch.log_softmax(logits, -1)[wanted]))
    assert table["zero-shot"]["score"] == pytest.approx(sum(right) / len(right))
    assert table["zero-shot"]["log_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    # The state holds the colour, so whatever reads it gets it right.
    assert table["logistic probe"]["score"] > 0.9
    assert list(table) == [
        *("zero-shot", "calibrated", "nearest class mean", "logistic probe", "RTD")
    ]


def test_perplexity_is_that_of_the_tokens_that_follow():
    model = tiny_models.gpt2()
    store = ReferenceStore.build(model, TEXTS[:5], tokenizer=tokenizer())
    table = by_method(evaluate_store(model, tokenizer(), store, TEXTS[5:], lora_steps=2))
    losses = []
    for row in TEXTS[5:]:
        ids = torch.tensor([tokenizer()(row["text"])["input_ids"]])
        losses += [model(ids, labels=ids).loss.item()] * (ids.shape[1] - 1)
    assert table["zero-shot"]["score"] == pytest.approx(math.exp(sum(losses) / len(losses)), 1e-3)
    methods = ["zero-shot", "token counts", "texts in the prompt", "LoRA", "RTD"]
    assert list(table) == methods and table["LoRA"]["trains"] and not table["RTD"]["trains"]


def test_a_store_with_nothing_mixed_in_is_the_model_alone():
    model = tiny_models.llama()
    store = ReferenceStore.build(model, TEXTS[:5], tokenizer=tokenizer())
    found = evaluate_store(
        model, tokenizer(), store, TEXTS[5:], lookup=Lookup(mix=0.0), lora_steps=0, shots=0
    )
    table = by_method(found)
    assert table["RTD"]["score"] == pytest.approx(table["zero-shot"]["score"], rel=1e-6)


def test_calibration_takes_away_what_the_model_prefers():
    seen = torch.tensor([[0.9, 0.1], [0.7, 0.3]]).log()
    log_p = calibrated(torch.tensor([[0.8, 0.2]]).log(), seen)
    torch.testing.assert_close(log_p.exp(), torch.tensor([[0.5, 0.5]]))


def test_the_nearest_mean_is_that_of_the_states_of_a_class():
    states = torch.tensor([[0.0, 0.0], [2.0, 0.0], [8.0, 0.0], [10.0, 0.0]])
    log_p = nearest_mean(states, torch.tensor([0, 0, 2, 2]), torch.tensor([[3.0, 0.0]]), 3)
    wanted = torch.tensor([[-4.0, -torch.inf, -36.0]])  # the mean squared distance to a mean is 1
    torch.testing.assert_close(log_p, torch.log_softmax(wanted, -1))


def test_baselines_that_are_ahead_are_named_with_the_error_of_the_difference():
    model = tiny_models.llama()
    store = ReferenceStore.build(model, [*ROWS[:6], *ROWS[-4:]], tokenizer=tokenizer())
    worst = Lookup(neighbours=len(store), temperature=1e9)  # the most frequent label
    found = evaluate_store(
        model, tokenizer(), store, ROWS[6:-4], lookup=worst, lora_steps=0, shots=0
    )
    table, ahead = by_method(found), {row["method"]: row for row in found["ahead"]}
    assert table["RTD"]["score"] < 0.9
    assert "logistic probe" in ahead and "RTD" not in ahead
    for method, row in ahead.items():
        assert row["by"] == pytest.approx(table[method]["score"] - table["RTD"]["score"])
        assert 0 <= row["standard_error"] < 0.3


def test_lora_learns_the_rows_and_leaves_the_model_alone():
    model = tiny_models.llama(initializer_range=0.3)
    known = read_references(ROWS, tokenizer())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    adapted = train_lora(model, known, steps=20, seed=0, rates=(2e-2,))
    known = known.spelled()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert (
        states_and_log_probs(adapted, known)[1].mean()
        > states_and_log_probs(model, known)[1].mean() + 0.5
    )


def test_lora_has_the_rank_and_modules_it_states_and_follows_the_seed():
    model = tiny_models.gpt2()
    references = read_references(TEXTS, tokenizer())
    steps = []
    adapted, again, other = (
        train_lora(model, references, steps=2, seed=seed, progress=lambda *step: steps.append(step))
        for seed in (0, 0, 1)
    )
    config = adapted.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (8, 16, 0.0)
    adapters = {k: v for k, v in adapted.state_dict().items() if "lora_" in k}
    assert len(adapters) == 2 * 4 * 4 and not any("lm_head" in name for name in adapters)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in adapters.items())
    assert not all(torch.equal(v, other.state_dict()[k]) for k, v in adapters.items())
    assert [step[:2] for step in steps] == [(1, 2), (2, 2)] * 9  # three runs for each seed
    assert all(p.requires_grad for p in model.parameters()) and not adapted.training


COMPLETIONS = [{"prompt": f"the {w}", "completion": f"sat on {w}"} for w in WORDS]


LONG_LABELS = [{"prompt": f"the {w}", "label": f"red {w} cat"} for w in WORDS]


@pytest.mark.parametrize(
    "rows",
    [ROWS, LONG_LABELS, TEXTS, COMPLETIONS],
    ids=["label", "long label", "text", "completion"],
)
def test_the_loss_of_lora_is_the_mean_over_the_values_of_each_text(rows):
    model, references = tiny_models.llama(), read_references(rows, tokenizer()).spelled()
    objective = ReferenceLM(max_tokens=64)
    pairs = zip(references.texts, references.values, strict=True)
    encoded = [objective.encode({"text": t, "values": v}, "references") for t, v in pairs]
    with torch.no_grad():
        losses = objective.losses(model, objective.collate(encoded, [0] * len(encoded)))
    log_p = states_and_log_probs(model, references)[1][:, 0].split(
        [len(v) for v in references.values]
    )
    torch.testing.assert_close(losses, torch.stack([-part.mean() for part in log_p]))


def test_a_text_that_fills_all_positions_of_the_model_is_learned():
    objective = ReferenceLM(max_tokens=4)
    running_text = objective.encode({"text": [5, 6, 7, 8], "values": [6, 7, 8, 9]}, "references")
    assert running_text == {"input_ids": [5, 6, 7, 8], "learnt": [(1, 4)]}
    labelled = objective.encode({"text": [5, 6, 7, 8], "values": [9]}, "references")
    assert labelled == {"input_ids": [6, 7, 8, 9], "learnt": [(3, 4)]}
    model, words = tiny_models.gpt2(), [WORDS[i % 5] for i in range(65)]
    for row in ({"text": " ".join(words)}, {"prompt": " ".join(words[:64]), "label": "red"}):
        references = read_references([row] * 2, tokenizer(), max_tokens=64)
        train_lora(model, references, steps=1, seed=0)


def test_an_adapted_model_is_not_adapted_again():
    import peft

    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    model = peft.get_peft_model(tiny_models.llama(), config).eval()
    store = ReferenceStore.build(model, TEXTS[:5], tokenizer=tokenizer())
    table = by_method(evaluate_store(model, tokenizer(), store, TEXTS[5:], lora_steps=2))
    assert "LoRA" not in table and "RTD" in table


def test_what_is_in_the_prompt_fits_into_the_positions():
    rows = [{"prompt": " ".join(WORDS[:12]), "label": w} for w in ("red", "blue")] * 4
    model = tiny_models.llama()
    store = ReferenceStore.build(model, rows, tokenizer=tokenizer())
    table = by_method(evaluate_store(model, tokenizer(), store, rows, lora_steps=0))
    assert "4 in the prompt" in table  # 64 positions, 13 tokens each, 12 for the row itself


def test_another_model_or_a_store_without_rows_is_refused():
    model = tiny_models.llama()
    store = ReferenceStore.build(model, TEXTS, tokenizer=tokenizer())
    with pytest.raises(UserError, match="built with another base"):
        evaluate_store(tiny_models.llama(seed=1), tokenizer(), store, TEXTS)
    store.rows = []
    with pytest.raises(UserError, match="the store has no rows"):
        evaluate_store(model, tokenizer(), store, TEXTS)
