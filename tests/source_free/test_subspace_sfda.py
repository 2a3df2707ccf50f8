"""Subspace SFDA: what moves, what stays, what is written."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from torch import nn

import foretune
import tiny_models
from foretune import Classification, Full, LoRA, Run, SubspaceSFDA, Task, TaskCollection, Unlabelled
from foretune.errors import UserError
from foretune.models.surgery import batch_norms
from foretune.source_free.core_state import load_core
from foretune.source_free.hooi import mode_product, unfold
from foretune.source_free.learner import add_imputer
from foretune.source_free.time_series_cnn import TimeSeriesCNN
from foretune.source_free.tucker import core_parameters, tucker_layers, tuckerize

RUN = Run(steps=4, batch_size=6, eval_every=0, device="cpu", weight_decay=0.0)
LOSSES = ("shot", "nrc", "aad", "mapu")
BN = ("stats", "frozen", "affine")


def windows(count=18, *, labels=True, shift=0.0, seed=0):
    rng = np.random.default_rng([seed, 3])
    time = np.arange(24)
    examples = []
    for i in range(count):
        wave = np.sin(time * (0.4 + 0.5 * (i % 3)) + rng.uniform(0, 6))
        x = np.stack([wave, shift + 0.5 * wave, np.roll(wave, 3)]) + 0.3 * rng.normal(size=(3, 24))
        examples.append(
            {"x": x.astype("f4"), "y": "abc"[i % 3]} if labels else {"x": x.astype("f4")}
        )
    return examples


def source_tasks():
    tasks = TaskCollection((Task("source", windows(24), (), windows(12, seed=1)),))
    return tasks.with_objective(Classification().fit(tasks))


def target_tasks(*, labels=False, test=True, names=("target",)):
    objective = Unlabelled(source=source_tasks().objective)
    tasks = tuple(
        Task(
            name,
            windows(shift=0.7, labels=labels, seed=k),
            (),
            windows(9, shift=0.7, seed=7) if test else (),
        )
        for k, name in enumerate(names)
    )
    return TaskCollection(tasks, objective)


@pytest.fixture(scope="module")
def prepared():
    """A factorised network with an imputer, whose statistics of batches have seen data."""
    torch.manual_seed(0)
    model = TimeSeriesCNN(3, 3, mid=4, features=8, dropout=0.1)
    tuckerize(model, rank_factor=2)
    run = RUN.replace(steps=12, batch_size=12)
    method = foretune.Standard(learning_rate=1e-2)
    model = foretune.retrain(model, source_tasks(), method, run).model
    add_imputer(model, source_tasks(), run)
    return model.eval()


def adapt(model, tasks=None, run=RUN, **fields):
    method = SubspaceSFDA(**{"learning_rate": 1e-2, **fields})
    return foretune.adapt(model, tasks or target_tasks(), method, run)


def moved(before, after):
    """Names of the state that is not the same bit for bit."""
    a, b = before.state_dict(), after.state_dict()
    assert list(a) == list(b)
    return {name for name in a if not torch.equal(a[name], b[name])}


def norms(model):
    parameters = {n for n, _ in model.named_parameters()}
    state = {
        n for n in model.state_dict() if any(n.startswith(f"{b}.") for b in batch_norms(model))
    }
    return state & parameters, state - parameters


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("bn", BN)
def test_cores_move_and_bases_and_classifier_stay_bit_for_bit(prepared, loss, bn):
    changed = moved(prepared, adapt(prepared, loss=loss, bn=bn).models["target", 0])
    affine, running = norms(prepared)
    allowed = set(core_parameters(prepared))
    allowed |= {"stats": running, "frozen": set(), "affine": running | affine}[bn]
    assert changed <= allowed
    assert changed >= set(core_parameters(prepared))
    assert (bn == "frozen") == running.isdisjoint(changed)
    assert (bn == "affine") == bool(affine & changed)


def test_all_parameters_move_but_the_classifier_and_the_imputer(prepared):
    changed = moved(prepared, adapt(prepared, tuned="all").models["target", 0])
    parameters = {n for n, _ in prepared.named_parameters()}
    fixed = {n for n in parameters if n.startswith(("head.", "imputer."))}
    assert changed & parameters == parameters - fixed
    frozen = moved(prepared, adapt(prepared, tuned="all", bn="frozen").models["target", 0])
    affine, running = norms(prepared)
    assert frozen == parameters - fixed - affine and frozen.isdisjoint(running)


def test_batch_norm_alone_moves(prepared):
    affine, running = norms(prepared)
    changed = moved(prepared, adapt(prepared, tuned="batch-norm").models["target", 0])
    assert changed <= affine | running and changed & affine


def test_change_of_a_weight_lies_within_the_spans_of_its_bases(prepared):
    adapted = adapt(prepared, learning_rate=0.05).models["target", 0]
    for name, layer in tucker_layers(adapted).items():
        change = layer.weight - tucker_layers(prepared)[name].weight
        assert change.norm() > 1e-3
        for mode, basis in enumerate((layer.out_factor, layer.in_factor)):
            q = torch.linalg.qr(basis.detach())[0]
            outside = change - mode_product(change, q @ q.T, mode)
            assert unfold(outside, mode).abs().max() < 1e-6


def test_tuned_count_is_that_of_the_cores(prepared):
    adapted = adapt(prepared)
    layers = tucker_layers(prepared).values()
    counted = sum(k.ranks[0] * k.ranks[1] * k.core.shape[2] for k in layers)
    assert adapted.cost["trainable_parameters"] == counted


@pytest.mark.parametrize("loss", LOSSES)
def test_labels_of_the_target_are_not_read(prepared, loss):
    bare = adapt(prepared, target_tasks(test=False), loss=loss).models["target", 0]
    tasks = target_tasks(labels=True, test=False)
    for row in tasks["target"].train:
        row["y"] = "nonsense"
    labelled = adapt(prepared, tasks, loss=loss).models["target", 0]
    assert not moved(bare, labelled)


@pytest.mark.parametrize("loss", LOSSES)
def test_same_seed_same_bits_and_the_input_is_left_alone(prepared, loss):
    before = copy.deepcopy(prepared)
    trainable = [p.requires_grad for p in prepared.parameters()]
    state = torch.get_rng_state()
    first, second = (adapt(prepared, loss=loss).models["target", 0] for _ in range(2))
    assert not moved(first, second)
    assert moved(first, adapt(prepared, run=RUN.replace(seed=1), loss=loss).models["target", 0])
    assert not moved(before, prepared)
    assert [p.requires_grad for p in prepared.parameters()] == trainable
    assert torch.equal(torch.get_rng_state(), state)


def test_a_task_does_not_notice_the_others(prepared):
    both = adapt(prepared, target_tasks(names=("target", "other")))
    alone = adapt(prepared, target_tasks())
    assert not moved(both.models["target", 0], alone.models["target", 0])
    assert moved(both.models["target", 0], both.models["other", 0])


def test_adapting_lowers_its_own_loss(prepared):
    history = []
    seen = lambda step, steps, figures: history.append(figures["loss"])  # noqa: E731
    tasks = target_tasks()
    run = RUN.replace(steps=60, batch_size=18)
    method = SubspaceSFDA(learning_rate=1e-2, pseudo_labels=0.0)
    foretune.adapt(prepared, tasks, method, run, progress=seen)
    assert np.mean([v for v in history[-6:] if v is not None]) < history[0] - 0.01


@pytest.mark.parametrize("loss", ["shot", "nrc", "aad", "mapu"])
def test_one_row_is_enough_to_run(prepared, loss):
    adapted = foretune.adapt(prepared, target_tasks(), SubspaceSFDA(loss=loss), RUN, shots=1)
    state = adapted.models["target", 0].state_dict()
    assert all(v.isfinite().all() for v in state.values())


def test_a_whole_model_is_factorised_on_the_way_and_none_leaves_it():
    model = TimeSeriesCNN(3, 3, mid=4, features=8)
    adapted = adapt(model, rank_factor=2).models["target", 0]
    assert set(tucker_layers(adapted)) == {f"blocks.{i}.0" for i in range(3)}
    assert not tucker_layers(model)
    unfactored = adapt(model, rank_factor=None, tuned="all").models["target", 0]
    assert not tucker_layers(unfactored)


# --- what is written ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [{}, {"bn": "frozen"}, {"bn": "affine"}, {"tuned": "all"}, {"tuned": "batch-norm"}],
)
def test_saved_state_is_only_what_moved_and_comes_back(prepared, fields, tmp_path):
    adapted = adapt(prepared, **fields)
    folder = adapted.save(tmp_path / "out") / "target"
    files = {"core.safetensors", "core.json", "trained_on.json", "README.md"}
    assert {p.name for p in folder.iterdir()} == files
    loaded = load_core(prepared, folder)
    assert not moved(loaded, adapted.models["target", 0])
    from safetensors.torch import load_file

    names = set(load_file(folder / "core.safetensors"))
    assert names >= moved(prepared, loaded)
    if fields == {"bn": "frozen"}:
        assert names == set(core_parameters(prepared))
    metadata = json.loads((folder / "core.json").read_text())
    assert metadata["labels"] == ["a", "b", "c"]
    method = metadata["method"]
    assert method.pop("name") == "subspace-sfda"
    assert SubspaceSFDA(**method) == SubspaceSFDA(**{"learning_rate": 1e-2, **fields})


def test_state_of_a_model_factorised_on_the_way_comes_back_onto_the_whole_one(tmp_path):
    model = TimeSeriesCNN(3, 3, mid=4, features=8)
    adapted = adapt(model, rank_factor=2)
    loaded = load_core(model, adapted.save(tmp_path) / "target")
    assert not moved(loaded, adapted.models["target", 0])


def test_a_run_with_a_folder_leaves_the_same_small_state(prepared, tmp_path):
    out = tmp_path / "run"
    adapted = adapt(prepared, run=RUN.replace(out=out))
    assert not moved(load_core(prepared, out / "target"), adapted.models["target", 0])
    assert json.loads((out / "scores.json").read_text())


def test_state_of_another_base_is_refused(prepared, tmp_path):
    folder = adapt(prepared).save(tmp_path) / "target"
    altered = copy.deepcopy(prepared)
    with torch.no_grad():
        altered.head.bias.add_(1)
    with pytest.raises(UserError, match=r"does not belong to this base: its weights differ"):
        load_core(altered, folder)
    with pytest.raises(UserError, match=r"does not belong to this base: it has no blocks.0.0.core"):
        load_core(TimeSeriesCNN(3, 3, mid=4, features=8), folder)


def test_broken_state_is_refused_in_one_line(prepared, tmp_path):
    folder = adapt(prepared).save(tmp_path) / "target"
    (folder / "core.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"core.safetensors is not a readable"):
        load_core(prepared, folder)
    (folder / "core.json").write_text("{")
    with pytest.raises(UserError, match=r"core.json is not JSON"):
        load_core(prepared, folder)
    with pytest.raises(UserError, match=r"holds no adapted state: it has no core.json"):
        load_core(prepared, tmp_path)


# --- families of transformers ---------------------------------------------------------------------

TEXTS = [{"text": f"the {a} {b}"} for a in ("cat", "dog", "red", "blue") for b in ("one", "two")]


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2", "llama"])
def test_text_classifiers_tune_their_cores_too(family):
    model = getattr(tiny_models, family)(num_labels=2, num_hidden_layers=1)
    tokenizer = tiny_models.tokenizer()
    objective = Unlabelled(source=Classification(tokenizer, labels={"s": "ab"}, space=("a", "b")))
    tasks = TaskCollection((Task("t", TEXTS),), objective)
    method = SubspaceSFDA(rank_factor=4, learning_rate=1e-2)
    adapted = foretune.adapt(model, tasks, method, RUN).models["t", 0]
    start = copy.deepcopy(model)
    tuckerize(start, rank_factor=4)
    assert moved(start, adapted) == set(core_parameters(adapted))


def test_images_go_through():
    model = tiny_models.vit(num_labels=3)
    size, channels = model.config.image_size, model.config.num_channels
    rows = [{"x": np.random.default_rng(i).normal(size=(channels, size, size))} for i in range(6)]
    objective = Unlabelled(source=Classification(labels={"s": (0, 1, 2)}, space=(0, 1, 2)))
    tasks = TaskCollection((Task("t", rows),), objective)
    adapted = foretune.adapt(model, tasks, SubspaceSFDA(rank_factor=4), RUN)
    assert adapted.cost["trainable_parameters"] > 0


def test_other_adapting_methods_take_unlabelled_rows_too():
    model = TimeSeriesCNN(3, 3, mid=4, features=8)
    assert foretune.adapt(model, target_tasks(), Full(), RUN).scores.keys() == {("target", 0)}
    assert foretune.adapt(model, target_tasks(), LoRA(), RUN).scores.keys() == {("target", 0)}


# --- what cannot be done --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"loss": "tent"}, "loss must be one of shot, nrc, aad, mapu; got 'tent'"),
        ({"tuned": "head"}, "tuned must be one of core, all, batch-norm; got 'head'"),
        ({"bn": "off"}, "bn must be one of stats, frozen, affine; got 'off'"),
        ({"rank_factor": 0}, "rank_factor must be a whole number not below 1, got 0"),
        ({"entropy": -1}, "entropy must be a number not below 0, got -1"),
        ({"diversity": "x"}, "diversity must be a number not below 0"),
        ({"pseudo_labels": None}, "pseudo_labels must be a number not below 0, got None"),
        ({"imputation": -0.5}, "imputation must be a number not below 0"),
        ({"neighbours": 0}, "neighbours must be a whole number not below 1, got 0"),
        ({"decay": -1}, "decay must be a number not below 0, got -1"),
        ({"tuned": "batch-norm", "bn": "frozen"}, "trains nothing; use bn=affine"),
    ],
)
def test_bad_fields_are_refused_by_name(fields, message):
    with pytest.raises(UserError, match=message):
        SubspaceSFDA(**fields)


def test_what_has_no_place_is_said(prepared):
    with pytest.raises(UserError, match="adapts to unlabelled examples; give the tasks"):
        adapt(prepared, source_tasks())
    with pytest.raises(UserError, match="patience needs target labels"):
        adapt(prepared, run=RUN.replace(patience=1))
    model = TimeSeriesCNN(3, 3, mid=4, features=8)
    with pytest.raises(UserError, match="loss mapu needs an imputer"):
        adapt(model, loss="mapu")
    with pytest.raises(
        UserError, match="tuned=core matches no trainable parameter of TimeSeriesCNN"
    ):
        adapt(model, rank_factor=None)
    plain = nn.Sequential(nn.Flatten(), nn.Linear(72, 8), nn.Linear(8, 3))
    with pytest.raises(UserError, match="tuned=batch-norm matches no trainable parameter"):
        adapt(plain, tuned="batch-norm")
    with pytest.raises(UserError, match="has no attribute `temporal`"):
        add_imputer(plain, source_tasks(), RUN)
    with pytest.raises(UserError, match="has 2 outputs where the tasks have 3 labels"):
        adapt(nn.Sequential(nn.Flatten(), nn.Linear(72, 8), nn.Linear(8, 2)))


def test_unlabelled_rows_are_checked():
    fitted = source_tasks().objective
    with pytest.raises(UserError, match="Unlabelled needs the source's labels"):
        Unlabelled(source=Classification())
    bad = Task("t", windows(3), (), [{**windows(1)[0], "y": "z"}])
    with pytest.raises(
        UserError, match=r"test row 1: scoring needs a label of the source .* got 'z'"
    ):
        Unlabelled(source=fitted).fit(TaskCollection((bad,)))
    none = Task("t", [{"y": "a"}])
    with pytest.raises(UserError, match='train row 1: an array "x" is missing'):
        Unlabelled(source=fitted).fit(TaskCollection((none,)))


def test_add_imputer_learns_and_changes_nothing_else():
    torch.manual_seed(0)
    model = TimeSeriesCNN(3, 3, mid=4, features=8).eval()
    before = copy.deepcopy(model)
    history = add_imputer(
        model, source_tasks(), RUN.replace(steps=60, batch_size=12), learning_rate=1e-2
    )
    assert history[-1]["loss"] < 0.8 * history[0]["loss"]
    after = {k: v for k, v in model.state_dict().items() if not k.startswith("imputer.")}
    assert all(torch.equal(v, after[k]) for k, v in before.state_dict().items())
    assert all(p.requires_grad for n, p in model.named_parameters() if "imputer" not in n)
