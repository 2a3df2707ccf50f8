"""Recipes: what is read, what is refused, and that recipe keys agree with the code."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any, get_type_hints

import pytest

from foretune.errors import UserError
from foretune.recipes.blocks import (
    RUN_FIELDS_OF_ADAPT,
    RUN_FIELDS_OF_RETRAIN,
    RUN_FIELDS_OF_THE_RECIPE,
    AdaptBlock,
    Block,
    RetrainBlock,
    TasksBlock,
    with_fields_of,
)
from foretune.recipes.entries import adapt_methods
from foretune.recipes.objective_blocks import OBJECTIVES
from foretune.recipes.overrides import apply_overrides
from foretune.recipes.schema import Recipe, load_recipe, packaged_recipes, parse_block, parse_recipe
from foretune.recipes.templates import TEMPLATES, template_text
from foretune.recipes.yaml_io import parse_yaml
from foretune.run import Run
from foretune.tasks.sources import Source

MINIMAL: dict[str, Any] = {
    "name": "mine",
    "model": {"name": "minilm"},
    "tasks": {"source": "data.jsonl"},
    "objective": {"kind": "choice"},
    "retrain": {"methods": ["none"]},
}
TRAINING = [name for name, text in packaged_recipes().items() if "\ntasks:" in text]


def parse(*overrides: str) -> Recipe:
    return parse_recipe(apply_overrides(MINIMAL, overrides), "my.yaml")


def refusal(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        parse(*overrides)
    line = str(caught.value)
    assert "\n" not in line
    return line


@pytest.mark.parametrize("name", TRAINING)
def test_packaged_recipe_parses_and_round_trips(name: str) -> None:
    recipe = load_recipe(name, ["tasks.source=data.jsonl"])
    assert recipe.name == name
    assert parse_recipe(parse_yaml(recipe.to_yaml(), "again"), "again") == recipe


@pytest.mark.parametrize("name", packaged_recipes())
def test_packaged_recipe_says_what_it_shows_and_costs(name: str) -> None:
    text = packaged_recipes()[name]
    assert text.startswith("# ")
    assert "# Shows:" in text
    assert "# Costs:" in text


def test_convai2_has_forty_unseen_personas() -> None:
    unseen = load_recipe("convai2", ["tasks.source=x"]).tasks.unseen
    assert isinstance(unseen, list)
    assert len(set(unseen)) == 40


@pytest.mark.parametrize(
    ("override", "says"),
    [
        (
            "retrain.stepz=3",
            'unknown key "retrain.stepz" in my.yaml. Did you mean "retrain.steps"?',
        ),
        ("steps=3", 'unknown key "steps" in my.yaml. Did you mean retrain.steps or adapt.steps?'),
        ("adapt.xyz=3", 'unknown key "adapt.xyz" in my.yaml. Valid keys: '),
        ("retrain.steps=ten", "\"retrain.steps\" in my.yaml must be a whole number, got 'ten'"),
        ("retrain.steps=yes", "must be a whole number, got True"),
        ("retrain.steps=0", "my.yaml: retrain.steps must be a whole number not below 1, got 0"),
        ("retrain.schedule=fast", "must be 'linear', 'cosine' or 'constant', got 'fast'"),
        ("retrain.methods=[peft-mll]", 'Did you mean "peft-ml"?'),
        (
            "retrain.methods=[lora]",
            "retrain.methods: lora is a method for adapt, not for retrain; methods for "
            "retrain: none, ",
        ),
        ("retrain.methods=[none, none]", 'names "none" twice'),
        ("retrain.methods=[{peft-ml: {frm: lora}}]", 'Did you mean "form"?'),
        ("retrain.methods=[]", '"retrain.methods"'),
        (
            "adapt.method=standard",
            "adapt.method: standard is a method for retrain, not for adapt; methods for ",
        ),
        (
            "retrain.methods=[{peft-ml: {search: {penalti: [0]}}}]",
            'peft-ml has no field "penalti"',
        ),
        ("retrain.methods=[{peft-ml: {search: {penalty: 0}}}]", "must map fields to lists"),
        ("retrain.methods=[{peft-ml: {search: {form.x: [0]}}}]", "form is no block of keys"),
        (
            "retrain.methods=[{peft-ml: {search: {learning_rate: [1]}}}]",
            "set peft-ml.learning_rates instead",
        ),
        ("retrain.methods=[none, {auto: {search: {rounds: [1]}}}]", "auto searches by itself"),
        ("adapt.methods=[standard]", "adapt.methods: standard is a method for retrain"),
        ("adapt.methods=[hed]", 'Did you mean "head"?'),
        ("adapt.methods=[head, head]", 'names "head" twice'),
        ("adapt.methods=[5]", '"adapt.methods'),
        ("adapt={methods: [head], method: lora}", "not both"),
        ("adapt={methods: [head], lora: {r: 2}}", "lora only with the method lora"),
        ("adapt={fields: {pull: 1}}", "fields only beside method"),
        ("adapt.patience=2", "patience only with one method and rate"),
        ("adapt.schedule=cosine", "schedule only with one method and rate"),
        ("adapt.steps=0", "steps of at least 1"),
        ("adapt.shots=[0]", "at least 1 row"),
        ("adapt.shots=[2, 2]", "shots that differ"),
        ("objective.kind=[]", "must be one of"),
        ("adapt.lora.rank=3", 'lora field "rank"'),
        ("objective.kind=choise", 'Did you mean "choice"?'),
        (
            "objective.scorin=x",
            'unknown key "objective.scorin" in my.yaml. Did you mean "objective.scoring"?',
        ),
        ("objective=null", '"objective"'),
        ("model.file=my.py", "needs either name"),
        ("tasks.unseen=true", "must be a whole number or a list or text, got True"),
        ("name=a/b", '"name"'),
        ("spectrum.rank=3", 'Did you mean "spectrum.ranks"?'),
    ],
)
def test_mistake_has_its_own_line(override: str, says: str) -> None:
    raw = apply_overrides(MINIMAL, [override])
    if override.startswith("model.file"):
        raw["model"]["name"] = "minilm"
    with pytest.raises(UserError) as caught:
        parse_recipe(raw, "my.yaml")
    line = str(caught.value)
    assert says in line
    assert "\n" not in line


def test_several_mistakes_are_counted() -> None:
    line = refusal("retrain.stepz=3", "adapt.steps=x", "seeds=0")
    assert line.endswith("(and 2 more)")
    assert "retrain.stepz" in line


def test_missing_key_is_named() -> None:
    raw = {key: value for key, value in MINIMAL.items() if key != "model"}
    with pytest.raises(UserError, match='key "model" is missing in my'):
        parse_recipe(raw, "my.yaml")


def test_error_in_an_override_names_the_command_line() -> None:
    with pytest.raises(UserError, match="on the command line"):
        load_recipe("quickstart", ["retrain.stepz=1"])


def test_one_rate_on_the_command_line_replaces_the_search() -> None:
    block = load_recipe("quickstart", ["retrain.learning_rate=1e-4"]).retrain
    assert block.rates == [1e-4]


def test_rates_that_exclude_each_other_are_refused() -> None:
    assert "not both" in refusal("retrain.learning_rates=[1e-4]", "retrain.learning_rate=1e-4")


@pytest.mark.parametrize("override", ["retrain.steps", "=3", "retrain..steps=3", "name.x=1"])
def test_odd_override_is_refused(override: str) -> None:
    assert override in refusal(override)


def test_overrides_leave_the_recipe_alone() -> None:
    before = {"retrain": {"steps": 1}}
    apply_overrides(before, ["retrain.steps=2", "adapt.lora.r=3"])
    assert before == {"retrain": {"steps": 1}}


def test_methods_take_fields_names_and_rates() -> None:
    recipe = parse(
        "retrain.methods=[{peft-ml: {form: last-layer, as: end}}, {reptile: {learning_rate: 0.5}}]",
        "retrain.learning_rates=[1e-4, 2e-4]",
    )
    last, reptile = recipe.entries
    assert (last.name, last.method, last.rates) == ("end", "peft-ml", [1e-4, 2e-4])
    assert last.record({"learning_rate": 1e-4}).form == "last-layer"
    assert reptile.rates == [0.5]


def test_a_search_tries_each_value_with_each_rate() -> None:
    recipe = parse(
        "retrain.methods=[none, {peft-ml: {search: {penalty: [0, 0.1], lora.r: [2, 4]}}}]",
        "retrain.learning_rates=[1e-4, 2e-4]",
    )
    none, peft_ml = recipe.entries
    assert none.trials == [{}]  # it has no rate
    assert len(peft_ml.trials) == 8
    record = peft_ml.record(peft_ml.trials[-1])
    assert (record.learning_rate, record.penalty) == (2e-4, 0.1)
    assert record.lora == {"r": 4, "lora_alpha": 16}  # the other keys as by default
    assert peft_ml.name_with(peft_ml.trials[0]) == "peft-ml 0.0001 penalty=0 lora.r=2"


def test_how_to_adapt_is_searched_unless_it_is_fixed() -> None:
    searched = ["seeds=1", "adapt.methods=[head]", "adapt.learning_rates=[1e-3, 1e-2]"]
    fixed = ["adapt.method=head", "adapt.learning_rate=1e-3", "adapt.learning_rates=[1e-3]"]
    assert all(parse(override).adapt.searches for override in searched)
    assert not any(parse(override).adapt.searches for override in fixed)
    assert adapt_methods(parse().adapt) == [("head", {}), ("lora", {}), ("basis", {})]
    methods = parse("adapt.methods=[lora, {basis: {free: 1}}]", "adapt.lora.r=2").adapt
    assert adapt_methods(methods) == [("lora", {"lora": {"r": 2}}), ("basis", {"free": 1})]


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_choose_how_to_adapt_and_repeat(name: str) -> None:
    recipe = parse_recipe(parse_yaml(template_text(name), name), name)
    assert recipe.seeds == 3 and recipe.adapt.searches and recipe.retrain.search_steps is None
    assert recipe.retrain_run().patience is not None


def test_yaml_reads_exponents_as_numbers() -> None:
    assert parse_yaml("[1e-4, 2E5, -3e-1, 0x10, v1e4]", "x") == [1e-4, 2e5, -0.3, 16, "v1e4"]


def test_yaml_refuses_duplicate_keys() -> None:
    with pytest.raises(UserError, match='line 2: bad YAML: the key "steps" appears twice'):
        parse_yaml("steps: 1\nsteps: 2\n", "x.yaml")


def test_yaml_runs_no_code() -> None:
    with pytest.raises(UserError, match="bad YAML"):
        parse_yaml("!!python/object/apply:os.system [echo hi]", "x.yaml")


def test_parse_block_refuses_unknown_keys() -> None:
    with pytest.raises(UserError, match='Did you mean "steps"'):
        parse_block(AdaptBlock, ["step=3"])


def test_tasks_block_is_source() -> None:
    block, source = TasksBlock(source="x").model_dump(), Source(source="x").to_dict()
    # A recipe says whether the unseen tasks rotate, a source which turn it is.
    assert (block.pop("rotate"), source.pop("turn")) == (False, None)
    assert block == source
    assert list(block) == list(source)


@pytest.mark.parametrize(
    ("block", "other_keys", "without"),
    [
        (
            RetrainBlock,
            {"learning_rate", "learning_rates", "methods", "search_steps"},
            RUN_FIELDS_OF_THE_RECIPE + RUN_FIELDS_OF_ADAPT,
        ),
        (
            AdaptBlock,
            {
                *("learning_rate", "learning_rates", "method", "methods", "lora", "fields"),
                *("search_tasks", "shots", "draws"),
            },
            RUN_FIELDS_OF_THE_RECIPE + RUN_FIELDS_OF_RETRAIN,
        ),
    ],
)
def test_fields_of_run_are_keys_with_the_same_default(
    block: type[Block], other_keys: set[str], without: tuple[str, ...]
) -> None:
    fields = {field.name: field for field in dataclasses.fields(Run)}
    assert set(without) < set(fields)
    assert block.model_fields.keys() - other_keys == fields.keys() - set(without)
    types = get_type_hints(Run)
    for name in fields.keys() - set(without):
        assert block.model_fields[name].default == fields[name].default
        assert block.model_fields[name].annotation == types[name]


def test_a_new_field_of_a_record_is_a_key_at_once() -> None:
    @dataclasses.dataclass
    class Record:
        needed: int
        hidden: int = 1
        names: list[str] = dataclasses.field(default_factory=list)

    @with_fields_of(Record, without=("hidden",))
    class RecordBlock(Block):
        first: int = 0

    assert list(RecordBlock.model_fields) == ["first", "needed", "names"]
    assert parse_block(RecordBlock, ["needed=2"]).model_dump() == {
        "first": 0,
        "needed": 2,
        "names": [],
    }
    with pytest.raises(UserError, match='"needed" on the command line must be a whole number'):
        parse_block(RecordBlock, ["needed=yes"])
    with pytest.raises(UserError, match='key "needed" is missing'):
        parse_block(RecordBlock, [])


def test_reading_recipes_does_not_import_torch() -> None:
    code = "import sys, foretune.recipes.schema; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_objective_block_repeats_the_objective(kind: str) -> None:
    from foretune.tasks.objectives import make_objective

    fields = {
        field.name: field.default
        for field in dataclasses.fields(make_objective(kind))
        if field.name != "tokenizer" and not field.metadata.get("learnt")
    }
    assert OBJECTIVES[kind](kind=kind).model_dump(exclude={"kind"}) == fields
