"""Padding removed against padding: the same outputs and gradients, and nothing left behind."""

from __future__ import annotations

import logging

import pytest
import torch
import transformers
from torch import nn

import tiny_models
from foretune.adapters.bank import AdapterBank
from foretune.models import packing
from foretune.models.frozen_prefix import frozen_prefix
from foretune.models.layout import Packing, rows_by_length
from foretune.models.packing import packed
from foretune.models.recompute import recomputed
from foretune.models.routing import route

LENGTHS = [9, 2, 5, 3, 1, 9, 4]
SLOTS = [0, 0, 0, 1, 1, 2, 2]


@pytest.fixture(autouse=True)
def _nothing_said_yet(monkeypatch):
    monkeypatch.setattr(packing, "_WARNED", set())


def mistral(**changes):
    config = transformers.MistralConfig(
        **{**tiny_models.DECODER, "sliding_window": 3, **changes}, attn_implementation="sdpa"
    )
    return tiny_models._seeded(transformers.MistralForCausalLM, config, 0)


def modernbert(**changes):
    config = transformers.ModernBertConfig(
        **{**tiny_models.SIZES, "local_attention": 4, "global_attn_every_n_layers": 2, **changes},
        attn_implementation="sdpa",
    )
    return tiny_models._seeded(transformers.ModernBertModel, config, 0)


MODELS = {
    "bert": tiny_models.bert,  # absolute positions, bidirectional
    "bert-classifier": lambda: tiny_models.bert(num_labels=3),
    "roberta-classifier": lambda: tiny_models.roberta(num_labels=3),  # positions from the padding
    "gpt2": tiny_models.gpt2,  # learned positions, causal
    "gpt2-classifier": lambda: tiny_models.gpt2(num_labels=3),
    "llama": tiny_models.llama,  # rotary positions
    "llama-grouped": lambda: tiny_models.llama(num_key_value_heads=1),
    "llama-classifier": lambda: tiny_models.llama(num_labels=3),
    "qwen2": tiny_models.qwen2,
    "mistral": mistral,  # a sliding window shorter than the rows
    "modernbert": modernbert,  # the same, bidirectional, in every other block
}


def rows(lengths=LENGTHS, width: int | None = None):
    width = width or max(lengths)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, tiny_models.VOCABULARY, (len(lengths), width), generator=generator)
    mask = (torch.arange(width)[None] < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": torch.where(mask > 0, ids, 0), "attention_mask": mask}


def answer(model, inputs, bank=None, slots=SLOTS):
    """(output where there are tokens, gradients of everything) for a made-up loss."""
    with route(slots):
        output = model(**inputs)
    output = output.logits if hasattr(output, "logits") else output.last_hidden_state
    if output.dim() == 3:
        output = output[inputs["attention_mask"] > 0]
    weights = torch.randn(
        output.shape, generator=torch.Generator().manual_seed(2), dtype=output.dtype
    )
    (output * weights).sum().backward()
    named = [*model.named_parameters(), *(() if bank is None else bank.named_parameters())]
    grads = {name: p.grad.clone() for name, p in named if p.grad is not None}
    for _, p in named:
        p.grad = None
    return output.detach(), grads


def banked(model, **fields):
    bank = AdapterBank(model, ["a", "b", "c"], lora={"r": 2}, **fields).double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in bank.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return bank


def vectors_seen(model, call):
    """How many vectors the first linear layer of the last block works on in `call`."""
    seen = []
    linear = [m for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    plain = linear[-2].register_forward_hook(
        lambda _, args, __: seen.append(args[0].numel() // args[0].shape[-1])
    )
    call()
    plain.remove()
    return seen


@pytest.mark.parametrize("name", MODELS)
def test_without_padding_nothing_changes(name):
    model = MODELS[name]().double()
    expected, expected_grads = answer(model, rows())
    with packed(model) as why:
        output, grads = answer(model, rows())
    assert why is None
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-12)
    assert grads.keys() == expected_grads.keys()
    for key, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[key], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("slots", [SLOTS, [2, 0, 1, 0, 2, 2, 1], [1] * 7, None])
@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_adapters_find_their_tokens(name, slots):
    model = MODELS[name]().double()
    bank = banked(model)
    with bank.attached():
        expected, expected_grads = answer(model, rows(), bank, slots)
        with packed(model) as why:
            output, grads = answer(model, rows(), bank, slots)
    assert why is None
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-12)
    assert grads.keys() == expected_grads.keys()
    for key, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[key], rtol=1e-9, atol=1e-11)


def test_copies_of_a_layer_inside_a_block_find_their_tokens():
    model = tiny_models.bert().double()
    head = "encoder.layer.3.output.dense"
    bank = AdapterBank(model, ["a", "b", "c"], heads=[head], fresh_heads=True).double()
    with bank.attached():
        expected, expected_grads = answer(model, rows(), bank)
        with packed(model, [head]) as why:
            output, grads = answer(model, rows(), bank)
    assert why is None
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-12)
    for key, grad in expected_grads.items():
        torch.testing.assert_close(grads[key], grad, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_recomputed_blocks_give_the_same_gradients(name, pack):
    model = MODELS[name]().double().train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    bank = banked(model)
    with bank.attached():
        expected, expected_grads = answer(model, rows(), bank)
        with recomputed(model):
            if pack:
                with packed(model):
                    output, grads = answer(model, rows(), bank)
            else:
                output, grads = answer(model, rows(), bank)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-12)
    for key, grad in expected_grads.items():
        torch.testing.assert_close(grads[key], grad, rtol=1e-9, atol=1e-11)


def test_above_a_frozen_prefix():
    model = tiny_models.bert().double()
    for name, p in model.named_parameters():
        p.requires_grad_("layer.3" in name)
    expected, expected_grads = answer(model, rows())
    with frozen_prefix(model, []), packed(model) as why:
        output, grads = answer(model, rows())
    assert why is None
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-12)
    for key, grad in expected_grads.items():
        torch.testing.assert_close(grads[key], grad, rtol=1e-9, atol=1e-11)


def test_nothing_is_computed_for_padding():
    model = tiny_models.bert()
    with packed(model):
        assert vectors_seen(model, lambda: model(**rows())) == [sum(LENGTHS)]
        full = rows([6, 6, 6])
        assert vectors_seen(model, lambda: model(**full)) == [18]
    assert vectors_seen(model, lambda: model(**rows())) == [len(LENGTHS) * max(LENGTHS)]


def test_a_model_is_packed_once():
    for model in (tiny_models.bert(), tiny_models.bert(attn_implementation="eager")):
        with packed(model):
            before = [m.forward for m in model.modules() if "forward" in vars(m)]
            with packed(model):
                assert [m.forward for m in model.modules() if "forward" in vars(m)] == before
            assert before
        assert not any("forward" in vars(m) for m in model.modules())


def test_rows_do_not_see_each_other():
    model = tiny_models.bert().double()
    inputs = rows()
    changed = {k: v.clone() for k, v in inputs.items()}
    changed["input_ids"][2, :5] = torch.tensor([7, 8, 9, 10, 11])
    with packed(model), torch.no_grad():
        before, after = model(**inputs).last_hidden_state, model(**changed).last_hidden_state
    same = [i for i in range(len(LENGTHS)) if i != 2]
    assert torch.equal(before[same], after[same])
    assert not torch.equal(before[2], after[2])


def test_padding_on_the_left_is_left_to_the_model():
    model = tiny_models.llama().double()
    inputs = {k: v.flip(1) for k, v in rows().items()}
    expected, _ = answer(model, inputs)
    with packed(model):
        output, _ = answer(model, inputs)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)


def test_the_model_is_left_as_it_was():
    model = tiny_models.llama()
    with pytest.raises(RuntimeError, match="stop"), packed(model), recomputed(model):
        assert model.config._attn_implementation != "sdpa"
        raise RuntimeError("stop")
    assert model.config._attn_implementation == "sdpa"
    assert not any("forward" in vars(m) for m in model.modules())
    assert not model._forward_pre_hooks
    assert not model._forward_hooks


class Mixing(nn.Module):
    """A block that averages over the positions of a row: it must not lose sight of the rows."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, hidden, attention_mask=None, **kwargs):
        return self.block(hidden, attention_mask, **kwargs) + hidden.mean(1, keepdim=True)


def mixing_llama():
    model = tiny_models.llama()
    model.model.layers[1] = Mixing(model.model.layers[1])
    return model


def test_a_model_that_mixes_positions_is_found_out(caplog):
    model = mixing_llama().double()
    with caplog.at_level(logging.WARNING, "foretune"), packed(model) as why:
        pass
    assert why == "LlamaForCausalLM gives different results without padding"
    assert why in caplog.text


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (tiny_models.t5, "T5ForConditionalGeneration has no single list of blocks"),
        (
            lambda: tiny_models.bert(attn_implementation="eager"),
            'BertModel uses the attention "eager", not "sdpa"',
        ),
    ],
)
def test_what_cannot_be_packed_is_grouped_by_length(build, reason, caplog):
    model = build().double()
    lengths = [40, 2, 17, 33, 5]
    inputs = rows(lengths)
    if model.config.is_encoder_decoder:
        inputs["labels"] = inputs["input_ids"][:, :4].contiguous()
        with torch.no_grad():
            expected = model(**inputs).logits
            with caplog.at_level(logging.WARNING, "foretune"), packed(model) as why:
                logits = model(**inputs).logits
        torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-12)
    else:
        slots = [0, 0, 1, 2, 2]
        bank = banked(model)
        with bank.attached():
            expected, expected_grads = answer(model, inputs, bank, slots)
            with caplog.at_level(logging.WARNING, "foretune"), packed(model) as why:
                output, grads = answer(model, inputs, bank, slots)
        torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-12)
        for key, grad in expected_grads.items():
            torch.testing.assert_close(grads[key], grad, rtol=1e-9, atol=1e-11)
    assert why == reason
    assert reason in caplog.text
    assert "forward" not in vars(model)


def test_a_model_without_tokens_is_not_touched():
    for model in (tiny_models.vit(), tiny_models.plain()):
        with packed(model) as why:
            assert why is None
            assert not any("forward" in vars(m) for m in model.modules())


def test_every_token_has_one_place():
    places = Packing((3, 1, 20, 2), 20, (1, 0, 3, 2), torch.device("cpu"))
    x = torch.arange(80.0).view(4, 20, 1)
    flat = places.pack(x)[0, :, 0].tolist()
    assert flat == [20.0, 0.0, 1.0, 2.0, 60.0, 61.0, *(40.0 + i for i in range(20))]
    back = places.unpack(places.pack(x))
    mask = torch.arange(20)[None] < torch.tensor(places.lengths)[:, None]
    assert torch.equal(back[..., 0], torch.where(mask, x[..., 0], 0))
    assert rows_by_length([16, 17, 1]) == [[0, 2], [1]]
