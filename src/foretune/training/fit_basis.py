"""`fit_basis`: a basis for a base that was not retrained together with adapters."""

from __future__ import annotations

from torch import nn

from foretune.adapters.basis import Basis
from foretune.adapters.task_adapters import SavedAdapters
from foretune.errors import UserError
from foretune.run import Run
from foretune.tasks.task import TaskCollection
from foretune.training.methods import AdaptMethod
from foretune.training.model_copies import copy_to_adapt
from foretune.training.process_group import process_group
from foretune.training.verbs import adapt, objective_of


def fit_basis(
    model: nn.Module, seen: TaskCollection, method: AdaptMethod, run: Run | None = None
) -> Basis:
    """Adapts a base to the seen tasks and takes the basis of the adapters.

    The model is not changed: `set_basis` gives it the result, `save_basis` writes it beside it.

    Args:
        model: A base.
        seen: The seen tasks; their test examples are not used.
        method: How to adapt, by adapters: `foretune.LoRA()` or `foretune.Head()`.
        run: Random seed and budget; None for the defaults of `Run`.

    Raises:
        UserError: The method trains whole models, there are fewer than two tasks, or none of them
            changed anything.
    """
    run = (run or Run()).replace(out=None, overwrite=False, resume=False)
    if not method.shares_base:
        raise UserError(f"{method.name} trains no adapters to make a basis of: use lora or head")
    adapted = adapt(model, seen, method, run, split="validation")
    objective = objective_of(seen).fit(seen).bind(model)
    labels = copy_to_adapt(model, objective, run.seed)[1].common_labels()
    group = process_group()
    tensors = group.merge(adapted.tensors, [(name, 0) for name in seen.names])
    configs = group.gather((adapted.config, adapted.base_fingerprint))
    config, record = next(pair for pair in configs if pair[0])
    adapters = SavedAdapters(list(tensors.values()), config, record["without"])
    basis = Basis.of(adapters, labels=labels)
    if basis is None:
        raise UserError(
            f"the adapters of {len(seen)} tasks make no basis: it needs two that differ, in layers "
            "or in heads with the same labels"
        )
    return basis
