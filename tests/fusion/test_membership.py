"""Adding and removing an expert is fusing anew with it and without it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import foretune
import tiny_models
from foretune import SMILE, UserError
from fusion.fused_models import FAMILIES, adapted, ids, linears, nudged, output, saved
from linear_tasks import equal_bits

METHODS = {
    "plain": SMILE(k=4, gate_k=2),
    "two": SMILE(k=4, gate_k=2, top_k=2, routing="sequence"),
    "dense": SMILE(k=None, gate_k=3),
    "weights": SMILE(k=4, gate_k=2, routing_use_diff=False),
    "some": SMILE(k=4, gate_k=2, exclude_modules=["pooler"]),
}


def bert_models() -> tuple[Any, dict[str, Any]]:
    """Full models and LoRAs of other layers and ranks, biases alone, with heads of their own."""
    base = tiny_models.bert(num_labels=3)
    save_head = {"modules_to_save": ["classifier"]}
    return base, {
        "full": nudged(base, 1, "query"),
        "two": adapted(base, 2, ["query", "value"], r=2, **save_head),
        "five": adapted(base, 3, ["key", "value"], r=5, **save_head),
        "bias": nudged(nudged(base, 4, "key.bias"), 5, "classifier"),
        "headless": adapted(base, 6, ["query"], r=1),
    }


def assert_same(fused: Any, anew: Any, path: Path) -> None:
    """Equal bits, in memory and in a folder that is loaded again."""
    assert fused.names == anew.names == fused.routing.names
    assert fused.labels == anew.labels and set(fused.heads) == set(anew.heads)
    assert equal_bits(fused.model.state_dict(), anew.model.state_dict())
    for key in ("layers", "energy_kept", "extra_parameters", "base_parameters"):
        assert fused.report[key] == anew.report[key], key
    loaded = foretune.load_fused(fused.save(path))
    for task in anew.names:
        batch = {"input_ids": ids()}
        expected = output(anew.set_task(task).model, batch)
        assert torch.equal(output(fused.set_task(task).model, batch), expected)
        assert torch.equal(output(loaded.set_task(task).model, batch), expected)


@pytest.mark.parametrize("kind", METHODS)
def test_adding_and_removing_is_fusing_anew(kind: str, tmp_path: Path) -> None:
    base, models = bert_models()
    method = METHODS[kind]
    for name in models if kind == "plain" else ("five",):
        others = {n: m for n, m in models.items() if n != name}
        fused = foretune.fuse(base, others, method)
        fused.set_task("two" if name != "two" else "full")
        # The last task of the fused model is the new one.
        anew = foretune.fuse(base, {**others, name: models[name]}, method)
        assert_same(fused.add_expert(name, models[name]), anew, tmp_path / "a")
        assert_same(fused.remove_expert(name), foretune.fuse(base, others, method), tmp_path / "b")


def test_a_loaded_model_takes_experts_from_folders(tmp_path: Path) -> None:
    base, models = bert_models()
    folders = {n: saved(m, tmp_path / n) for n, m in models.items()}
    first = {n: folders[n] for n in ("full", "two")}
    options = {"allow_unverified": True}
    fused = foretune.fuse(base, first, METHODS["plain"], **options)
    loaded = foretune.load_fused(fused.save(tmp_path / "fused"))
    loaded.add_expert("headless", folders["headless"], **options)
    headless = {**first, "headless": folders["headless"]}
    anew = foretune.fuse(base, headless, METHODS["plain"], **options)
    assert_same(loaded, anew, tmp_path / "again")
    assert "headless does not record its base" in loaded.report["notes"][-1]
    with pytest.raises(UserError, match="does not record which base"):
        loaded.add_expert("five", folders["five"])
    assert loaded.names == ["full", "two", "headless"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "vit", "t5"])
def test_other_families(family: str) -> None:
    build, make_batch = FAMILIES[family]
    base, batch = build(), make_batch()
    models = {name: linears(base, seed) for seed, name in enumerate("abc")}
    method = SMILE(k=4, gate_k=2)
    fused = foretune.fuse(base, {n: models[n] for n in "ab"}, method)
    fused.add_expert("c", models["c"])
    anew = foretune.fuse(base, models, method)
    assert torch.equal(output(fused.model, batch), output(anew.model, batch))
    fused.remove_expert("a").remove_expert("c")
    alone = foretune.fuse(base, {"b": models["b"]}, method)
    assert torch.equal(output(fused.model, batch), output(alone.model, batch))


def test_one_model_with_a_head_gets_a_second(tmp_path: Path) -> None:
    base, models = bert_models()
    method = METHODS["plain"]
    fused = foretune.fuse(base, {"full": models["full"]}, method)
    fused.add_expert("two", models["two"])
    anew = foretune.fuse(base, {n: models[n] for n in ("full", "two")}, method)
    assert_same(fused, anew, tmp_path / "out")


def test_gates_from_activations_are_made_again_of_all_tasks() -> None:
    base, models = bert_models()
    method = SMILE(k=4, gate_k=2, gate="activations", routing="sequence")
    samples = {name: [{"input_ids": ids(seed=i)}] for i, name in enumerate(models)}
    two = {n: models[n] for n in ("full", "two")}
    three = {n: models[n] for n in ("full", "two", "five")}
    fused = foretune.fuse(base, two, method, samples=samples)
    with pytest.raises(UserError, match="samples of every task are needed; none for full, two"):
        fused.add_expert("five", models["five"])
    fused.add_expert("five", models["five"], samples)
    anew = foretune.fuse(base, three, method, samples=samples)
    assert equal_bits(fused.model.state_dict(), anew.model.state_dict())
    fused.remove_expert("five", samples)
    anew = foretune.fuse(base, two, method, samples=samples)
    assert equal_bits(fused.model.state_dict(), anew.model.state_dict())


def test_what_cannot_be_changed_is_refused() -> None:
    base, models = bert_models()
    two = {n: models[n] for n in ("full", "two")}
    fused = foretune.fuse(base, two, METHODS["plain"])
    before = {k: v.clone() for k, v in fused.model.state_dict().items()}
    with pytest.raises(UserError, match='there is an expert "two" already'):
        fused.add_expert("two", models["two"])
    with pytest.raises(UserError, match='no expert "three"; there are full, two'):
        fused.remove_expert("three")
    with pytest.raises(UserError, match="samples are for gate=activations"):
        fused.remove_expert("two", {"full": []})
    with pytest.raises(UserError, match="was not tuned from this base"):
        fused.add_expert("odd", tiny_models.bert(num_labels=3, intermediate_size=24))
    assert equal_bits(fused.model.state_dict(), before) and fused.names == ["full", "two"]
    with pytest.raises(UserError, match="two is the only expert"):
        fused.remove_expert("full").remove_expert("two")
    with pytest.raises(UserError, match="average merges the models into one set of weights"):
        foretune.fuse(base, two, foretune.Average()).add_expert("five", models["five"])
    with pytest.raises(UserError, match="rest=average merges"):
        averaged = dataclasses.replace(METHODS["plain"], rest="average")
        foretune.fuse(base, two, averaged).remove_expert("full")
