"""The one reader of adapter folders: what is refused by every verb, and what is noted."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import foretune
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

pytest.importorskip("foretune.fusion")
peft_model = pytest.importorskip("foretune.decoding.peft_model")

LORA = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}
WEIGHTS, CONFIG, RECORD = (
    *("adapter_model.safetensors", "adapter_config.json"),
    "base_fingerprint.json",
)


def banked(model, heads=()):
    bank = AdapterBank(model, ["a"], lora=LORA, heads=heads)
    with torch.no_grad():
        for p in bank.parameters():
            p.normal_()
    return bank


@pytest.fixture
def folder(tmp_path):
    """An adapter with a copy of the language model head."""
    model = tiny_models.llama()
    bank = banked(model, ["lm_head"])
    record = base_record(model, bank.head_names)
    write_adapter(tmp_path, peft_config(bank, model, None), peft_tensors(bank, 0), record)
    return tmp_path


def by_decoding(folder, **options):
    return peft_model.with_adapter(tiny_models.llama(), folder, **options)


def by_fusing(folder, **options):
    return foretune.fuse(tiny_models.llama(), {"a": folder}, foretune.Average(), **options)


def by_resuming(folder):
    model = tiny_models.llama()
    load_adapter(banked(model, ["lm_head"]), 0, folder, model)


VERBS = {"decode": by_decoding, "fuse": by_fusing, "resume": by_resuming}


def change_tensors(change):
    def damage(folder):
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return damage


def change_config(**fields):
    def damage(folder):
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(config | fields))

    return damage


def remove(*parts):
    """Removes the tensors whose names contain all of the parts."""

    def change(tensors):
        for key in [k for k in tensors if all(part in k for part in parts)]:
            del tensors[key]

    return change_tensors(change)


def spoil(number):
    return change_tensors(lambda t: t[next(k for k in t if "lora_B" in k)].fill_(number))


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def truncate(folder):
    write(WEIGHTS, (folder / WEIGHTS).read_bytes()[:-100])(folder)


DAMAGES = {
    "B missing": (remove("layers.1.self_attn.v_proj.lora_B"), "half an adapter: .* no lora_B"),
    "A missing": (remove("layers.1.self_attn.v_proj.lora_A"), "half an adapter: .* no lora_A"),
    "layer missing": (remove("layers.1.self_attn.v_proj"), "half an adapter: .* no tensors of"),
    "head missing": (remove("lm_head"), "half an adapter: it has no lm_head.weight"),
    "all missing": (remove(""), "holds no tensors"),
    "all but the head missing": (remove("lora_"), "half an adapter: it has no tensors of"),
    "NaN": (spoil(float("nan")), "lora_B.weight holds NaN or infinite"),
    "infinite": (spoil(float("inf")), "lora_B.weight holds NaN or infinite"),
    "another r": (change_config(r=3), "the config has r=3 for .*, but its factors have rank 2"),
    "r as text": (change_config(r="2"), "adapter_config.json is damaged: r: .*, got '2'"),
    "r zero": (change_config(r=0), "r must be a number above 0, got 0"),
    "alpha as text": (change_config(lora_alpha="4"), "damaged: lora_alpha: .*, got '4'"),
    "alpha NaN": (change_config(lora_alpha=float("nan")), "lora_alpha must be a number above 0"),
    "rank pattern": (change_config(rank_pattern={"q_proj": 4}), "the config has r=4 for"),
    "bad pattern": (change_config(target_modules="("), "is not a regular expression"),
    "targets a number": (change_config(target_modules=5), "damaged: target_modules"),
    "layers and a pattern": (
        change_config(target_modules=".*q_proj", layers_to_transform=[0]),
        "adapter_config.json: `layers_to_transform` cannot be used",
    ),
    "imports a module": (change_config(megatron_config={"a": 1}), "Megatron"),
    "config a list": (write(CONFIG, b"[1]"), "adapter_config.json is damaged"),
    "config no JSON": (write(CONFIG, b"{"), "adapter_config.json is not JSON"),
    "config no adapter's": (write(CONFIG, b"{}"), "adapter_config.json is damaged: peft_type"),
    "truncated": (truncate, "is not a readable safetensors file"),
    "garbage": (write(WEIGHTS, b"garbage" * 9), "is not a readable safetensors file"),
    "record garbage": (write(RECORD, b"{"), "base_fingerprint.json is not JSON"),
    "record no key": (write(RECORD, b"{}"), "base_fingerprint.json is damaged: base"),
    "record a number": (write(RECORD, b"5"), "base_fingerprint.json .*no mapping"),
    "another base": (write(RECORD, b'{"base": "0000"}'), "was trained on another base"),
    "no record": (lambda folder: (folder / RECORD).unlink(), "does not record which base"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "only safetensors are read"),
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_whole_adapter_is_taken(verb, folder):
    VERBS[verb](folder)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("verb", VERBS)
def test_a_damaged_adapter_is_refused_by_every_verb(verb, damage, folder):
    do_damage, message = DAMAGES[damage]
    do_damage(folder)
    with pytest.raises(UserError, match=message) as error:
        VERBS[verb](folder)
    assert "\n" not in str(error.value)


def test_an_adapter_that_peft_wrote_needs_to_be_allowed_and_is_noted(tmp_path):
    made = peft.get_peft_model(
        tiny_models.llama(), peft.LoraConfig(**LORA, init_lora_weights=False)
    )
    made.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"--allow-unverified \(allow_unverified=True\)"):
        by_fusing(tmp_path)
    with pytest.warns(UserWarning, match="does not record its base"):
        model = by_decoding(tmp_path, allow_unverified=True)
    ids = torch.tensor([[4, 5, 6]])
    torch.testing.assert_close(model(input_ids=ids).logits, made.eval()(input_ids=ids).logits)
    (note,) = by_fusing(tmp_path, allow_unverified=True).report["notes"]
    assert "does not record its base" in note


def test_an_adapter_without_an_effect_is_reported(tmp_path):
    model = tiny_models.llama()
    bank = AdapterBank(model, ["a"], lora=LORA)  # B is zero
    write_adapter(
        tmp_path, peft_config(bank, model, None), peft_tensors(bank, 0), base_record(model)
    )
    with pytest.warns(UserWarning, match="the adapter has no effect"):
        by_decoding(tmp_path)


def test_an_adapter_of_what_the_model_does_not_use_is_reported(tmp_path):
    model = tiny_models.llama()
    model.unused = torch.nn.Linear(4, 4)
    bank = AdapterBank(model, ["a"], lora={"r": 2, "target_modules": ["unused"]})
    with torch.no_grad():
        for p in bank.parameters():
            p.normal_()
    write_adapter(
        tmp_path, peft_config(bank, model, None), peft_tensors(bank, 0), base_record(model)
    )
    with pytest.warns(UserWarning, match="no effect: it changes no output for 8 tokens"):
        peft_model.with_adapter(model, tmp_path)


def test_fields_that_name_code_are_never_imported(tmp_path, folder):
    (tmp_path / "trap.py").write_text("raise SystemExit('imported')")
    trap = {"base_model_class": "Trap", "parent_library": "trap"}
    change_config(auto_mapping=trap, megatron_core="trap", auto_map={"AutoModel": "trap.Trap"})(
        folder
    )
    by_decoding(folder)


def test_an_adapter_of_an_encoder_decoder_is_taken(tmp_path):
    model = tiny_models.t5()
    bank = AdapterBank(model, ["a"], lora={"r": 2, "target_modules": ["q"]})
    with torch.no_grad():
        for p in bank.parameters():
            p.normal_()
    write_adapter(
        tmp_path, peft_config(bank, model, None), peft_tensors(bank, 0), base_record(model)
    )
    peft_model.with_adapter(model, tmp_path)
