"""One contract for every method that prunes."""

from __future__ import annotations

import pytest
import torch

import foretune
import linear_tasks
import tiny_models
from contract.cases import assert_survives_json
from foretune.errors import UserError
from foretune.methods import make, methods_of
from linear_tasks import copy_of, equal_bits
from pruning import tiny_mixtures

PRUNE = methods_of("prune")


def _prune(name, model, **fields):
    method = make(name, experts=3, **fields)
    return foretune.prune(model, tiny_mixtures.rows(), method, tokenizer=tiny_models.tokenizer())


@pytest.mark.parametrize("name", PRUNE)
def test_pruning_leaves_its_input_alone(name):
    model = tiny_mixtures.mixture("olmoe")
    before, config = copy_of(model), model.config.to_dict()
    result = _prune(name, model)
    assert equal_bits(model.state_dict(), before)
    assert model.config.to_dict() == config
    assert result.size["after"]["experts"] == [3, 3]
    assert result.size["after"]["parameters"] < result.size["before"]["parameters"]
    assert_survives_json(result.method)


@pytest.mark.parametrize("name", PRUNE)
def test_pruning_is_reproducible(name):
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first, second = (_prune(name, tiny_mixtures.mixture("olmoe")) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert first.plan == second.plan
    assert equal_bits(first.model.state_dict(), second.model.state_dict())


@pytest.mark.parametrize("name", PRUNE)
def test_a_pruned_model_is_saved_whole(name, tmp_path):
    result = _prune(name, tiny_mixtures.mixture("olmoe"))
    folder = result.save(tmp_path / "small")
    assert not [p for p in tmp_path.iterdir() if p != folder]
    loaded, _ = foretune.load_model(folder, head="causal-lm")
    assert equal_bits(loaded.state_dict(), result.model.state_dict())


@pytest.mark.parametrize("name", PRUNE)
def test_pruning_is_refused_to_the_other_verbs(name):
    with pytest.raises(UserError, match="for prune, not for fuse"):
        foretune.fuse(linear_tasks.Net(), {}, make(name))
