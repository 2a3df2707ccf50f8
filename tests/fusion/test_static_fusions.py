"""Average, task arithmetic and TIES: the controls of a fusion."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import foretune
import tiny_models
from foretune import TIES, Average, TaskArithmetic, UserError
from fusion.fused_models import FAMILIES, adapted, ids, nudged, output

NAMES = ("a", "b", "c")


def tuned(model: nn.Module) -> dict[str, Any]:
    return {name: nudged(model, seed) for seed, name in enumerate(NAMES, 1)}


@pytest.mark.parametrize("family", FAMILIES)
def test_average_is_the_mean_of_every_weight(family: str) -> None:
    model = FAMILIES[family][0]()
    finetuned = tuned(model)
    fused = foretune.fuse(model, finetuned, Average())
    if fused.heads:
        fused.set_task("a")
    for name, got in fused.model.named_parameters():
        if "heads" in name:
            continue
        mean = torch.stack([m.get_parameter(name) for m in finetuned.values()]).mean(0)
        torch.testing.assert_close(got, mean, rtol=1e-5, atol=1e-6)


def test_scale_of_one_over_their_number_is_the_average() -> None:
    model = tiny_models.llama()
    finetuned = tuned(model)
    one = foretune.fuse(model, finetuned, TaskArithmetic(scale=1 / 3))
    other = foretune.fuse(model, finetuned, Average())
    for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_ties_keeps_all_of_one_model_and_elects_signs_among_several() -> None:
    layer = nn.Linear(4, 1, bias=False)
    changes = {"a": [9.0, -1.0, 2.0, 1.0], "b": [3.0, -3.0, -5.0, -2.0]}
    base = layer.weight.detach().clone()
    finetuned = {}
    for name, change in changes.items():
        finetuned[name] = nn.Sequential(nn.Linear(4, 1, bias=False))
        finetuned[name][0].weight.data = base + torch.tensor([change])
    model = nn.Sequential(layer)
    both = foretune.fuse(model, finetuned, TIES(density=1.0)).model[0].weight - base
    # Signs by total: + (12), − (−4), − (−3), − (−1); then the mean of those that agree.
    torch.testing.assert_close(both, torch.tensor([[6.0, -2.0, -5.0, -2.0]]))
    half = foretune.fuse(model, finetuned, TIES(density=0.5, scale=2.0)).model[0].weight - base
    # Half of each stays: 9 and 2 of a, −3 (or 3, as large) and −5 of b.
    torch.testing.assert_close(half[0, [0, 2]], torch.tensor([18.0, -10.0]))
    one = foretune.fuse(model, {"a": finetuned["a"]}, TIES(density=1.0)).model[0].weight
    torch.testing.assert_close(one, finetuned["a"][0].weight)


@pytest.mark.parametrize("family", [tiny_models.llama, tiny_models.gpt2])
def test_one_lora_averaged_is_that_lora_merged(family: Any) -> None:
    model = family()
    targets = ["c_attn", "c_proj"] if family is tiny_models.gpt2 else ["q_proj", "up_proj"]
    lora = adapted(model, 1, targets, fan_in_fan_out=family is tiny_models.gpt2)
    fused = foretune.fuse(model, {"a": lora}, Average())
    batch = {"input_ids": ids()}
    torch.testing.assert_close(
        output(fused.model, batch), output(lora, batch), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TaskArithmetic(scale=0), "scale must be a number above 0, got 0"),
        (lambda: TIES(density=1.2), "density is a share between 0 and 1, got 1.2"),
        (lambda: TIES(density=0), "density=0 keeps nothing"),
        (lambda: TIES(scale=None), "scale must be a number above 0, got None"),
    ],
)
def test_bad_fields_are_refused_by_name(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize("method", [Average(), TaskArithmetic(), TIES()], ids=lambda m: m.name)
def test_what_does_not_fit_is_refused(method: Any) -> None:
    model = tiny_models.bert()
    with pytest.raises(UserError, match="nothing to fuse"):
        foretune.fuse(model, {}, method)
    with pytest.raises(UserError, match="do not differ from the base"):
        foretune.fuse(model, {"a": tiny_models.bert()}, method)
    with pytest.raises(UserError, match="has shape"):
        foretune.fuse(model, {"a": tiny_models.bert(vocab_size=30)}, method)
