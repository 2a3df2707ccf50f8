"""Whole labels: their score is the sum over their tokens, whatever they have in common."""

from __future__ import annotations

import pytest
import torch

import tiny_models
from decoding.test_eft import gemma2, mistral
from foretune.decoding import model_scores
from foretune.decoding.model_scores import states_and_log_probs
from foretune.decoding.reference_store import ReferenceStore
from foretune.decoding.references import read_references
from foretune.decoding.store_table import evaluate_store
from foretune.errors import UserError

FAMILIES = {
    "llama": tiny_models.llama,
    "gpt2": tiny_models.gpt2,
    "gemma2": gemma2,
    "mistral": mistral,  # a sliding window of four tokens
}
LABELS = ("red cat", "red dog", "red", "blue cat on mat", "green")
WORDS = [w for w in tiny_models.WORDS if len(w) > 1]
ROWS = [
    {"prompt": f"the {w} {'sat ' * (i % 3)}on".strip(), "label": LABELS[i % len(LABELS)]}
    for i, w in enumerate(WORDS)
]


def tokenizer():
    return tiny_models.tokenizer(special=False)


@torch.no_grad()
def by_hand(model, row, labels):
    """The log-probability of each label: one call for each, no cache."""
    prompt, scores = tokenizer()(row["prompt"])["input_ids"], []
    for tokens in labels.values():
        log_p = torch.log_softmax(model(torch.tensor([[*prompt, *tokens]])).logits[0].float(), -1)
        places = range(len(prompt) - 1, len(prompt) + len(tokens) - 1)
        scores.append(sum(log_p[i, token] for i, token in zip(places, tokens, strict=True)))
    return torch.stack(scores)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("one_at_a_time", [False, True])
def test_a_label_has_the_log_probability_of_all_its_tokens(family, one_at_a_time, monkeypatch):
    if one_at_a_time:
        monkeypatch.setattr(model_scores, "TOKENS", 1)
    model, references = FAMILIES[family](), read_references(ROWS, tokenizer())
    assert [tokens[-1] for tokens in references.labels.values()] == [2] * 5  # "red" begins others
    states, log_p = states_and_log_probs(model, references, scored=[0, 2, 7])
    assert states.shape[0] == len(ROWS)
    wanted = torch.stack([by_hand(model, ROWS[i], references.labels) for i in (0, 2, 7)])
    torch.testing.assert_close(log_p, torch.log_softmax(wanted, -1), rtol=1e-4, atol=1e-4)


def test_what_labels_have_in_common_does_not_tell_them_apart():
    """The difference of two labels is that of their last tokens, given what they share."""
    model, labels = tiny_models.llama(), {"red cat": 0, "red dog": 1}
    rows = [{"prompt": "the mat", "label": label} for label in labels]
    _, log_p = states_and_log_probs(model, read_references(rows, tokenizer()))
    words = tokenizer()
    with torch.no_grad():
        last = model(torch.tensor([words("the mat red")["input_ids"]])).logits[0, -1]
    cat, dog = words("cat dog")["input_ids"]
    assert float(log_p[0, 0] - log_p[0, 1]) == pytest.approx(float(last[cat] - last[dog]), abs=1e-5)


def test_a_store_of_long_labels_is_tuned_evaluated_and_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(model_scores, "SCORED", 9)
    model = tiny_models.llama()
    store = ReferenceStore.build(model, ROWS, tokenizer=tokenizer())
    assert store.scored.shape == (9,) and store.model_log_probs.shape == (9, 5)
    tuned = store.tune()
    assert tuned["entries"] == 9 and tuned["metric"] == "accuracy"
    store.save(tmp_path / "s")
    loaded = ReferenceStore.load(tmp_path / "s")
    assert torch.equal(loaded.scored, store.scored) and loaded.labels == store.labels
    found = evaluate_store(model, tokenizer(), loaded, ROWS, lora_steps=1, shots=2)
    table = {row["method"]: row for row in found["rows"]}
    right = [
        int(by_hand(model, row, store.labels).argmax()) == list(store.labels).index(row["label"])
        for row in ROWS
    ]
    assert table["zero-shot"]["score"] == pytest.approx(sum(right) / len(right))
    assert {"calibrated", "LoRA", "RTD"} <= set(table)


def test_long_labels_need_a_cache_and_short_ones_do_not():
    model = tiny_models.mamba2()
    with pytest.raises(UserError, match="KV cache is needed"):
        states_and_log_probs(model, read_references(ROWS, tokenizer()))
    short = [{"prompt": "the cat", "label": label} for label in ("red", "blue")]
    assert states_and_log_probs(model, read_references(short, tokenizer()))[1].shape == (2, 2)
