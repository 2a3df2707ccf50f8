"""Folders of towers: foretune loads them without code from the folder, transformers with it."""

from __future__ import annotations

import json

import peft
import pytest
import torch
import transformers
from transformers.dynamic_module_utils import get_class_from_dynamic_module

import foretune
import tiny_models
from foretune.adapters.stored_adapter import read_adapter
from foretune.errors import UserError
from foretune.models.loading import load_base, save_base
from foretune.models.tower_models import array_tower
from foretune.run import Run
from tower_tasks import TEXTS, encoder_folder, opinions, replies

RUN = Run(steps=4, batch_size=3, device="cpu")
LORA = {"r": 2, "lora_alpha": 4}


@pytest.fixture
def base(tmp_path):
    """The folder of a retrained tower."""
    model, tokenizer = foretune.load_model(
        encoder_folder(tmp_path / "e"), head="classification", tower=[5, 7]
    )
    run = RUN.replace(out=tmp_path / "out")
    foretune.retrain(model, opinions(), foretune.Standard(), run, tokenizer=tokenizer)
    return tmp_path / "out" / "base"


def encoded():
    return tiny_models.tokenizer()(list(TEXTS), padding=True, return_tensors="pt")


def copied_class(folder, name, monkeypatch, tmp_path):
    """The class in the Python file of a folder, as transformers executes it."""
    monkeypatch.setattr(
        transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    found = get_class_from_dynamic_module(f"tower.{name}", str(folder))
    assert found.__module__.startswith("transformers_modules")
    return found


def test_a_saved_tower_loads_bit_for_bit_without_its_code(base) -> None:
    (base / "tower.py").write_text("raise SystemExit('executed')")
    model, tokenizer = load_base(base)
    again, _ = load_base(base)
    assert torch.equal(model(**encoded()).logits, again(**encoded()).logits)
    assert model.config.id2label == {0: "no", 1: "yes"}
    assert tokenizer is not None
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and not [name for name in trained if name.startswith("body.encoder.")]


def test_a_folder_without_our_record_keeps_its_encoder_frozen(base) -> None:
    (base / "foretune.json").unlink()
    model, _ = foretune.load_model(base, head="classification")
    assert not any(p.requires_grad for p in model.body.encoder.parameters())


def test_stock_transformers_gives_the_same_logits(base, monkeypatch, tmp_path) -> None:
    config = json.loads((base / "config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "tower.TowerConfig",
        "AutoModelForSequenceClassification": "tower.TowerForSequenceClassification",
    }
    stock = copied_class(base, "TowerForSequenceClassification", monkeypatch, tmp_path)
    model = stock.from_pretrained(base).eval()
    assert torch.equal(model(**encoded()).logits, load_base(base)[0](**encoded()).logits)


@pytest.mark.parametrize("method", [foretune.LoRA(lora=LORA, learning_rate=0.1), foretune.Head()])
def test_adapters_load_with_stock_peft_on_both(base, method, monkeypatch, tmp_path) -> None:
    model, _ = load_base(base)
    tasks, out = opinions(2, start=4), tmp_path / "adapters"
    foretune.adapt(model, tasks, method, RUN.replace(out=out), shots=2)
    stock = copied_class(base, "TowerForSequenceClassification", monkeypatch, tmp_path)
    read_adapter(out / "p4", model)  # refuses another base
    logits = [
        peft.PeftModel.from_pretrained(loaded.eval(), out / "p4")(**encoded()).logits
        for loaded in (load_base(base)[0], stock.from_pretrained(base))
    ]
    assert torch.equal(*logits)
    assert not torch.equal(logits[0], model(**encoded()).logits)


def test_the_head_can_be_resized_on_loading(base) -> None:
    model, _ = foretune.load_model(base, head="classification", num_labels=5)
    assert model(**encoded()).logits.shape == (len(TEXTS), 5)


def test_a_second_tower_is_refused(base) -> None:
    with pytest.raises(UserError, match="has a tower already"):
        foretune.load_model(base, head="classification", tower=[4])


def test_a_saved_dual_tower_loads_bit_for_bit(tmp_path, monkeypatch) -> None:
    model, tokenizer = foretune.load_model(encoder_folder(tmp_path / "e"), tower=[5])
    run = RUN.replace(out=tmp_path / "out")
    method = foretune.PEFTML(learning_rate=0.1, lora=LORA)
    outcome = foretune.retrain(model, replies(), method, run, tokenizer=tokenizer)
    folder = tmp_path / "out" / "base"
    stock = copied_class(folder, "DualTower", monkeypatch, tmp_path)
    expected = outcome.model(**encoded(), side="response").pooler_output
    for loaded in (load_base(folder)[0], stock.from_pretrained(folder).eval()):
        assert torch.equal(loaded(**encoded(), side="response").pooler_output, expected)
    adapted = foretune.adapt(load_base(folder)[0], replies(2), foretune.LoRA(lora=LORA), RUN)
    assert len(adapted.config["target_modules"]) == 4


def test_a_saved_tower_on_arrays_loads_bit_for_bit(tmp_path, monkeypatch) -> None:
    model, x = array_tower(6, [4, 3], 2), torch.randn(5, 2, 3)
    save_base(model, None, tmp_path / "base")
    stock = copied_class(tmp_path / "base", "TowerForArrays", monkeypatch, tmp_path)
    for loaded in (load_base(tmp_path / "base")[0], stock.from_pretrained(tmp_path / "base")):
        assert torch.equal(loaded(x).logits, model(x).logits)
