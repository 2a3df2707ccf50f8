"""FD-Align: the alignment, its teacher, and what stays unchanged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import foretune
import tiny_models
from foretune import FDAlign, PromptClassification, Run, Task, TaskCollection
from foretune.errors import UserError
from foretune.methods import make
from foretune.models import dual_encoder
from foretune.tasks.objectives.prompt_templates import IMAGES, TEXTS
from foretune.training.data import TaskData, sampler_for, slot_of
from foretune.training.learners.fd_align import FDAlignLearner, keys_of
from foretune.training.loop import fit
from foretune.training.model_copies import fresh_copy
from foretune.training.process_group import Partition
from foretune.training.scoring import score_slots
from linear_tasks import copy_of, equal_bits

TEMPLATES = ("a red {}", "the blue {}", "{} on the mat", "one {}", "a green {} sat")
RUN = Run(steps=6, batch_size=4, device="cpu", warmup=0.0, weight_decay=0.0)
LORA = {"r": 2, "lora_alpha": 4}


def images(seed: int = 0, rows: int = 6) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    names = ("cat", "dog", "mat")
    return [
        {"x": rng.normal(i % 3, 1, size=(3, 8, 8)).astype("f4"), "y": names[i % 3]}
        for i in range(rows)
    ]


def texts(rows: int = 6) -> list[dict[str, Any]]:
    words = ("cat", "dog", "mat")
    more = ("sat on the red", "a b c", "two blue", "one e f", "the green")
    return [
        {"text": f"the {words[i % 3]} {more[i % len(more)]}", "label": words[i % 3]}
        for i in range(rows)
    ]


def world(kind: str = "clip", **changes: Any) -> tuple[nn.Module, TaskCollection]:
    """A model, and two tasks of its kind with different label sets that share some examples."""
    examples = images() if kind in ("clip", "siglip") else texts()
    two = [row for row in examples if "mat" not in (row.get("y"), row.get("label"))]
    tasks = (Task("one", examples, examples[:3], examples), Task("two", two, (), two))
    objective = PromptClassification(tiny_models.tokenizer(), templates=TEMPLATES)
    model = getattr(tiny_models, kind)(**changes)
    with torch.no_grad():  # random towers of this size embed everything almost alike
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(8)
    return model, TaskCollection(tasks, objective)


def learner_of(
    model: nn.Module, tasks: TaskCollection, method: FDAlign, run: Run = RUN
) -> tuple[FDAlignLearner, TaskData]:
    """A learner on its device, its teacher's outputs computed, before the first step."""
    objective = tasks.objective.fit(tasks).bind(model)
    model = fresh_copy(model, objective, 0)
    data = TaskData([slot_of(task) for task in tasks], objective)
    learner = method.learner(model, objective, data.keys, run)
    learner.place(torch.device("cpu"), Partition(data))
    learner.start(run)
    return learner, data


def batch_of(data: TaskData, picks: Any = ((0, 0), (0, 1), (0, 4), (1, 2))) -> Any:
    return data.step(list(picks), "train", train=False, seed=[0]).chunks[0]


def gradients(learner: FDAlignLearner, loss: Tensor) -> list[Tensor | None]:
    return list(torch.autograd.grad(loss, learner.base, allow_unused=True))


KINDS = ("clip", "siglip", "bert", "roberta")
NO_DROPOUT = {
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "roberta": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_at_the_first_step_the_divergence_and_its_gradient_are_zero(
    kind: str, direction: Any
) -> None:
    model, tasks = world(kind, **NO_DROPOUT.get(kind, {}))
    learner, data = learner_of(model, tasks, FDAlign(weight=1.0, direction=direction))
    learner.model.train()
    chunk = batch_of(data)
    extra = learner.row_losses(chunk, torch.device("cpu")) - data.objective.losses(
        learner.model, chunk
    )
    assert extra.abs().max() < 1e-5
    for g in gradients(learner, extra.sum()):
        assert g is None or g.abs().max() < 1e-3
    moved = fresh_copy(model, data.objective, 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in moved.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    learner.model = moved
    extra = learner.row_losses(chunk, torch.device("cpu")) - data.objective.losses(moved, chunk)
    assert extra.min() > 1e-4


@pytest.mark.parametrize("kind", ["clip", "bert"])
def test_weight_zero_is_full_fine_tuning_bit_for_bit(kind: str) -> None:
    model, tasks = world(kind)
    plain = foretune.adapt(model, tasks, make("full", learning_rate=1e-3), RUN)
    ours = foretune.adapt(model, tasks, FDAlign(weight=0.0, learning_rate=1e-3), RUN)
    held = foretune.adapt(model, tasks, FDAlign(weight=5.0, learning_rate=1e-3), RUN)
    for key, tuned in plain.models.items():
        assert equal_bits(tuned.state_dict(), ours.models[key].state_dict())
        assert not equal_bits(tuned.state_dict(), held.models[key].state_dict())
    assert plain.scores == ours.scores


def test_weight_zero_on_adapters_is_lora() -> None:
    model, tasks = world("clip")
    plain = foretune.adapt(model, tasks, make("lora", lora=LORA), RUN)
    ours = foretune.adapt(model, tasks, FDAlign(weight=0, learning_rate=1e-3, lora=LORA), RUN)
    for key, tensors in plain.tensors.items():
        assert equal_bits(tensors, ours.tensors[key])


def test_the_teacher_s_share_of_the_loss_is_weight_times_the_mean_divergence() -> None:
    model, tasks = world("clip")
    a, data = learner_of(model, tasks, FDAlign(weight=1.0))
    b, _ = learner_of(model, tasks, FDAlign(weight=2.5))
    chunk = batch_of(data)
    with torch.no_grad():
        for learner in (a, b):
            torch.manual_seed(3)
            for p in learner.base:
                p.add_(0.05 * torch.randn_like(p))
    plain = data.objective.losses(a.model, chunk)
    penalty, larger = (x.row_losses(chunk, torch.device("cpu")) - plain for x in (a, b))
    assert penalty.max() > 1e-3
    torch.testing.assert_close(larger, 2.5 * penalty, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_forward_is_from_the_teacher_and_reverse_from_the_student(direction: Any) -> None:
    model, tasks = world("clip")
    learner, data = learner_of(model, tasks, FDAlign(weight=1.0, direction=direction))
    chunk = batch_of(data)
    with torch.no_grad():
        for p in learner.base:
            p.mul_(1.2)
        before = torch.stack([learner.teacher[key] for key in keys_of(chunk)]).softmax(1)
        now = learner.read(data.objective.features(learner.model, chunk), chunk).softmax(1)
        p, q = (before, now) if direction == "forward" else (now, before)
        expected = (p * (p / q).log()).sum(1)
        plain = data.objective.losses(learner.model, chunk)
        divergence = learner.row_losses(chunk, torch.device("cpu")) - plain
    assert divergence.max() > 1e-3
    torch.testing.assert_close(divergence, expected, rtol=1e-3, atol=1e-4)


def test_the_authors_settings_are_converted() -> None:
    method = FDAlign.official(learning_rate=1e-4)
    assert (method.weight, method.num_kept, method.num_prototypes) == (1.0, 60, 20)
    assert FDAlign.official(beta=12, num_prototypes=8).weight == 1.5


@pytest.mark.parametrize(("kind", "templates"), [("clip", IMAGES), ("bert", TEXTS)])
def test_the_authors_settings_run_with_the_default_templates(
    kind: str, templates: tuple[str, ...]
) -> None:
    assert len(set(templates)) == 80
    model, tasks = world(kind)
    tasks = tasks.with_objective(PromptClassification(tiny_models.tokenizer()))
    adapted = foretune.adapt(model, tasks, FDAlign.official(), RUN.replace(steps=1))
    assert adapted.scores.keys() == {("one", 0), ("two", 0)}


@pytest.mark.parametrize("lora", [None, LORA])
def test_the_cached_teacher_is_that_of_the_base_without_its_adapters(lora: Any) -> None:
    model, tasks = world("clip")
    apart = tiny_models.clip()
    apart.load_state_dict(model.state_dict())
    learner, data = learner_of(model, tasks, FDAlign(weight=1.0, learning_rate=0.05, lora=lora))
    chunk = batch_of(data)
    cached = torch.stack([learner.teacher[key] for key in keys_of(chunk)])
    sampler = sampler_for(data, RUN, pooled=FDAlign().pooled)
    fit(learner, data, sampler, RUN, validate=False)
    with torch.no_grad():
        copied = learner.read(data.objective.features(apart.eval(), chunk), chunk)
        torch.testing.assert_close(cached, copied)
        if learner.bank is None:
            return
        with learner.bank.attached():
            tuned = learner.read(data.objective.features(learner.model, chunk), chunk)
            with learner.bank.bare():
                bare = learner.read(data.objective.features(learner.model, chunk), chunk)
    torch.testing.assert_close(bare, cached)
    assert (tuned - cached).abs().max() > 1e-3


def test_the_teacher_has_no_dropout_and_draws_no_random_number() -> None:
    model, tasks = world("bert", hidden_dropout_prob=0.5)
    torch.manual_seed(4)
    before = torch.get_rng_state()
    first, data = learner_of(model, tasks, FDAlign())
    assert torch.equal(torch.get_rng_state(), before)
    first.model.train()
    torch.manual_seed(5)
    second, _ = learner_of(model, tasks, FDAlign())
    assert all(torch.equal(v, second.teacher[k]) for k, v in first.teacher.items())
    assert len(first.teacher) == 10 and first.model.training
    assert keys_of(batch_of(data, [(0, 0)]))[0] == keys_of(batch_of(data, [(0, 0), (0, 1)]))[0]


class Normed(nn.Module):
    """A dual encoder with batch statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.vision = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(192), nn.Linear(192, 8))
        self.words = nn.Embedding(tiny_models.VOCABULARY, 8)

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        return self.vision(pixel_values)

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.words(input_ids).mean(1)


def test_the_teacher_moves_no_batch_statistics() -> None:
    _, tasks = world("clip")
    model = Normed().train()
    before = copy_of(model)
    learner, _ = learner_of(model, tasks, FDAlign())
    assert equal_bits(copy_of(learner.model), before)
    assert learner.model.training


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_only_the_image_tower_moves(kind: str) -> None:
    model, tasks = world(kind)
    before = copy_of(model)
    adapted = foretune.adapt(model, tasks, FDAlign(learning_rate=1e-3), RUN)
    assert equal_bits(model.state_dict(), before)
    tuned = adapted.models["one", 0].state_dict()
    moved = {k for k, v in tuned.items() if not torch.equal(v, before[k])}
    assert moved and all(k.startswith(("vision_model.", "visual_projection.")) for k in moved)
    lora = foretune.adapt(model, tasks, FDAlign(learning_rate=1e-3, lora=LORA), RUN)
    assert all("vis" in k and "text" not in k for k in lora.tensors["one", 0])


def test_templates_and_class_names_swapped_swap_the_prototypes() -> None:
    model, _ = world("clip")
    words, blanks = ("cat", "dog"), ("red", "blue", "green")
    tokenizer = tiny_models.tokenizer()
    by_template = dual_encoder.text_embeddings(
        model, tokenizer, [f"a {b} {w}" for b in blanks for w in words]
    ).view(3, 2, -1)
    by_class = dual_encoder.text_embeddings(
        model, tokenizer, [f"a {b} {w}" for w in words for b in blanks]
    ).view(2, 3, -1)
    torch.testing.assert_close(by_template.mean(1), by_class.mean(0))
    torch.testing.assert_close(by_template.mean(0), by_class.mean(1))


def test_interpolation_is_the_mean_of_original_and_tuned_weights() -> None:
    model, tasks = world("clip")
    start = copy_of(model)
    fields = {"learning_rate": 1e-3, "weight": 1.0}
    tuned = foretune.adapt(model, tasks, FDAlign(**fields), RUN).models["one", 0].state_dict()
    half = foretune.adapt(model, tasks, FDAlign(**fields, interpolate=0.5), RUN)
    for name, value in half.models["one", 0].state_dict().items():
        torch.testing.assert_close(value, torch.lerp(start[name], tuned[name], 0.5))
    none = foretune.adapt(model, tasks, FDAlign(**fields, interpolate=0.0), RUN)
    assert equal_bits(none.models["one", 0].state_dict(), start)


@pytest.mark.parametrize(("kind", "lora"), [("clip", None), ("clip", LORA), ("bert", None)])
def test_same_seed_same_bits_and_it_learns(kind: str, lora: Any) -> None:
    model, tasks = world(kind)
    method = FDAlign(learning_rate=3e-3 if lora is None else 3e-2, weight=0.1, lora=lora)
    run = RUN.replace(steps=24)
    first, second = (foretune.adapt(model, tasks, method, run) for _ in range(2))
    assert first.scores == second.scores
    objective = tasks.objective.fit(tasks).bind(model)
    data = TaskData([slot_of(task) for task in tasks], objective)
    assert first.scores["one", 0] >= score_slots(model, data, "test")[0]
    if lora is None:
        chunk = batch_of(data, [(0, i) for i in range(6)])
        tuned = first.models["one", 0]
        losses = [data.objective.losses(m.eval(), chunk).mean() for m in (model, tuned)]
        assert losses[1] < 0.8 * losses[0]
    state = [x.models or x.tensors for x in (first, second)]
    for key, first_state in state[0].items():
        as_dict = first_state.state_dict() if isinstance(first_state, nn.Module) else first_state
        second_state = state[1][key]
        assert equal_bits(
            as_dict,
            second_state.state_dict() if isinstance(second_state, nn.Module) else second_state,
        )


def test_a_task_does_not_depend_on_the_others_in_its_bank() -> None:
    model, tasks = world("clip")
    method = FDAlign(learning_rate=1e-2, lora=LORA)
    both = foretune.adapt(model, tasks, method, RUN, draws=2)
    alone = foretune.adapt(model, tasks.subset(["two"]), method, RUN, draws=2)
    for key, tensors in alone.tensors.items():
        for name, value in tensors.items():
            torch.testing.assert_close(both.tensors[key][name], value, rtol=1e-3, atol=1e-5)


def test_what_is_saved_is_loaded_by_transformers_alone(tmp_path: Path) -> None:
    import transformers

    model, tasks = world("clip")
    adapted = foretune.adapt(model, tasks, FDAlign(learning_rate=1e-3), RUN.replace(out=tmp_path))
    loaded = transformers.CLIPModel.from_pretrained(tmp_path / "one").eval()
    assert equal_bits(loaded.state_dict(), adapted.models["one", 0].state_dict())
    objective = tasks.objective.fit(tasks).bind(model)  # a text tower that never moved
    again = tasks.objective.fit(tasks).bind(loaded)
    for task, embedded in objective.embedded.items():
        assert torch.equal(embedded, again.embedded[task])
    data = TaskData([slot_of(task) for task in tasks], again)
    assert score_slots(loaded, data, "test")[0] == adapted.scores["one", 0]


def test_an_adapter_is_a_plain_peft_folder(tmp_path: Path) -> None:
    import peft

    model, tasks = world("clip")
    method = FDAlign(learning_rate=1e-2, lora=LORA)
    adapted = foretune.adapt(model, tasks, method, RUN)
    adapted.save(tmp_path)
    loaded = peft.PeftModel.from_pretrained(model, tmp_path / "one").eval()
    objective = tasks.objective.fit(tasks).bind(model)
    data = TaskData([slot_of(task) for task in tasks], objective)
    assert score_slots(loaded, data, "test", only=[0])[0] == adapted.scores["one", 0]


def test_another_objective_is_refused() -> None:
    rows = texts()
    objective = foretune.Classification(tiny_models.tokenizer())
    tasks = TaskCollection((Task("one", rows, (), rows),), objective)
    with pytest.raises(UserError, match="needs the objective prompts, got classification"):
        foretune.adapt(tiny_models.bert(num_labels=3), tasks, FDAlign(), RUN)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weight": -1}, "weight must be a number not below 0, got -1"),
        ({"weight": None}, "weight must be a number not below 0, got None"),
        ({"direction": "both"}, "direction must be one of forward, reverse; got 'both'"),
        ({"num_kept": 0}, "num_kept must be a whole number not below 1, got 0"),
        ({"num_prototypes": None}, "num_prototypes must be a whole number not below 1"),
        ({"interpolate": 2}, "interpolate is a share between 0 and 1, got 2"),
        ({"interpolate": 0.5, "lora": {"r": 2}}, "interpolate applies to full weights"),
    ],
)
def test_a_bad_field_is_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make("fd-align", **fields)
