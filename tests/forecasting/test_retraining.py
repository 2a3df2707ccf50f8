"""Scenes as tasks: a forecaster is retrained by PEFT-ML and adapted by LoRA through the bank."""

from __future__ import annotations

import pytest
import torch

import foretune
from forecasting.tiny_scenes import batch_of, forecast_mae, scene_tasks
from foretune.adapters.bank import AdapterBank
from foretune.forecasting.forecasters import add_head, add_prompts
from foretune.forecasting.junctions import junctions
from foretune.methods import make
from foretune.models.routing import route
from foretune.run import Run
from linear_tasks import copy_of, equal_bits

RUN = Run(steps=3, batch_size=4, device="cpu", eval_every=0)
LORA = {"r": 2, "lora_alpha": 4}


def forecaster(kind):
    model = forecast_mae()
    if kind == "head":
        add_head(model, modes=3, spread=True)
    else:
        add_prompts(model, modes=3, prompts=4, adapter_rank=0)
    return model.eval()


@pytest.mark.parametrize("kind", ["head", "prompts"])
def test_peft_ml_retrains_a_forecaster_and_lora_adapts_it_to_unseen_scenes(kind):
    model = forecaster(kind)
    before = copy_of(model)
    outcome = foretune.retrain(model, scene_tasks(), make("peft-ml", lora=LORA), RUN)
    assert equal_bits(before, model.state_dict())
    assert outcome.bank is not None
    for slot in range(2):  # every task has moved its own adapter in every block
        moved = {n for n in outcome.bank.layer_names if outcome.bank.factors(n, slot)[1].any()}
        assert {n for n in outcome.bank.layer_names if "blocks" in n} <= moved
    adapted = foretune.adapt(
        outcome.model, scene_tasks(names=("three", "four")), make("lora", lora=LORA), RUN
    )
    assert len(adapted.scores) == len(adapted.tensors) == 2


def test_peft_ml_is_not_standard_retraining():
    model, tasks = forecaster("head"), scene_tasks()
    lora = {**LORA, "lora_alpha": 64}
    ours = foretune.retrain(model, tasks, make("peft-ml", lora=lora, learning_rate=1e-3), RUN).model
    plain = foretune.retrain(model, tasks, make("standard", learning_rate=1e-3), RUN).model
    assert not torch.equal(ours.forecaster.loc[0].weight, plain.forecaster.loc[0].weight)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["head", "prompts"])
def test_a_batch_that_mixes_tasks_gives_each_scene_its_own_adapter(kind):
    """Scenes have unlike numbers of agents and lanes, and slots stand in no order."""
    model = forecaster(kind)
    rows = junctions(5, seed=3)
    for i, row in enumerate(rows):
        row["agents"], row["kinds"] = row["agents"][: i + 1], row["kinds"][: i + 1]
        row.pop("headings", None)
    rows[2]["lanes"] = rows[2]["lanes"][:0]
    bank = AdapterBank(model, ["a", "b"], lora=LORA)
    for p in bank.parameters():
        p.normal_(std=0.3)
    slots = [1, 0, 1, 0, 0]
    with bank.attached():
        with route(slots):
            together = model(batch_of(rows).inputs).trajectories
        for i, slot in enumerate(slots):
            for candidate in (0, 1):
                with route([candidate]):
                    alone = model(batch_of(rows[i : i + 1]).inputs).trajectories[0]
                assert torch.allclose(together[i], alone, atol=1e-4) == (candidate == slot)
