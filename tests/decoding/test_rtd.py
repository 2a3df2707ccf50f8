"""RTD on `generate`: every way of decoding has the one mixture, and nothing stays on the model."""

from __future__ import annotations

import pytest
import torch

import foretune
import tiny_models
from foretune.decoding.generation import encode
from foretune.decoding.lookup import Lookup
from foretune.decoding.reference_store import ReferenceStore
from foretune.decoding.rtd import RTD
from foretune.errors import UserError

WORDS = [w for w in tiny_models.WORDS if len(w) > 1]
ROWS = [{"text": " ".join(WORDS[(i * k) % len(WORDS)] for k in range(1, 9))} for i in range(1, 12)]
PROMPTS = ["the cat", "red", "one two three the dog sat"]
FAMILIES = {
    "llama": tiny_models.llama,
    "qwen2": tiny_models.qwen2,
    "gpt2": tiny_models.gpt2,
}
TOKENS = {"max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0}


def gemma2(**changes):
    """A model with a soft cap on its logits, after the output embeddings."""
    import transformers

    sizes = {**tiny_models.DECODER, "head_dim": 8, "final_logit_softcapping": 0.5, **changes}
    config = transformers.Gemma2Config(**sizes)
    torch.manual_seed(0)
    return transformers.Gemma2ForCausalLM(config).eval()


def tokenizer():
    return tiny_models.tokenizer(special=False)


def store_of(model, **options):
    return ReferenceStore.build(model, ROWS, tokenizer=tokenizer(), **options)


@pytest.fixture(params=FAMILIES)
def model(request):
    return FAMILIES[request.param]()


def ids(*texts):
    return encode(tiny_models.llama(), tokenizer(), texts or PROMPTS[:1])


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# --- the mixture --------------------------------------------------------------------------------


def test_without_a_share_of_the_store_no_bit_changes(model):
    store, batch = store_of(model), ids()
    plain = model(**batch).logits
    with RTD(mix=0.0).steer(model, store=store):
        assert torch.equal(model(**batch).logits, plain)


@pytest.mark.parametrize("mix", [0.3, 1.0])
def test_logits_are_the_log_of_the_mixture(model, mix):
    store, batch = store_of(model), ids("the cat sat on")
    out = model(**batch, output_hidden_states=True)
    r = store.reference(
        out.hidden_states[-1][0], Lookup(neighbours=5, temperature=2.0), out.logits.shape[-1]
    ).reference
    with RTD(mix=mix, neighbours=5, temperature=2.0).steer(model, store=store):
        made = model(**batch).logits.exp()[0]
    wanted = (1 - mix) * torch.softmax(out.logits[0], -1) + mix * r
    torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(made.sum(-1), torch.ones(len(made)))


def test_the_store_alone_gives_what_followed_a_state_it_holds(model):
    store = store_of(model)
    known = tokenizer()(ROWS[4]["text"])["input_ids"]
    with RTD(mix=1.0, neighbours=1).steer(model, store=store):
        logits = model(torch.tensor([known])).logits[0]
    assert logits[:-1].argmax(-1).tolist() == known[1:]


def test_a_soft_cap_on_the_logits_is_kept():
    model = gemma2()
    store, batch = store_of(model), ids()
    capped = torch.softmax(model(**batch).logits, -1)
    with RTD(mix=0.25).steer(model, store=store):
        made = model(**batch).logits.exp()
    # A quarter is the store's, the rest the capped distribution, not the bare output layer's.
    assert ((made - 0.75 * capped) >= -1e-6).all()
    assert model(**batch).logits.abs().max() <= 0.5


def test_fields_of_the_record_stand_over_those_of_the_store():
    store = store_of(tiny_models.llama())
    store.lookup = Lookup(neighbours=4, temperature=2.0, mix=0.5)
    assert RTD().lookup(store) == store.lookup
    assert RTD(mix=0.1).lookup(store) == Lookup(neighbours=4, temperature=2.0, mix=0.1)
    assert RTD(neighbours=8).lookup(store) == Lookup(neighbours=8, temperature=None, mix=0.5)
    assert RTD(heads=2, temperature=3.0).lookup(store).temperature == 3.0


# --- generate -----------------------------------------------------------------------------------

WAYS = {
    "greedy": {"do_sample": False},
    "beam": {"do_sample": False, "num_beams": 3},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_cache_changes_nothing(model, way):
    batch, store = ids(*PROMPTS), store_of(model)
    with RTD(mix=0.6).steer(model, store=store):
        cached = model.generate(**batch, **TOKENS, **WAYS[way])
        uncached = model.generate(**batch, **TOKENS, **WAYS[way], use_cache=False)
    assert torch.equal(cached, uncached)
    assert not torch.equal(cached, model.generate(**batch, **TOKENS, **WAYS[way]))


def test_greedy_takes_the_best_of_the_mixture_step_by_step(model):
    store, row = store_of(model), ids()["input_ids"]
    with RTD(mix=0.6).steer(model, store=store):
        got = model.generate(row, **TOKENS, do_sample=False)
        for _ in range(TOKENS["max_new_tokens"]):
            row = torch.cat([row, model(row).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(got, row)


def test_a_padded_batch_is_its_rows(model):
    store = store_of(model)
    with RTD(mix=0.6).steer(model, store=store):
        batch = ids(*PROMPTS)
        together = model.generate(**batch, **TOKENS, do_sample=False)[:, -6:]
        alone = [model.generate(**ids(p), **TOKENS, do_sample=False)[:, -6:] for p in PROMPTS]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("drafter", ["another model", "prompt lookup"])
def test_assisted_decoding_is_greedy(model, drafter):
    store, batch = store_of(model), ids("the cat sat on the cat")
    helped = (
        {"assistant_model": type(model)(model.config).eval()}
        if drafter == "another model"
        else {"prompt_lookup_num_tokens": 3}
    )
    with RTD(mix=0.6).steer(model, store=store):
        greedy = model.generate(**batch, **TOKENS, do_sample=False)
        assisted = model.generate(**batch, **TOKENS, do_sample=False, **helped)
    assert torch.equal(greedy, assisted)


@pytest.mark.parametrize("past_hooks", [False, True])
def test_with_an_adapter_it_is_called_and_generates_alike(past_hooks, monkeypatch):
    import peft

    if past_hooks:  # as some versions of peft do
        monkeypatch.setattr(
            peft.tuners.tuners_utils.BaseTuner, "forward", lambda m, **k: m.model.forward(**k)
        )
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(tiny_models.llama(), config).eval()
    store, batch = store_of(model), ids()
    with RTD(mix=0.6).steer(model, store=store):
        row = batch["input_ids"]
        got = model.generate(input_ids=row, **TOKENS, do_sample=False)
        for _ in range(6):
            logits = model(input_ids=row).logits
            torch.testing.assert_close(logits.exp().sum(-1), torch.ones(1, row.shape[1]))
            torch.testing.assert_close(logits, model.get_base_model()(row).logits)
            row = torch.cat([row, logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(got, row)
    assert hooks(model) == 0


def test_nothing_stays_on_the_model(model):
    store, batch = store_of(model), ids()
    before = model(**batch).logits
    with RTD(mix=0.6).steer(model, store=store):
        assert hooks(model) == 2
        model.generate(**batch, **TOKENS)
    assert hooks(model) == 0
    with pytest.raises(ZeroDivisionError), RTD(mix=0.6).steer(model, store=store):
        1 / 0  # noqa: B018
    assert hooks(model) == 0
    assert torch.equal(model(**batch).logits, before)


# --- decode -------------------------------------------------------------------------------------


def test_decode_says_what_stands_behind_every_token(tmp_path):
    model = tiny_models.llama()
    store = store_of(model)
    store.save(tmp_path / "s")
    known = ROWS[4]["text"].split()
    [got] = foretune.decode(
        model,
        " ".join(known[:3]),
        RTD(mix=1.0, neighbours=2, temperature=1e-6),
        tokenizer=tokenizer(),
        store=tmp_path / "s",
        max_new_tokens=2,
    )
    assert got.text.split() == known[3:5]
    first = got.details["tokens"][0]
    assert first["text"] == known[3] and first["reference"] == pytest.approx(1.0)
    assert first["neighbours"][0] == {
        "row": 4,
        "weight": pytest.approx(1.0),
        "token": known[3],
        "reference": ROWS[4],
    }
    assert 0 < first["own"] < 0.5


@pytest.mark.parametrize("heads", [1, 4])
def test_weights_of_the_neighbours_of_a_token_add_up(heads):
    model = tiny_models.gpt2()
    store = store_of(model, heads=heads)
    found = RTD(neighbours=3).decode(
        model, PROMPTS, tokenizer=tokenizer(), store=store, max_new_tokens=3, neighbours_shown=99
    )
    for token in (t for one in found for t in one.details["tokens"]):
        weights = [n["weight"] for n in token["neighbours"]]
        assert sum(weights) == pytest.approx(1.0) and weights == sorted(weights, reverse=True)
        told = sum(n["weight"] for n in token["neighbours"] if n["token"] == token["text"])
        assert token["reference"] == pytest.approx(told)


def test_neighbours_can_be_left_out_and_the_same_seed_gives_the_same_text():
    model = tiny_models.llama()
    store = store_of(model)
    options = {"tokenizer": tokenizer(), "store": store, "do_sample": True, "max_new_tokens": 8}
    first, again, other = (
        RTD().decode(model, PROMPTS, **options, neighbours_shown=0, seed=s) for s in (1, 1, 2)
    )
    assert first == again != other
    assert first[0].details == {}


# --- refusals -----------------------------------------------------------------------------------


def test_another_model_or_no_store_is_refused():
    model = tiny_models.llama()
    with (
        pytest.raises(UserError, match="built with another base"),
        RTD().steer(tiny_models.llama(seed=1), store=store_of(model)),
    ):
        pass
    with pytest.raises(UserError, match="RTD needs a store: store=FOLDER"):
        foretune.decode(model, "the", RTD(), tokenizer=tokenizer())
    with pytest.raises(UserError, match="store must be a ReferenceStore or its folder, got int"):
        foretune.decode(model, "the", RTD(), tokenizer=tokenizer(), store=3)
    with pytest.raises(UserError, match="is not a store"):
        foretune.decode(model, "the", RTD(), tokenizer=tokenizer(), store="nowhere")


def test_labels_and_tuples_are_refused():
    model, batch = tiny_models.llama(), ids()
    with RTD(mix=0.5).steer(model, store=store_of(model)):
        with pytest.raises(UserError, match="call it without labels"):
            model(**batch, labels=batch["input_ids"])
        with pytest.raises(UserError, match="leave out return_dict=False"):
            model(**batch, return_dict=False)
        with pytest.raises(UserError, match='generate has no option "max_tokens"'):
            RTD().decode(model, "the", tokenizer=tokenizer(), store=store_of(model), max_tokens=3)


def test_a_model_that_goes_past_its_output_layer_is_noticed(monkeypatch):
    model = tiny_models.llama()
    store, batch = store_of(model), ids()
    bypassed = torch.nn.Linear(16, tiny_models.VOCABULARY)
    monkeypatch.setattr(model, "get_output_embeddings", lambda: bypassed)
    with (
        RTD(mix=0.5).steer(model, store=store),
        pytest.raises(UserError, match="does not call its output embeddings"),
    ):
        model(**batch)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"neighbours": 0}, "neighbours must be a whole number not below 1, got 0"),
        ({"temperature": -1}, "temperature must be a number above 0, got -1"),
        ({"mix": 2}, "mix is a share between 0 and 1, got 2"),
        ({"heads": 1.5}, "heads must be a whole number not below 1, got 1.5"),
        ({"search": "fast"}, "search must be one of exact, faiss; got 'fast'"),
    ],
)
def test_bad_fields_are_refused_by_name(fields, message):
    with pytest.raises(UserError, match=message):
        RTD(**fields)


def test_heads_that_do_not_divide_the_states_are_refused():
    model = tiny_models.llama()
    with (
        pytest.raises(UserError, match="heads must divide the width of a state, 16, got 5"),
        RTD(heads=5).steer(model, store=store_of(model)),
    ):
        pass
