"""One contract for the records of all methods."""

from __future__ import annotations

import dataclasses

import pytest

import foretune
import linear_tasks
from contract.cases import adapt_cases, assert_survives_json
from contract.retrain_forms import FORMS, named
from foretune.errors import UserError
from foretune.method import check_verb
from foretune.methods import METHODS, make, method_class, method_class_of, methods_of
from foretune.run import Run
from linear_tasks import family

CASES = adapt_cases()
RUN = Run(steps=12, batch_size=4, eval_every=4, device="cpu", weight_decay=0.0)


@pytest.mark.parametrize("name", methods_of("retrain") + methods_of("adapt"))
def test_every_method_that_trains_has_a_form_whose_behaviour_is_tested(name):
    """The contracts of fuse, prune and decode run over the table itself."""
    forms = {form for form, _ in FORMS} | {case.name for case in CASES}
    assert name in forms, f"{name}: add its forms to retrain_forms.py or a contract_cases.py"


def _rate_fields(name):
    return [f.name for f in dataclasses.fields(method_class(name)) if "learning_rate" in f.name]


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
def test_record_has_a_name_label_verb_and_docstring(name):
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


@pytest.mark.parametrize("case", CASES, ids=str)
def test_record_of_an_adapt_method_survives_json(case):
    assert_survives_json(case.method)


@pytest.mark.parametrize(("name", "fields"), named(FORMS))
def test_record_survives_json(name, fields):
    if "lora" in fields:
        fields = {**fields, "lora": {**fields["lora"], "target_modules": ("out", "body")}}
    assert_survives_json(make(name, **fields))


@pytest.mark.parametrize("bad", [0, -1, "x", None, True, float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("name", "field"), [(name, field) for name in METHODS for field in _rate_fields(name)]
)
def test_bad_rate_is_refused_by_name(name, field, bad):
    if bad is None and getattr(make(name), field) is None:
        return  # None is this method's default: it derives the rate
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
        ("standard", {"heads": "per-task"}, 'standard has no field "heads"'),
        (
            "peft-ml",
            {"form": "prefix"},
            "form must be one of lora, last-layer, both, sparse; got 'prefix'",
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


def test_name_of_another_verb_is_worded_as_its_record():
    with pytest.raises(UserError) as by_record:
        check_verb(make("lora"), "retrain")
    with pytest.raises(UserError) as by_name:
        method_class_of("lora", "retrain")
    record_message, name_message = str(by_record.value), str(by_name.value)
    assert record_message.split(";")[0] == name_message.split(";")[0]
    assert name_message.endswith("; methods for retrain: " + ", ".join(methods_of("retrain")))


def test_unknown_name_is_looked_for_among_the_methods_of_the_verb():
    with pytest.raises(UserError, match=r'^no method "loraa" for adapt.*Did you mean "lora"?'):
        method_class_of("loraa", "adapt")
    with pytest.raises(UserError, match=r'^no method "loraa" for retrain; .*auto\.$'):
        method_class_of("loraa", "retrain")


def test_method_of_the_other_verb_is_refused():
    model, tasks = linear_tasks.Net(), family()
    with pytest.raises(UserError, match="lora is a method for adapt, not for retrain"):
        foretune.retrain(model, tasks, make("lora"), RUN)
    with pytest.raises(UserError, match="peft-ml is a method for retrain, not for adapt"):
        foretune.adapt(model, tasks, make("peft-ml"), RUN)
