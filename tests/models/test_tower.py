"""Towers: what they compute, what is trained, and that each text is embedded once."""

from __future__ import annotations

import copy
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import foretune
import tiny_models
from foretune.adapters.fingerprint import base_record, fingerprint
from foretune.errors import UserError
from foretune.models import sentence_cache as cache_module
from foretune.models.sentence_cache import sentence_cache
from foretune.models.tower_models import array_tower
from foretune.run import Run
from foretune.tasks.task import Task, TaskCollection
from tower_tasks import TEXTS, encoder_folder, opinions, replies

RUN = Run(steps=6, batch_size=3, device="cpu", warmup=0.0)
LORA = {"r": 2, "lora_alpha": 4}


@pytest.fixture(autouse=True)
def no_caches():
    cache_module._CACHES.clear()


@pytest.fixture
def texts(tmp_path):
    return foretune.load_model(encoder_folder(tmp_path / "e"), head="classification", tower=[5, 7])[
        0
    ]


@pytest.fixture
def dual(tmp_path):
    return foretune.load_model(encoder_folder(tmp_path / "e"), tower=[5])[0]


@pytest.fixture
def seen_rows(monkeypatch):
    """Counts the rows that an encoder reads, by their ids without padding."""
    counts: Counter = Counter()
    plain = cache_module.SentenceCache._embed

    def counting(self, texts, length):
        counts.update(tuple(ids.tolist()) for ids in texts)
        return plain(self, texts, length)

    monkeypatch.setattr(cache_module.SentenceCache, "_embed", counting)
    return counts


def test_embedding_is_the_mean_of_the_last_states_over_the_tokens(texts) -> None:
    encoded = tiny_models.tokenizer()(list(TEXTS), padding=True, return_tensors="pt")
    hidden = texts.body.encoder(**encoded).last_hidden_state
    for row, states, mask in zip(
        texts.body.embed(**encoded), hidden, encoded["attention_mask"], strict=True
    ):
        assert torch.allclose(row, states[mask > 0].mean(0), atol=1e-6)


def test_logits_are_those_of_the_layers_on_the_embedding(texts) -> None:
    encoded = tiny_models.tokenizer()(list(TEXTS), padding=True, return_tensors="pt")
    x = texts.body.embed(**encoded)
    weights = dict(texts.named_parameters())
    for layer in ("body.layers.0", "body.layers.2"):
        x = F.gelu(x @ weights[f"{layer}.weight"].T + weights[f"{layer}.bias"])
    expected = x @ weights["classifier.weight"].T + weights["classifier.bias"]
    assert torch.allclose(texts(**encoded).logits, expected, atol=1e-6)


def test_cached_embeddings_are_the_model_s_own(texts) -> None:
    tokenizer, cache = tiny_models.tokenizer(), sentence_cache(texts)
    numbers = np.array([cache.number_of(tokenizer(text)["input_ids"]) for text in TEXTS])
    encoded = tokenizer(list(TEXTS), padding=True, return_tensors="pt")
    assert torch.allclose(cache.embeddings(numbers), texts.body.embed(**encoded), atol=1e-5)


def test_an_embedding_does_not_depend_on_which_texts_were_new(texts) -> None:
    tokenizer = tiny_models.tokenizer()
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    together = cache_module.SentenceCache(texts.body)
    numbers = np.array([together.number_of(row) for row in ids])
    alone = cache_module.SentenceCache(texts.body)
    parts = [alone.embeddings(np.array([alone.number_of(row)])) for row in ids]
    assert torch.equal(together.embeddings(numbers), torch.cat(parts))


def test_each_text_is_embedded_once_in_retraining_adapting_and_scoring(texts, seen_rows) -> None:
    base = foretune.retrain(texts, opinions(), foretune.Standard(), RUN).model
    for method in (foretune.LoRA(lora=LORA), foretune.Head()):
        foretune.adapt(base, opinions(3, start=4), method, RUN, shots=2)
    assert len(seen_rows) == len(TEXTS)
    assert set(seen_rows.values()) == {1}


def test_a_base_that_is_loaded_has_the_embeddings_of_the_first(texts, seen_rows, tmp_path) -> None:
    from foretune.models.loading import load_base

    run = RUN.replace(out=tmp_path / "out")
    foretune.retrain(texts, opinions(), foretune.Standard(), run)
    base, _ = load_base(tmp_path / "out" / "base")
    foretune.adapt(base, opinions(2, start=4), foretune.Head(), RUN)
    assert set(seen_rows.values()) == {1}


def test_other_weights_of_the_encoder_have_other_embeddings(texts) -> None:
    before = sentence_cache(texts)
    with torch.no_grad():
        next(texts.body.encoder.parameters()).add_(1.0)
    assert sentence_cache(texts) is not before


@pytest.mark.parametrize("method", ["standard", "peft-ml"])
def test_retraining_moves_the_tower_and_leaves_the_encoder(texts, method) -> None:
    record = foretune.PEFTML(lora=LORA) if method == "peft-ml" else foretune.Standard()
    base = foretune.retrain(texts, opinions(), record, RUN).model
    before = dict(texts.named_parameters())
    for name, p in base.named_parameters():
        assert torch.equal(p, before[name]) == name.startswith("body.encoder."), name


def test_copies_share_the_encoder_and_nothing_else(texts) -> None:
    copied = copy.deepcopy(texts)
    for (name, p), q in zip(texts.named_parameters(), copied.parameters(), strict=True):
        assert (p.data_ptr() == q.data_ptr()) == name.startswith("body.encoder."), name
    copied.half()
    assert {p.dtype for p in texts.parameters()} == {torch.float32}


def test_fingerprint_of_a_copy_reads_the_encoder_once(texts, monkeypatch) -> None:
    from foretune.models import digests

    first, names = base_record(texts), []
    plain = digests._update

    def noting(state, pairs, *rest):
        names.extend(name for name, _ in pairs)
        plain(state, pairs, *rest)

    monkeypatch.setattr(digests, "_update", noting)
    assert base_record(copy.deepcopy(texts)) == first
    assert not [name for name in names if name.startswith("body.encoder.")]


def test_training_writes_to_no_buffer_of_the_encoder(texts) -> None:
    run, tower = RUN.replace(eval_every=2, patience=1), texts.body
    base = foretune.retrain(texts, opinions(), foretune.Standard(), run).model
    foretune.adapt(base, opinions(2, start=4), foretune.LoRA(lora=LORA), RUN)
    assert {b._version for b in tower.encoder.buffers()} <= {0, 1}


@pytest.mark.parametrize("change", ["in place", "other tensor"])
def test_fingerprint_sees_a_changed_encoder(texts, change) -> None:
    before, p = fingerprint(texts), next(texts.body.encoder.parameters())
    with torch.no_grad():
        if change == "in place":
            p[0, 0] += 1.0
        else:
            p.data = p + 1.0
    assert fingerprint(texts) != before


def test_dropout_of_the_encoder_stays_off(texts) -> None:
    texts.train()
    assert not any(module.training for module in texts.body.encoder.modules())
    assert texts.body.layers.training


def test_lora_adapts_the_layers_of_the_tower_and_the_head(texts) -> None:
    base = foretune.retrain(texts, opinions(), foretune.Standard(), RUN).model
    adapted = foretune.adapt(base, opinions(2), foretune.LoRA(lora=LORA), RUN)
    assert sorted(adapted.config["target_modules"]) == [
        "body.layers.0", "body.layers.2", "classifier"
    ]  # fmt: skip


@pytest.mark.parametrize("fields", [{"target_modules": ["query"]}, {"modules_to_save": ["query"]}])
def test_an_adapter_in_the_frozen_encoder_is_refused(texts, fields) -> None:
    with pytest.raises(UserError, match="the encoder below a tower is frozen"):
        foretune.adapt(texts, opinions(2), foretune.LoRA(lora={**LORA, **fields}), RUN)


def test_tasks_adapted_together_equal_each_alone(texts) -> None:
    together = foretune.adapt(texts, opinions(3), foretune.LoRA(lora=LORA), RUN)
    alone = foretune.adapt(texts, opinions(1), foretune.LoRA(lora=LORA), RUN)
    for name, tensor in alone.tensors["p0", 0].items():
        assert torch.allclose(tensor, together.tensors["p0", 0][name], atol=1e-5), name


def test_a_new_dual_tower_is_its_encoder(dual) -> None:
    x = torch.randn(3, 16)
    assert torch.equal(dual.get_context_features(x), x)
    assert torch.equal(dual.get_response_features(x), x)


def test_choice_on_a_new_dual_tower_scores_as_on_its_encoder(dual, tmp_path) -> None:
    encoder, _ = foretune.load_model(tmp_path / "e")
    scores = [
        foretune.adapt(model, replies(), foretune.LoRA(lora=LORA, learning_rate=1e-9), RUN).scores
        for model in (dual, encoder)
    ]
    assert scores[0] == scores[1]


def test_choice_losses_are_those_of_cosines_after_the_towers(dual) -> None:
    from foretune.training.data import TaskData

    with torch.no_grad():
        for p in dual.towers.parameters():
            p.normal_(generator=torch.Generator().manual_seed(0))
    tasks = replies(2)
    objective = tasks.objective.fit(tasks).bind(dual)
    data = TaskData.of(tasks, objective)
    [batch] = data.step([(1, 3), (0, 2), (0, 4)], "train", train=False, seed=[0]).chunks
    losses = objective.losses(dual, batch)
    rows = [tasks["p0"].train[2], tasks["p0"].train[4], tasks["p1"].train[3]]
    for loss, row in zip(losses, rows, strict=True):

        def embedded(texts):
            encoded = tiny_models.tokenizer()(texts, padding=True, return_tensors="pt")
            return dual.embed(encoded["input_ids"], encoded["attention_mask"])

        context = F.normalize(dual.towers["context"](embedded([row["context"]])), dim=-1)
        candidates = F.normalize(dual.towers["response"](embedded(row["candidates"])), dim=-1)
        expected = F.cross_entropy(context @ candidates.T / 0.05, torch.tensor([0]))
        assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_the_sides_of_a_dual_tower_are_trained_apart(dual) -> None:
    method = foretune.PEFTML(learning_rate=1e-2, lora=LORA)
    base = foretune.retrain(dual, replies(), method, RUN).model
    context, response = base.towers["context"], base.towers["response"]
    for p, q in zip(context.parameters(), response.parameters(), strict=True):
        assert not torch.equal(p, q)


def test_arrays_need_no_model_file() -> None:
    rng = np.random.default_rng(0)
    rows = [{"x": rng.normal(size=(2, 3)), "y": i % 2} for i in range(8)]
    for row in rows:
        row["x"][0, 0] = 5.0 * row["y"]
    tasks = TaskCollection((Task("a", train=rows, validation=rows, test=rows),)).with_objective(
        foretune.Classification()
    )
    model = array_tower(6, [4, 4], 2)
    run = RUN.replace(steps=60, batch_size=8)
    outcome = foretune.retrain(model, tasks, foretune.Standard(learning_rate=0.02), run)
    assert outcome.validation_score == 1.0


@pytest.mark.parametrize("widths", [[], [0], [8, -1], [2.5], [True], [10**9]])
def test_widths_must_be_those_of_layers(widths) -> None:
    with pytest.raises(UserError, match="widths of its hidden layers"):
        array_tower(3, widths, 2)


@pytest.mark.parametrize("build", [tiny_models.t5, tiny_models.vit, tiny_models.clip])
def test_what_is_no_encoder_of_texts_is_refused(build, tmp_path) -> None:
    folder = encoder_folder(tmp_path / "e", build())
    with pytest.raises(UserError, match="a tower needs an encoder of texts"):
        foretune.load_model(folder, head="classification", tower=[4])


def test_a_decoder_is_read_by_the_same_mean(tmp_path) -> None:
    folder = encoder_folder(tmp_path / "e", tiny_models.llama())
    model, tokenizer = foretune.load_model(folder, head="classification", tower=[4])
    assert model(**tokenizer("the cat", return_tensors="pt")).logits.shape == (1, 2)


def test_trainable_layers_beside_a_tower_are_refused(tmp_path) -> None:
    folder = encoder_folder(tmp_path / "e")
    with pytest.raises(UserError, match="has no meaning beside tower"):
        foretune.load_model(folder, head="classification", tower=[4], trainable_layers=1)


def test_a_text_beyond_the_encoder_s_positions_is_refused(texts) -> None:
    tasks = opinions(1)
    long = {"text": " ".join(["cat"] * 80), "label": "no"}
    tasks = TaskCollection((Task("p", train=(*tasks["p0"].train, long)),)).with_objective(
        foretune.Classification(tiny_models.tokenizer(), max_tokens=100)
    )
    with pytest.raises(UserError, match="set max_tokens to 64 or less"):
        foretune.retrain(texts, tasks, foretune.Standard(), RUN.replace(batch_size=9))
