"""Side models: the cache follows all that is done to it, and is never silently wrong."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import tiny_models
from foretune.decoding.side_models import Side, carry, run_beside
from foretune.errors import UserError
from foretune.models.calls import CACHE_NAMES, cache_argument

IDS = torch.randint(4, tiny_models.VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(0))
FREE: dict[str, Any] = {
    "max_new_tokens": 6,
    "eos_token_id": None,
    "pad_token_id": 0,
    "do_sample": False,
}
CACHE: Any = cache_argument(tiny_models.llama(num_hidden_layers=1))  # as this transformers says it


def summed(base: Tensor, sides: list[Tensor]) -> Tensor:
    return base + torch.stack(sides).sum(0)


def model(seed: int, **changes: Any) -> Any:
    return tiny_models.llama(seed=seed, num_hidden_layers=2, initializer_range=0.4, **changes)


@pytest.fixture
def large() -> Any:
    return model(1)


@pytest.fixture
def sides() -> list[Side]:
    return [Side(model=model(2)), Side(model=tiny_models.gpt2(seed=3, n_layer=1))]


def test_the_model_is_as_it_was_after_the_block(large: Any, sides: list[Side]) -> None:
    large.train()
    sides[0].model.model.layers[0].train()
    large.lm_head.weight.requires_grad_(False)
    modes = [m.training for side in (large, sides[0].model) for m in side.modules()]
    with torch.no_grad():
        before = copy.deepcopy(large).eval()(IDS).logits
    with run_beside(large, sides, summed):
        large.generate(IDS, **FREE)
        assert not large.training
    assert len(large._forward_hooks) == len(large._forward_pre_hooks) == 0
    assert modes == [m.training for side in (large, sides[0].model) for m in side.modules()]
    assert not large.lm_head.weight.requires_grad and large.model.norm.weight.requires_grad
    with torch.no_grad():
        assert torch.equal(large.eval()(IDS).logits, before)


def test_an_error_inside_the_block_leaves_no_hook(large: Any, sides: list[Side]) -> None:
    def fails(base: Tensor, logits: list[Tensor]) -> Tensor:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"), run_beside(large, sides, fails):
        large(IDS)
    assert len(large._forward_hooks) == len(large._forward_pre_hooks) == 0
    with run_beside(large, sides, summed):
        large(IDS)  # the flag against recursion was lowered again


def test_a_forward_step_by_step_is_one_forward(large: Any, sides: list[Side]) -> None:
    with run_beside(large, sides, summed), torch.no_grad():
        want = large(IDS).logits
        first = large(IDS[:, :4])  # positional, and no cache given: it is made
        second = large(IDS[:, 4:], **{CACHE: first[CACHE]})
        assert torch.allclose(second.logits, want[:, 4:], atol=1e-4)
        kept = large(input_ids=IDS, logits_to_keep=2).logits
        assert torch.allclose(kept, want[:, -2:], atol=1e-4)
        assert large(IDS, use_cache=False).get(CACHE) is None


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_either_name_of_the_cache_argument_will_do(
    large: Any, sides: list[Side], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for one in (large, sides[0].model):
        monkeypatch.setattr(one, "forward", with_cache_named(name, one.forward))
    with run_beside(large, sides, summed), torch.no_grad():
        want = large(IDS, use_cache=False).logits
        first = large(IDS[:, :4], use_cache=True)
        second = large(IDS[:, 4:], **{name: first[CACHE]}, use_cache=True)
    assert torch.allclose(second.logits, want[:, 4:], atol=1e-4)


def with_cache_named(name: str, forward: Any) -> Any:
    """The forward with this name for its cache, whichever transformers it is of."""

    def renamed(*args: Any, **kwargs: Any) -> Any:
        if name in kwargs:
            kwargs[CACHE] = kwargs.pop(name)
        return forward(*args, **kwargs)

    signature = inspect.signature(forward)
    parameters = [
        p.replace(name=name) if p.name == CACHE else p for p in signature.parameters.values()
    ]
    renamed.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return renamed


def test_an_empty_cache_of_the_user_is_used_and_goes_on(large: Any, sides: list[Side]) -> None:
    cache = transformers.DynamicCache()
    with run_beside(large, sides, summed):
        want = large.generate(IDS, **{**FREE, "max_new_tokens": 9})
        some = large.generate(IDS, **{CACHE: cache}, **{**FREE, "max_new_tokens": 4})
        more = {CACHE: cache, "attention_mask": torch.ones_like(some)}
        rest = large.generate(some, **more, **{**FREE, "max_new_tokens": 5})
    assert torch.equal(rest, want)


def test_a_deep_copy_of_a_prompt_cache_has_side_caches_of_its_own(
    large: Any, sides: list[Side]
) -> None:
    with run_beside(large, sides, summed), torch.no_grad():
        want = large.generate(IDS, **FREE)
        prompt = large(IDS[:, :4], **{CACHE: transformers.DynamicCache()})[CACHE]
        for _ in range(2):
            got = large.generate(IDS, **{CACHE: copy.deepcopy(prompt)}, **FREE)
            assert torch.equal(got, want)


def test_a_cache_filled_without_side_models_is_refused(large: Any, sides: list[Side]) -> None:
    with torch.no_grad():
        filled = large(IDS)[CACHE]
    with (
        run_beside(large, sides, summed),
        pytest.raises(UserError, match="filled without the side models"),
    ):
        large.generate(IDS, **{CACHE: filled}, **FREE)


def test_a_cache_that_is_none_of_transformers_is_refused(large: Any, sides: list[Side]) -> None:
    with (
        run_beside(large, sides, summed),
        pytest.raises(UserError, match="Cache class of transformers, got tuple"),
    ):
        large(IDS, **{CACHE: ()})


def test_a_cache_used_outside_of_the_block_is_refused(large: Any, sides: list[Side]) -> None:
    with torch.no_grad():
        with run_beside(large, sides, summed):
            cache = large(IDS[:, :3])[CACHE]
        large(IDS[:, 3:5], **{CACHE: cache})
        with (
            run_beside(large, sides, summed),
            pytest.raises(UserError, match="holds 3 tokens instead of 5"),
        ):
            large(IDS[:, 5:], **{CACHE: cache})


def test_a_cache_of_other_side_models_is_refused_unless_it_is_empty(
    large: Any, sides: list[Side]
) -> None:
    other = [Side(model=model(7)), sides[1]]
    with torch.no_grad():
        with run_beside(large, sides, summed):
            cache = large(IDS[:, :3])[CACHE]
        with (
            run_beside(large, other, summed),
            pytest.raises(UserError, match="filled with other side models"),
        ):
            large(IDS[:, 3:], **{CACHE: cache})
        cache.reset()
        with run_beside(large, sides[:1], summed):
            want = large(IDS).logits
            fresh = transformers.DynamicCache()
            carry(fresh, [side.key for side in other])
            assert torch.allclose(large(IDS, **{CACHE: fresh}).logits, want, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache_implementation": "static"}, "dynamic cache"),
        ({"inputs_embeds": torch.zeros(1, 3, 16)}, "pass input_ids, not inputs_embeds"),
    ],
)
def test_what_cannot_be_generated_is_refused(
    large: Any, sides: list[Side], options: dict[str, Any], message: str
) -> None:
    inputs = {} if "inputs_embeds" in options else {"input_ids": IDS}
    with run_beside(large, sides, summed), pytest.raises(UserError, match=message):
        large.generate(**inputs, **options, **FREE)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"labels": IDS}, "no loss"),
        ({"logits_to_keep": torch.tensor([0])}, "got a tensor"),
        ({"attention_mask": torch.ones(2, 1, 6, 6)}, r"shape \(rows, tokens\)"),
        ({"return_dict": False}, "leave out return_dict=False"),
    ],
)
def test_what_cannot_be_forwarded_is_refused(
    large: Any, sides: list[Side], inputs: dict[str, Any], message: str
) -> None:
    with run_beside(large, sides, summed), pytest.raises(UserError, match=message):
        large(IDS, **inputs)


def test_prefill_in_chunks_and_sliding_windows_give_the_same(large: Any) -> None:
    config = transformers.MistralConfig(
        **{**tiny_models.DECODER, "sliding_window": 3, "num_hidden_layers": 2}
    )
    torch.manual_seed(5)
    sliding = transformers.MistralForCausalLM(config).eval()
    for main, side in ((large, sliding), (sliding, large)):
        with run_beside(main, [Side(model=side)], summed):
            want = main.generate(IDS, use_cache=False, **FREE)
            assert torch.equal(main.generate(IDS, **FREE), want)
            assert torch.equal(main.generate(IDS, prefill_chunk_size=2, **FREE), want)
            looked = main.generate(IDS[:1], prompt_lookup_num_tokens=2, **FREE)
            assert torch.equal(looked, want[:1])


def test_a_model_with_a_recurrent_state_is_refused(large: Any) -> None:
    with (
        pytest.raises(UserError, match=r"Mamba.* recurrent state"),
        run_beside(large, [Side(model=tiny_models.mamba2())], summed),
    ):
        pass


def test_forward_calls_are_counted(large: Any, sides: list[Side]) -> None:
    with run_beside(large, sides, summed) as beside:
        large.generate(IDS, **FREE)
    assert (beside.forwards, beside.side_forwards) == (6, 12)
