"""EFT: oracles of its distribution, and that all of `generate` follows it."""

from __future__ import annotations

import copy
import json
import warnings
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import foretune
import tiny_models
from foretune import EFT, UserError
from foretune.adapters.fingerprint import base_record
from foretune.decoding.token_distributions import before_cap, in_nucleus

WIDE: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 4, "initializer_range": 0.3}
SHARP: dict[str, Any] = {"initializer_range": 0.4}
FREE: dict[str, Any] = {"max_new_tokens": 10, "eos_token_id": None, "pad_token_id": 0}
IDS = torch.randint(4, tiny_models.VOCABULARY, (3, 6), generator=torch.Generator().manual_seed(0))


def gemma2(cap: float | None = 5.0, seed: int = 0, **changes: Any) -> Any:
    sizes = {**tiny_models.DECODER, "head_dim": 8, "sliding_window": 4, "initializer_range": 0.5}
    config = transformers.Gemma2Config(
        **{**sizes, "num_hidden_layers": 2, "final_logit_softcapping": cap, **changes}
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transformers.Gemma2ForCausalLM(config).eval()


def mistral(seed: int = 0, **changes: Any) -> Any:
    sizes = {**tiny_models.DECODER, "sliding_window": 4, "num_hidden_layers": 2, **SHARP}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = transformers.MistralConfig(**{**sizes, **changes})
        return transformers.MistralForCausalLM(config).eval()


def trio(family: str) -> tuple[Any, Any, Any]:
    """(large, small tuned, small untuned) with one vocabulary."""
    if family == "llama":
        return tiny_models.llama(seed=1, **WIDE), tiny_models.llama(seed=2, **SHARP), small(3)
    if family == "gpt2":
        made = [tiny_models.gpt2(seed=s, n_layer=2, **SHARP) for s in (1, 2, 3)]
        return made[0], made[1], made[2]
    if family == "qwen2":
        return tiny_models.qwen2(seed=1, **WIDE), tiny_models.qwen2(seed=2, **SHARP), small(3)
    if family == "gemma2":
        return gemma2(seed=1), gemma2(seed=2), gemma2(seed=3)
    return mistral(1), mistral(2), tiny_models.gpt2(seed=3, **SHARP)


FAMILIES = ("llama", "gpt2", "qwen2", "gemma2", "mistral")


def small(seed: int) -> Any:
    return tiny_models.llama(seed=seed, num_hidden_layers=1, **SHARP)


def log_probs(model: Any, ids: Tensor = IDS, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return torch.log_softmax(model(input_ids=ids, **inputs).logits.float(), -1)


def steered_log_probs(
    method: EFT, model: Any, tuned: Any, untuned: Any = None, **more: Any
) -> Tensor:
    with method.steer(model, tuned=tuned, untuned=untuned, **more):
        return log_probs(model)


def random_logits(*shape: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def equal(a: Tensor, b: Tensor, within: float = 2e-6) -> bool:
    return bool(((a.exp() - b.exp()).abs() < within).all())


# --- the distribution ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_untuned_small_model_steered_is_the_tuned_one(family: str) -> None:
    _, tuned, untuned = trio(family)
    assert equal(steered_log_probs(EFT(), copy.deepcopy(untuned), tuned, untuned), log_probs(tuned))


@pytest.mark.parametrize("family", FAMILIES)
def test_beta_zero_is_the_model_alone(family: str) -> None:
    large, tuned, untuned = trio(family)
    assert equal(steered_log_probs(EFT(beta=0), large, tuned, untuned), log_probs(large))


@pytest.mark.parametrize("beta", [-1, 0.5, 3])
def test_equal_side_models_change_nothing(beta: float) -> None:
    large, tuned, _ = trio("llama")
    alike = steered_log_probs(EFT(beta=beta), large, tuned, copy.deepcopy(tuned))
    assert equal(alike, log_probs(large))


@pytest.mark.parametrize("beta", [0.5, 1.0, 1.7])
def test_logits_and_log_probabilities_give_one_distribution(beta: float) -> None:
    base, high, low = (random_logits(4, 24, seed=s) for s in range(3))
    by_logits = torch.log_softmax(base + beta * (high - low), -1)
    assert equal(EFT(beta=beta).combine(base, [high], [low]), by_logits)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_constant_on_a_row_of_logits_changes_nothing(place: int) -> None:
    logits = [random_logits(4, 24, seed=s) for s in range(3)]
    method = EFT(beta=0.7, top_p=0.8, delta_clip=2.0)
    before = method.combine(logits[0], [logits[1]], [logits[2]])
    logits[place] = logits[place] + torch.tensor([5.0, -3.0, 0.1, 40.0])[:, None]
    assert equal(method.combine(logits[0], [logits[1]], [logits[2]]), before, 1e-5)


def test_two_terms_of_one_pair_are_one_with_the_sum_of_the_weights() -> None:
    base, high, low = (random_logits(4, 24, seed=s) for s in range(3))
    both = EFT(weights=(0.3, 0.5)).combine(base, [high, high], [low])
    assert equal(both, EFT(weights=(0.8,)).combine(base, [high], [low]))
    assert equal(both, EFT(beta=0.8).combine(base, [high], [low]))
    each = EFT(weights=(0.3, 0.5)).combine(base, [high, high], [low, low])
    assert equal(both, each)


def test_several_tuned_models_have_equal_weights_by_default() -> None:
    base, one, two, low = (random_logits(4, 24, seed=s) for s in range(4))
    halves = EFT(weights=(0.5, 0.5)).combine(base, [one, two], [low])
    assert equal(EFT().combine(base, [one, two], [low]), halves)


def test_each_tuned_model_goes_with_its_own_untuned_one() -> None:
    base, one, two, low, lower = (random_logits(4, 24, seed=s) for s in range(5))
    got = EFT(weights=(1, -0.5)).combine(base, [one, two], [low, lower])
    assert equal(got, torch.log_softmax(base + (one - low) - 0.5 * (two - lower), -1))


def test_the_distribution_is_the_best_trade_of_reward_and_distance() -> None:
    base, high, low = (random_logits(24, seed=s).double() for s in range(3))
    beta = 0.7
    log_ref = torch.log_softmax(base, -1)
    reward = torch.log_softmax(high, -1) - torch.log_softmax(low, -1)

    def value(log_p: Tensor) -> float:
        p = log_p.exp()
        return float((p * (beta * reward)).sum() - (p * (log_p - log_ref)).sum())

    best = EFT(beta=beta).combine(base, [high], [low]).double()
    for seed in range(20):
        other = torch.log_softmax(best + 0.05 * random_logits(24, seed=seed).double(), -1)
        assert value(other) < value(best)


def test_top_p_one_is_plain() -> None:
    base, high, low = (random_logits(4, 24, seed=s) for s in range(3))
    plain = EFT().combine(base, [high], [low])
    assert torch.equal(EFT(top_p=1.0).combine(base, [high], [low]), plain)
    assert equal(EFT(top_p=1 - 1e-9).combine(base, [high], [low]), plain)


def test_tokens_outside_of_top_p_keep_their_ratios_and_those_inside_do_not() -> None:
    base, high, low = (random_logits(1, 24, seed=s)[0] / 2 for s in range(3))
    inside = in_nucleus(torch.log_softmax(base, -1), 0.8)
    assert 2 < int(inside.sum()) < 20
    got = EFT(top_p=0.8).combine(base, [high], [low])
    kept, before = got[~inside], torch.log_softmax(base, -1)[~inside]
    assert torch.allclose(kept - kept[0], before - before[0], atol=1e-5)
    delta = torch.log_softmax(high, -1) - torch.log_softmax(low, -1)
    assert delta[inside].max() - delta[inside].min() > 0.5
    assert equal(got, torch.log_softmax(base + delta.where(inside, 0.0), -1))


def test_nucleus_is_the_smallest_set_that_reaches_the_share() -> None:
    log_p = torch.tensor([[0.1, 0.5, 0.15, 0.25], [0.97, 0.01, 0.01, 0.01]]).log()
    assert in_nucleus(log_p, 0.7).tolist() == [
        [False, True, False, True],
        [True, False, False, False],
    ]
    assert in_nucleus(log_p, 1e-9).sum(-1).tolist() == [1, 1]


def test_delta_clip_bounds_how_far_a_ratio_moves() -> None:
    base, high, low = (random_logits(4, 24, seed=s) for s in range(3))
    moved = EFT(delta_clip=0.5).combine(base, [high], [low]) - torch.log_softmax(base, -1)
    spread = moved.max(-1).values - moved.min(-1).values
    assert bool((spread <= 1.0 + 1e-5).all()) and bool((spread > 0.9).all())
    wide = EFT(delta_clip=1e4).combine(base, [high], [low])
    assert torch.equal(wide, EFT().combine(base, [high], [low]))


def test_a_token_that_all_forbid_stays_forbidden() -> None:
    base, high, low = (random_logits(2, 24, seed=s) for s in range(3))
    for logits in (base, high, low):
        logits[:, 3] = -torch.inf
    got = EFT().combine(base, [high], [low])
    assert bool((got[:, 3] == -torch.inf).all()) and not bool(got.isnan().any())


def test_vocabularies_that_share_a_prefix_move_only_there() -> None:
    base, high, low = random_logits(4, 24), random_logits(4, 30, seed=1), random_logits(4, 20)
    got = EFT().combine(base, [high], [low])
    assert got.shape == (4, 24)
    by_hand = torch.log_softmax(base, -1)
    by_hand[:, :20] += torch.log_softmax(high[:, :20], -1) - torch.log_softmax(low[:, :20], -1)
    assert equal(got, torch.log_softmax(by_hand, -1))


def test_ids_that_mean_other_tokens_are_left_alone() -> None:
    base, high, low = (random_logits(1, 24, seed=s)[0] for s in range(3))
    shared = torch.ones(22, dtype=torch.bool)
    shared[[2, 5, 7]] = False
    got = EFT().combine(base, [high], [low], shared)
    alone = [2, 5, 7, 22, 23]
    ratios = got[alone] - torch.log_softmax(base, -1)[alone]
    assert torch.allclose(ratios, ratios[0].expand(5), atol=1e-5)


def test_uncapped_difference_is_that_of_the_model_without_cap() -> None:
    capped, free = gemma2(5.0, seed=2), gemma2(None, seed=2)
    assert not equal(log_probs(capped), log_probs(free), 1e-2)
    with torch.no_grad():
        raw, squeezed = free(IDS).logits, capped(IDS).logits
    assert torch.allclose(before_cap(squeezed, 5.0), raw, atol=1e-3)
    assert torch.equal(before_cap(raw, None), raw)
    large, low = tiny_models.llama(seed=1, **WIDE), small(3)
    lifted = steered_log_probs(EFT(uncap=True), large, capped, low)
    assert equal(lifted, steered_log_probs(EFT(), large, free, low), 1e-4)
    assert not equal(lifted, steered_log_probs(EFT(), large, capped, low), 1e-3)


def test_logits_at_the_cap_come_back_finite() -> None:
    assert bool(before_cap(torch.tensor([30.0, -30.0, 31.0]), 30.0).isfinite().all())


# --- generate -----------------------------------------------------------------------------------


def reference(method: EFT, large: Any, tuned: Any, untuned: Any, ids: Tensor, steps: int) -> Tensor:
    """Greedy decoding without hooks, caches or padding."""
    for _ in range(steps):
        logits = [model(ids).logits[:, -1] for model in (large, tuned, untuned)]
        token = method.combine(logits[0], [logits[1]], [logits[2]]).argmax(-1, keepdim=True)
        ids = torch.cat([ids, token], 1)
    return ids


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_greedy_with_and_without_cache_is_the_plain_loop(family: str) -> None:
    large, tuned, untuned = trio(family)
    method = EFT(beta=0.8)
    want = reference(method, large, tuned, untuned, IDS, 10)
    with method.steer(large, tuned=tuned, untuned=untuned):
        assert torch.equal(large.generate(IDS, do_sample=False, **FREE), want)
        free = large.generate(IDS, do_sample=False, use_cache=False, **FREE)
    assert torch.equal(free, want)
    assert not torch.equal(large.generate(IDS, do_sample=False, **FREE), want)


@pytest.mark.parametrize("family", FAMILIES)
def test_left_padded_rows_are_what_they_are_alone(family: str) -> None:
    large, tuned, untuned = trio(family)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1]])
    with EFT(beta=0.8).steer(large, tuned=tuned, untuned=untuned):
        padded = IDS.where(mask > 0, 0)
        batch = large.generate(padded, attention_mask=mask, do_sample=False, **FREE)
        beams = large.generate(padded, attention_mask=mask, num_beams=3, **FREE)
        for row, used, wide, ids in zip(batch, mask, beams, IDS, strict=True):
            alone = ids[used > 0][None]
            n = alone.shape[1]
            assert torch.equal(large.generate(alone, do_sample=False, **FREE)[0, n:], row[6:])
            assert torch.equal(large.generate(alone, num_beams=3, **FREE)[0, n:], wide[6:])


@pytest.mark.parametrize("family", FAMILIES)
def test_beams_with_cache_are_those_without(family: str) -> None:
    large, tuned, untuned = trio(family)
    options = {**FREE, "num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5}
    with EFT(beta=0.8).steer(large, tuned=tuned, untuned=untuned):
        cached = large.generate(IDS, **options)
        assert torch.equal(cached, large.generate(IDS, use_cache=False, **options))
        assert not torch.equal(cached[0], large.generate(IDS, do_sample=False, **FREE)[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_drafting_by_the_tuned_model_or_the_prompt_changes_no_token(family: str) -> None:
    large, tuned, untuned = trio(family)
    with EFT(beta=1.0).steer(large, tuned=tuned, untuned=untuned) as beside:
        want = large.generate(IDS[:1], do_sample=False, **FREE)
        calls = beside.forwards
        drafted = large.generate(IDS[:1], do_sample=False, assistant_model=tuned, **FREE)
        assert beside.forwards - calls <= calls
        looked = large.generate(IDS[:1], do_sample=False, prompt_lookup_num_tokens=3, **FREE)
    assert torch.equal(drafted, want)
    assert torch.equal(looked, want)


def test_a_drafter_that_is_nearly_right_saves_calls_of_the_large_model() -> None:
    untuned = small(3)
    large, tuned = copy.deepcopy(untuned), small(2)  # EFT is then the tuned model itself
    with EFT().steer(large, tuned=tuned, untuned=untuned) as beside:
        large.generate(IDS[:1], do_sample=False, assistant_model=tuned, **FREE)
    assert beside.forwards <= 4


def test_sampled_drafts_keep_the_distribution() -> None:
    large, tuned, untuned = small(1), small(2), small(3)
    draws = 160
    with EFT().steer(large, tuned=tuned, untuned=untuned):
        first = log_probs(large, IDS[:1])[0, -1].exp()
        followed = torch.cat([IDS[:1].expand(24, -1), torch.arange(24)[:, None]], 1)
        second = first @ log_probs(large, followed)[:, -1].exp()
        torch.manual_seed(0)
        options = {**FREE, "max_new_tokens": 2, "do_sample": True, "top_k": 0}
        drafted = torch.cat(
            [large.generate(IDS[:1], assistant_model=tuned, **options) for _ in range(draws)]
        )
        exact = large.generate(IDS[:1].expand(draws, -1), **options)
    alone = log_probs(tuned, IDS[:1])[0, -1].exp()
    assert total_variation(alone, first) > 0.2  # the drafter's own distribution is far away
    for place, want in ((6, first), (7, second)):
        by_draft, by_draw = (
            torch.bincount(ids[:, place], minlength=24) / draws for ids in (drafted, exact)
        )
        # As far as an exact sampler of as many draws, give or take.
        assert total_variation(by_draft, want) < total_variation(by_draw, want) + 0.06


def total_variation(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().sum() / 2)


# --- adapters, the model itself, prompts of their own -------------------------------------------


def with_lora(model: Any, seed: int = 0) -> Any:
    import peft

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], inference_mode=True)
        wrapped = peft.get_peft_model(model, config).eval()
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.5)
    return wrapped


def test_adapter_on_and_off_are_a_pair_in_one_set_of_weights() -> None:
    large, untuned = tiny_models.llama(seed=1, **WIDE), small(3)
    tuned = with_lora(copy.deepcopy(untuned))
    wanted = [p.requires_grad for p in tuned.parameters()]
    pair = steered_log_probs(EFT(beta=0.7), large, tuned)
    assert equal(pair, steered_log_probs(EFT(beta=0.7), large, tuned, untuned))
    assert not equal(pair, log_probs(large), 1e-2)
    assert [p.requires_grad for p in tuned.parameters()] == wanted
    inside = tuned.get_base_model()  # peft has put the adapter into it
    assert equal(steered_log_probs(EFT(beta=0.7), large, tuned, inside), pair)
    with EFT(beta=0.7).steer(large, tuned=tuned):
        cached = large.generate(IDS, do_sample=False, **FREE)
        assert torch.equal(cached, large.generate(IDS, do_sample=False, use_cache=False, **FREE))
        drafted = large.generate(
            IDS[:1], do_sample=False, assistant_model=tuned.get_base_model(), **FREE
        )
    assert torch.equal(drafted[0], cached[0])


def test_steering_an_adapted_model_by_itself_scales_its_adapter() -> None:
    base = small(3)
    tuned = with_lora(copy.deepcopy(base))
    on, off = log_probs(tuned), log_probs(base)
    got = steered_log_probs(EFT(beta=0.5), tuned, tuned)
    assert equal(got, torch.log_softmax(on + 0.5 * (on - off), -1))
    with EFT(beta=0.5).steer(tuned, tuned=tuned):
        cached = tuned.generate(input_ids=IDS, do_sample=False, **FREE)
        free = tuned.generate(input_ids=IDS, do_sample=False, use_cache=False, **FREE)
    assert torch.equal(cached, free)


def test_the_model_itself_may_be_a_side_model() -> None:
    large, tuned, _ = trio("llama")
    assert equal(steered_log_probs(EFT(), large, tuned, large), log_probs(tuned))
    with EFT(beta=0.5).steer(large, tuned=large, untuned=tuned) as beside:
        cached = large.generate(IDS, do_sample=False, **FREE)
        assert (beside.forwards, beside.side_forwards) == (10, 20)
        free = large.generate(IDS, do_sample=False, use_cache=False, **FREE)
    assert torch.equal(cached, free)


@torch.no_grad()
def test_side_models_read_prompts_of_their_own() -> None:
    large, _, untuned = trio("llama")
    tuned = tiny_models.gpt2(seed=2, **SHARP)  # its positions are absolute
    own = torch.randint(4, 24, (2, 9), generator=torch.Generator().manual_seed(5))
    own_mask = torch.ones_like(own)
    own_mask[0, :4] = 0
    prompts = {"tuned": {"input_ids": own, "attention_mask": own_mask}}
    method = EFT(beta=0.8)
    with method.steer(large, tuned=tuned, untuned=untuned, prompts=prompts, prompt_length=6):
        got = large.generate(IDS[:2], do_sample=False, **FREE)
        free = large.generate(IDS[:2], do_sample=False, use_cache=False, **FREE)
        beams = large.generate(IDS[:2], num_beams=3, **FREE)
        free_beams = large.generate(IDS[:2], num_beams=3, use_cache=False, **FREE)
    for row in range(2):
        ids, side = IDS[row : row + 1], own[row, own_mask[row] > 0][None]
        for _ in range(10):
            new = ids[:, 6:]
            logits = [
                large(ids).logits[:, -1],
                tuned(torch.cat([side, new], 1)).logits[:, -1],
                untuned(ids).logits[:, -1],
            ]
            token = method.combine(logits[0], [logits[1]], [logits[2]]).argmax(-1, keepdim=True)
            ids = torch.cat([ids, token], 1)
        assert torch.equal(got[row], ids[0])
    assert torch.equal(free, got)
    assert torch.equal(beams, free_beams)
    alone = {"tuned": {k: v[1:] for k, v in prompts["tuned"].items()}}
    with method.steer(large, tuned=tuned, untuned=untuned, prompts=alone, prompt_length=6):
        drafted = large.generate(IDS[1:2], do_sample=False, assistant_model=tuned, **FREE)
    assert torch.equal(drafted[0], got[1])


def test_prompts_of_their_own_need_to_be_read_whole() -> None:
    large, tuned, untuned = trio("llama")
    own = {"tuned": {"input_ids": IDS[:, :2], "attention_mask": torch.ones(3, 2)}}
    method = EFT()
    with (
        method.steer(large, tuned=tuned, untuned=untuned, prompts=own, prompt_length=6),
        pytest.raises(UserError, match="full prompt in one forward call"),
    ):
        large(IDS)  # logits at all positions, of which the tuned model has two
    with pytest.raises(UserError, match="need the model's prompt_length"):
        steered_log_probs(method, large, tuned, untuned, prompts=own)
    with pytest.raises(UserError, match="prompts takes tuned and untuned, got tunned"):
        steered_log_probs(method, large, tuned, untuned, prompts={"tunned": own["tuned"]})


# --- warnings and mistakes ----------------------------------------------------------------------


def test_a_token_that_the_untuned_model_never_learned_is_warned_of_once() -> None:
    large, tuned, untuned = trio("llama")
    biased = tiny_models.gpt2(seed=3)
    head = nn.Linear(16, 24)
    nn.init.zeros_(head.weight)
    with torch.no_grad():
        head.bias.copy_(torch.zeros(24))
        head.bias[2] = -40.0
        biased.lm_head = head
    sure = tiny_models.gpt2(seed=4)
    sure.lm_head = copy.deepcopy(head)
    with torch.no_grad():
        sure.lm_head.bias[2] = 40.0
    with (
        pytest.warns(UserWarning, match="delta_clip=10") as caught,
        EFT().steer(large, tuned=sure, untuned=biased),
    ):
        large.generate(IDS, do_sample=False, **FREE)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        steered_log_probs(EFT(delta_clip=10), large, sure, biased)
        steered_log_probs(EFT(), large, tuned, untuned)


def test_ids_that_a_side_model_cannot_read_are_replaced_and_warned_of() -> None:
    large, tuned, _ = trio("llama")
    narrow = tiny_models.llama(seed=3, vocab_size=20, num_hidden_layers=1, **SHARP)
    ids = torch.tensor([[5, 21, 6, 7]])
    with EFT().steer(large, tuned=tuned, untuned=narrow), pytest.warns(UserWarning) as caught:
        got = log_probs(large, ids)
    assert "20 tokens and cannot read token 21" in str(caught[0].message)
    read = torch.tensor([[5, 2, 6, 7]])  # 2 is its end-of-text
    with torch.no_grad():
        logits = [large(ids).logits, tuned(ids).logits, narrow(read).logits]
    assert equal(got, EFT().combine(logits[0], [logits[1]], [logits[2]]))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"beta": "x"}, "beta must be a finite number, got 'x'"),
        ({"beta": float("inf")}, "beta must be a finite number, got inf"),
        ({"beta": True}, "beta must be a finite number"),
        ({"top_p": 0}, "top_p must be a number above 0, got 0"),
        ({"top_p": 1.5}, "top_p must be a number above 0 and at most 1, got 1.5"),
        ({"delta_clip": -1}, "delta_clip must be a number above 0, got -1"),
        ({"weights": ()}, "weights must be a list of numbers"),
        ({"weights": 0.5}, "weights must be a list of numbers, got 0.5"),
        ({"weights": (1, None)}, "each of weights must be a finite number, got None"),
        ({"uncap": 1}, "uncap must be true or false, got 1"),
    ],
)
def test_bad_fields_are_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        EFT(**fields)


def test_numbers_of_models_that_do_not_fit_are_refused() -> None:
    large, tuned, untuned = trio("llama")
    with pytest.raises(UserError, match="2 weights for 1 tuned models"):
        steered_log_probs(EFT(weights=(1, 2)), large, tuned, untuned)
    with pytest.raises(UserError, match="1 tuned models but 2 untuned"):
        steered_log_probs(EFT(), large, tuned, [untuned, untuned])
    with pytest.raises(UserError, match="untuned is missing"):
        steered_log_probs(EFT(), large, tuned)


@pytest.mark.parametrize("kind", ["bert", "t5", "module"])
def test_models_that_are_no_decoders_are_refused(kind: str) -> None:
    large, tuned, untuned = trio("llama")
    odd = {"bert": tiny_models.bert, "t5": tiny_models.t5, "module": tiny_models.plain}[kind]()
    with pytest.raises(UserError, match="model is needed, got"):
        steered_log_probs(EFT(), large, odd, untuned)
    with pytest.raises(UserError, match="model is needed, got"):
        foretune.decode(
            odd, "the cat", EFT(), tokenizer=tiny_models.tokenizer(), tuned=tuned, untuned=untuned
        )


# --- folders ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """large, tuned, untuned: model folders; adapter: a PEFT folder over untuned."""
    root = tmp_path_factory.mktemp("models")
    large, tuned, untuned = trio("llama")
    for name, model in {"large": large, "tuned": tuned, "untuned": untuned}.items():
        model.save_pretrained(root / name)
        tiny_models.tokenizer().save_pretrained(root / name)
    adapted = with_lora(copy.deepcopy(untuned))
    adapted.peft_config["default"].base_model_name_or_path = str(root / "untuned")
    adapted.save_pretrained(root / "adapter")
    record = json.dumps(base_record(untuned))
    (root / "adapter" / "base_fingerprint.json").write_text(record)
    return root


PROMPTS = ["the cat sat", "a dog", "one two three"]
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6}


def test_decode_takes_models_and_folders_alike(folders: Any) -> None:
    large, tuned, untuned = trio("llama")
    names = {"tuned": str(folders / "tuned"), "untuned": folders / "untuned"}
    from_folders = foretune.decode(str(folders / "large"), PROMPTS, EFT(), **names, **GREEDY)
    from_models = foretune.decode(
        large,
        PROMPTS,
        EFT(),
        tokenizer=tiny_models.tokenizer(),
        tuned=tuned,
        untuned=untuned,
        batch_size=2,
        **GREEDY,
    )
    assert from_folders == from_models
    assert [one.prompt for one in from_models] == PROMPTS
    drafted = foretune.decode(
        str(folders / "large"), PROMPTS, EFT(), **names, speculative=True, **GREEDY
    )
    assert drafted == from_models


def test_an_adapter_folder_is_its_own_pair_and_may_be_given_its_base(folders: Any) -> None:
    name = str(folders / "large")
    alone = foretune.decode(name, PROMPTS, EFT(), tuned=folders / "adapter", **GREEDY)
    untuned = small(3)
    for base in (str(folders / "untuned"), untuned):
        given = {"tuned": folders / "adapter", "untuned": base}
        assert foretune.decode(name, PROMPTS, EFT(), **given, **GREEDY) == alone
    assert not any("lora" in key for key in untuned.state_dict())  # left untouched
    assert alone != foretune.decode(name, PROMPTS, EFT(beta=0), tuned=folders / "adapter", **GREEDY)


def test_several_folders_with_weights(folders: Any) -> None:
    name, both = str(folders / "large"), [str(folders / "tuned"), str(folders / "adapter")]
    method = EFT(weights=(0.7, 0.3))
    _, _, parts = method.load(name, tuned=both, untuned=str(folders / "untuned"))
    large, tuned, untuned = trio("llama")
    adapted = with_lora(copy.deepcopy(untuned))
    with method.steer(large, **parts):
        got = log_probs(large)
    delta = 0.7 * (log_probs(tuned) - log_probs(untuned)) + 0.3 * (
        log_probs(adapted) - log_probs(untuned)
    )
    assert equal(got, torch.log_softmax(log_probs(large) + delta, -1))


def test_prompts_of_their_own_follow_the_batches(folders: Any) -> None:
    parts = {"tuned": str(folders / "tuned"), "untuned": str(folders / "untuned")}
    own = {"tuned_prompts": ["red the cat sat on", "blue a dog", "green one two"]}
    call = [str(folders / "large"), PROMPTS, EFT()]
    whole = foretune.decode(*call, **parts, **own, **GREEDY)
    assert foretune.decode(*call, **parts, **own, batch_size=1, **GREEDY) == whole
    assert foretune.decode(*call, **parts, **own, speculative=True, **GREEDY) == whole
    same = {"tuned_prompts": PROMPTS, "untuned_prompts": PROMPTS}
    plain = foretune.decode(*call, **parts, **GREEDY)
    assert foretune.decode(*call, **parts, **same, **GREEDY) == plain != whole


def test_other_tokenizers_and_other_bases_are_refused(folders: Any, tmp_path: Any) -> None:
    name, parts = str(folders / "large"), {"tuned": str(folders / "tuned")}
    with pytest.raises(UserError, match="EFT needs a tuned model"):
        foretune.decode(name, "the cat", EFT())
    with pytest.raises(UserError, match="untuned is missing"):
        foretune.decode(name, "the cat", EFT(), **parts)
    with pytest.raises(UserError, match="3 prompts but 1 tuned_prompts"):
        foretune.decode(name, PROMPTS, EFT(), **parts, tuned_prompts="the cat")
    with pytest.raises(UserError, match="2 tuned models but 3 untuned"):
        foretune.decode(name, "a", EFT(), tuned=[name, name], untuned=[name] * 3)
    with pytest.raises(UserError, match='no option "num_beam"'):
        foretune.decode(name, "a", EFT(), tuned=name, untuned=name, num_beam=3)
    odd = tmp_path / "odd"
    small(3).save_pretrained(odd)
    text = tiny_models.tokenizer().backend_tokenizer.to_str()
    for word in ("cat", "dog", "sat", "mat"):
        text = text.replace(f'"{word}"', f'"{word}s"')
    (tmp_path / "t.json").write_text(text)
    transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "t.json")).save_pretrained(
        odd
    )
    reason = r"4 of 24 ids differ \(id 13 is 'cat' to the model, 'cats' to .*odd\); log-prob"
    with pytest.raises(UserError, match=reason):
        foretune.decode(name, "a", EFT(), **parts, untuned=str(odd))


def test_speculative_lets_the_first_tuned_model_draft(
    folders: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from foretune.decoding import generation

    seen: list[Any] = []
    plain = generation.generate_texts

    def spy(*args: Any, **options: Any) -> Any:
        seen.append(options.get("assistant_model"))
        return plain(*args, **options)

    monkeypatch.setattr(generation, "generate_texts", spy)
    tuned, untuned = small(2), small(3)
    for speculative in (True, False):
        parts = {"tuned": tuned, "untuned": untuned, "speculative": speculative}
        foretune.decode(str(folders / "large"), "a dog", EFT(), **parts, **GREEDY)
    assert seen[0] is tuned and seen[1] is None


def test_a_model_that_asks_for_a_static_cache_gets_a_dynamic_one() -> None:
    large, tuned, untuned = trio("llama")
    parts = {"tuned": tuned, "untuned": untuned, "tokenizer": tiny_models.tokenizer()}
    plain = foretune.decode(large, PROMPTS, EFT(), **parts, **GREEDY)
    large.generation_config.cache_implementation = "static"
    assert foretune.decode(large, PROMPTS, EFT(), **parts, **GREEDY) == plain


def test_speculative_needs_one_vocabulary(folders: Any) -> None:
    narrow = tiny_models.llama(seed=3, vocab_size=20, num_hidden_layers=1, **SHARP)
    with pytest.raises(UserError, match="vocabulary of the large one, got 20 and 24 tokens"):
        foretune.decode(
            str(folders / "large"), "a", EFT(), tuned=narrow, untuned=narrow, speculative=True
        )


def test_an_adapter_of_another_base_is_refused(folders: Any, tmp_path: Any) -> None:
    import json
    import shutil

    from foretune.adapters.fingerprint import fingerprint

    adapter = tmp_path / "adapter"
    shutil.copytree(folders / "adapter", adapter)
    record = adapter / "base_fingerprint.json"
    record.write_text(json.dumps({"base": fingerprint(small(3))}))
    call = [str(folders / "large"), "a", EFT()]
    foretune.decode(*call, tuned=adapter, **GREEDY)
    record.write_text(json.dumps({"base": fingerprint(small(4))}))
    with pytest.raises(UserError, match="trained on another base"):
        foretune.decode(*call, tuned=adapter, **GREEDY)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": None})
    )
    with pytest.raises(UserError, match="names no base_model_name_or_path"):
        foretune.decode(*call, tuned=adapter, **GREEDY)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no adapter_model.safetensors; only safetensors"):
        foretune.decode(*call, tuned=adapter, untuned=small(3), **GREEDY)
