"""One contract for every method that decodes."""

from __future__ import annotations

import pytest
import torch

import foretune
import tiny_models
from contract.cases import assert_survives_json
from foretune.errors import UserError
from foretune.methods import make, methods_of
from linear_tasks import copy_of, equal_bits

DECODE = methods_of("decode")
DECODE_FORMS = [
    ("eft", {}),
    ("rtd", {}),
    ("rtd", {"neighbours": 4, "temperature": 2.0, "mix": 0.5, "heads": 2, "search": "faiss"}),
    ("eft", {"beta": 0.5, "weights": [0.5, 1], "top_p": 0.9, "delta_clip": 5.0, "uncap": True}),
]


@pytest.mark.parametrize(("name", "fields"), DECODE_FORMS)
def test_record_survives_json(name, fields):
    assert_survives_json(make(name, **fields))


def _decode_resources(name, model):
    """Side models or a store, as the method takes them, for that model."""
    small = [tiny_models.gpt2(seed=s, n_layer=1, initializer_range=0.4) for s in (1, 2)]
    rows = [{"text": "the cat sat on the mat"}, {"text": "a dog sat on the red mat"}]
    store = foretune.ReferenceStore.build(model, rows, tokenizer=tiny_models.tokenizer())
    return {"eft": {"tuned": small[0], "untuned": small[1]}, "rtd": {"store": store}}[name]


@pytest.mark.parametrize("name", DECODE)
def test_decoding_leaves_its_input_alone_and_is_reproducible(name):
    model = tiny_models.llama(num_hidden_layers=1, initializer_range=0.4)
    resources = _decode_resources(name, model)
    models = [model, *(m for m in resources.values() if isinstance(m, torch.nn.Module))]
    before, wanted = [copy_of(m) for m in models], [p.requires_grad for p in model.parameters()]
    prompts = ["the cat sat", "a dog"]

    def drawn(seed):
        torch.manual_seed(seed + 7)
        options = {"tokenizer": tiny_models.tokenizer(), "do_sample": True, "max_new_tokens": 8}
        return foretune.decode(model, prompts, make(name), seed=seed, **options, **resources)

    first = drawn(1)
    assert [one.prompt for one in first] == prompts
    assert first == drawn(1) != drawn(2)
    assert all(equal_bits(m.state_dict(), b) for m, b in zip(models, before, strict=True))
    assert [p.requires_grad for p in model.parameters()] == wanted
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("name", DECODE)
def test_decoding_refuses_a_method_of_another_verb_and_unknown_options(name):
    model, options = tiny_models.llama(num_hidden_layers=1), {"tokenizer": tiny_models.tokenizer()}
    with pytest.raises(UserError, match="not for decode"):
        foretune.decode(model, "a dog", make("lora"))
    with pytest.raises(UserError, match='generate has no option "max_tokens"'):
        foretune.decode(
            model, "a dog", make(name), max_tokens=3, **options, **_decode_resources(name, model)
        )
