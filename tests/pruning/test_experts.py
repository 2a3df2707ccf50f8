"""Experts are read, written, dropped and merged alike in every way of storing them."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

import tiny_models
from foretune.errors import UserError
from foretune.pruning.budgets import counts_of
from foretune.pruning.experts import find_blocks
from foretune.pruning.plan import (
    BlockPlan,
    Plan,
    apply_plan,
    highest,
    keep,
    loads_in_transformers,
    merge,
)
from foretune.pruning.prune import collect_statistics
from foretune.pruning.routers import parse_router_output
from foretune.pruning.statistics import Collector, ExpertStatistics
from pruning import tiny_mixtures

FAMILIES = [*tiny_mixtures.FAMILIES, "switch"]
ALL = range(8)


def eager(family: str, **changes: Any) -> Any:
    model = tiny_mixtures.mixture(family, **changes)
    if family != "switch":
        model.set_experts_implementation("eager")
    return model


def pruned(model: Any, plans: Any) -> Any:
    """The model after `plans(block)` for each of its blocks."""
    apply_plan(model, {block.name: plans(block) for block in find_blocks(model)})
    return model


def seen(model: Any, ids: torch.Tensor, *, outputs: bool = False) -> dict[str, ExpertStatistics]:
    with Collector(find_blocks(model), outputs=outputs) as collector, torch.no_grad():
        model(input_ids=ids)
    return collector.statistics


def difference(a: Any, b: Any) -> float:
    return float((a - b).detach().abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_all_experts_changes_no_bit(family: str) -> None:
    before = tiny_mixtures.logits(eager(family))
    after = pruned(eager(family), lambda block: keep(ALL, 8))
    assert torch.equal(tiny_mixtures.logits(after), before)


@pytest.mark.parametrize("router", ["mean", "dominant", "remap"])
@pytest.mark.parametrize("family", FAMILIES)
def test_merging_clusters_of_one_changes_no_bit(family: str, router: Any) -> None:
    before = tiny_mixtures.logits(eager(family))
    plan = merge(list(ALL), [1.0] * 8, router=router, align=True)
    assert torch.equal(tiny_mixtures.logits(pruned(eager(family), lambda _: plan)), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_order_of_experts_does_not_matter(family: str) -> None:
    # DeepSeek's router compares groups of neighbours, so experts stay within theirs
    order = [3, 1, 0, 2, 5, 4, 7, 6] if family == "deepseek-v3" else [6, 3, 1, 7, 0, 2, 5, 4]
    plan = BlockPlan(8, tuple((e,) for e in order), ((1.0,),) * 8)
    before = tiny_mixtures.logits(eager(family))
    after = tiny_mixtures.logits(pruned(eager(family), lambda _: plan))
    assert difference(after, before) < 1e-5 * float(before.abs().max())


def drop_unused(model: Any, ids: torch.Tensor, **options: Any) -> Any:
    found = seen(model, ids)
    plans = {}
    for block in find_blocks(model):
        frequency = found[block.name].frequency
        kept = highest(frequency, 6, block.num_groups)
        assert frequency[kept].sum() == frequency.sum()
        plans[block.name] = keep(kept, 8, **options)
    apply_plan(model, plans)
    return model


IDS = torch.tensor([[7, 12]])


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in tiny_mixtures.OVER_ALL])
def test_dropping_experts_never_chosen_is_exact(family: str) -> None:
    before = eager(family)(input_ids=IDS).logits
    assert difference(drop_unused(eager(family), IDS)(input_ids=IDS).logits, before) < 1e-5


@pytest.mark.parametrize("family", ["qwen2-moe", "olmoe"])
def test_where_the_softmax_is_over_all_experts_only_the_kept_denominator_is_exact(
    family: str,
) -> None:
    before = eager(family)(input_ids=IDS).logits
    assert difference(drop_unused(eager(family), IDS)(input_ids=IDS).logits, before) > 0.01
    model = drop_unused(eager(family), IDS, keep_denominator=True)
    assert difference(model(input_ids=IDS).logits, before) < 1e-5


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("family", ["qwen2-moe", "qwen3-moe", "olmoe"])
def test_how_a_router_normalises_is_read_off_its_answers(family: str, norm: bool) -> None:
    model = tiny_mixtures.mixture(family, norm_topk_prob=norm)
    assert {b.normalises for b in find_blocks(model)} == {"chosen" if norm else "all"}


def test_weights_that_depend_on_no_other_expert_need_no_denominator() -> None:
    """DeepSeek's are sigmoids, here neither summing to one nor from a softmax."""
    model = tiny_mixtures.mixture("deepseek-v3", norm_topk_prob=False)
    assert {b.normalises for b in find_blocks(model)} == {"chosen"}


def test_switch_keeps_the_denominator_too() -> None:
    ids = torch.tensor([[7, 12]])
    decoder = torch.tensor([[0, 5]])
    before = eager("switch")(input_ids=ids, decoder_input_ids=decoder).logits
    results = []
    for keep_denominator in (False, True):
        model = eager("switch")
        with Collector(find_blocks(model), outputs=False) as collector, torch.no_grad():
            model(input_ids=ids, decoder_input_ids=decoder)
        plan = {
            name: keep(highest(found.frequency, 4), 8, keep_denominator=keep_denominator)
            for name, found in collector.statistics.items()
        }
        apply_plan(model, plan)
        results.append(model(input_ids=ids, decoder_input_ids=decoder).logits)
    assert difference(results[0], before) > 0.01
    assert difference(results[1], before) < 1e-5 * float(before.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_fall_by_those_of_the_experts_and_their_router_rows(family: str) -> None:
    model = eager(family)
    blocks = find_blocks(model)
    hidden, inner = 16, tiny_mixtures.INNER
    matrices = 2 if family in ("switch", "nemotron-h") else 3
    expert = matrices * hidden * inner + (2 * inner + hidden if family == "gpt-oss" else 0)
    row = hidden + (family in ("gpt-oss", "switch", "ernie", "afmoe", "gemma4"))  # one more number
    before = sum(p.numel() for p in model.parameters())
    assert all(block.num_parameters == expert for block in blocks)
    pruned(model, lambda block: keep(highest(np.arange(8), 4, block.num_groups), 8))
    after = sum(p.numel() for p in model.parameters())
    assert before - after == len(blocks) * 4 * (expert + row)


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_units_in_another_order_compute_the_same(family: str) -> None:
    model = eager(family)
    before = tiny_mixtures.logits(model)
    for block in find_blocks(model):
        units, rest = block.read()
        units = units.clone()
        units[3] = units[3][
            torch.randperm(tiny_mixtures.INNER, generator=torch.Generator().manual_seed(0))
        ]
        block.write(units, rest)
    assert difference(tiny_mixtures.logits(model), before) < 1e-5 * float(before.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_merging_copies_of_one_expert_gives_that_expert(family: str) -> None:
    model = eager(family)
    for block in find_blocks(model):
        units, rest = block.read()
        units, rest = units.clone(), rest.clone()
        for e in (1, 2, 3):  # the same function with its units in another order
            generator = torch.Generator().manual_seed(e)
            order = torch.randperm(tiny_mixtures.INNER, generator=generator)
            units[e], rest[e] = units[0][order], rest[0]
        block.write(units, rest)
    before = tiny_mixtures.logits(model)
    one = [0, 0, 0, 0, 1, 2, 3, 4]
    for align, near in ((True, True), (False, False)):
        plan = merge(one, [1.0, 3, 2, 0, 1, 1, 1, 1], router="remap", align=align)
        merged = pruned(copy.deepcopy(model), lambda _, plan=plan: plan)
        changed = difference(tiny_mixtures.logits(merged), before)
        assert (changed < 1e-4 * float(before.abs().max())) == near


@pytest.mark.parametrize("family", FAMILIES)
def test_a_smaller_mixture_is_a_plain_folder_that_loads_bit_for_bit(
    family: str, tmp_path: Any
) -> None:
    model = pruned(eager(family), lambda b: keep(highest(np.arange(8), 4, b.num_groups), 8))
    model.save_pretrained(tmp_path)
    seq2seq = family == "switch"
    name = "AutoModelForSeq2SeqLM" if seq2seq else "AutoModelForCausalLM"
    auto = tiny_mixtures.loaded(getattr(transformers, name), tmp_path)
    if not seq2seq:
        auto.set_experts_implementation("eager")
    assert torch.equal(
        tiny_mixtures.logits(auto), tiny_mixtures.logits(tiny_mixtures.realigned(model))
    )
    assert sum(p.numel() for p in auto.parameters()) == sum(p.numel() for p in model.parameters())


def test_the_loss_that_balances_experts_counts_the_smaller_number() -> None:
    for router in ("mean", "remap"):
        labels = [0, 0, 1, 1, 2, 2, 3, 3]
        plan = merge(labels, [1.0] * 8, router=router, align=True)  # type: ignore[arg-type]
        model = pruned(eager("mixtral"), lambda _, plan=plan: plan)
        output = model(input_ids=IDS, labels=IDS, output_router_logits=True)
        assert torch.isfinite(output.aux_loss)


def test_blocks_of_different_sizes_ask_for_no_loss_that_balances_experts() -> None:
    model = eager("mixtral", output_router_logits=True)
    kept = iter((3, 5))
    model = pruned(model, lambda _: keep(range(next(kept)), 8))
    assert torch.isfinite(model(input_ids=IDS, labels=IDS).loss)


@pytest.mark.parametrize("family", FAMILIES)
def test_frequencies_sum_to_the_experts_given_to_each_token(family: str) -> None:
    model = eager(family)
    found = collect_statistics(
        model, tiny_mixtures.rows(family), tiny_models.tokenizer(), outputs=True, batch_size=5
    )
    assert list(found) == [block.name for block in find_blocks(model)]
    for block in find_blocks(model):
        one = found[block.name]
        assert one.frequency.sum() == block.top_k * one.num_tokens
        assert one.num_tokens > 20


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_no_statistic(family: str) -> None:
    model, rows = eager(family), tiny_mixtures.rows(family)
    alone, padded = (
        collect_statistics(model, rows, tiny_models.tokenizer(), outputs=True, batch_size=size)
        for size in (1, 12)
    )
    for name, one in alone.items():
        other = padded[name]
        assert one.num_tokens == other.num_tokens
        fields = ("frequency", "gate_sum", "logit_products", "output_sum")
        pairs = [(getattr(one, field), getattr(other, field)) for field in fields]
        assert one.activation is not None and other.activation is not None
        pairs += [(one.activation[kind], other.activation[kind]) for kind in one.activation]
        for a, b in pairs:
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3 * np.abs(a).max())


@pytest.mark.parametrize("family", ["mixtral", "gpt-oss", "switch", "hunyuan"])
def test_statistics_are_those_of_the_block_itself(family: str) -> None:
    """Σ g·f over the experts chosen is what the block returns."""
    model = eager(family)
    block = find_blocks(model)[0]
    x = torch.randn(1, 10, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), Collector([block], outputs=True) as collector:
        output = block.block(x)
        output = output[0] if isinstance(output, tuple) else output
    with torch.no_grad():
        given = block.router(x[0] if family != "switch" else x)
        every = torch.stack([block.output(e, x[0]) for e in ALL])  # (E, N, H)
        if family == "hunyuan":  # the shared expert takes part, too
            output = output - block.block.shared_mlp(x)
    found = collector.statistics[block.name]
    routing = parse_router_output(given)
    assert routing is not None
    gates = torch.zeros(10, 8).scatter(1, routing.indices, routing.scores)
    torch.testing.assert_close(torch.einsum("ne,enh->nh", gates, every), output.reshape(10, 16))
    np.testing.assert_allclose(found.output_sum, every.sum(1), rtol=1e-4, atol=1e-3)
    norms = every.norm(dim=-1).T
    softmax = torch.zeros(10, 8).scatter(
        1, routing.indices, routing.logits.softmax(-1).gather(1, routing.indices)
    )
    for kind, weights in {"router": gates, "softmax": softmax}.items():
        whole = weights / weights.sum(1, keepdim=True)
        for name, expected in {kind: weights, f"renormalised {kind}": whole}.items():
            np.testing.assert_allclose(
                found.activation[name], (expected * norms).sum(0), rtol=1e-4, atol=1e-4
            )
    assert found.num_tokens == 10


def test_experts_that_read_other_vectors_than_their_router_are_measured_on_them() -> None:
    """Gemma 4 normalises the hidden states anew for its experts."""
    model = eager("gemma4")
    block = find_blocks(model)[0]
    read: list[torch.Tensor] = []
    handle = block.experts.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    found = seen(model, IDS, outputs=True)[block.name]
    handle.remove()
    with torch.no_grad():
        expected = torch.stack([block.output(e, read[0]).sum(0) for e in ALL])
    np.testing.assert_allclose(found.output_sum, expected, rtol=1e-4, atol=1e-3)


def test_where_weights_scale_what_experts_read_the_block_is_the_sum_of_experts_on_that() -> None:
    """Llama 4: Σ f(g·x); REAP weighs ‖f(x)‖ by g, as the authors' code does."""
    model = eager("llama4")
    block = find_blocks(model)[0]
    assert block.scales_inputs and block.normalises == "chosen" and block.top_k == 1
    x = torch.randn(10, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), Collector([block], outputs=True) as collector:
        output, logits = block.block(x[None])
    scores, best = logits.sigmoid().max(-1)
    with torch.no_grad():
        routed = [
            block.output(int(e), g * row[None]) for e, g, row in zip(best, scores, x, strict=True)
        ]
        expected = torch.cat(routed) + block.block.shared_expert(x)
        norms = torch.stack([block.output(e, x).norm(dim=-1) for e in ALL])
    torch.testing.assert_close(output, expected)
    one_hot = np.eye(8)[best]
    found = collector.statistics[block.name]
    assert found.activation is not None
    np.testing.assert_array_equal(found.frequency, one_hot.sum(0))
    for kind, weights in {"router": logits.sigmoid(), "softmax": logits.softmax(-1)}.items():
        expected_sum = (weights.numpy() * one_hot * norms.T.numpy()).sum(0)
        np.testing.assert_allclose(found.activation[kind], expected_sum, rtol=1e-4, atol=1e-6)


def test_correlation_is_that_of_numpy_and_knows_constant_columns() -> None:
    rng = np.random.default_rng(0)
    h = rng.normal(size=(50, 3))
    h[:, 2] = 4.0
    one = ExpertStatistics(50, h[0], h[0], h.sum(0), h.T @ h)
    assert one.correlation()[0, 1] == pytest.approx(np.corrcoef(h[:, :2].T)[0, 1])
    assert one.correlation()[0, 2] == 0
    cosine = h[:, 0] @ h[:, 2] / np.linalg.norm(h[:, 0]) / np.linalg.norm(h[:, 2])
    assert one.cosine()[0, 2] == pytest.approx(cosine)


def test_a_plan_survives_json() -> None:
    plan = merge([0, 1, 0, 2], [1.0, 0, 3, 0], router="mean", align=False)
    assert BlockPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert plan.groups == ((0, 2), (1,), (3,)) and plan.weights == ((0.25, 0.75), (1.0,), (1.0,))
    assert plan.references == [2, 1, 3]
    assert keep([4, 1], 8).dropped == [0, 2, 3, 5, 6, 7]


def test_unused_experts_of_a_cluster_are_averaged_alike() -> None:
    assert merge([0, 0], [0.0, 0.0], router="mean", align=True).weights == ((0.5, 0.5),)


def test_only_one_count_and_plain_routers_load_in_transformers() -> None:
    def loads(*plans: BlockPlan) -> bool:
        model = eager("olmoe")
        plan: Plan = dict(zip([b.name for b in find_blocks(model)], plans, strict=True))
        apply_plan(model, plan)
        return loads_in_transformers(model, plan)

    assert loads(keep([0, 1], 8), keep([2, 3], 8))
    assert not loads(keep([0, 1], 8), keep([2, 3, 4], 8))
    assert not loads(*[keep([0, 1], 8, keep_denominator=True)] * 2)
    assert not loads(*[merge([0, 1] * 4, [1.0] * 8, router="remap", align=True)] * 2)


# --- refusals -------------------------------------------------------------------------------------


def test_a_model_without_experts_is_refused() -> None:
    with pytest.raises(UserError, match="LlamaForCausalLM has no mixture of experts to prune"):
        find_blocks(tiny_models.llama())


def test_a_router_that_answers_otherwise_is_refused() -> None:
    # Top-2 routing of NLLB returns a mask and dense weights
    config = transformers.NllbMoeConfig(
        **{"vocab_size": 24, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2},
        **{"encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "num_experts": 4, "max_length": 8},
        **{"encoder_sparse_step": 2, "decoder_sparse_step": 2},
        **{"encoder_attention_heads": 2, "decoder_attention_heads": 2},
    )
    model = transformers.NllbMoeForConditionalGeneration(config).eval()
    with pytest.raises(UserError, match="NllbMoeTop2Router, whose output is not supported"):
        find_blocks(model)


def test_experts_stored_otherwise_are_refused() -> None:
    model = eager("mixtral")
    model.model.layers[0].mlp.experts = torch.nn.Linear(16, 16)
    with pytest.raises(
        UserError, match=r"layers\.0\.mlp: Linear stores its experts in an unsupported way"
    ):
        find_blocks(model)


def test_quantised_experts_are_refused() -> None:
    model = eager("mixtral")
    experts = model.model.layers[1].mlp.experts
    experts.down_proj = torch.nn.Parameter(experts.down_proj.to(torch.int8), requires_grad=False)
    with pytest.raises(UserError, match="holds quantised weights"):
        find_blocks(model)


def test_adapters_must_be_merged_first() -> None:
    config = LoraConfig(target_modules=["q_proj"])
    with pytest.raises(UserError, match="merge them first"):
        find_blocks(get_peft_model(eager("mixtral"), config))


@pytest.mark.parametrize(
    ("family", "count", "message"),
    [
        ("mixtral", 1, r"routes each token to 2: experts must be from 2 to 8, got 1"),
        ("mixtral", 9, r"must be from 2 to 8, got 9"),
        ("mixtral", (4, 4, 4), r"experts has 3 numbers, the model has 2 blocks"),
        ("deepseek-v3", 5, r"routes within 2 groups: experts must be a multiple of 2.*got 5"),
        ("deepseek-v3", 2, r"at least two per group"),
    ],
)
def test_a_number_of_experts_that_cannot_be_is_refused(
    family: str, count: Any, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        counts_of(count, find_blocks(eager(family)), grouped=True)


def test_half_of_the_experts_is_the_default_and_a_list_is_one_for_each_block() -> None:
    blocks = find_blocks(eager("mixtral"))
    assert counts_of(None, blocks, grouped=True) == [4, 4]
    assert counts_of((3, 8), blocks, grouped=True) == [3, 8]


# --- budgets by score -----------------------------------------------------------------------------


def test_by_score_the_best_of_all_blocks_are_kept() -> None:
    """Two best of each block, which a token needs, then the largest shares wherever they are."""
    rng = np.random.default_rng(0)
    blocks = find_blocks(eager("mixtral", num_hidden_layers=3))
    scores = {block.name: 10.0**i * rng.pareto(1, 8) for i, block in enumerate(blocks)}
    shares = [np.sort(s / s.sum())[::-1] for s in scores.values()]
    least = np.sort(np.concatenate([share[2:] for share in shares]))[::-1][15 - 6 - 1]
    expected = [2 + int((share[2:] >= least).sum()) for share in shares]
    given = counts_of(5, blocks, grouped=True, budget="score", scores=scores)
    assert given == expected and sum(given) == 15 and len(set(given)) > 1


def test_by_score_the_groups_of_a_router_stay_equal() -> None:
    blocks = find_blocks(eager("deepseek-v3", num_hidden_layers=3))
    scores = {blocks[0].name: np.eye(8)[0] + 0.01, blocks[1].name: np.ones(8)}
    assert counts_of(6, blocks, grouped=True, budget="score", scores=scores) == [4, 8]
    blocks = find_blocks(eager("deepseek-v3", num_hidden_layers=3))[:1]
    assert counts_of(6, blocks, grouped=True, budget="score", scores=scores) == [6]


def test_by_score_an_even_block_gets_as_many_as_another() -> None:
    blocks = find_blocks(eager("mixtral"))
    even = {block.name: np.ones(8) for block in blocks}
    assert sum(counts_of(None, blocks, grouped=True, budget="score", scores=even)) == 8
    nothing = {block.name: np.zeros(8) for block in blocks}
    assert sum(counts_of(8, blocks, grouped=True, budget="score", scores=nothing)) == 16


def test_a_list_and_a_budget_by_score_contradict_each_other() -> None:
    with pytest.raises(UserError, match="budget=score needs one number, the mean over blocks"):
        counts_of((3, 5), find_blocks(eager("mixtral")), grouped=True, budget="score")
