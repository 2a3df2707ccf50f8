"""EFT as a logits processor: token for token what `steer` gives, whatever way `generate` goes."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import tiny_models
from decoding.test_eft import FAMILIES, FREE, IDS, WIDE, log_probs, small, trio, with_lora
from foretune import EFT, UserError

MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1]])
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 0.8, "top_k": 0},
    "beams": {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5},
    "without cache": {"do_sample": False, "use_cache": False},
}


def both(method: EFT, models: Any, ids: Tensor, mask: Tensor | None, **options: Any) -> Any:
    """(ids by `steer`, ids by a processor, the processor)."""
    large, tuned, untuned = models
    inputs = {"input_ids": ids, **({} if mask is None else {"attention_mask": mask})}
    parts = {"tuned": tuned, "untuned": untuned}
    torch.manual_seed(3)
    with method.steer(large, **parts):
        steered = large.generate(**inputs, **FREE, **options)
    processor = method.processor(**parts, attention_mask=mask)
    torch.manual_seed(3)
    processed = large.generate(**inputs, logits_processor=[processor], **FREE, **options)
    return steered, processed, processor


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_left_padded_batch_is_what_steer_gives(family: str, way: str) -> None:
    models, ids = trio(family), IDS.where(MASK > 0, 0)
    steered, processed, _ = both(EFT(beta=0.8), models, ids, MASK, **WAYS[way])
    assert torch.equal(processed, steered)
    plain = models[0].generate(ids, attention_mask=MASK, **FREE, **WAYS["greedy"])
    assert not torch.equal(plain, processed[: len(plain)])


@pytest.mark.parametrize("family", FAMILIES)
def test_drafts_change_no_token(family: str) -> None:
    models = trio(family)
    steered, processed, processor = both(
        EFT(), models, IDS[:1], None, do_sample=False, assistant_model=models[1]
    )
    assert torch.equal(processed, steered)
    alone, _, _ = both(EFT(), models, IDS[:1], None, do_sample=False)
    assert torch.equal(processed, alone)
    looked = models[0].generate(
        IDS[:1], logits_processor=[processor], do_sample=False, prompt_lookup_num_tokens=3, **FREE
    )
    assert torch.equal(looked, alone)


@pytest.mark.parametrize(
    "fields", [{"top_p": 0.9}, {"delta_clip": 0.7, "weights": (0.8, 0.3)}, {"uncap": True}], ids=str
)
def test_every_field_counts(fields: dict[str, Any]) -> None:
    large, tuned, untuned = trio("gemma2")
    ups = [tuned, trio("llama")[1]] if "weights" in fields else tuned
    steered, processed, _ = both(EFT(**fields), (large, ups, untuned), IDS, None, do_sample=False)
    assert torch.equal(processed, steered)


def test_an_adapter_is_its_own_pair_also_on_the_model_itself() -> None:
    large, tuned = tiny_models.llama(seed=1, **WIDE), with_lora(small(3))
    wanted = [p.requires_grad for p in tuned.parameters()]
    steered, processed, _ = both(EFT(beta=0.7), (large, tuned, None), IDS, None, num_beams=3)
    assert torch.equal(processed, steered)
    assert [p.requires_grad for p in tuned.parameters()] == wanted
    steered, processed, _ = both(EFT(beta=0.5), (tuned, tuned, None), IDS, None, do_sample=False)
    assert torch.equal(processed, steered)


def test_scores_are_normalised_and_dropout_is_off() -> None:
    large, tuned, untuned = trio("llama")
    processor = EFT().processor(tuned=tuned, untuned=untuned, attention_mask=None)
    with EFT().steer(large, tuned=tuned, untuned=untuned):
        wanted = log_probs(large)[:, -1]
    with torch.no_grad():
        scores = large(IDS).logits[:, -1]
    tuned.train()
    got = processor(IDS, scores)
    assert tuned.training
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(got.exp().sum(-1), torch.ones(3))
    forbidden = scores.clone()
    forbidden[:, 5] = -torch.inf
    assert bool((processor(IDS, forbidden)[:, 5] == -torch.inf).all())


def test_only_what_is_new_is_read() -> None:
    large, tuned, untuned = trio("gpt2")
    lengths: list[int] = []
    tuned.register_forward_pre_hook(
        lambda _, __, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    steered, processed, processor = both(
        EFT(beta=0.8), (large, tuned, untuned), IDS, None, num_beams=4
    )
    assert torch.equal(processed, steered)
    assert lengths == [6, *[1] * 9] * 2  # beams change places, and take their caches with them
    assert processor.side_forwards == 20


@torch.no_grad()
def test_any_order_of_calls_gives_what_a_new_processor_gives() -> None:
    _, tuned, untuned = trio("mistral")
    kept = EFT().processor(tuned=tuned, untuned=untuned, attention_mask=None)
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 24, (4, 12), generator=random)
    for rows, length in (([0, 1], 5), ([0, 1], 9), ([1, 0], 7), ([2, 1, 3], 8), ([2], 8), ([2], 3)):
        scores = torch.randn(len(rows), 24, generator=random)
        fresh = EFT().processor(tuned=tuned, untuned=untuned, attention_mask=None)
        part = ids[rows, :length]
        torch.testing.assert_close(kept(part, scores), fresh(part, scores), rtol=1e-4, atol=1e-5)


def test_the_model_is_left_alone_and_other_processors_work_beside_it() -> None:
    large, tuned, untuned = trio("llama")
    parts = {"tuned": tuned, "untuned": untuned}
    options = {**FREE, "do_sample": False, "repetition_penalty": 1.5, "min_new_tokens": 3}
    processor = EFT().processor(**parts, attention_mask=None)
    before = copy.deepcopy(large.state_dict())
    ids = large.generate(IDS, logits_processor=[processor], **options)
    assert ids.shape == (3, 16)
    assert not large._forward_hooks and not large._forward_pre_hooks
    assert all(torch.equal(v, before[k]) for k, v in large.state_dict().items())


def test_a_token_that_the_untuned_model_never_learned_is_warned_of_once() -> None:
    large, tuned, untuned = trio("llama")
    with torch.no_grad():
        for model, logit in ((tuned, 60.0), (untuned, -60.0)):
            head = torch.nn.Linear(16, 24)
            torch.nn.init.zeros_(head.weight)
            torch.nn.init.zeros_(head.bias)
            head.bias[7] = logit
            model.lm_head = head
    processor = EFT().processor(tuned=tuned, untuned=untuned, attention_mask=None)
    with pytest.warns(UserWarning, match="delta_clip=10") as caught:
        large.generate(IDS, logits_processor=[processor], do_sample=False, **FREE)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        large.generate(IDS, logits_processor=[processor], do_sample=False, **FREE)


def test_mistakes_are_named() -> None:
    large, tuned, untuned = trio("llama")
    with pytest.raises(UserError, match="untuned is missing"):
        EFT().processor(tuned=tuned, attention_mask=None)
    with pytest.raises(UserError, match="model is needed, got"):
        EFT().processor(tuned=tiny_models.bert(), untuned=untuned, attention_mask=None)
    with pytest.raises(UserError, match=r"must have shape \(prompts, tokens\), got \(6,\)"):
        EFT().processor(tuned=tuned, untuned=untuned, attention_mask=MASK[0])
    processor = EFT().processor(tuned=tuned, untuned=untuned, attention_mask=MASK[:2])
    with pytest.raises(UserError, match=r"of 2 prompts of 6 tokens, but .* shape \(3, 6\)"):
        large.generate(IDS, logits_processor=[processor], do_sample=False, **FREE)
    assert isinstance(processor, transformers.LogitsProcessor)
