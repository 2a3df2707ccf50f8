"""The store: what it answers, what it is tuned to, how it is saved, whom it refuses."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

import tiny_models
from foretune.adapters.fingerprint import base_and_adapter, fingerprint
from foretune.decoding.lookup import Lookup
from foretune.decoding.reference_store import ReferenceStore
from foretune.errors import UserError

WORDS = [w for w in tiny_models.WORDS if len(w) > 1]
TEXTS = [{"text": " ".join(WORDS[(i * k) % len(WORDS)] for k in range(1, 8))} for i in range(1, 12)]
LABELLED = [
    {"prompt": f"the {a} {b}", "label": "red" if a in WORDS[:4] else "blue"}
    for a in WORDS
    for b in ("sat", "on")
]
CHOICE = [
    {"context": f"the {w} sat on", "candidates": ["cat", "dog", "mat"], "answer": 0} for w in WORDS
]
SIZE = 10


def made(n=60, d=8, values=None, seed=0, **fields):
    """A store of random keys whose values are 0 to 4; one row an entry."""
    random = torch.Generator().manual_seed(seed)
    keys = torch.randn(n, d, generator=random)
    values = torch.randint(0, 5, (n,), generator=random) if values is None else values
    own = torch.full((n,), 0.1).log()
    return ReferenceStore(keys, values, own, torch.arange(n), **fields)


def asked(store, queries, **lookup):
    return store.reference(queries, Lookup(**lookup), SIZE).reference


def queries(n=9, d=8):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(9))


def histogram(store):
    return torch.bincount(store.values, minlength=SIZE).float() / len(store)


def with_letters():
    """A tokenizer that knows the letters of choice rows."""
    return tiny_models.tokenizer(special=False)


# --- what it answers ----------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_a_distribution_over_the_values_of_the_store(heads):
    store = made()
    found = store.reference(queries(), Lookup(neighbours=7, heads=heads), SIZE)
    torch.testing.assert_close(found.reference.sum(-1), torch.ones(9))
    assert found.reference[:, 5:].count_nonzero() == 0
    assert found.places.shape == found.weights.shape == (heads, 9, 7)
    torch.testing.assert_close(found.weights.sum(-1), torch.ones(heads, 9))


def test_an_entry_that_is_asked_for_gives_its_value_with_certainty():
    store = made()
    answer = asked(store, store.keys, neighbours=1, temperature=1.0)
    assert torch.equal(answer, torch.nn.functional.one_hot(store.values, SIZE).float())


@pytest.mark.parametrize("heads", [1, 4])
def test_all_neighbours_at_an_endless_temperature_are_the_histogram(heads):
    store = made()
    answer = asked(store, queries(), neighbours=60, temperature=1e12, heads=heads)
    torch.testing.assert_close(answer, histogram(store).expand(9, -1))


def test_at_no_temperature_the_nearest_decides():
    store = made()
    cold = asked(store, queries(), neighbours=20, temperature=1e-9)
    torch.testing.assert_close(cold, asked(store, queries(), neighbours=1, temperature=1.0))


@pytest.mark.parametrize("heads", [1, 2])
def test_order_of_the_entries_does_not_matter(heads):
    store, order = made(), torch.randperm(60, generator=torch.Generator().manual_seed(1))
    turned = ReferenceStore(
        store.keys[order], store.values[order], store.model_log_probs, store.sources
    )
    lookup = {"neighbours": 7, "temperature": 3.0, "heads": heads}
    torch.testing.assert_close(
        asked(turned, queries(), **lookup), asked(store, queries(), **lookup)
    )


def test_every_entry_twice_with_twice_the_neighbours_is_the_same():
    store = made()
    twice = ReferenceStore(*[torch.cat([t, t]) for t in _tensors(store)])
    torch.testing.assert_close(
        asked(twice, queries(), neighbours=14, temperature=3.0),
        asked(store, queries(), neighbours=7, temperature=3.0),
    )


def test_moving_and_turning_all_states_changes_nothing_with_one_head():
    store = made()
    turn, _ = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(2)))
    moved = ReferenceStore(store.keys @ turn + 5, *_tensors(store)[1:])
    lookup = {"neighbours": 7, "temperature": 3.0}
    there = asked(moved, queries() @ turn + 5, **lookup)
    torch.testing.assert_close(there, asked(store, queries(), **lookup), rtol=1e-4, atol=1e-5)
    with_heads = asked(moved, queries() @ turn + 5, **lookup, heads=2)
    assert not torch.allclose(with_heads, asked(store, queries(), **lookup, heads=2), atol=1e-3)


def test_turning_each_slice_changes_nothing_with_heads():
    store = made()
    turns = [
        torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(s)))[0]
        for s in (3, 4)
    ]
    turn = torch.block_diag(*turns)
    moved = ReferenceStore(store.keys @ turn, *_tensors(store)[1:])
    lookup = {"neighbours": 7, "temperature": 3.0, "heads": 2}
    torch.testing.assert_close(
        asked(moved, queries() @ turn, **lookup), asked(store, queries(), **lookup)
    )


def test_heads_are_the_mean_of_stores_of_slices_at_a_scaled_temperature():
    store = made()
    parts = [
        asked(
            ReferenceStore(store.keys[:, s], *_tensors(store)[1:]),
            queries()[:, s],
            neighbours=7,
            temperature=3.0 / 2,
        )
        for s in (slice(0, 4), slice(4, 8))
    ]
    both = asked(store, queries(), neighbours=7, temperature=3.0, heads=2)
    torch.testing.assert_close(both, (parts[0] + parts[1]) / 2)


def test_far_states_are_finite_and_normalised():
    answer = asked(made(), queries() + 1e2, neighbours=7, temperature=1.0)
    torch.testing.assert_close(answer.sum(-1), torch.ones(9))


def test_faiss_answers_like_the_exact_search():
    pytest.importorskip("faiss")
    store, lookup = made(), Lookup(neighbours=7, temperature=3.0, heads=2)
    exact = store.reference(queries(), lookup, SIZE, "exact").reference
    torch.testing.assert_close(store.reference(queries(), lookup, SIZE, "faiss").reference, exact)


def test_more_neighbours_than_entries_are_all_entries():
    store = made(n=5)
    torch.testing.assert_close(
        asked(store, queries(), neighbours=99, temperature=2.0),
        asked(store, queries(), neighbours=5, temperature=2.0),
    )


def test_automatic_temperature_is_the_mean_distance_to_entries_of_other_rows():
    keys = torch.tensor([[0.0, 0.0], [1.0, 0.0], [3.0, 0.0]])
    store = ReferenceStore(keys, torch.arange(3), torch.zeros(3), torch.arange(3))
    assert store.temperature(Lookup(neighbours=1)) == pytest.approx((1 + 1 + 4) / 3)
    assert store.temperature(Lookup(neighbours=1, temperature=9.0)) == 9.0


def test_entries_that_are_all_alike_have_a_temperature():
    store = ReferenceStore(torch.ones(6, 2), torch.arange(6), torch.zeros(6), torch.arange(6))
    answer = asked(store, torch.ones(1, 2), neighbours=6)
    torch.testing.assert_close(answer[0, :6], torch.full((6,), 1 / 6))


# --- tuning -------------------------------------------------------------------------------------


def clusters(n=80, wrong=0.0):
    """Two clusters, each with its value, so that neighbours know the answer."""
    random = torch.Generator().manual_seed(0)
    values = torch.arange(n) % 2
    keys = torch.randn(n, 4, generator=random) * 0.1 + values[:, None] * 3
    noise = torch.rand(n, generator=random) < wrong
    own = torch.full((n,), 0.3).log()
    return ReferenceStore(keys, values ^ noise, own, torch.arange(n))


def test_tuning_trusts_a_store_that_knows_and_not_one_that_does_not():
    knows = clusters()
    assert knows.tune()["mix"] >= 0.9
    assert knows.tuned["score"] > knows.tuned["model_alone"] + 1
    noise = made()
    noise.model_log_probs = torch.full((60,), 0.9).log()
    assert noise.tune()["mix"] == 0.0
    assert noise.tuned["score"] == noise.tuned["model_alone"]


def test_tuning_leaves_out_the_row_itself():
    """Each row has its entry twice and a value of its own: nobody else knows it."""
    keys = torch.randn(20, 4, generator=torch.Generator().manual_seed(0)).repeat(2, 1)
    values, sources = torch.arange(20).repeat(2), torch.arange(20).repeat(2)
    store = ReferenceStore(keys, values, torch.full((40,), 0.2).log(), sources)
    assert store.tune()["mix"] == 0.0
    apart = ReferenceStore(keys, values, torch.full((40,), 0.2).log(), torch.arange(40))
    assert apart.tune()["mix"] > 0.9


def test_noise_takes_more_neighbours_than_clean_labels():
    clean, noisy = clusters(), clusters(wrong=0.3)
    clean.tune()
    noisy.tune()
    assert noisy.lookup.neighbours > 4
    assert noisy.tuned["score"] < clean.tuned["score"]


def test_tuning_is_reproducible_and_the_score_is_what_it_says():
    store = clusters(wrong=0.2)
    first, second = store.tune(sample=30, seed=3), store.tune(sample=30, seed=3)
    assert first == second and first["entries"] == 30
    entries = store.sampled(30, 3)
    by_hand = []
    for i in entries.tolist():
        others = torch.arange(80)[torch.arange(80) != i]
        squared = (store.keys[others] - store.keys[i]).square().sum(-1)
        near = squared.argsort()[: first["neighbours"]]
        weights = torch.softmax(-squared[near] / first["temperature"], -1)
        own = store.model_log_probs[i].exp()
        reference = weights[store.values[others[near]] == store.values[i]].sum()
        by_hand.append(((1 - first["mix"]) * own + first["mix"] * reference).log())
    assert first["score"] == pytest.approx(float(torch.stack(by_hand).mean()), rel=1e-4)


def test_one_row_cannot_be_tuned():
    store = made(n=4)
    store.sources = torch.zeros(4).long()
    with pytest.raises(UserError, match="one row cannot be tuned"):
        store.tune()


# --- building -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [tiny_models.llama, tiny_models.qwen2, tiny_models.gpt2])
def test_states_are_those_that_the_output_layer_reads(family):
    model, tokenizer = family(), tiny_models.tokenizer(special=False)
    store = ReferenceStore.build(model, TEXTS, tokenizer=tokenizer)
    ids = tokenizer(TEXTS[3]["text"])["input_ids"]
    out = model(torch.tensor([ids]), output_hidden_states=True)
    mine = store.sources == 3
    torch.testing.assert_close(
        store.keys[mine], out.hidden_states[-1][0, :-1], rtol=1e-4, atol=1e-5
    )
    assert store.values[mine].tolist() == ids[1:]
    log_p = torch.log_softmax(out.logits[0, :-1], -1)
    wanted = log_p.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    torch.testing.assert_close(store.model_log_probs[mine], wanted, rtol=1e-4, atol=1e-5)


def test_building_leaves_the_model_as_it_was():
    model = tiny_models.llama()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    ReferenceStore.build(model, TEXTS, tokenizer=tiny_models.tokenizer(special=False))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_row_with_a_label_is_one_entry_at_the_end_of_its_prompt():
    tokenizer = tiny_models.tokenizer(special=False)
    store = ReferenceStore.build(tiny_models.llama(), LABELLED, tokenizer=tokenizer)
    assert len(store) == len(LABELLED)
    assert store.labels == {w: tokenizer(w)["input_ids"] for w in ("blue", "red")}
    assert store.values.tolist() == [int(row["label"] == "red") for row in LABELLED]
    assert store.next_tokens.tolist() == [store.labels[row["label"]][0] for row in LABELLED]
    assert store.lookup.neighbours == max(1, len(LABELLED) // 4)
    assert store.lookup.mix == 1.0


def test_a_completion_is_an_entry_a_token_and_one_for_its_end():
    tokenizer = tiny_models.tokenizer(special=False)
    rows = [{"prompt": "the cat", "completion": "sat on"}, {"prompt": "a", "completion": "mat"}]
    store = ReferenceStore.build(tiny_models.llama(), rows, tokenizer=tokenizer)
    ids = tokenizer("sat on mat")["input_ids"]
    assert store.values.tolist() == [*ids[:2], 2, ids[2], 2]
    assert store.sources.tolist() == [0, 0, 0, 1, 1]


@pytest.mark.parametrize("permute", [True, False])
def test_candidates_are_rotated_so_that_every_letter_is_right_as_often(permute):
    tokenizer = tiny_models.tokenizer(special=False)
    tokenizer.add_tokens(["A", "B", "C", "A.", "B.", "C.", "Answer:"])
    model = tiny_models.llama(vocab_size=len(tokenizer))
    store = ReferenceStore.build(model, CHOICE, tokenizer=tokenizer, permute_options=permute)
    assert len(store) == len(CHOICE) * (3 if permute else 1)
    assert list(store.labels) == ["A", "B", "C"]
    counts = torch.bincount(store.values, minlength=3).tolist()
    assert counts == ([len(CHOICE)] * 3 if permute else [len(CHOICE), 0, 0])


def test_long_texts_are_cut_into_pieces_and_no_token_is_lost():
    model, tokenizer = tiny_models.llama(), tiny_models.tokenizer(special=False)
    text = " ".join(WORDS * 12)
    store = ReferenceStore.build(model, [{"text": text}], tokenizer=tokenizer)
    ids = tokenizer(text)["input_ids"]
    assert len(ids) > 64 and store.values.tolist() == ids[1:]


@pytest.mark.parametrize("key_type", ["float16", "bfloat16"])
def test_keys_in_half_precision(key_type):
    model, tokenizer = tiny_models.llama(), tiny_models.tokenizer(special=False)
    full = ReferenceStore.build(model, TEXTS, tokenizer=tokenizer)
    half = ReferenceStore.build(model, TEXTS, tokenizer=tokenizer, key_type=key_type)
    assert half.keys.dtype == getattr(torch, key_type)
    torch.testing.assert_close(half.keys.float(), full.keys, rtol=1e-2, atol=1e-2)


# --- saving and refusing ------------------------------------------------------------------------


def _tensors(store):
    return [store.keys, store.values, store.model_log_probs, store.sources]


def as_written_first(folder):
    """Rewrites a store of labels of one token as version 1 wrote it."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "store.safetensors")
    about = json.loads((folder / "store.json").read_text())
    tokens = torch.tensor([ids[0] for ids in about["labels"].values()])
    tensors["own"] = tensors["own"].gather(1, tensors["values"][:, None])[:, 0]
    tensors["values"] = tokens[tensors["values"]]
    del tensors["scored"]
    save_file(tensors, folder / "store.safetensors")
    about["labels"] = {name: ids[0] for name, ids in about["labels"].items()}
    about["format"] = "foretune-store-1"
    (folder / "store.json").write_text(json.dumps(about))


def built(model=None, **options):
    model = model or tiny_models.llama()
    tokenizer = tiny_models.tokenizer(special=False)
    return ReferenceStore.build(model, LABELLED, tokenizer=tokenizer, **options)


def test_a_saved_store_comes_back_as_it_was(tmp_path):
    store = built(key_type="float16")
    store.tune()
    store.save(tmp_path / "s")
    loaded = ReferenceStore.load(tmp_path / "s")
    parts = ([*_tensors(loaded), loaded.scored], [*_tensors(store), store.scored])
    for one, other in zip(*parts, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)
    for name in ("rows", "kind", "labels", "model", "lookup", "tuned"):
        assert getattr(loaded, name) == getattr(store, name)
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == [
        ".foretune",
        "rows.jsonl",
        "store.json",
        "store.safetensors",
    ]


def test_a_store_of_labels_of_version_1_is_read_and_tuned_without_the_model(tmp_path):
    store = built()
    store.save(tmp_path / "s")
    as_written_first(tmp_path / "s")
    loaded = ReferenceStore.load(tmp_path / "s")
    assert loaded.labels == store.labels and torch.equal(loaded.values, store.values)
    assert loaded.model_log_probs is None
    tuned = loaded.tune()
    assert tuned["mix"] == 1.0 and tuned["model_alone"] is None
    loaded.save_lookup(tmp_path / "s")
    assert ReferenceStore.load(tmp_path / "s").lookup == loaded.lookup


def test_tuning_can_be_saved_alone(tmp_path):
    store = built()
    store.save(tmp_path / "s")
    store.tune()
    store.save_lookup(tmp_path / "s")
    assert ReferenceStore.load(tmp_path / "s").lookup == store.lookup


def test_a_folder_in_use_is_not_written_over(tmp_path):
    store = built()
    store.save(tmp_path / "s")
    with pytest.raises(UserError, match="is not empty: use --overwrite to replace"):
        store.save(tmp_path / "s")
    store.save(tmp_path / "s", overwrite=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="holds files that foretune did not write"):
        store.save(tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine" / "letter.txt").read_text() == "dear"


def test_a_store_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    store = built()
    store.rows = [{"x": float("nan")}, *store.rows]
    monkeypatch.setattr(ReferenceStore, "_metadata", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        store.save(tmp_path / "s")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["store.safetensors", "store.json", "rows.jsonl"])
def test_a_damaged_store_is_one_line(tmp_path, name):
    store = built()
    store.save(tmp_path / "s")
    (tmp_path / "s" / name).write_text("{broken")
    with pytest.raises(UserError, match=name):
        ReferenceStore.load(tmp_path / "s")
    (tmp_path / "s" / name).unlink()
    with pytest.raises(UserError, match=f"is not a store: it has no {name}"):
        ReferenceStore.load(tmp_path / "s")


def test_entries_beyond_the_rows_are_refused(tmp_path):
    built().save(tmp_path / "s")
    (tmp_path / "s" / "rows.jsonl").write_text(json.dumps(LABELLED[0]) + "\n")
    with pytest.raises(UserError, match="it has 1 rows of 24"):
        ReferenceStore.load(tmp_path / "s")


def test_another_base_is_refused():
    store = built()
    store.check_model(tiny_models.llama())
    with pytest.raises(UserError, match="built with another base"):
        store.check_model(tiny_models.llama(seed=1))


def adapted(seed=0, name="default"):
    import peft

    model = tiny_models.llama()
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    return peft.get_peft_model(model, config, adapter_name=name).eval()


def test_an_adapter_counts_unless_it_is_off_and_its_name_does_not():
    model = adapted()
    store = built(model)
    store.check_model(adapted(name="mine"))
    with pytest.raises(UserError, match=r"built with an adapter .* this model has no adapter"):
        store.check_model(tiny_models.llama())
    with pytest.raises(UserError, match=r"built with an adapter .* this model has an adapter"):
        store.check_model(adapted(seed=1))
    with model.disable_adapter():
        built().check_model(model)
        assert base_and_adapter(model) == {
            "base": fingerprint(tiny_models.llama()),
            "adapter": None,
        }
    with pytest.raises(UserError, match="built with no adapter"):
        built().check_model(model)


def test_states_of_an_adapted_model_are_its_own():
    assert not torch.equal(built(adapted()).keys, built().keys)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"neighbours": 0}, "neighbours must be a whole number not below 1"),
        ({"temperature": 0.0}, "temperature must be a number above 0"),
        ({"mix": 1.5}, "mix is a share between 0 and 1"),
        ({"heads": 0}, "heads must be a whole number"),
    ],
)
def test_a_bad_lookup_is_refused_by_name(fields, message):
    with pytest.raises(UserError, match=message):
        Lookup(**fields)


def test_bad_stores_are_refused():
    with pytest.raises(UserError, match="heads must divide the width of a state, 16, got 3"):
        built(heads=3)
    with pytest.raises(UserError, match="keys \\(N, d\\) and values of them"):
        ReferenceStore(torch.ones(3, 2), torch.ones(2), torch.ones(3), torch.ones(3))
    with pytest.raises(UserError, match="key_type must be one of float32"):
        built(key_type="int8")
    with pytest.raises(UserError, match="the store's width 8, got 3"):
        made().search(torch.ones(1, 3), Lookup())
    with pytest.raises(UserError, match="has no tokenizer"):
        ReferenceStore.build(tiny_models.llama(), LABELLED, tokenizer=None)


@pytest.mark.parametrize("model", [tiny_models.t5, tiny_models.plain])
def test_a_model_that_cannot_continue_a_text_is_refused(model):
    with pytest.raises(UserError, match="is needed, got"):
        built(model())


def test_states_that_are_not_finite_are_refused():
    model = tiny_models.llama()
    with torch.no_grad():
        model.model.norm.weight.mul_(1e6)
    with pytest.raises(UserError, match="states are not finite in float16"):
        built(model, key_type="float16")


def test_lookup_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Lookup().mix = 0.5  # type: ignore[misc]
