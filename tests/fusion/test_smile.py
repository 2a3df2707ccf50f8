"""SMILE: the oracles of its algebra, and what users hand to it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import foretune
import tiny_models
from foretune import SMILE, UserError
from foretune.fusion.mixture import expert_layers
from fusion import fused_models
from fusion.fused_models import FAMILIES, adapted, ids, linears, nudged, output, saved
from linear_tasks import copy_of, equal_bits

NAMES = ("a", "b", "c")
FULL = 64  # beyond the width of every tiny layer


def tuned(model: nn.Module, names: tuple[str, ...] = NAMES) -> dict[str, Any]:
    return {name: linears(model, seed) for seed, name in enumerate(names, 1)}


# --- the algebra --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("k", [FULL, None], ids=["factors", "dense"])
def test_one_expert_of_full_rank_is_the_finetuned_model(family: str, k: int | None) -> None:
    build, batch = FAMILIES[family]
    model = build()
    one = linears(model, 1)
    fused = foretune.fuse(model, {"a": one}, SMILE(k=k))
    torch.testing.assert_close(
        output(fused.model, batch()), output(one, batch()), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_forced_to_an_expert_of_full_rank_it_is_that_model(family: str) -> None:
    build, batch = FAMILIES[family]
    model = build()
    finetuned = tuned(model)
    fused = foretune.fuse(model, finetuned, SMILE(k=FULL))
    for name, one in finetuned.items():
        fused.set_experts(name)
        expected = output(one, batch())
        torch.testing.assert_close(output(fused.model, batch()), expected, rtol=1e-4, atol=1e-4)


def test_rows_sent_to_their_own_experts_are_what_each_model_says() -> None:
    model = tiny_models.llama()
    finetuned = tuned(model)
    fused = foretune.fuse(model, finetuned, SMILE(k=FULL, routing="task"))
    fused.set_task(["b", "a", "c"])
    said = output(fused.model, {"input_ids": ids()})
    for row, name in enumerate("bac"):
        expected = output(finetuned[name], {"input_ids": ids()})[row]
        torch.testing.assert_close(said[row], expected, rtol=1e-4, atol=1e-4)


def _layer(fused: Any) -> Any:
    return next(iter(expert_layers(fused.model).values()))


def _one_layer(seed: int = 0, size: int = 12, out: int = 9) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(size, out), nn.Flatten(0, -2))


def test_gate_as_wide_as_the_input_sees_only_the_norm() -> None:
    model = _one_layer(size=8)
    fused = foretune.fuse(model, tuned(model), SMILE(gate_k=8))
    x = torch.randn(5, 8)
    logits = _layer(fused).logits(x)
    torch.testing.assert_close(logits, x.norm(dim=-1, keepdim=True).expand(-1, 3))


def _reference(
    layer: nn.Linear,
    tuned: list[nn.Linear],
    x,
    gate_k: int,
    k: int | None,
    top_k: int,
    use_diff: bool = True,
):
    """The paper's layer, one token and one expert at a time."""
    said = []
    for token in x:
        energy, answers = [], []
        for one in tuned:
            u, s, vh = torch.linalg.svd(one.weight - layer.weight, full_matrices=False)
            directions = vh if use_diff else torch.linalg.svd(one.weight, full_matrices=False)[2]
            energy.append((directions[:gate_k] @ token).norm())
            low = (u[:, :k] * s[:k]) @ vh[:k]
            answers.append(low @ token + one.bias - layer.bias)
        p = torch.stack(energy).softmax(0)
        chosen = p.argsort(descending=True)[:top_k]
        y = layer.weight @ token + layer.bias
        for i in chosen:
            y = y + p[i] / p[chosen].sum() * answers[i]
        said.append(y)
    return torch.stack(said)


@pytest.mark.parametrize(("gate_k", "k", "top_k"), [(4, 8, 1), (4, 24, 2), (1, 3, 3), (8, None, 2)])
def test_layer_equals_the_formula_written_out(gate_k: int, k: int | None, top_k: int) -> None:
    model = _one_layer(size=24, out=20)
    finetuned = tuned(model)
    fused = foretune.fuse(model, finetuned, SMILE(gate_k=gate_k, k=k, top_k=top_k))
    x = torch.randn(30, 24)
    expected = _reference(model[0], [m[0] for m in finetuned.values()], x, gate_k, k, top_k)
    torch.testing.assert_close(_layer(fused)(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_gate_of_the_weights_themselves_is_the_authors_option(kind: str) -> None:
    model = _one_layer(size=24, out=20)
    if kind == "full":
        finetuned = tuned(model)
        layers = [m[0] for m in finetuned.values()]
    else:
        finetuned = {n: adapted(model, i, ["0"], r=3) for i, n in enumerate(NAMES, 1)}
        layers = [copy.deepcopy(m).merge_and_unload()[0] for m in finetuned.values()]
    method = SMILE(gate_k=4, k=8, routing_use_diff=False)
    fused = foretune.fuse(model, finetuned, method)
    x = torch.randn(30, 24)
    expected = _reference(model[0], layers, x, 4, 8, 1, use_diff=False)
    torch.testing.assert_close(_layer(fused)(x), expected, rtol=1e-4, atol=1e-4)
    other = foretune.fuse(model, finetuned, SMILE(gate_k=4, k=8))
    assert not torch.equal(_layer(other).gate, _layer(fused).gate)
    assert torch.equal(_layer(other).up, _layer(fused).up)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_gate_of_one_direction_on_loras_is_arrow(top_k: int, tmp_path: Path) -> None:
    base = tiny_models.llama(num_hidden_layers=2)
    targets = ["q_proj", "down_proj"]
    loras = {f"t{i}": adapted(base, i, targets) for i in range(4)}
    fused = foretune.fuse(base, loras, SMILE(k=3, gate_k=1, top_k=top_k))
    paths = []
    for name, lora in loras.items():
        saved(lora, tmp_path / name)
        paths.append(str(tmp_path / name))
    arrow = peft.create_arrow_model(
        base_model=copy.deepcopy(base),
        task_specific_adapter_paths=paths,
        arrow_config=peft.ArrowConfig(top_k=top_k, router_temperature=1.0, rng_seed=0),
    )
    for module in arrow.modules():  # its power iteration stops early; ours is exact
        for arrow_layer in getattr(module, "lora_arrow", {}).values():
            exact = arrow_layer.top_right_singular_vec_from_BA
            arrow_layer.top_right_singular_vec_from_BA = lambda a, b, f=exact: f(a, b, iters=2000)
            arrow_layer._protos_ready = False
    batch = {"input_ids": ids()}
    torch.testing.assert_close(
        output(fused.model, batch), output(arrow.eval(), batch), rtol=1e-4, atol=1e-5
    )
    assert (output(base, batch) - output(fused.model, batch)).abs().max() > 1e-2


def test_all_experts_at_equal_shares_are_the_average_of_the_weights() -> None:
    model = _one_layer(size=8)
    finetuned = tuned(model)
    # A gate as wide as the input has equal logits, so equal shares.
    fused = foretune.fuse(model, finetuned, SMILE(k=FULL, gate_k=8, top_k=3))
    average = foretune.fuse(model, finetuned, foretune.Average())
    x = torch.randn(5, 8)
    torch.testing.assert_close(fused.model(x), average.model(x), rtol=1e-4, atol=1e-5)


def test_order_of_the_experts_does_not_matter() -> None:
    model = tiny_models.bert()
    finetuned = tuned(model)
    one = foretune.fuse(model, finetuned, SMILE(k=4, gate_k=2, top_k=2))
    other = foretune.fuse(model, dict(reversed(finetuned.items())), SMILE(k=4, gate_k=2, top_k=2))
    batch = {"input_ids": ids()}
    torch.testing.assert_close(
        output(one.model, batch), output(other.model, batch), rtol=1e-4, atol=1e-5
    )


def test_layer_that_nothing_changed_stays_plain() -> None:
    model = tiny_models.bert()
    finetuned = {n: nudged(model, i, "query") for i, n in enumerate(NAMES)}
    fused = foretune.fuse(model, finetuned, SMILE())
    assert set(expert_layers(fused.model)) == {
        f"encoder.layer.{i}.attention.self.query" for i in range(4)
    }


def test_expert_that_left_a_layer_alone_is_never_chosen_there() -> None:
    model = _one_layer(size=8)
    finetuned = {"a": linears(model, 1), "idle": copy.deepcopy(model), "b": linears(model, 2)}
    layer = _layer(foretune.fuse(model, finetuned, SMILE(top_k=3, gate_k=2)))
    shares = layer.probabilities(torch.randn(50, 8) * 0.01)
    assert shares[:, 1].abs().max() == 0
    torch.testing.assert_close(shares.sum(1), torch.ones(50))
    assert (shares[:, 0] > 0).all()


def test_change_of_a_bias_alone_is_kept() -> None:
    model = _one_layer(size=8)
    one = nudged(model, 1, "bias")
    fused = foretune.fuse(model, {"a": one}, SMILE())
    x = torch.randn(4, 8)
    torch.testing.assert_close(fused.model(x), one(x))


def test_lora_of_its_own_rank_loses_nothing() -> None:
    base = tiny_models.gpt2()
    lora = adapted(base, 1, ["c_attn", "c_fc"], fan_in_fan_out=True)
    fused = foretune.fuse(base, {"a": lora}, SMILE(k=3))
    batch = {"input_ids": ids()}
    torch.testing.assert_close(
        output(fused.model, batch), output(lora, batch), rtol=1e-4, atol=1e-5
    )
    assert fused.report["energy_kept"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    "config",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"v_proj": 11}},
    ],
    ids=["rslora", "patterns"],
)
def test_scaling_is_that_of_peft(config: dict, tmp_path: Path) -> None:
    base = tiny_models.qwen2()
    lora = adapted(base, 1, ["q_proj", "v_proj"], **config)
    batch = {"input_ids": ids()}
    for source in (lora, saved(lora, tmp_path / "lora")):
        fused = foretune.fuse(base, {"a": source}, SMILE(), allow_unverified=True)
        torch.testing.assert_close(
            output(fused.model, batch), output(lora, batch), rtol=1e-4, atol=1e-5
        )


def test_full_checkpoint_and_loras_of_other_layers_and_ranks_go_together() -> None:
    base = tiny_models.llama()
    finetuned = {
        "full": linears(base, 1),
        "two": adapted(base, 2, ["q_proj"], r=2),
        "five": adapted(base, 3, ["v_proj"], r=5),
    }
    fused = foretune.fuse(base, finetuned, SMILE(k=FULL))
    for name, one in finetuned.items():
        fused.set_experts(name)
        batch = {"input_ids": ids()}
        torch.testing.assert_close(
            output(fused.model, batch), output(one, batch), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("bias", [True, False])
def test_number_of_parameters_is_the_formula(bias: bool) -> None:
    model = nn.Sequential(nn.Linear(20, 10, bias=bias), nn.Flatten(0, -2))
    fused = foretune.fuse(model, tuned(model), SMILE(k=4, gate_k=3))
    assert fused.report["extra_parameters"] == 3 * (4 * (10 + 20) + 3 * 20 + 10 * bias)


@pytest.mark.parametrize(
    "method", [SMILE(), foretune.Average(), foretune.TIES()], ids=lambda m: m.name
)
def test_what_is_fused_stays_bit_for_bit(method: Any) -> None:
    base = tiny_models.bert()
    finetuned = {"full": linears(base, 1), "lora": adapted(base, 2, ["query"])}
    before = [copy_of(m) for m in (base, *finetuned.values())]
    fused = foretune.fuse(base, finetuned, method)
    with torch.no_grad():
        for parameter in fused.model.parameters():
            parameter.zero_()
    assert all(
        equal_bits(m.state_dict(), old)
        for m, old in zip((base, *finetuned.values()), before, strict=True)
    )
    assert not [h for m in (base, *finetuned.values()) for h in m._forward_pre_hooks]


def test_inputs_that_are_not_contiguous_and_half_precision() -> None:
    model = _one_layer(size=8)[0].bfloat16()
    finetuned = {n: linears(nn.Sequential(model), i)[0] for i, n in enumerate(NAMES)}
    wrapped = foretune.fuse(
        nn.Sequential(model), {n: nn.Sequential(m) for n, m in finetuned.items()}, SMILE()
    )
    x = torch.randn(8, 5, 3).bfloat16().transpose(0, 2)
    assert wrapped.model(x).dtype == torch.bfloat16
    assert wrapped.model(x).shape == (3, 5, 9)


# --- routing ------------------------------------------------------------------------------------


def test_sequence_takes_one_choice_a_layer_and_padding_does_not_count() -> None:
    model = tiny_models.bert()
    fused = foretune.fuse(model, tuned(model), SMILE(routing="sequence", gate_k=2))
    short = ids(2, 5)
    padded = torch.cat([short, ids(2, 3, seed=9)], dim=1)
    mask = torch.tensor([[1] * 5 + [0] * 3] * 2)
    plain = output(fused.model, {"input_ids": short, "attention_mask": mask[:, :5]})
    beside = output(fused.model, {"input_ids": padded, "attention_mask": mask})
    torch.testing.assert_close(beside[:, :5], plain, rtol=1e-4, atol=1e-5)
    chosen = []
    from foretune.fusion.mixture import observe

    with observe(fused.model, lambda name, layer, x, p: chosen.append(p)):
        output(fused.model, {"input_ids": short})
    inside = [p for p in chosen if p.dim() == 3]  # the pooler sees one vector a row
    assert len(inside) == 24 and all(p.shape[1] == 1 for p in inside)


def test_decoder_routed_by_sequence_does_not_see_the_future() -> None:
    model = tiny_models.llama()
    fused = foretune.fuse(model, tuned(model), SMILE(routing="sequence", gate_k=2))
    long = ids(2, 7)
    whole = output(fused.model, {"input_ids": long})
    torch.testing.assert_close(
        output(fused.model, {"input_ids": long[:, :4]}), whole[:, :4], rtol=1e-4, atol=1e-5
    )
    with pytest.raises(UserError, match="use_cache=False"):
        fused.model.generate(long, max_new_tokens=3, do_sample=False)
    assert fused.model.generate(long, max_new_tokens=3, use_cache=False).shape[1] > 7


@pytest.mark.parametrize("build", [tiny_models.llama, tiny_models.gpt2, tiny_models.mamba2])
def test_routing_by_sequence_refuses_a_cache_of_any_kind(build: Any) -> None:
    model = build()
    fused = foretune.fuse(model, tuned(model), SMILE(routing="sequence", gate_k=2))
    free = {"max_new_tokens": 3, "eos_token_id": None, "do_sample": False}
    with pytest.raises(UserError, match="use_cache=False"):
        fused.model.generate(ids(2, 5), **free)
    assert fused.model.generate(ids(2, 5), use_cache=False, **free).shape == (2, 8)


@pytest.mark.parametrize("build", [tiny_models.qwen2, tiny_models.mamba2])
def test_token_routing_generates_the_same_with_and_without_the_cache(build: Any) -> None:
    model = build()
    fused = foretune.fuse(model, tuned(model), SMILE(gate_k=2))
    made = [
        fused.model.generate(ids(2, 5), max_new_tokens=6, do_sample=False, use_cache=cache)
        for cache in (True, False)
    ]
    assert torch.equal(*made)


def test_task_routing_asks_for_the_task() -> None:
    model = tiny_models.bert()
    fused = foretune.fuse(model, tuned(model), SMILE(routing="task"))
    with pytest.raises(UserError, match=r"set_task\(NAME\) first; the experts are a, b, c"):
        output(fused.model, {"input_ids": ids()})
    with pytest.raises(UserError, match='no expert "d"; there are a, b, c'):
        fused.set_task("d")
    fused.set_task(["a", "b"])
    with pytest.raises(UserError, match="got 2 tasks, but a layer's input has 3 rows"):
        output(fused.model, {"input_ids": ids()})


def test_usage_counts_each_real_token_once() -> None:
    model = tiny_models.bert()
    fused = foretune.fuse(model, tuned(model), SMILE(gate_k=2))
    with fused.usage() as usage:
        output(fused.model, {"input_ids": ids()})
    assert usage.mean().keys() == set(NAMES)
    assert sum(usage.mean().values()) == pytest.approx(1)
    with fused.usage() as usage:
        fused.set_experts("b")
        output(fused.model, {"input_ids": ids()})
    assert usage.mean()["b"] == pytest.approx(1)
    mask = torch.ones(3, 7).long()
    mask[:, 4:] = 0
    fused.set_experts(["a", "b", "b"])
    mask[0] = 1  # 7 tokens to a, 8 to b
    with fused.usage() as usage:
        output(fused.model, {"input_ids": ids(), "attention_mask": mask})
    # The pooler sees one row each.
    inside = {n: s for n, s in usage.layers.items() if n.startswith("encoder")}
    assert all(s.tolist() == pytest.approx([7 / 15, 8 / 15, 0]) for s in inside.values())


def test_gate_from_activations_tells_tasks_by_their_inputs() -> None:
    """LoRA experts of random directions, tasks that use different words."""
    model = tiny_models.bert()
    words = {"a": ids(8, 6) % 6 + 4, "b": ids(8, 6) % 6 + 12}
    loras = {n: adapted(model, i, ["query", "value"]) for i, n in enumerate(words)}
    samples = {name: [{"input_ids": rows[:4]}] for name, rows in words.items()}
    fused = foretune.fuse(
        model, loras, SMILE(gate="activations", routing="sequence", gate_k=4), samples=samples
    )
    for name, rows in words.items():
        with fused.usage() as usage:
            output(fused.model, {"input_ids": rows[4:]})
        assert usage.mean()[name] > 0.9
    assert fused.report["notes"] == []


def test_mean_that_all_tasks_share_does_not_hide_what_tells_them_apart() -> None:
    model = _one_layer(size=8)
    generator = torch.Generator().manual_seed(0)

    def rows(task: int) -> torch.Tensor:
        x = torch.randn(200, 8, generator=generator) * 0.1
        x[:, 0] = 1000 + 50 * x[:, 0]
        x[:, 1 + task] *= 20
        return x

    fused = foretune.fuse(
        model,
        tuned(model, ("a", "b")),
        SMILE(gate="activations", gate_k=1),
        samples={"a": [{"input": rows(0)}], "b": [{"input": rows(1)}]},
    )
    for task in range(2):
        chosen = _layer(fused).probabilities(rows(task)).argmax(-1)
        assert (chosen == task).float().mean() > 0.8


def test_gate_from_texts_needs_a_tokenizer_and_every_task() -> None:
    model = tiny_models.bert()
    finetuned = tuned(model, ("a", "b"))
    method = SMILE(gate="activations", gate_k=2)
    texts = {"a": ["the cat sat", "a dog"], "b": ["red blue", "one two three"]}
    with pytest.raises(UserError, match="needs samples of every task; none for b"):
        foretune.fuse(model, finetuned, method, samples={"a": ["x"]})
    with pytest.raises(UserError, match="no tokenizer: give tokenizer="):
        foretune.fuse(model, finetuned, method, samples=texts)
    with pytest.raises(UserError, match="samples are for gate=activations"):
        foretune.fuse(model, finetuned, SMILE(), samples=texts)
    fused = foretune.fuse(
        model, finetuned, method, samples=texts, tokenizer=tiny_models.tokenizer()
    )
    assert fused.routing.weights is None


def test_advice_needs_measurements() -> None:
    base = tiny_models.bert()
    loras = {n: adapted(base, i, ["query"]) for i, n in enumerate("ab")}
    assert foretune.fuse(base, loras, SMILE()).report["notes"] == []


# --- heads and the rest -------------------------------------------------------------------------


def classifiers(widths: tuple[int, ...] = (2, 5)) -> tuple[Any, dict[str, Any]]:
    """A headless base, and classifiers over it with different numbers of labels."""
    base = tiny_models.bert()
    made = {}
    for i, width in enumerate(widths):
        one = tiny_models.bert(num_labels=width, seed=9 + i)
        one.bert.load_state_dict(base.state_dict())
        one.config.id2label = {j: f"label{i}{j}" for j in range(width)}
        made[f"t{i}"] = linears(one, i + 1)
    return base, made


def test_every_task_keeps_its_head_and_its_labels(tmp_path: Path) -> None:
    base, finetuned = classifiers()
    fused = foretune.fuse(base, finetuned, SMILE(k=FULL, routing="task"))
    batch = {"input_ids": ids()}
    with pytest.raises(UserError, match=r"set_task"):
        output(fused.model, batch)
    loaded = foretune.load_fused(fused.save(tmp_path / "x"))
    for one in (fused, loaded):
        for name, model in finetuned.items():
            one.set_task(name)
            torch.testing.assert_close(
                output(one.model, batch), output(model, batch), rtol=1e-4, atol=1e-4
            )
            assert one.model.config.id2label == model.config.id2label
            labels = torch.zeros(3, dtype=torch.long)
            assert one.model(**batch, labels=labels).loss.isfinite()
    with pytest.raises(UserError, match="set_task takes one name"):
        fused.set_task(["t0", "t1", "t0"])


def test_heads_of_loras_are_kept_too(tmp_path: Path) -> None:
    base = tiny_models.bert(num_labels=3)
    loras = {
        n: adapted(base, i, ["query"], modules_to_save=["classifier"]) for i, n in enumerate("ab")
    }
    folders = {n: saved(lora, tmp_path / n) for n, lora in loras.items()}
    base.save_pretrained(tmp_path / "base")
    method = SMILE(routing="task")
    fused = foretune.fuse(tmp_path / "base", folders, method, allow_unverified=True)
    batch = {"input_ids": ids()}
    for name, lora in loras.items():
        fused.set_task(name)
        torch.testing.assert_close(
            output(fused.model, batch), output(lora, batch), rtol=1e-4, atol=1e-5
        )


def test_heads_that_are_all_alike_stay_one() -> None:
    model = tiny_models.bert(num_labels=3)
    fused = foretune.fuse(model, tuned(model), SMILE())
    assert fused.heads == {}
    assert output(fused.model, {"input_ids": ids()}).shape == (3, 3)


def test_what_is_outside_the_layers_is_told_or_averaged() -> None:
    model = tiny_models.bert()
    finetuned = {n: nudged(model, i) for i, n in enumerate(NAMES)}
    left = foretune.fuse(model, finetuned, SMILE())
    name = "embeddings.word_embeddings.weight"
    assert name in left.report["left_out"]
    assert torch.equal(left.model.get_parameter(name), model.get_parameter(name))
    assert "stay as in the base" in left.report["notes"][0]
    average = foretune.fuse(model, finetuned, SMILE(rest="average"))
    mean = torch.stack([m.get_parameter(name) for m in finetuned.values()]).mean(0)
    torch.testing.assert_close(average.model.get_parameter(name), mean)


def test_tied_output_embeddings_stay_tied() -> None:
    model = tiny_models.llama(tie_word_embeddings=True)
    fused = foretune.fuse(model, {n: nudged(model, i) for i, n in enumerate(NAMES)}, SMILE())
    assert fused.model.lm_head.weight is fused.model.model.embed_tokens.weight
    assert "lm_head" not in expert_layers(fused.model)


def test_layers_are_named_and_left_out() -> None:
    model = tiny_models.bert()
    finetuned = tuned(model)
    some = foretune.fuse(model, finetuned, SMILE(target_modules=["query", "*.1.output.dense"]))
    assert len(expert_layers(some.model)) == 5
    for exclude in (["query", "encoder.layer.0.*"], ["query", "encoder.layer.0"]):
        others = foretune.fuse(model, finetuned, SMILE(exclude_modules=exclude, rest="average"))
        names = set(expert_layers(others.model))
        assert names and not any("query" in n or "layer.0." in n for n in names)
        query = "encoder.layer.2.attention.self.query.weight"
        assert torch.equal(others.model.get_parameter(query), model.get_parameter(query))
    with pytest.raises(UserError, match=r"target_modules=\['q_proj'\]; BertModel has: dense, key"):
        foretune.fuse(model, finetuned, SMILE(target_modules=["q_proj"]))


def test_vocabularies_of_other_sizes_fuse_their_backbones() -> None:
    model = tiny_models.llama()
    longer = linears(model, 1)
    longer.resize_token_embeddings(30)
    fused = foretune.fuse(model, {"a": longer, "b": linears(model, 2)}, SMILE())
    assert "model.embed_tokens.weight" in fused.report["left_out"]


# --- refusals -----------------------------------------------------------------------------------


def test_multihead_attention_is_refused_unless_left_out() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    finetuned = {n: nudged(model, i) for i, n in enumerate("ab")}
    with pytest.raises(UserError, match=r"self_attn.* belongs to an nn\.MultiheadAttention"):
        foretune.fuse(model, finetuned, SMILE())
    fused = foretune.fuse(model, finetuned, SMILE(exclude_modules=["self_attn"]))
    assert len(expert_layers(fused.model)) == 2


def test_fused_mixtures_of_experts_are_refused_unless_left_out() -> None:
    import transformers

    config = transformers.MixtralConfig(
        **tiny_models.DECODER, num_local_experts=2, num_experts_per_tok=1
    )
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(config).eval()
    finetuned = {n: nudged(model, i) for i, n in enumerate("ab")}
    with pytest.raises(UserError, match=r"holds a mixture of experts in one tensor"):
        foretune.fuse(model, finetuned, SMILE())
    fused = foretune.fuse(model, finetuned, SMILE(exclude_modules=["*experts*"], k=2))
    assert output(fused.model, {"input_ids": ids()}).isfinite().all()


@pytest.mark.parametrize(
    ("finetuned", "message"),
    [
        (lambda m: {}, "nothing to fuse"),
        (lambda m: {"a": copy.deepcopy(m)}, "no linear layer differs"),
        (
            lambda m: {"a": tiny_models.roberta()},
            "base is a BertModel, but the fine-tuned model is a Roberta",
        ),
        (
            lambda m: {"a": linears(m, 1), "b": tiny_models.llama()},
            "b is a Llama.*fuse models of one",
        ),
        (
            lambda m: {"a": tiny_models.bert(intermediate_size=24)},
            "has no encoder.*of shape|has shape",
        ),
        (lambda m: {"a": "no/such/folder"}, "no such folder"),
    ],
)
def test_models_that_do_not_fit_are_refused(finetuned: Any, message: str) -> None:
    model = tiny_models.bert()
    with pytest.raises(UserError, match=message):
        foretune.fuse(model, finetuned(model), SMILE())


def test_more_than_plain_lora_is_refused(tmp_path: Path) -> None:
    base = tiny_models.bert()
    for config, message in [
        ({"use_dora": True}, "a is a DoRA adapter"),
        ({"bias": "lora_only"}, "with trained biases"),
        ({"alora_invocation_tokens": [3]}, "an activated LoRA adapter"),
        ({"trainable_token_indices": [3]}, "with trained tokens"),
        ({"init_lora_weights": "pissa"}, "initialised by pissa, which may also change the base"),
    ]:
        with pytest.raises(UserError, match=message):
            foretune.fuse(base, {"a": adapted(base, 1, ["query"], **config)}, SMILE())
    other = adapted(tiny_models.llama(), 1, ["q_proj"])
    with pytest.raises(UserError, match=r"the base is a BertModel, but the adapters were tr"):
        foretune.fuse(base, {"a": other}, SMILE())
    with pytest.raises(UserError, match="the base is a PEFT model"):
        foretune.fuse(other, {"a": other}, SMILE())
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1}))
    with pytest.raises(UserError, match=r"no adapter_model\.safetensors; only safetensors"):
        foretune.fuse(base, {"a": tmp_path}, SMILE())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"k": 0}, "k must be a whole number not below 1, got 0"),
        ({"gate_k": None}, "gate_k must be a whole number not below 1, got None"),
        ({"top_k": 1.5}, "top_k must be a whole number"),
        ({"gate": "data"}, "gate must be one of weights, activations; got 'data'"),
        ({"routing": "expert"}, "routing must be one of token, sequence, task"),
        ({"rest": "mean"}, "rest must be one of base, average"),
        ({"routing_use_diff": 1}, "routing_use_diff must be true or false, got 1"),
        (
            {"routing_use_diff": False, "gate": "activations"},
            "routing_use_diff=false chooses the weights of gate=weights",
        ),
        ({"target_modules": "query"}, "target_modules must be a list of module names"),
        ({"exclude_modules": None}, "exclude_modules must be a list of module names"),
    ],
)
def test_bad_fields_are_refused_by_name(fields: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        SMILE(**fields)


def test_more_experts_a_token_than_there_are_is_refused() -> None:
    model = tiny_models.bert()
    with pytest.raises(UserError, match="top_k=4 exceeds the number of fused models, 3"):
        foretune.fuse(model, tuned(model), SMILE(top_k=4))
    with pytest.raises(UserError, match="not for an encoder-decoder"):
        t5 = tiny_models.t5()
        foretune.fuse(t5, tuned(t5), SMILE(routing="sequence"))


# --- on disk ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_folders_fuse_like_models_and_the_result_loads_bit_for_bit(
    family: str, tmp_path: Path
) -> None:
    build, make_batch = FAMILIES[family]
    model, batch = build(), make_batch()
    finetuned = tuned(model)
    folders = {name: saved(one, tmp_path / name) for name, one in finetuned.items()}
    method = SMILE(k=4, gate_k=2, top_k=2)
    fused = foretune.fuse(saved(model, tmp_path / "base"), folders, method)
    torch.testing.assert_close(
        output(fused.model, batch),
        output(foretune.fuse(model, finetuned, method).model, batch),
        rtol=1e-4,
        atol=1e-5,
    )
    loaded = foretune.load_fused(fused.save(tmp_path / "out"))
    assert torch.equal(output(loaded.model, batch), output(fused.model, batch))
    assert loaded.method == method.to_dict() and loaded.names == list(NAMES)
    assert loaded.report == fused.report
    again = loaded.save(tmp_path / "again")
    for name in ("experts.safetensors", "base/model.safetensors", "fused.json"):
        assert (again / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_saving_leaves_the_model_as_it_was_and_the_base_loads_alone(tmp_path: Path) -> None:
    import transformers

    model = tiny_models.llama()
    fused = foretune.fuse(model, tuned(model), SMILE())
    batch = {"input_ids": ids()}
    before = output(fused.model, batch)
    fused.save(tmp_path / "out")
    assert torch.equal(output(fused.model, batch), before)
    plain = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out" / "base").eval()
    assert torch.equal(output(plain, batch), output(model, batch))


@pytest.mark.parametrize("method", [SMILE(), foretune.Average()], ids=lambda m: m.name)
def test_stock_transformers_never_takes_a_fused_folder_for_its_base(
    method: Any, tmp_path: Path
) -> None:
    import transformers

    base = tiny_models.bert(num_labels=3)
    folder = foretune.fuse(base, heads_apart(base), method).save(tmp_path / "out")
    for trusted in (False, True):
        for load in (
            transformers.AutoConfig,
            transformers.AutoModel,
            transformers.AutoModelForSequenceClassification,
        ):
            with pytest.raises(ValueError, match=r"load it with foretune.load_fused\(FOLDER\)"):
                load.from_pretrained(folder, trust_remote_code=trusted)
    with pytest.raises(OSError, match="no file named model"):
        transformers.BertForSequenceClassification.from_pretrained(folder)
    with pytest.raises(UserError, match="out is a fused model: load it with foretune"):
        foretune.load_model(folder)
    with pytest.raises(UserError, match="out is a fused model: load it with foretune"):
        foretune.fuse(folder, heads_apart(base), method)


def heads_apart(base: nn.Module) -> dict[str, Any]:
    """Fine-tuned copies with a head of their own."""
    return {name: nudged(base, seed) for seed, name in enumerate("ab", 1)}


@pytest.mark.parametrize("method", [SMILE(k=4), foretune.Average()], ids=lambda m: m.name)
def test_folders_of_version_1_are_read(method: Any, tmp_path: Path) -> None:
    """They had the base's files, with the first task's head, in the folder itself."""
    base = tiny_models.bert(num_labels=3)
    fused = foretune.fuse(base, heads_apart(base), method)
    folder = fused.save(tmp_path / "out")
    for file in (folder / "base").iterdir():
        file.replace(folder / file.name)
    (folder / "base").rmdir()
    record = json.loads((folder / "fused.json").read_text())
    (folder / "fused.json").write_text(json.dumps({**record, "format": "foretune-fused-1"}))
    loaded = foretune.load_fused(folder)
    for task in "ab":
        batch = {"input_ids": ids()}
        loaded.set_task(task), fused.set_task(task)
        assert torch.equal(output(loaded.model, batch), output(fused.model, batch))


def test_saving_replaces_a_fused_model_and_nothing_else(tmp_path: Path) -> None:
    model = _one_layer()
    fused = foretune.fuse(model, tuned(model), SMILE())
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds files that foretune did not write"):
        fused.save(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    fused.save(tmp_path / "x")
    fused.save(tmp_path / "x")


def test_base_and_models_in_half_precision_stay_so(tmp_path: Path) -> None:
    model = tiny_models.llama().bfloat16()
    folder = saved(model, tmp_path / "base")
    folders = {n: saved(m, tmp_path / n) for n, m in tuned(model).items()}
    loaded = foretune.load_fused(foretune.fuse(folder, folders, SMILE()).save(tmp_path / "x"))
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}
    assert output(loaded.model, {"input_ids": ids()}).isfinite().all()


def test_shards_are_read_where_they_are(tmp_path: Path) -> None:
    model = tiny_models.llama()
    one = linears(model, 1)
    one.save_pretrained(tmp_path / "a", max_shard_size="10KB")
    assert (tmp_path / "a" / "model.safetensors.index.json").is_file()
    fused = foretune.fuse(model, {"a": tmp_path / "a"}, SMILE(k=FULL))
    batch = {"input_ids": ids()}
    torch.testing.assert_close(output(fused.model, batch), output(one, batch), rtol=1e-4, atol=1e-4)


def test_one_layer_of_a_folder_is_in_memory_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    model = tiny_models.llama()
    folders = {n: saved(m, tmp_path / n) for n, m in tuned(model).items()}
    loaded = []
    real = transformers.LlamaForCausalLM.from_pretrained
    monkeypatch.setattr(
        transformers.LlamaForCausalLM,
        "from_pretrained",
        lambda *a, **k: loaded.append(a) or real(*a, **k),
    )
    foretune.fuse(model, folders, SMILE())
    assert loaded == []


def test_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    base = tiny_models.bert()
    folder = saved(adapted(base, 1, ["query"]), tmp_path / "a")
    (folder / "base_fingerprint.json").write_text(json.dumps({"base": "0" * 40}))
    with pytest.raises(UserError, match="was trained on another base"):
        foretune.fuse(base, {"a": folder}, SMILE())


def test_folder_that_is_no_fused_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no fused model: it has no fused\.json"):
        foretune.load_fused(tmp_path)
    fused = foretune.fuse(tiny_models.bert(), tuned(tiny_models.bert()), SMILE())
    folder = fused.save(tmp_path / "x")
    (folder / "experts.safetensors").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"experts.safetensors is not a readable"):
        foretune.load_fused(folder)


def test_experts_and_base_learn() -> None:
    model = tiny_models.llama()
    fused = foretune.fuse(model, tuned(model), SMILE(k=4, gate_k=2, top_k=2))
    optimizer = torch.optim.AdamW(fused.model.parameters(), lr=1e-2)
    batch = {"input_ids": ids(), "labels": ids()}
    losses = []
    for _ in range(8):
        loss = fused.model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3
    layer = _layer(fused)
    fused.model(**batch).loss.backward()
    assert all(getattr(layer, p).grad.abs().sum() > 0 for p in ("up", "down", "gate"))


def test_plain_module_fuses(tmp_path: Path) -> None:
    model = tiny_models.plain()
    finetuned = {n: fused_models.nudged(model, i, "body") for i, n in enumerate("ab")}
    fused = foretune.fuse(model, finetuned, SMILE(k=FULL))
    x = torch.randn(2, 3, 8)
    fused.set_experts("b")
    torch.testing.assert_close(fused.model(x), finetuned["b"](x))
