"""One mistake, one wording, whichever command it is made with."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from foretune.decoding.prompts import decode_method, split_words
from foretune.errors import UserError
from foretune.forecasting.folders import adapt_settings
from foretune.fusion.folders import parse_request
from foretune.methods import methods_of
from foretune.pruning.folders import prune_method
from foretune.recipes.on_folders import settings as adapt_block
from foretune.recipes.schema import load_recipe
from foretune.source_free.folders import settings as sfda_settings

NOT_A_SETTING: dict[str, Callable[[str], object]] = {
    "run": lambda argument: load_recipe("quickstart", [argument]),
    "adapt": lambda argument: adapt_block("tasks.jsonl", [argument]),
    "fuse": lambda argument: parse_request("smile", [argument]),
    "prune": lambda argument: prune_method("uncurl", [argument]),
    "generate": lambda argument: split_words(["a prompt", argument], "eft", False),
    "datastore evaluate": lambda argument: decode_method("rtd", [argument]),
    "forecast adapt": lambda argument: adapt_settings("full", [argument], 0),
    "sfda adapt": lambda argument: sfda_settings([argument], 0),
}

OTHER_VERB: dict[str, Callable[[], object]] = {
    "retrain": lambda: load_recipe("quickstart", ["retrain.methods=[lora]"]),
    "fuse": lambda: parse_request("lora", []),
    "prune": lambda: prune_method("lora", []),
    "decode": lambda: decode_method("lora", []),
}


@pytest.mark.parametrize("command", NOT_A_SETTING)
def test_argument_that_is_no_setting(command: str) -> None:
    wording = re.compile(r'^"dog" must read (NAME=FOLDER or )?KEY=VALUE')
    with pytest.raises(UserError, match=wording):
        NOT_A_SETTING[command]("dog")


@pytest.mark.parametrize("verb", OTHER_VERB)
def test_method_of_another_verb(verb: str) -> None:
    names = ", ".join(methods_of(verb))
    wording = f"lora is a method for adapt, not for {verb}; methods for {verb}: {names}$"
    with pytest.raises(UserError, match=wording):
        OTHER_VERB[verb]()
