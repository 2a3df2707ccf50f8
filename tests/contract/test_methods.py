"""One contract that every row of the methods' table goes through."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

import foretune
import fused_models
import linear_tasks
import tiny_mixtures
import tiny_models
from foretune.errors import UserError
from foretune.methods import METHODS, make, method_class
from foretune.models.loading import load_base, load_module
from foretune.run import Run
from foretune.tasks.task import Task, TaskCollection
from linear_tasks import copy_of, equal_bits, family

RETRAIN = [name for name in METHODS if method_class(name).verb == "retrain"]
ADAPT = [name for name in METHODS if method_class(name).verb == "adapt"]
DECODE = [name for name in METHODS if method_class(name).verb == "decode"]
PRUNE = [name for name in METHODS if method_class(name).verb == "prune"]
FUSE = [name for name in METHODS if method_class(name).verb == "fuse"]
TRAINING = [name for name in RETRAIN if name != "none"]
EPISODIC = [{"inner": "all", "inner_steps": 3}, {"inner": "adapter", "inner_steps": 3}]
# Every form of a method: (name, fields). Rates that suit the linear family.
FAST = {"learning_rate": 0.03}
BETWEEN = {**FAST, "adapter_learning_rate": 0.03, "lora": {"r": 1, "lora_alpha": 1}}
PEFT_ML_WITH_HEADS = ("peft-ml", {**BETWEEN, "heads": "per-task"})
PEFT_ML_SPARSE = ("peft-ml", {**BETWEEN, "form": "sparse", "fraction": 0.3})
FORMS = [
    ("none", {}),
    ("standard", FAST),
    ("standard", {**FAST, "heads": "per-task"}),
    ("peft-ml", {**FAST, "adapter_learning_rate": 0.03, "lora": {"r": 1, "lora_alpha": 1}}),
    ("peft-ml", {**FAST, "adapter_learning_rate": 0.03, "form": "last-layer"}),
    PEFT_ML_WITH_HEADS,
    PEFT_ML_SPARSE,
    ("peft-ml", {**BETWEEN, "penalty": 0.1}),
    ("peft-ml", {**BETWEEN, "adapter_dropout": 0.5}),
    ("peft-ml", {**BETWEEN, "restart_every": 3}),
    ("peft-ml", {**BETWEEN, "interpolate": 0.5}),
    ("standard", {**FAST, "interpolate": 0.5}),
    ("standard", {**FAST, "average": 0.5}),
    ("peft-ml", {**BETWEEN, "average": 0.5}),
    ("fomaml", {**FAST, "inner_learning_rate": 0.03, "inner_steps": 3, "average": 0.5}),
    (
        "auto",
        {
            "candidates": [{"name": "none"}, {"name": "standard", **FAST}],
            "rounds": 1,
            "shots": [4],
            "adapt_run": {"steps": 2, "device": "cpu"},
        },
    ),
    *[
        (name, {**FAST, "inner_learning_rate": 0.03, "lora": {"r": 1, "lora_alpha": 1}, **form})
        for name in ("reptile", "fomaml")
        for form in EPISODIC
    ],
]
TRAINED_FORMS = FORMS[1:]
ADAPT_FORMS = [
    ("full", FAST),
    ("head", FAST),
    ("lora", {**FAST, "lora": {"r": 2, "lora_alpha": 2}}),
    ("sara", {**FAST, "fraction": 0.5}),
]
PROMPT_FORMS = [  # read labels by name, so they cannot adapt to the linear family
    ("fd-align", {"weight": 2.0, "num_kept": 9, "direction": "reverse", "interpolate": 0.5}),
    ("fd-align", {"lora": {"r": 2, "lora_alpha": 2}}),
]
DECODE_FORMS = [
    ("eft", {}),
    ("rtd", {}),
    ("rtd", {"neighbours": 4, "temperature": 2.0, "mix": 0.5, "heads": 2, "search": "faiss"}),
    ("eft", {"beta": 0.5, "weights": [0.5, 1], "top_p": 0.9, "delta_clip": 5.0, "uncap": True}),
]
SOURCE_FREE_FORMS = [
    ("subspace-sfda", {}),
    ("subspace-sfda", {"loss": "aad", "tuned": "all", "rank_factor": None, "entropy": 0.5}),
]
# 12 steps: whole updates for 3 inner steps (Reptile) and for 3 + 1 (FOMAML).
RUN = Run(steps=12, batch_size=4, eval_every=4, device="cpu", weight_decay=0.0)


VARIANTS = ("penalty", "adapter_dropout", "restart_every", "interpolate", "average")


def _named(forms):
    return [
        pytest.param(
            name,
            fields,
            id="-".join(
                [name, *[str(fields[k]) for k in ("heads", "form", "inner") if k in fields]]
                + [k for k in VARIANTS if k in fields]
            ),
        )
        for name, fields in forms
    ]


def _rate_fields(name):
    return [f.name for f in dataclasses.fields(method_class(name)) if "learning_rate" in f.name]


# --- the record ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_record_is_frozen_and_keyword_only(name):
    cls, record = method_class(name), make(name)
    for field in dataclasses.fields(cls):
        assert field.kw_only
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(record, field.name, getattr(record, field.name))
    with pytest.raises(TypeError):
        cls(1e-3)


@pytest.mark.parametrize("name", METHODS)
def test_record_says_what_it_is(name):
    cls = method_class(name)
    assert cls.name == name
    assert cls.label
    assert cls.verb in ("retrain", "adapt", "fuse", "prune", "decode")
    summary = cls.__doc__.splitlines()[0]
    assert 10 < len(summary) < 100 and not summary.startswith(cls.__name__ + "(")
    if cls.paper is not None:
        assert {"title", "authors", "year", "arxiv"} <= set(cls.paper)
    documented = cls.__doc__.partition("Args:")[2]
    assert all(f"{f.name}:" in documented for f in dataclasses.fields(cls))


@pytest.mark.parametrize(
    ("name", "fields"),
    _named(FORMS + ADAPT_FORMS + PROMPT_FORMS + DECODE_FORMS + SOURCE_FREE_FORMS),
)
def test_record_survives_json(name, fields):
    if "lora" in fields:
        fields = {**fields, "lora": {**fields["lora"], "target_modules": ("out", "body")}}
    record = make(name, **fields)
    known = json.loads(json.dumps(record.to_dict()))
    assert known.pop("name") == name
    assert make(name, **known) == record


@pytest.mark.parametrize("bad", [0, -1, "x", None, True, float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("name", "field"), [(name, field) for name in METHODS for field in _rate_fields(name)]
)
def test_bad_rate_is_refused_by_name(name, field, bad):
    if bad is None and getattr(make(name), field) is None:
        return  # None is this method's default, and stands for a rate of its own
    with pytest.raises(UserError, match=rf"^{field} must be .*got {bad!r}"):
        make(name, **{field: bad})


@pytest.mark.parametrize("name", METHODS)
def test_unknown_field_is_refused_by_name(name):
    with pytest.raises(UserError, match=f'{name} has no field "learning_rat"') as error:
        make(name, learning_rat=1e-3)
    if "learning_rate" in [f.name for f in dataclasses.fields(method_class(name))]:
        assert 'Did you mean "learning_rate"?' in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lora": {"r": 0}}, r"lora r \(the rank\) must be a whole number not below 1, got 0"),
        ({"lora": {"r": 2.5}}, r"got 2\.5"),
        ({"lora": {"lora_alpha": -1}}, "lora_alpha must be a number above 0, got -1"),
        ({"lora": {"lora_dropout": 1}}, "lora_dropout must be at least 0 and below 1, got 1"),
        ({"lora": {"rank": 4}}, 'lora field "rank" is not supported'),
        ({"lora": 8}, "lora must be a peft.LoraConfig or a mapping"),
    ],
)
@pytest.mark.parametrize(
    "name", [n for n in METHODS if "lora" in [f.name for f in dataclasses.fields(method_class(n))]]
)
def test_bad_lora_is_refused_by_name(name, fields, message):
    with pytest.raises(UserError, match=message):
        make(name, **fields)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("standard", {"heads": "many"}, "heads must be one of shared, per-task; got 'many'"),
        (
            "peft-ml",
            {"form": "prefix"},
            "form must be one of lora, last-layer, sparse; got 'prefix'",
        ),
        ("peft-ml", {"fraction": 0}, "fraction must be a number above 0, got 0"),
        ("peft-ml", {"fraction": 1.5}, "fraction is a share between 0 and 1, got 1.5"),
        ("peft-ml", {"fraction": "x"}, "fraction must be a number above 0, got 'x'"),
        ("reptile", {"inner": "head"}, "inner must be one of all, adapter; got 'head'"),
        ("fomaml", {"inner": "head"}, "inner must be one of all, adapter; got 'head'"),
        ("reptile", {"inner_steps": 0}, "inner_steps must be a whole number not below 1, got 0"),
        ("fomaml", {"inner_steps": 1.5}, "inner_steps must be a whole number .* got 1.5"),
        ("peftml", {}, 'no method "peftml".*Did you mean "peft-ml"?'),
    ],
)
def test_bad_choice_is_refused_by_name(name, fields, message):
    with pytest.raises(UserError, match=message):
        make(name, **fields)


def test_method_of_the_other_verb_is_refused():
    model, tasks = linear_tasks.Net(), family()
    with pytest.raises(UserError, match="lora is a method to adapt with, not to retrain with"):
        foretune.retrain(model, tasks, make("lora"), RUN)
    with pytest.raises(UserError, match="peft-ml is a method to retrain with, not to adapt with"):
        foretune.adapt(model, tasks, make("peft-ml"), RUN)


# --- retrain ------------------------------------------------------------------------------------


def _retrain(name, fields, *, model=None, tasks=None, **changes):
    model = linear_tasks.Net() if model is None else model
    return foretune.retrain(model, tasks or family(), make(name, **fields), RUN.replace(**changes))


@pytest.mark.parametrize(("name", "fields"), _named(FORMS))
def test_retraining_leaves_its_input_alone(name, fields):
    model = linear_tasks.Net()
    model.body.bias.requires_grad_(False)
    before, wanted = copy_of(model), [p.requires_grad for p in model.parameters()]
    result = _retrain(name, fields, model=model).model
    assert equal_bits(model.state_dict(), before)
    assert [p.requires_grad for p in model.parameters()] == wanted
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(result.body.bias, model.body.bias)  # frozen in, frozen out
    shapes = {k: v.shape for k, v in result.state_dict().items()}
    assert shapes == {k: v.shape for k, v in before.items()}
    assert all(not m.training and "forward" not in vars(m) for m in result.modules())


@pytest.mark.parametrize(("name", "fields"), _named(FORMS))
def test_same_seed_same_bits(name, fields):
    torch.manual_seed(7)
    first = _retrain(name, fields, seed=3)
    torch.manual_seed(8)
    second, other = _retrain(name, fields, seed=3), _retrain(name, fields, seed=4)
    assert equal_bits(first.model.state_dict(), second.model.state_dict())
    assert first.history == second.history
    assert equal_bits(first.model.state_dict(), other.model.state_dict()) == (name == "none")


def test_global_random_state_is_left_alone():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    _retrain(*FORMS[3])
    foretune.adapt(linear_tasks.Net(), family(), make("lora"), RUN)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("name", "fields"), _named(FORMS))
def test_cost_is_told(name, fields):
    cost = _retrain(name, fields).cost
    assert {"tokens", "examples", "seconds", "cpu_seconds", "peak_memory_mb"} <= set(cost)
    assert (cost["trainable_parameters"] == 0) == (name == "none")


@pytest.mark.parametrize("rows", [24, [24, 2, 9]])
@pytest.mark.parametrize("together", [None, 1])
def test_budgets_are_equal(rows, together):
    tasks = family(rows=rows)
    counted = {
        str((name, fields)): _retrain(
            name, fields, tasks=tasks, tasks_per_step=together, eval_every=0
        ).cost["examples"]
        for name, fields in TRAINED_FORMS
    }
    low, high = min(counted.values()), max(counted.values())
    # Within one update: where a task has fewer rows than a batch, visits are not all of one size.
    assert high == low if rows == 24 else high - low <= 4 * RUN.batch_size, counted


def _distance(model, tasks):
    """To the weights that the family shares; from outside, through what the model says."""
    x = torch.eye(4)
    with torch.no_grad():
        w = (model(x) - model(torch.zeros(1, 4))).T.numpy()
    return float(np.sum((w - linear_tasks.shared_weight()) ** 2))


@pytest.mark.parametrize(
    ("name", "fields"),
    # The model is one layer: with a head a task PEFT-ML has nothing left to adapt.
    _named([f for f in TRAINED_FORMS if f[0] != "auto" and f != PEFT_ML_WITH_HEADS]),
)
def test_retraining_comes_closer_to_a_known_answer(name, fields):
    tasks = family(6, offset=0.2)
    model = linear_tasks.Net(hidden=None)
    result = _retrain(
        name,
        {**fields, "learning_rate": 0.1},
        model=model,
        tasks=tasks,
        steps=120,
        batch_size=8,
        eval_every=0,
        warmup=0.0,
    ).model
    if fields.get("form") == "last-layer":
        # Its adapter is the whole model here, so W gets no gradient and must stay.
        assert torch.equal(result.out.weight, model.out.weight)
    elif fields.get("heads") == "per-task":
        assert torch.equal(result.out.weight, model.out.weight)
    else:
        left = 1 - fields.get("interpolate", 1.0)
        assert _distance(result, tasks) < (0.1 + left**2) * _distance(model, tasks)


@pytest.mark.parametrize(
    ("name", "fields"), _named([f for f in TRAINED_FORMS if {"heads", "form"} & set(f[1])])
)
def test_heads_of_their_own_make_progress(name, fields):
    untouched = _retrain("none", {}).validation_score
    assert _retrain(name, fields, steps=60).validation_score > untouched + 0.5 * abs(untouched)


@pytest.mark.parametrize(("name", "fields"), _named(FORMS))
def test_saved_base_gives_the_same_outputs(name, fields, tmp_path):
    model = load_module(linear_tasks.module_file(tmp_path), hidden=6)
    outcome = _retrain(name, fields, model=model)
    outcome.save(tmp_path / "out")
    loaded, _ = load_base(tmp_path / "out" / "base")
    x = torch.randn(5, 4)
    assert torch.equal(loaded(x), outcome.model(x))
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["finished"] and make(**record["method"]) == outcome.method
    folders = tmp_path / "out" / "adapters"
    assert folders.is_dir() == (outcome.bank is not None)
    moved = {"interpolate", "average"} & set(fields)  # away from the weights beside the adapters
    kept = name == "peft-ml" and not moved and fields.get("form") != "sparse"
    assert (outcome.bank is not None) == kept


def _classification() -> TaskCollection:
    words = ("red", "blue", "cat", "dog")
    rows = [{"text": f"the {w} sat on {v}", "label": w} for w in words[:2] for v in words] * 2
    more = [{"text": f"a {v} {w}", "label": w} for w in words[2:] for v in words] * 2
    tasks = (Task("colour", rows, rows[:4], rows), Task("animal", more, more[:4], more))
    objective = foretune.Classification(tokenizer=tiny_models.tokenizer())
    return TaskCollection(tasks, objective)


@pytest.mark.parametrize(("name", "fields"), _named(FORMS))
def test_a_hugging_face_model_goes_through_and_is_loaded_by_transformers(name, fields, tmp_path):
    import transformers

    shared = name == "standard" and fields.get("heads") != "per-task"
    model = tiny_models.bert(num_labels=4 if shared else 2, num_hidden_layers=1)
    fields = {k: v for k, v in fields.items() if k != "lora"}
    outcome = _retrain(
        name,
        fields,
        model=model,
        tasks=_classification(),
        steps=4,
        batch_size=2,
        out=tmp_path / "x",
    )
    assert list(outcome.model.state_dict()) == list(model.state_dict())
    auto = transformers.AutoModelForSequenceClassification
    loaded = auto.from_pretrained(tmp_path / "x" / "base").eval()
    ids = torch.randint(4, tiny_models.VOCABULARY, (2, 6))
    assert torch.equal(loaded(ids).logits, outcome.model(ids).logits)


# --- adapt --------------------------------------------------------------------------------------


def _adapt(name, fields, *, model=None, tasks=None, shots=8, draws=2, **changes):
    model = linear_tasks.Net() if model is None else model
    run = RUN.replace(batch_size=8, **changes)
    return foretune.adapt(
        model, tasks or family(), make(name, **fields), run, shots=shots, draws=draws
    )


@pytest.mark.parametrize(("name", "fields"), _named(ADAPT_FORMS))
def test_adapting_leaves_its_input_alone_and_scores_every_task_and_draw(name, fields):
    model = linear_tasks.Net()
    model.body.bias.requires_grad_(False)
    before, wanted = copy_of(model), [p.requires_grad for p in model.parameters()]
    adapted = _adapt(name, fields, model=model)
    assert equal_bits(model.state_dict(), before)
    assert [p.requires_grad for p in model.parameters()] == wanted
    assert set(adapted.scores) == {(f"task{t}", draw) for t in range(3) for draw in range(2)}
    assert set(adapted.num_rows.values()) == {8}
    assert {"tokens", "examples", "seconds", "trainable_parameters"} <= set(adapted.cost)


@pytest.mark.parametrize(("name", "fields"), _named(ADAPT_FORMS))
def test_adapting_is_reproducible(name, fields):
    first, second = _adapt(name, fields, seed=3), _adapt(name, fields, seed=3)
    assert first.scores == second.scores
    for key, tensors in first.tensors.items():
        assert equal_bits(tensors, second.tensors[key])
    for key, model in first.models.items():
        assert equal_bits(model.state_dict(), second.models[key].state_dict())
    assert first.scores != _adapt(name, fields, seed=4).scores


@pytest.mark.parametrize(("name", "fields"), _named(ADAPT_FORMS))
def test_adapting_makes_progress(name, fields):
    untouched = foretune.retrain(
        linear_tasks.Net(), family(), make("none"), RUN.replace(eval_rows=None)
    ).validation_score
    adapted = _adapt(name, fields, steps=80, shots=None, draws=1)
    assert np.mean(list(adapted.scores.values())) > 0.5 * untouched


@pytest.mark.parametrize(("name", "fields"), _named(ADAPT_FORMS))
def test_a_task_does_not_notice_the_others(name, fields):
    every = _adapt(name, fields, tasks=family(3, rows=[24, 5, 24]))
    alone = _adapt(name, fields, tasks=family(3, rows=[24, 5, 24]).subset(["task1"]), draws=1)
    waves = _adapt(name, fields, tasks=family(3, rows=[24, 5, 24]), tasks_per_wave=2)
    assert waves.scores == pytest.approx(every.scores, rel=1e-4)
    assert alone.scores["task1", 0] == pytest.approx(every.scores["task1", 0], rel=1e-4)
    for key in every.tensors:
        for k, value in every.tensors[key].items():
            torch.testing.assert_close(waves.tensors[key][k], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["subspace-sfda"])  # more of it in tests/methods
def test_adapting_without_labels_is_refused_tasks_with_a_loss_of_labels(name):
    with pytest.raises(UserError, match=f"{name} adapts to rows without labels"):
        _adapt(name, {})
    with pytest.raises(UserError, match=f"{name} is a method to adapt with, not to retrain with"):
        _retrain(name, {})


@pytest.mark.parametrize("name", ["lora", "head"])
def test_a_task_does_not_notice_how_many_labels_the_others_have(name):
    rows = [{"text": f"the {w}", "label": w} for w in ("red", "blue", "green", "cat", "dog")] * 2
    few = Task("few", [r for r in rows if r["label"] in ("red", "blue")], (), rows[:2])
    objective = foretune.Classification(tokenizer=tiny_models.tokenizer())
    model = tiny_models.bert(num_labels=2, num_hidden_layers=1)
    run = RUN.replace(steps=3, batch_size=4)
    beside_two, beside_three = (
        foretune.adapt(
            model,
            TaskCollection((few, Task("other", others, (), others)), objective),
            make(name, learning_rate=0.01),
            run,
        ).tensors["few", 0]
        for others in (
            [r for r in rows if r["label"] in ("cat", "dog")],
            [r for r in rows if r["label"] in ("cat", "dog", "green")],
        )
    )
    for k, value in beside_two.items():
        torch.testing.assert_close(beside_three[k][: len(value)], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("name", "fields"), _named(ADAPT_FORMS))
def test_adapters_are_saved_in_a_folder_each(name, fields, tmp_path):
    model = load_module(linear_tasks.module_file(tmp_path), hidden=6)
    adapted = _adapt(name, fields, model=model)
    adapted.save(tmp_path / "out")
    folders = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert folders == sorted(f"task{t}{d}" for t in range(3) for d in ("", "-draw1"))
    for folder in (tmp_path / "out").iterdir():
        own = {"full": "model.safetensors", "sara": "sparse_delta.safetensors"}
        assert (folder / own.get(name, "adapter_model.safetensors")).is_file()


# --- decode -------------------------------------------------------------------------------------


def _decode_resources(name, model):
    """Side models or a store, as the method takes them, for that model."""
    small = [tiny_models.gpt2(seed=s, n_layer=1, initializer_range=0.4) for s in (1, 2)]
    rows = [{"text": "the cat sat on the mat"}, {"text": "a dog sat on the red mat"}]
    store = foretune.ReferenceStore.build(model, rows, tokenizer=tiny_models.tokenizer())
    return {"eft": {"tuned": small[0], "untuned": small[1]}, "rtd": {"store": store}}[name]


@pytest.mark.parametrize("name", DECODE)
def test_decoding_leaves_its_input_alone_and_is_reproducible(name):
    model = tiny_models.llama(num_hidden_layers=1, initializer_range=0.4)
    resources = _decode_resources(name, model)
    models = [model, *(m for m in resources.values() if isinstance(m, torch.nn.Module))]
    before, wanted = [copy_of(m) for m in models], [p.requires_grad for p in model.parameters()]
    prompts = ["the cat sat", "a dog"]

    def drawn(seed):
        torch.manual_seed(seed + 7)
        options = {"tokenizer": tiny_models.tokenizer(), "do_sample": True, "max_new_tokens": 8}
        return foretune.decode(model, prompts, make(name), seed=seed, **options, **resources)

    first = drawn(1)
    assert [one.prompt for one in first] == prompts
    assert first == drawn(1) != drawn(2)
    assert all(equal_bits(m.state_dict(), b) for m, b in zip(models, before, strict=True))
    assert [p.requires_grad for p in model.parameters()] == wanted
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("name", DECODE)
def test_decoding_refuses_a_method_of_another_verb_and_unknown_options(name):
    model, options = tiny_models.llama(num_hidden_layers=1), {"tokenizer": tiny_models.tokenizer()}
    with pytest.raises(UserError, match="not to decode with"):
        foretune.decode(model, "a dog", make("lora"))
    with pytest.raises(UserError, match='generate has no option "max_tokens"'):
        foretune.decode(
            model, "a dog", make(name), max_tokens=3, **options, **_decode_resources(name, model)
        )


# --- prune --------------------------------------------------------------------------------------


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
    known = json.loads(json.dumps(result.method.to_dict()))
    assert known.pop("name") == name
    assert make(name, **known) == result.method


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
    with pytest.raises(UserError, match="to prune with, not to fuse with"):
        foretune.fuse(linear_tasks.Net(), {}, make(name))


# --- fuse ---------------------------------------------------------------------------------------


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
        foretune.prune(tiny_models.bert(), [], make(name))
    with pytest.raises(UserError, match=f"{name} is a method to fuse with, not to adapt with"):
        foretune.adapt(linear_tasks.Net(), family(), make(name), RUN)
