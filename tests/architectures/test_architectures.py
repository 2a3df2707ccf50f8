"""The table of docs/architectures.md is what happens."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import pytest
import transformers

from architectures.catalogue import ARCHITECTURES
from architectures.checks import CHECKS, outcome

REPOSITORY = Path(__file__).parents[2]
RESULTS = json.loads((REPOSITORY / "benchmarks/results/architectures.json").read_text("utf-8"))
ROWS = {name: row for rows in RESULTS["groups"].values() for name, row in rows.items()}
FAST = ("BERT", "DeBERTa-v3", "Llama", "Qwen3-MoE", "Mamba", "T5", "ViT", "CLIP")


def assert_as_in_the_table(name, folder):
    architecture = ARCHITECTURES[name]
    if not hasattr(transformers, architecture.model):
        pytest.skip(f"transformers {version('transformers')} has no {architecture.model}")
    same_version = version("transformers") == RESULTS["versions"]["transformers"]
    for check in CHECKS:
        (folder / check).mkdir(parents=True)
        happened, expected = outcome(check, architecture, folder / check), ROWS[name][check]
        if not same_version:  # other versions have other names and messages
            happened, expected = (text.partition(":")[0] for text in (happened, expected))
        assert happened == expected, f"{name}, {check}: run make architectures if this is right"


def test_the_table_lists_the_catalogue():
    assert list(ROWS) == list(ARCHITECTURES)
    assert len(ROWS) >= 60


@pytest.mark.parametrize("name", FAST)
def test_an_architecture_does_what_the_table_says(name, tmp_path):
    assert_as_in_the_table(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in FAST])
def test_every_architecture_does_what_the_table_says(name, tmp_path):
    assert_as_in_the_table(name, tmp_path)
