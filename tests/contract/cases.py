"""The cases on which the contract of each verb is tested; a wing's cases are among its tests.

`tests/<folder>/contract_cases.py` holds `ADAPT_CASES`: every form of each adapt method.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from foretune.methods import make
from foretune.tasks.task import TaskCollection

TESTS = Path(__file__).parents[1]


@dataclass(frozen=True)
class AdaptCase:
    """One form of an adapt method, with a model and tasks that suit it.

    Args:
        name: Name of the method.
        fields: Fields of its record, with a learning rate that suits the model.
        model: Builds the base, the same one at each call.
        tasks: Builds two or more tasks, with an objective.
        file: A file that the folder of an adapted task must contain.
        reload: (base, folder) → the adapted model; None for adapters, which PEFT loads.
        shots: Examples per class or task.
        progress_steps: Number of steps after which the score must exceed that after one step; None
            where the method does not minimise the score.
        label: Distinguishes the forms of one method.
    """

    name: str
    fields: Mapping[str, Any]
    model: Callable[[], nn.Module]
    tasks: Callable[[], TaskCollection]
    file: str = "adapter_model.safetensors"
    reload: Callable[[nn.Module, Path], nn.Module] | None = None
    shots: int | None = None
    progress_steps: int | None = 40
    label: str = ""

    def __str__(self) -> str:
        return "-".join(filter(None, [self.name, self.label]))

    @property
    def method(self) -> Any:
        return make(self.name, **self.fields)


def adapt_cases() -> list[AdaptCase]:
    """The cases of all folders of tests."""
    cases: list[AdaptCase] = []
    for file in sorted(TESTS.glob("*/contract_cases.py")):
        spec = importlib.util.spec_from_file_location(f"contract_cases_{file.parent.name}", file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        cases += module.ADAPT_CASES
    return cases


def assert_survives_json(record: Any) -> None:
    """Checks that the record's JSON makes an equal record."""
    fields = json.loads(json.dumps(record.to_dict()))
    assert fields.pop("name") == record.name
    assert make(record.name, **fields) == record
