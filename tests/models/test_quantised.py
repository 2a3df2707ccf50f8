"""Adapters over bases in 4 and 8 bits, against stock PEFT on the same quantised base."""

from __future__ import annotations

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import foretune
import tiny_models
from foretune.adapters.bank import AdapterBank
from foretune.adapters.fingerprint import base_record, fingerprint, is_base
from foretune.adapters.head_copies import escaped
from foretune.adapters.peft_format import peft_config, peft_tensors, write_adapter
from foretune.errors import UserError
from foretune.models.frozen_prefix import frozen_prefix
from foretune.models.loading import load_base, load_model, load_module, save_base
from foretune.models.prefix_cache import prefix_cache
from foretune.models.quantised import dense_weight, quantised_as, quantised_layers
from foretune.models.routing import route
from foretune.run import Run
from foretune.tasks.objectives.causal_lm import CausalLM
from foretune.tasks.task import Task, TaskCollection

pytest.importorskip("bitsandbytes")

BUILDERS = {
    "llama": lambda: tiny_models.llama(hidden_size=32, intermediate_size=64).float(),
    "gpt2": lambda: tiny_models.gpt2(n_embd=32).float(),
    "roberta with a head": lambda: tiny_models.roberta(
        num_labels=3, hidden_size=32, intermediate_size=64
    ).float(),
}
DIVISIBLE = {"hidden_size": 64, "intermediate_size": 64}  # by the size of a block, or it fails


@pytest.fixture
def folder(tmp_path, request):
    model = BUILDERS[getattr(request, "param", "llama")]()
    save_base(model, tiny_models.tokenizer(), tmp_path / "base")
    return tmp_path / "base"


def _ids(rows: int) -> torch.Tensor:
    return torch.randint(4, tiny_models.VOCABULARY, (rows, 6))


def _bank(model, keys=("a", "b"), **options) -> AdapterBank:
    bank = AdapterBank(model, keys, lora={"r": 3, "lora_alpha": 5}, **options)
    with torch.no_grad():
        for p in bank.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return bank


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
@pytest.mark.parametrize("folder", BUILDERS, indirect=True)
def test_mixed_batch_is_stock_peft_one_task_at_a_time(folder, quantize, tmp_path):
    model, _ = load_base(folder, quantize=quantize)
    assert quantised_as(model) == quantize
    heads = ["classifier"] if hasattr(model, "classifier") else []
    assert not any(name.startswith(tuple(heads)) for name in quantised_layers(model) if heads)
    bank = _bank(model, heads=heads)
    close = {"nf4": 1e-5, "int8": 5e-3}[quantize]  # inputs are rounded to 8 bits, too
    ids, slots = _ids(6), torch.tensor([1, 0, 0, 1, 0, 1])
    with bank.attached(), route(slots):
        logits = model(ids).logits
    logits.square().sum().backward()
    config = peft_config(bank, model, str(folder))
    record = base_record(model, bank.head_names)
    for slot in (0, 1):
        write_adapter(tmp_path / "adapter", config, peft_tensors(bank, slot), record)
        stock = peft.PeftModel.from_pretrained(
            load_base(folder, quantize=quantize)[0], tmp_path / "adapter", is_trainable=True
        )
        rows = slots == slot
        expected = stock.eval()(ids[rows]).logits
        assert torch.allclose(logits[rows], expected, atol=close * expected.abs().max().item())
        expected.square().sum().backward()
        for name in bank.layer_names:
            layer = stock.get_submodule(f"base_model.model.{name}")
            grads = (layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad)
            stacked = bank.layers[escaped(name)]
            values = (stacked.a.grad[slot], stacked.b.grad[slot].T)
            for value, reference in zip(values, grads, strict=True):
                assert torch.allclose(value, reference, atol=close * reference.abs().max().item())


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_loaded_as_transformers_quantises(folder, quantize):
    options = {
        "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        "int8": {"load_in_8bit": True, "llm_int8_threshold": 0.0},
    }
    config = BitsAndBytesConfig(**options[quantize])
    stock = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.float32
    )
    ids, model = _ids(3), load_base(folder, quantize=quantize)[0]
    # in evaluation bitsandbytes rounds to bfloat16 on some processors, and here it must not
    stock.train(quantize == "nf4")
    assert torch.equal(model(ids).logits, stock(ids).logits)
    assert quantised_layers(model).keys() == quantised_layers(stock).keys()


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_dense_weight_is_what_the_layer_multiplies_by(folder, quantize):
    model, _ = load_base(folder, quantize=quantize)
    layer = next(iter(quantised_layers(model).values()))
    x = torch.randn(4, layer.in_features)
    before = dense_weight(layer)
    y = layer(x)
    assert torch.allclose(y, x @ before.T, atol=0.02)
    assert torch.equal(dense_weight(layer), before)  # the scales have moved by now


def test_gradient_after_a_call_in_evaluation(folder):
    """bitsandbytes repacks a weight in evaluation, and gave no gradient below it from then on."""
    save_base(tiny_models.llama(**DIVISIBLE).float(), tiny_models.tokenizer(), folder)
    from bitsandbytes.functional import has_avx512bf16

    stock = AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        dtype=torch.float32,
    ).eval()
    ids = _ids(4)

    def gradients(model=stock) -> list[torch.Tensor]:
        torch.manual_seed(0)
        bank = _bank(model)
        with bank.attached(), route(torch.tensor([0, 1, 1, 0])):
            model(ids).logits.square().sum().backward()
        return [p.grad for p in bank.parameters()]

    first = gradients()
    dense = AutoModelForCausalLM.from_pretrained(folder).eval()
    for name, layer in quantised_layers(stock).items():
        dense.get_submodule(name).weight.data = dense_weight(layer).clone()
    for value, reference in zip(first, gradients(dense), strict=True):
        assert torch.allclose(value, reference, atol=1e-4 * reference.abs().max().item())
    with torch.no_grad():
        stock(ids)
    assert all(map(torch.equal, gradients(), first))
    for layer in quantised_layers(stock).values():
        layer.support_avx512bf16_for_cpu = has_avx512bf16()  # as before foretune has seen it
    with torch.no_grad():
        stock(ids)
    for value, reference in zip(gradients(), first, strict=True):  # repacking rounds the scales
        assert torch.allclose(value, reference, atol=0.02 * reference.abs().max().item())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_recognised_by_the_original(folder, dtype, quantize):
    original, _ = load_base(folder)
    other = tiny_models.llama(hidden_size=32, intermediate_size=64, seed=1).float()
    model, _ = load_base(folder, dtype=dtype, quantize=quantize)
    record = base_record(model)
    assert is_base(original, record)
    assert is_base(model, base_record(original))
    assert not is_base(other, record)
    assert not is_base(model, base_record(other))
    assert {str(p.dtype) for p in model.parameters() if p.is_floating_point()} == {f"torch.{dtype}"}


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_quantised_checkpoint(folder, quantize, tmp_path):
    """It is a base of its own, and its scales count as much as its integers."""
    model, tokenizer = load_base(folder, quantize=quantize)
    save_base(model, tokenizer, tmp_path / "small")
    loaded, _ = load_base(tmp_path / "small")
    assert quantised_as(loaded) == quantize
    ids = _ids(3)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    record = base_record(loaded)
    assert is_base(loaded, record)
    assert not is_base(load_base(folder)[0], record)
    layer = next(iter(quantised_layers(loaded).values()))
    scale = layer.weight.quant_state.absmax if quantize == "nf4" else layer.state.SCB
    before = fingerprint(loaded)
    scale.mul_(2)
    assert fingerprint(loaded) != before
    assert not is_base(loaded, record)
    with pytest.raises(UserError, match="is quantised already"):
        load_base(tmp_path / "small", quantize=quantize)


def test_rows_in_8_bits_do_not_depend_on_one_another(folder):
    """Which inputs are outliers would be decided for the batch as a whole."""
    model, tokenizer = load_base(folder)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "layernorm" in name:
                p *= 4  # inputs beyond 6, the usual threshold
    save_base(model, tokenizer, folder.parent / "outliers")
    loaded, _ = load_base(folder.parent / "outliers", quantize="int8")
    ids = _ids(5)
    with torch.no_grad():
        alone = torch.cat([loaded(row[None]).logits for row in ids])
        assert torch.allclose(loaded(ids).logits, alone, atol=1e-5)


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_states_are_not_shared_by_bases_of_other_scales(folder, quantize):
    """Weights twice as large have the same integers."""
    model, tokenizer = load_base(folder)
    ids = _ids(3)

    def logits_and_cache(where) -> tuple[torch.Tensor, object]:
        base, _ = load_base(where, quantize=quantize)
        last = len(base.model.layers) - 1
        base.requires_grad_(False)
        cache = prefix_cache(base, last, {})
        with torch.no_grad(), frozen_prefix(base, [f"model.layers.{last}.mlp.up_proj"]):
            return base(ids).logits, cache

    first, first_cache = logits_and_cache(folder)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight *= 2
    save_base(model, tokenizer, folder.parent / "scaled")
    second, second_cache = logits_and_cache(folder.parent / "scaled")
    assert second_cache is not first_cache
    assert not torch.allclose(first, second, atol=1e-4)


def test_own_code_keeps_its_weights(tmp_path):
    (tmp_path / "net.py").write_text("import torch\ndef build(): return torch.nn.Linear(2, 2)\n")
    save_base(load_module(tmp_path / "net.py"), None, tmp_path / "base")
    for options in ({"dtype": "bfloat16"}, {"quantize": "nf4"}):
        with pytest.raises(UserError, match="keeps the weights that it makes"):
            load_base(tmp_path / "base", **options)
    assert load_base(tmp_path / "base", dtype="auto")[0].weight.dtype == torch.float32


def test_trainable_layers_are_those_adapted(folder):
    model, _ = load_model(folder, head="causal-lm", trainable_layers=1, quantize="nf4")
    plain, _ = load_model(folder, head="causal-lm", trainable_layers=1)
    names = AdapterBank(model, ["a"], lora={}).layer_names
    assert names == AdapterBank(plain, ["a"], lora={}).layer_names
    assert len(names) < len(quantised_layers(model))


def test_kept_apart_from_full_weights(folder):
    model, _ = load_base(folder, quantize="nf4")
    rows = [{"text": "a b c d"}] * 4
    objective = CausalLM(tiny_models.tokenizer())
    tasks = TaskCollection((Task("one", rows, [], rows),)).with_objective(objective)
    with pytest.raises(UserError, match=r"held in 4 bits \(nf4\).*retrain the original"):
        foretune.retrain(model, tasks, foretune.PEFTML())
    with pytest.raises(UserError, match=r"full changes the weights.*adapt it with lora or head"):
        foretune.adapt(model, tasks, foretune.Full())
    with pytest.raises(UserError, match="quantised, but sparse adapters"):
        AdapterBank(model, ["a"], lora={}, sparse=0.1)


def test_nothing_else_is_quantised(tmp_path):
    with pytest.raises(UserError, match="quantize must be one of nf4, int8; got 'int4'"):
        load_base(tmp_path, quantize="int4")


def test_not_sharded(folder, monkeypatch):
    model, tokenizer = load_model(folder, head="causal-lm", quantize="nf4")
    rows = [{"text": "the cat sat"}]
    tasks = TaskCollection((Task("t", rows, rows, rows),), CausalLM(tokenizer))
    monkeypatch.setattr("foretune.training.adapting.base_is_sharded", lambda: True)
    with pytest.raises(UserError, match="a quantised base cannot be sharded"):
        foretune.adapt(model, tasks, foretune.LoRA(), Run(steps=1))
