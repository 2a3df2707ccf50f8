"""`TaskAdapters`: the adapters of several tasks on one base, from a bank or as they were saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from typing_extensions import override

from foretune.adapters.bank import AdapterBank
from foretune.adapters.config import lora_scale
from foretune.adapters.head_copies import escaped
from foretune.adapters.layers import LoRALayer
from foretune.adapters.peft_names import PREFIX


class TaskAdapters(Protocol):
    """Adapters with tasks along the first axis.

    Attributes:
        layers: Names of the modules with low-rank changes.
        heads: Names of the modules of which each task has a copy.
        num_tasks: Number of tasks.
    """

    layers: Sequence[str]
    heads: Sequence[str]
    num_tasks: int

    def factors(self, layer: str) -> tuple[Tensor, Tensor]:
        """A (tasks, r, in) and s·B (tasks, out, r) of a layer, kernels flattened, on the CPU."""
        ...

    def copies(self, head: str) -> dict[str, Tensor]:
        """The parameters (tasks, …) of a head, by their names in it, on the CPU."""
        ...


class BankAdapters(TaskAdapters):
    """The slots of a bank with low-rank adapters or without any."""

    def __init__(self, bank: AdapterBank) -> None:
        self.bank = bank
        self.layers, self.heads = bank.layer_names, bank.head_names
        self.num_tasks = len(bank.keys)

    @override
    def factors(self, layer: str) -> tuple[Tensor, Tensor]:
        stacked = self.bank.layers[escaped(layer)]
        assert isinstance(stacked, LoRALayer)
        b = stacked.b if stacked.is_conv else stacked.b.mT
        return stacked.a.detach().flatten(2).cpu(), stacked.scale * b.detach().cpu()

    @override
    def copies(self, head: str) -> dict[str, Tensor]:
        by_task = [self.bank.head_state(head, slot) for slot in range(self.num_tasks)]
        return {name: torch.stack([s[name].detach().cpu() for s in by_task]) for name in by_task[0]}


class SavedAdapters(TaskAdapters):
    """Adapters as tensors under PEFT's names, all of one configuration.

    Args:
        tensors: The tensors of each task.
        config: Their adapter_config.json.
        heads: Names of the modules of which each task has a copy.
    """

    def __init__(
        self,
        tensors: Sequence[Mapping[str, Tensor]],
        config: Mapping[str, Any],
        heads: Sequence[str],
    ) -> None:
        self.tensors, self.scale = tensors, lora_scale(config)
        suffix = ".lora_A.weight"
        names = [name.removeprefix(PREFIX) for name in tensors[0]]
        self.layers = [name.removesuffix(suffix) for name in names if name.endswith(suffix)]
        self.heads = heads
        self.num_tasks = len(tensors)

    @override
    def factors(self, layer: str) -> tuple[Tensor, Tensor]:
        a, b = (self._stacked(f"{layer}.lora_{factor}.weight") for factor in "AB")
        return a.flatten(2), self.scale * b.flatten(2)

    @override
    def copies(self, head: str) -> dict[str, Tensor]:
        prefix = f"{PREFIX}{head}."
        names = [name.removeprefix(prefix) for name in self.tensors[0] if name.startswith(prefix)]
        return {name: self._stacked(f"{head}.{name}") for name in names if ".lora_" not in name}

    def _stacked(self, name: str) -> Tensor:
        return torch.stack([tensors[PREFIX + name].cpu() for tensors in self.tensors])
