"""The basis of the seen tasks' adapters, from the bank that was trained with the base."""

from __future__ import annotations

from foretune.adapters.bank import AdapterBank
from foretune.adapters.basis import Basis
from foretune.adapters.peft_format import peft_tensors
from foretune.adapters.task_adapters import BankAdapters, SavedAdapters
from foretune.tasks.task import Objective
from foretune.training.process_group import Partition


def basis_of_bank(bank: AdapterBank, partition: Partition, objective: Objective) -> Basis | None:
    """The basis of the adapters of all processes; None where it would be empty.

    Args:
        bank: The adapters of this process.
        partition: Which tasks they belong to.
        objective: The objective that they were trained with.
    """
    labels = objective.common_labels()
    if partition.group.size == 1:
        return Basis.of(BankAdapters(bank), labels=labels)
    local = {bank.keys[slot]: peft_tensors(bank, slot) for slot in range(len(partition.slots))}
    tensors = partition.group.merge(local, partition.data.keys)
    adapters = SavedAdapters(list(tensors.values()), bank.lora or {}, bank.head_names)
    return Basis.of(adapters, labels=labels)
