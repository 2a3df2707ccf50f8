"""One contract for every method that fuses."""

from __future__ import annotations

import pytest
import torch

import foretune
import linear_tasks
import tiny_models
from contract.cases import assert_survives_json
from foretune.errors import UserError
from foretune.fusion import FORMAT, RECORD_FILE
from foretune.methods import make, methods_of
from foretune.run import Run
from format_checks import assert_versions
from fusion import fused_models
from linear_tasks import copy_of, equal_bits, family

FUSE = methods_of("fuse")
RUN = Run(steps=12, batch_size=4, eval_every=4, device="cpu", weight_decay=0.0)


@pytest.mark.parametrize("name", FUSE)
def test_record_survives_json(name):
    assert_survives_json(make(name))


def _fuse(name, **fields):
    base = tiny_models.bert(num_labels=3)
    finetuned = {
        "full": fused_models.linears(base, 1),
        "lora": fused_models.adapted(base, 2, ["query"], modules_to_save=["classifier"]),
    }
    return base, finetuned, foretune.fuse(base, finetuned, make(name, **fields))


@pytest.mark.parametrize("name", FUSE)
def test_fusing_leaves_its_input_alone(name):
    base, finetuned, fused = _fuse(name)
    before = [copy_of(m) for m in (base, *finetuned.values())]
    with torch.no_grad():
        for parameter in fused.model.parameters():
            parameter.add_(1.0)
    after = [m.state_dict() for m in (base, *finetuned.values())]
    assert all(equal_bits(a, b) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("name", FUSE)
def test_fusing_twice_gives_the_same_bits_and_every_task_answers(name):
    base, finetuned, first = _fuse(name)
    state = torch.get_rng_state()
    second = foretune.fuse(base, finetuned, make(name))
    assert torch.equal(torch.get_rng_state(), state)
    assert equal_bits(first.model.state_dict(), second.model.state_dict())
    assert first.names == ["full", "lora"]
    for task in first.names:
        said = fused_models.output(first.set_task(task).model, {"input_ids": fused_models.ids()})
        assert said.isfinite().all()


@pytest.mark.parametrize("name", FUSE)
def test_a_fused_model_is_saved_whole_and_loads_bit_for_bit(name, tmp_path):
    fused = _fuse(name)[2]
    loaded = foretune.load_fused(fused.save(tmp_path / "out"))
    assert equal_bits(fused.model.state_dict(), loaded.model.state_dict())
    assert make(**loaded.method) == make(name)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    assert not [p for p in (tmp_path / "out").iterdir() if p.suffix in (".bin", ".pt", ".pkl")]


@pytest.mark.parametrize("name", FUSE)
def test_a_method_that_fuses_is_no_method_of_another_verb(name):
    with pytest.raises(UserError, match="fuse"):
        foretune.retrain(tiny_models.bert(), family(), make(name))
    with pytest.raises(UserError, match=f"{name} is a method for fuse, not for adapt"):
        foretune.adapt(linear_tasks.Net(), family(), make(name), RUN)


def test_a_fused_model_of_a_newer_version_is_refused(tmp_path):
    folder = _fuse("average")[2].save(tmp_path / "out")
    assert_versions(folder / RECORD_FILE, FORMAT, lambda: foretune.load_fused(folder))
