"""Which model counts as the base of an adapter."""

from __future__ import annotations

import copy
import json

import pytest
import torch

import tiny_models
from foretune.adapters.fingerprint import base_record, fingerprint, is_base
from foretune.adapters.stored_adapter import FINGERPRINT_FILE, check_base
from foretune.errors import UserError

HALVES = ["bfloat16", "float16"]


def cast(model, dtype):
    return model.to(getattr(torch, dtype))


@pytest.mark.parametrize("half", HALVES)
def test_checkpoint_in_half_precision_is_one_base_in_any_dtype(half):
    held = cast(tiny_models.bert(), half)
    record = base_record(held)
    assert is_base(cast(tiny_models.bert(), half).float(), record)
    other = base_record(cast(tiny_models.bert(), half).float())
    assert is_base(held, other) and other["base"]["float32"] == record["base"]["float32"]


@pytest.mark.parametrize("half", HALVES)
def test_base_rounded_on_loading_is_still_meant(half):
    rounded = cast(tiny_models.bert(), half)
    assert is_base(rounded, base_record(tiny_models.bert()))
    assert is_base(tiny_models.bert(), base_record(rounded))
    assert not is_base(rounded, base_record(tiny_models.bert(seed=1)))


def test_base_in_single_precision_is_not_recognised_by_rounded_values():
    model = tiny_models.bert()
    with torch.no_grad():  # a change that bfloat16 does not resolve
        model.get_parameter("embeddings.word_embeddings.weight").mul_(1 + 2**-12)
    assert not is_base(model, base_record(tiny_models.bert()))


def test_heads_that_an_adapter_brings_do_not_count():
    record = base_record(tiny_models.bert(num_labels=3), ["classifier"])
    assert record["without"] == ["classifier"]
    assert is_base(_with_head(3, 1.0), record) and is_base(_with_head(5, 0.0), record)
    assert not is_base(_with_head(3, 1.0), base_record(tiny_models.bert(num_labels=3)))


def _with_head(num_labels, shift):
    model = tiny_models.bert(num_labels=num_labels)
    with torch.no_grad():
        model.classifier.weight.add_(shift)
    return model


@pytest.mark.parametrize("heads", [[], ["classifier"]])
def test_records_of_the_first_version_are_read_by_their_rule(heads, tmp_path):
    """They hold one digest, exact in the dtype of the base, without the adapter's own modules."""
    model = tiny_models.bert(num_labels=3)
    half = tiny_models.bert(num_labels=3).bfloat16()
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "modules_to_save": heads or None})
    )
    for record, base in (
        ({"base": fingerprint(model, heads)}, model),
        ({"format": "foretune-adapter-1", "base": fingerprint(model, heads)}, model),
        ({"base": fingerprint(copy.deepcopy(half).float(), heads)}, half),
        ({"base": fingerprint(half, heads)}, copy.deepcopy(half).float()),
    ):
        (tmp_path / FINGERPRINT_FILE).write_text(json.dumps(record))
        check_base(tmp_path, base)
    with pytest.raises(UserError, match="was trained on another base"):
        check_base(tmp_path, tiny_models.bert(num_labels=3, seed=1))


@pytest.mark.parametrize("text", ["{", "[]", '{"base": 3}', '{"base": {"float32": 1}}', '{"x": 1}'])
def test_damaged_record_is_one_line(text, tmp_path):
    (tmp_path / FINGERPRINT_FILE).write_text(text)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"base_fingerprint\.json .*(damaged|not JSON|no mapping)"):
        check_base(tmp_path, tiny_models.bert())
