"""The bank against stock PEFT, one task at a time, in float64."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch import nn

import tiny_models
from foretune.adapters.bank import AdapterBank
from foretune.adapters.fingerprint import base_record
from foretune.adapters.peft_format import (
    load_adapter,
    peft_config,
    peft_tensors,
    write_adapter,
)
from foretune.errors import UserError
from foretune.models.routing import route

LENGTH = 6


def _ids(rows: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(4, tiny_models.VOCABULARY, (rows, LENGTH))
    mask = torch.ones_like(ids)
    mask[::2, 4:] = 0
    return {"input_ids": ids, "attention_mask": mask}


CASES = {
    "bert": (tiny_models.bert, _ids, lambda out: out.last_hidden_state, {}),
    "roberta with heads": (
        lambda: tiny_models.roberta(num_labels=3),
        _ids,
        lambda out: out.logits,
        {"heads": ["classifier"]},
    ),
    "gpt2": (tiny_models.gpt2, _ids, lambda out: out.logits, {}),
    "llama": (tiny_models.llama, _ids, lambda out: out.logits, {}),
    "qwen2": (tiny_models.qwen2, _ids, lambda out: out.logits, {}),
    "t5": (
        tiny_models.t5,
        lambda rows: {**_ids(rows), "labels": torch.randint(4, tiny_models.VOCABULARY, (rows, 4))},
        lambda out: out.logits,
        {},
    ),
    "vit": (
        tiny_models.vit,
        lambda rows: {"pixel_values": torch.randn(rows, 3, 8, 8, dtype=torch.float64)},
        lambda out: out.logits,
        {"heads": ["classifier"]},
    ),
    "plain": (
        tiny_models.plain,
        lambda rows: {"x": torch.randn(rows, 3, 8, dtype=torch.float64)},
        lambda out: out,
        {},
    ),
}
ROWS = {
    "uniform": (0, 0, 1, 1, 2, 2),
    "ragged": (0, 1, 1, 1, 2, 2),
    "unsorted": (2, 0, 1, 0, 2, 2),
    "absent": (2, 0, 0, 2),
}


def _bank(model, heads=(), **lora) -> AdapterBank:
    bank = AdapterBank(
        model, ["a", "b", "c"], lora={"r": 3, "lora_alpha": 5, **lora}, heads=heads
    ).double()
    with torch.no_grad():
        for p in bank.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return bank


def _as_peft(model, bank, slot, trainable=False):
    config = peft.LoraConfig(
        **{
            k: v
            for k, v in peft_config(bank, model, None).items()
            if k
            in (
                "r",
                "lora_alpha",
                "use_rslora",
                "target_modules",
                "modules_to_save",
                "fan_in_fan_out",
            )
        }
    )
    wrapped = peft.get_peft_model(copy.deepcopy(model), config)
    loaded_keys = peft.set_peft_model_state_dict(wrapped, peft_tensors(bank, slot))
    assert not loaded_keys.unexpected_keys
    if trainable:
        for name, p in wrapped.named_parameters():
            p.requires_grad_("original_module" not in name)
    return wrapped.eval()


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_equal_peft_one_task_at_a_time(case, rows):
    build, inputs_of, output_of, extra = CASES[case]
    torch.manual_seed(0)
    model = build().double().eval()
    slots = ROWS[rows]
    inputs = inputs_of(len(slots))
    bank = _bank(model, **extra)
    with bank.attached(), route(slots):
        out = output_of(model(**inputs))
    weights = torch.randn_like(out)
    (out * weights).sum().backward()

    expected_base = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for slot in set(slots):
        single = _as_peft(model, bank, slot, trainable=True)
        mine = torch.tensor([s == slot for s in slots])
        part = output_of(single(**{k: v[mine] for k, v in inputs.items()}))
        torch.testing.assert_close(out[mine], part, rtol=1e-9, atol=1e-12)
        (part * weights[mine]).sum().backward()
        for name, p in single.named_parameters():
            plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
            if plain in expected_base and p.grad is not None:
                expected_base[plain] += p.grad
        for name in bank.layer_names:
            layer = single.base_model.model.get_submodule(name)
            banked = bank.layers[name.replace(".", "/")]
            for factor, adapter in ((banked.a, layer.lora_A), (banked.b, layer.lora_B)):
                expected = adapter["default"].weight.grad
                if expected is None:  # a layer that the model does not call, such as the pooler
                    assert factor.grad is None
                    continue
                mine_only = factor.grad[slot] if factor is banked.a else bank_b_grad(banked, slot)
                torch.testing.assert_close(mine_only, expected, rtol=1e-9, atol=1e-12)
    for name, p in model.named_parameters():
        base_grad = torch.zeros_like(p) if p.grad is None else p.grad
        torch.testing.assert_close(base_grad, expected_base[name], rtol=1e-9, atol=1e-12)


def bank_b_grad(layer, slot):
    grad = layer.b.grad[slot]
    return grad[..., None] if layer.is_conv else grad.T


@pytest.mark.parametrize("lora", [{}, {"use_rslora": True}, {"lora_alpha": 32}])
@pytest.mark.parametrize("case", CASES)
def test_exported_adapter_gives_the_same_outputs_in_stock_peft(case, lora, tmp_path):
    build, inputs_of, output_of, extra = CASES[case]
    torch.manual_seed(1)
    model = build().double().eval()
    bank = _bank(model, **extra, **lora)
    inputs = inputs_of(2)
    write_adapter(
        tmp_path, peft_config(bank, model, None), peft_tensors(bank, 1), base_record(model)
    )
    with bank.attached(), route((1, 1)), torch.no_grad():
        ours = output_of(model(**inputs))
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(output_of(loaded(**inputs)), ours, rtol=1e-6, atol=1e-7)


def test_a_bank_of_heads_only_is_loaded_by_stock_peft(tmp_path):
    model = tiny_models.bert(num_labels=3)
    bank = AdapterBank(model, ["a"], heads=["classifier"], fresh_heads=True)
    write_adapter(
        tmp_path, peft_config(bank, model, None), peft_tensors(bank, 0), base_record(model)
    )
    inputs = _ids(2)
    with bank.attached(), route((0, 0)), torch.no_grad():
        ours = model(**inputs).logits
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, ours)
        assert not torch.allclose(model(**inputs).logits, ours)


def test_bank_does_not_change_the_model():
    model = tiny_models.bert()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    inputs = _ids(2)
    plain = model(**inputs).last_hidden_state
    bank = _bank(model)
    with bank.attached():
        assert list(model.state_dict()) == list(before)
        with route(None):
            torch.testing.assert_close(model(**inputs).last_hidden_state, plain)
        with pytest.raises(UserError, match="outside route"):
            model(**inputs)
    assert all("forward" not in vars(m) for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_slot_starts_the_same_whatever_other_slots_there_are():
    model = tiny_models.bert()
    few = AdapterBank(model, ["x"], lora={"r": 2})
    many = AdapterBank(model, ["a", "b", "x"], lora={"r": 2})
    for a, b in zip(few.slot_state(0).values(), many.slot_state(2).values(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(
        *[many.slot_state(s)["layers.encoder/layer/0/attention/self/query.a"] for s in (0, 1)]
    )


def test_fresh_adapters_change_nothing():
    model = tiny_models.llama()
    bank = AdapterBank(model, ["a"], lora={"r": 2})
    inputs = _ids(2)
    with torch.no_grad(), bank.attached(), route((0, 0)):
        torch.testing.assert_close(model(**inputs).logits, _plain_logits(model, inputs))


def _plain_logits(model, inputs):
    with route(None):
        return model(**inputs).logits


def test_dropout_is_applied_only_to_adapters_and_only_in_training():
    model = tiny_models.bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    bank = _bank(model.double(), lora_dropout=0.5)
    inputs = _ids(2)
    with torch.no_grad(), bank.attached(), route((0, 1)):
        scored = model.eval()(**inputs).last_hidden_state
        torch.testing.assert_close(model(**inputs).last_hidden_state, scored)
        assert not torch.allclose(model.train()(**inputs).last_hidden_state, scored)


def test_load_adapter_refuses_another_base(tmp_path):
    model, other_base = tiny_models.bert(seed=0), tiny_models.bert(seed=1)
    bank = AdapterBank(model, ["a"], lora={"r": 2})
    write_adapter(
        tmp_path, peft_config(bank, model, None), peft_tensors(bank, 0), base_record(model)
    )
    load_adapter(bank, 0, tmp_path, model)
    with pytest.raises(UserError, match="trained on another base"):
        load_adapter(bank, 0, tmp_path, other_base)


def test_load_adapter_refuses_another_rank(tmp_path):
    model = tiny_models.bert()
    bank = AdapterBank(model, ["a"], lora={"r": 2})
    write_adapter(
        tmp_path, peft_config(bank, model, None), peft_tensors(bank, 0), base_record(model)
    )
    with pytest.raises(UserError, match=r"has shape \(2, .*\), the bank's has \(4, "):
        load_adapter(AdapterBank(model, ["a"], lora={"r": 4}), 0, tmp_path, model)


def test_target_modules_that_match_nothing_list_what_there_is():
    with pytest.raises(
        UserError,
        match=r"no module matches target_modules='q_proj'; BertModel "
        r"has: query, key, value, dense",
    ):
        AdapterBank(tiny_models.bert(), ["a"], lora={"target_modules": ["q_proj"]})


def test_frozen_layers_are_not_adapted_by_default():
    model = tiny_models.bert()
    model.encoder.layer[0].requires_grad_(False)
    names = AdapterBank(model, ["a"], lora={"r": 2}).layer_names
    assert names and not any(name.startswith("encoder.layer.0.") for name in names)


def test_a_call_with_another_number_of_rows_than_the_route_is_refused():
    model = tiny_models.plain().double()
    bank = _bank(model)
    with pytest.raises(UserError, match="the route has 2 rows"), bank.attached(), route((0, 1)):
        model(torch.randn(3, 3, 8, dtype=torch.float64))


def test_adapters_inside_a_transformer_encoder_count_when_it_is_scored():
    """torch's fast path reads the weights of `linear1` and `linear2` without calling them."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()
    names = ["layers.0.linear1", "layers.0.linear2"]
    bank = AdapterBank(model, ["a"], lora={"r": 2, "target_modules": names})
    x = torch.randn(3, 5, 8)
    with torch.no_grad():
        before = model(x)
        for name in names:
            a, b = bank.factors(name, 0)
            bank.set_factors(name, 0, torch.randn_like(a), torch.randn_like(b))
        with bank.attached(), route((0, 0, 0)):
            adapted = model(x)
    assert torch.backends.mha.get_fastpath_enabled()
    assert not torch.allclose(before, adapted)
