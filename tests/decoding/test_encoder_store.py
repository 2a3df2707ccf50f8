"""Stores of an encoder: unit vectors of labelled texts, which classify and continue nothing."""

from __future__ import annotations

import json

import pytest
import torch

import foretune
import tiny_models
from command_line import call, the_error, the_json
from foretune import RTD, ReferenceStore, UserError
from foretune.decoding.classify import classify
from foretune.decoding.lookup import Lookup
from foretune.decoding.store_table import evaluate_store

WORDS = [w for w in tiny_models.WORDS if len(w) > 1]
ROWS = [
    {"text": " ".join([colour] * 4 + [word]), "label": f"my {colour}"}
    for colour in ("red", "blue", "green")
    for word in WORDS
]
ENCODERS = {"bert": tiny_models.bert, "roberta": tiny_models.roberta}


@pytest.mark.parametrize("family", ENCODERS)
@pytest.mark.parametrize("head", [None, 3])
def test_a_state_is_the_mean_over_tokens_scaled_to_unit_length(family, head):
    model, tokenizer = ENCODERS[family](num_labels=head), tiny_models.tokenizer()
    store = ReferenceStore.build(model, ROWS, tokenizer=tokenizer)
    for i in (0, len(ROWS) - 1):
        ids = tokenizer(ROWS[i]["text"])["input_ids"]
        assert ids[0] == 1 and ids[-1] == 2  # with its special tokens
        with torch.no_grad():
            hidden = model.base_model(torch.tensor([ids])).last_hidden_state[0]
        mean = hidden.mean(0)
        torch.testing.assert_close(store.keys[i], mean / mean.norm(), rtol=1e-4, atol=1e-5)
    assert store.is_of_encoder and store.model_log_probs is None
    assert store.lookup.mix == 1.0 and list(store.labels) == ["my blue", "my green", "my red"]


def built():
    model, tokenizer = tiny_models.bert(), tiny_models.tokenizer()
    return model, tokenizer, ReferenceStore.build(model, ROWS[::2], tokenizer=tokenizer)


def test_it_is_tuned_evaluated_saved_and_queried(tmp_path):
    model, tokenizer, store = built()
    tuned = store.tune()
    assert tuned["metric"] == "accuracy" and tuned["model_alone"] is None and tuned["mix"] == 1
    store.save(tmp_path / "s")
    loaded = ReferenceStore.load(tmp_path / "s")
    assert loaded.is_of_encoder and loaded.lookup == store.lookup
    result = evaluate_store(model, tokenizer, loaded, ROWS[1::2])
    assert [row["method"] for row in result["rows"]] == [
        *("nearest class mean", "logistic probe", "RTD")
    ]
    assert result["rows"][-1]["score"] > 0.9
    texts = [{"text": row["text"]} for row in ROWS[1::2]]
    found = classify(model, tokenizer, loaded, texts)
    right = [one["label"] == row["label"] for one, row in zip(found, ROWS[1::2], strict=True)]
    assert sum(right) / len(right) == pytest.approx(result["rows"][-1]["score"])
    for one in found:
        weight = sum(near["weight"] for near in one["neighbours"])
        assert 0 < weight <= 1 + 1e-6 and 0 < one["probability"] <= 1
        assert all(near["reference"] in ROWS for near in one["neighbours"])


def test_a_decoder_classifies_too_and_mixes_in_what_it_thinks():
    model, tokenizer = tiny_models.llama(), tiny_models.tokenizer(special=False)
    store = ReferenceStore.build(model, ROWS[::2], tokenizer=tokenizer)
    texts = [{"text": row["text"]} for row in ROWS[1::2]]
    for mix in (0.0, 0.5, 1.0):
        lookup = Lookup(neighbours=5, mix=mix)
        found = classify(model, tokenizer, store, texts, lookup=lookup)
        table = evaluate_store(
            model, tokenizer, store, ROWS[1::2], lookup=lookup, shots=0, lora_steps=0
        )
        right = [one["label"] == row["label"] for one, row in zip(found, ROWS[1::2], strict=True)]
        assert sum(right) / len(right) == pytest.approx(table["rows"][-1]["score"])


def test_what_an_encoder_cannot_do_is_refused():
    model, tokenizer, store = built()
    with pytest.raises(UserError, match="an encoder only classifies"):
        ReferenceStore.build(model, [{"text": "the cat"}] * 3, tokenizer=tokenizer)
    with pytest.raises(UserError, match=r"mix must be 1, got 0\.5"):
        classify(model, tokenizer, store, ROWS[:1], lookup=Lookup(mix=0.5))
    with pytest.raises(UserError, match="continues no text"):
        foretune.decode(tiny_models.llama(), "a", RTD(), tokenizer=tokenizer, store=store)
    with pytest.raises(UserError, match="built with another base"):
        classify(tiny_models.bert(seed=1), tokenizer, store, ROWS[:1])
    with pytest.raises(UserError, match=r"row 1 has \d+ tokens, but the model reads at most 64"):
        classify(model, tokenizer, store, [{"text": "cat " * 70}])
    texts = ReferenceStore.build(
        tiny_models.llama(), [{"text": "the cat sat"}] * 2, tokenizer=tokenizer
    )
    with pytest.raises(UserError, match="only a store of rows with labels classifies"):
        classify(tiny_models.llama(), tokenizer, texts, ROWS[:1])


def test_the_commands_take_an_encoder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_models.bert().save_pretrained("bert")
    tiny_models.tokenizer().save_pretrained("bert")
    lines = [{**row, "split": ("train", "test")[i % 2]} for i, row in enumerate(ROWS)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    rows = ("--rows", "rows.jsonl", "--split")
    built = the_json("datastore", "build", "bert", *rows, "train", "--out", "store")
    assert built["labels"] == ["my blue", "my green", "my red"] and built["kind"] == "label"
    assert the_json("datastore", "tune", "store")["metric"] == "accuracy"
    shown = call("datastore", "tune", "store").stdout
    assert "with the store, not tuned" in shown and "the model alone" not in shown
    table = call("datastore", "eval", "store", *rows, "test").stdout
    assert "nearest class mean" in table and "RTD" in table
    result = the_json("datastore", "predict", "store", *rows, "test", "--references", 1)
    assert len(result["results"]) == len(ROWS) // 2
    assert len(result["results"][0]["neighbours"]) == 1
    printed = call("datastore", "predict", "store", "neighbours=1", *rows, "test").stdout
    assert printed.split()[:3] == ["label", "probability", "text"]
    message = the_error("generate", "bert", "a", "--method", "rtd", "--store", "store")
    assert "foretune datastore predict" in message
    assert "mix must be 1" in the_error("datastore", "eval", "store", "mix=0.5", *rows, "test")
    (tmp_path / "texts.jsonl").write_text('{"text": "the cat"}\n')
    build = ("datastore", "build", "bert", "--rows", "texts.jsonl", "--out", "other")
    assert "an encoder only classifies" in the_error(*build)
    assert not (tmp_path / "other").exists()
