"""`KEY=VALUE` arguments: parsing, and splitting them from positional ones."""

from __future__ import annotations

import pytest

from foretune.errors import UserError
from foretune.recipes.overrides import Setting, apply_overrides, split_arguments


def test_value_is_yaml_and_key_dotted() -> None:
    setting = Setting.parse("lora.targets=[q, v]")
    assert (setting.keys, setting.value()) == (["lora", "targets"], ["q", "v"])
    assert Setting.parse("path=a=b").value() == "a=b"
    assert Setting.parse(" rate = 1e-4").value() == 1e-4


@pytest.mark.parametrize("argument", ["steps", "=3", "a..b=3", ".=3"])
def test_argument_without_a_key_or_value_is_refused(argument: str) -> None:
    with pytest.raises(UserError, match=f'^"{argument}" must read KEY=VALUE'):
        Setting.parse(argument)


def test_bad_yaml_names_the_argument() -> None:
    with pytest.raises(UserError, match=r'^setting "steps=\[1", line 1: bad YAML'):
        apply_overrides({}, ["steps=[1"])


def test_key_inside_a_value_names_the_argument() -> None:
    with pytest.raises(
        UserError, match=r'setting "lora\.r=4" sets a key inside "lora", which is 3'
    ):
        apply_overrides({}, ["lora=3", "lora.r=4"])


def test_arguments_are_split_by_their_equals_sign() -> None:
    mixed = ["runs/a", "steps=3", "runs/b"]
    assert split_arguments(mixed) == (["steps=3"], ["runs/a", "runs/b"])
    assert split_arguments(["a=b", "beta=1"], ["beta"]) == (["beta=1"], ["a=b"])


def test_later_settings_win() -> None:
    assert apply_overrides({}, ["k=1", "k=2"]) == {"k": 2}
