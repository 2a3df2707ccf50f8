"""UNCURL and the methods that it is compared with: what is known exactly must come out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import foretune
import tiny_models
from foretune.errors import ForetuneError, UserError
from foretune.methods import make
from foretune.pruning.experts import find_blocks
from foretune.pruning.prune import collect_statistics, held_out_loss, prune_with
from foretune.pruning.statistics import ExpertStatistics
from pruning import tiny_mixtures

PRUNE = ["uncurl", "random-experts", "frequency", "hc-smoe", "reap"]
SPECIAL = [
    ("uncurl", {"router": "remap"}),
    ("hc-smoe", {"router": "remap", "align": True}),
    ("frequency", {"keep_denominator": True}),
    ("reap", {"experts": [3, 5]}),
]


def prune(model: Any, name: str, *, family: str = "mixtral", **fields: Any) -> Any:
    rows = tiny_mixtures.rows(family)
    tokenizer = tiny_models.tokenizer()
    return foretune.prune(model, rows, make(name, **fields), tokenizer=tokenizer)


def doubled() -> tuple[Any, torch.Tensor]:
    """A Mixtral of four experts, each there twice with its hidden units in another order.

    The router's rows of a pair differ by noise of 1e-3; the logits are those before doubling of
    a router that sees pairs, so nothing but a merge of the right pairs can bring them back.
    """
    model = tiny_mixtures.mixture("mixtral")
    generator = torch.Generator().manual_seed(1)
    for block in find_blocks(model):
        units, rest = block.read()
        units = units.clone()
        row = block.router.weight.data
        for e in range(4):
            units[e + 4] = units[e][torch.randperm(tiny_mixtures.INNER, generator=generator)]
            row[e + 4] = row[e] + 1e-3 * torch.randn(16, generator=generator)
        block.write(units, rest)
    return model, tiny_mixtures.logits(model)


@pytest.mark.parametrize(
    ("name", "fields", "within"),
    [
        ("uncurl", {"router": "remap"}, (0, 1e-4)),
        ("hc-smoe", {"router": "remap", "align": True}, (0, 1e-4)),
        ("uncurl", {"router": "remap", "align": False}, (0.5, 99)),
        ("uncurl", {"router": "mean"}, (0.5, 99)),
        ("frequency", {}, (0.5, 99)),
    ],
)
def test_doubled_experts_are_found_and_merged_without_loss(
    name: str, fields: dict[str, Any], within: tuple[float, float]
) -> None:
    model, before = doubled()
    pruned = prune(model, name, experts=4, **fields)
    if name != "frequency":
        pairs = {group for plan in pruned.plan.values() for group in plan.groups}
        assert pairs == {(0, 4), (1, 5), (2, 6), (3, 7)}
    changed = float((tiny_mixtures.logits(pruned.model) - before).abs().max())
    assert within[0] <= changed < within[1]


@pytest.mark.parametrize("family", [*tiny_mixtures.FAMILIES, "switch"])
@pytest.mark.parametrize("name", PRUNE)
def test_every_family_is_pruned_saved_and_loaded_by_transformers_bit_for_bit(
    name: str, family: str, tmp_path: Path
) -> None:
    pruned = prune(tiny_mixtures.mixture(family), name, family=family, experts=4)
    assert pruned.loads_with == "transformers"
    folder = pruned.save(tmp_path / "small")
    auto = "AutoModelForSeq2SeqLM" if family == "switch" else "AutoModelForCausalLM"
    loaded = tiny_mixtures.loaded(getattr(transformers, auto), folder)
    own = tiny_mixtures.realigned(pruned.model)
    assert torch.equal(tiny_mixtures.logits(loaded), tiny_mixtures.logits(own))
    assert {block.num_experts for block in find_blocks(loaded)} == {4}


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "gpt-oss", "switch"])
@pytest.mark.parametrize(("name", "fields"), SPECIAL)
def test_what_a_config_cannot_say_is_loaded_by_foretune_and_by_nothing_else(
    name: str, fields: dict[str, Any], family: str, tmp_path: Path
) -> None:
    model = tiny_mixtures.mixture(family)
    blocks = len(find_blocks(model))
    if "experts" in fields:
        fields = {"experts": [3, 5] * (blocks // 2)}
    pruned = prune(model, name, family=family, **{"experts": 4, **fields})
    plain = "keep_denominator" in fields and family in ("mixtral", "gpt-oss")
    assert pruned.loads_with == ("transformers" if plain else "foretune")
    folder = pruned.save(tmp_path / "small")
    loaded, _ = foretune.load_model(folder, head="causal-lm")
    own = tiny_mixtures.logits(tiny_mixtures.realigned(pruned.model))
    assert torch.equal(tiny_mixtures.logits(tiny_mixtures.realigned(loaded)), own)
    assert sum(p.numel() for p in loaded.parameters()) == pruned.size["after"]["parameters"]
    if not plain:
        with pytest.raises(OSError, match=r"no file named model\.safetensors"):
            type(model).from_pretrained(folder)


def test_a_special_folder_keeps_its_dtype_where_asked(tmp_path: Path) -> None:
    model = tiny_mixtures.mixture("mixtral").bfloat16()
    prune(model, "uncurl", experts=4, router="remap").save(tmp_path / "small")
    auto, _ = foretune.load_model(tmp_path / "small", head="causal-lm", dtype="auto")
    full, _ = foretune.load_model(tmp_path / "small", head="causal-lm")
    assert (auto.dtype, full.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pruning_a_folder_equals_pruning_the_model_and_keeps_its_dtype(
    dtype: Any, tmp_path: Path
) -> None:
    model = tiny_mixtures.mixture("qwen2-moe").to(dtype)
    model.save_pretrained(tmp_path / "given")
    tiny_models.tokenizer().save_pretrained(tmp_path / "given")
    rows = tiny_mixtures.rows()
    method = foretune.UNCURL(experts=3)
    of_folder = foretune.prune(tmp_path / "given", rows, method)
    assert of_folder.model.dtype == dtype
    if dtype == torch.bfloat16:
        return  # its rounding depends on where tensors lie, and so may the clusters
    of_model = foretune.prune(model, rows, method, tokenizer=tiny_models.tokenizer())
    assert of_folder.plan == of_model.plan
    state = of_model.model.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in of_folder.model.state_dict().items())


def statistics(frequency: list[float], logits: np.ndarray, **more: Any) -> ExpertStatistics:
    f = np.array(frequency, dtype=float)
    return ExpertStatistics(len(logits), f, f, logits.sum(0), logits.T @ logits, **more)


def planned(model: Any, found: ExpertStatistics, name: str, **fields: Any) -> Any:
    [first, _] = find_blocks(model)
    return make(name, experts=4, **fields).plan([first], {first.name: found})[first.name]


def test_frequency_keeps_the_most_used() -> None:
    found = statistics([5, 0, 9, 1, 2, 7, 3, 0], np.zeros((4, 8)))
    plan = planned(tiny_mixtures.mixture("mixtral"), found, "frequency")
    assert plan.groups == ((0,), (2,), (5,), (6,))


def test_reap_is_a_mean_over_the_tokens_of_an_expert_and_not_a_sum() -> None:
    often = statistics(
        [90, 1, 1, 1, 1, 0, 0, 0],
        np.zeros((4, 8)),
        activation={
            "softmax": np.array([450.0, 9, 1, 8, 7, 0, 0, 0]),
            "renormalised softmax": np.array([9.0, 5, 3, 2, 4, 0, 0, 0]),
            "router": np.array([0.0, 0, 0, 0, 1, 2, 3, 4]),
        },
    )
    model = tiny_mixtures.mixture("mixtral")
    cases = (
        ({}, [0, 1, 3, 4]),
        ({"renormalise": True}, [1, 2, 3, 4]),
        ({"weigh": "router"}, [4, 5, 6, 7]),
    )
    for fields, kept in cases:
        plan = planned(model, often, "reap", **fields)
        assert [group[0] for group in plan.groups] == kept


def test_random_experts_follow_their_seed_and_differ_between_blocks() -> None:
    plans = [
        prune(tiny_mixtures.mixture("mixtral"), "random-experts", experts=4, seed=s).plan
        for s in (0, 0, 1)
    ]
    assert plans[0] == plans[1] != plans[2]
    first, second = plans[0].values()
    assert first.groups != second.groups


def test_dominant_grouping_has_the_most_used_as_cores() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(size=(200, 4))
    logits = np.concatenate([base, base + 0.1 * rng.normal(size=base.shape)], axis=1)
    found = statistics([9, 1, 9, 1, 1, 9, 1, 9], logits)
    plan = planned(tiny_mixtures.mixture("mixtral"), found, "uncurl", grouping="dominant")
    assert plan.groups == ((0, 4), (2, 6), (1, 5), (3, 7))
    assert plan.references == [0, 2, 5, 7]
    assert plan.weights[0] == (0.9, 0.1)


def test_uniform_weights_are_uniform() -> None:
    found = statistics([9, 1, 2, 3, 1, 9, 1, 9], np.random.default_rng(0).normal(size=(50, 8)))
    plan = planned(tiny_mixtures.mixture("mixtral"), found, "uncurl", weights="uniform")
    assert all(len(set(shares)) == 1 for shares in plan.weights)


def test_centring_compares_what_varies_and_not_how_likely_an_expert_is() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(400, 8)) + 5 * np.array([1, 1, 1, 1, -1, -1, -1, -1])
    logits[:, 5] = (
        logits[:, 0] - 10 + 0.05 * rng.normal(size=400)
    )  # seldom, but for the same tokens
    found = statistics([9, 9, 1, 1, 9, 1, 9, 1], logits)
    model = tiny_mixtures.mixture("mixtral")
    for centred in (True, False):
        groups = planned(model, found, "uncurl", grouping="dominant", centred=centred).groups
        assert any({0, 5} <= set(group) for group in groups) == centred
    assert found.cosine()[0, 5] < 0 and found.correlation()[0, 5] > 0.99


def test_the_groups_of_the_router_stay_equal() -> None:
    model = tiny_mixtures.mixture("deepseek-v3")
    for name in PRUNE:
        [plan] = prune(model, name, experts=4).plan.values()
        assert [sum(e < 4 for e in group) == len(group) for group in plan.groups] == [
            True,
            True,
            False,
            False,
        ]
    # a router that stays as it was has no groups to keep equal
    assert prune(model, "uncurl", experts=5, router="remap").size["after"]["experts"] == [5]


def test_nothing_is_left_on_the_given_model() -> None:
    model = tiny_mixtures.mixture("mixtral").train()
    prune(model, "reap", experts=4)
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


def test_a_method_can_be_tried_on_statistics_that_are_known() -> None:
    model, rows = tiny_mixtures.mixture("mixtral"), tiny_mixtures.rows()
    found = collect_statistics(model, rows, tiny_models.tokenizer(), outputs=True)
    for name in PRUNE:
        assert prune_with(model, found, make(name)).plan == prune(model, name).plan


def test_held_out_loss_is_that_of_the_objective_and_of_transformers() -> None:
    model = tiny_mixtures.mixture("mixtral")
    rows = tiny_mixtures.rows(count=3)
    told = held_out_loss(model, rows, tiny_models.tokenizer(), batch_size=2)
    losses = []
    for row in rows:
        ids = tiny_models.tokenizer()(row["text"], return_tensors="pt").input_ids
        losses.append(model(input_ids=ids, labels=ids).loss.item())
    assert told["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert told["tokens_per_s"] > 0


# --- folders and refusals -------------------------------------------------------------------------


def test_the_list_of_experts_is_beside_the_model(tmp_path: Path) -> None:
    pruned = prune(tiny_mixtures.mixture("mixtral"), "frequency", experts=3)
    about = json.loads((pruned.save(tmp_path / "x") / "experts.json").read_text())
    block = about["blocks"]["model.layers.0.mlp"]
    assert block["num_experts"] == 8 and len(block["groups"]) == 3 and len(block["dropped"]) == 5
    assert about["method"] == {
        "name": "frequency",
        "experts": 3,
        "budget": "equal",
        "keep_denominator": False,
    }
    assert about["size"]["before"]["experts"] == [8, 8]
    saved = sum(p.numel() for p in pruned.model.parameters())
    assert about["size"]["after"]["parameters"] == saved
    assert "parent" not in about and str(tmp_path) not in json.dumps(about)


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    pruned = prune(tiny_mixtures.mixture("mixtral"), "frequency", experts=3)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        pruned.save(tmp_path)
    with pytest.raises(UserError, match="holds files that foretune did not write"):
        pruned.save(tmp_path, overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    with pytest.raises(UserError, match=r"notes\.txt is a file"):
        pruned.save(tmp_path / "notes.txt")
    folder = pruned.save(tmp_path / "x")
    with pytest.raises(UserError, match="--overwrite to replace it"):
        pruned.save(folder)
    pruned.save(folder, overwrite=True)


def test_a_folder_that_does_not_fit_its_list_is_refused(tmp_path: Path) -> None:
    folder = prune(tiny_mixtures.mixture("mixtral"), "uncurl", router="remap").save(tmp_path / "x")
    about = json.loads((folder / "experts.json").read_text())
    about["blocks"]["model.layers.0.mlp"]["groups"].pop()
    about["blocks"]["model.layers.0.mlp"]["weights"].pop()
    (folder / "experts.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match=r"does not fit the files beside it"):
        foretune.load_model(folder, head="causal-lm")
    (folder / "experts.json").write_text("{}")
    with pytest.raises(UserError, match=r"experts\.json is damaged: loads_with: field required"):
        foretune.load_model(folder, head="causal-lm")


@pytest.mark.parametrize("name", PRUNE)
@pytest.mark.parametrize("bad", [0, -2, 2.5, "4", True, [], [4, 0]])
def test_a_bad_number_of_experts_is_refused_by_name(name: str, bad: Any) -> None:
    with pytest.raises(UserError, match="experts must be a whole number above 0 or a list"):
        make(name, experts=bad)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("uncurl", {"grouping": "kmeans"}, "grouping must be one of spectral, dominant"),
        ("uncurl", {"router": "rows"}, "router must be one of mean, dominant, remap"),
        ("uncurl", {"weights": 1}, "weights must be one of frequency, uniform"),
        ("uncurl", {"align": "yes"}, "align must be true or false, got 'yes'"),
        ("uncurl", {"centred": 1}, "centred must be true or false"),
        ("hc-smoe", {"router": "x"}, "router must be one of"),
        ("hc-smoe", {"align": None}, "align must be true or false"),
        ("reap", {"renormalise": 0}, "renormalise must be true or false"),
        ("frequency", {"keep_denominator": "no"}, "keep_denominator must be true or false"),
        ("random-experts", {"seed": -1}, "seed must be a whole number"),
    ],
)
def test_bad_fields_are_refused_by_name(name: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(name, **fields)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "rows must be a non-empty list of texts or mappings"),
        ("a text", "rows must be a non-empty list of texts"),
        ([{"txt": "a b c"}], 'task "rows".*text'),
        (["a"], "a text needs two tokens or more"),
    ],
)
def test_bad_rows_are_refused(rows: Any, message: str) -> None:
    model = tiny_mixtures.mixture("mixtral")
    tokenizer = tiny_models.tokenizer(special=False)
    with pytest.raises(UserError, match=message):
        foretune.prune(model, rows, make("frequency"), tokenizer=tokenizer)


def test_a_model_without_tokenizer_is_refused() -> None:
    with pytest.raises(UserError, match="need the model's tokenizer"):
        foretune.prune(tiny_mixtures.mixture("mixtral"), ["a b c"], make("frequency"))


def test_too_few_experts_are_refused_before_any_row_is_read() -> None:
    with pytest.raises(UserError, match="experts must be from 2 to 8, got 1"):
        foretune.prune(tiny_mixtures.mixture("mixtral"), [], make("frequency", experts=1))


def test_texts_for_an_encoder_decoder_are_refused() -> None:
    with pytest.raises(UserError, match='"prompt" and "completion"'):
        foretune.prune(
            tiny_mixtures.switch(), ["a b c"], make("frequency"), tokenizer=tiny_models.tokenizer()
        )


def test_a_folder_that_does_not_give_the_model_back_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = prune(tiny_mixtures.mixture("mixtral"), "frequency", experts=4)
    whole = type(result.model).from_pretrained

    def damaged(*args: Any, **options: Any) -> Any:
        model = whole(*args, **options)
        with torch.no_grad():
            model.model.layers[1].mlp.gate.weight[0] += 1e-3
        return model

    monkeypatch.setattr(type(result.model), "from_pretrained", damaged)
    with pytest.raises(ForetuneError, match=r"layers\.1\.mlp\.gate\.weight is not the same when"):
        result.save(tmp_path / "pruned")
    assert not (tmp_path / "pruned").exists()
