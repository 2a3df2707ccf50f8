"""foretune: retrain foundation models on many tasks so that they adapt better to the next one."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.2.0"

# Type checkers read the same names in __init__.pyi.
_PUBLIC = {
    "Adapted": "foretune.training.outcome",
    "AdapterBank": "foretune.adapters.bank",
    "Auto": "foretune.methods.auto",
    "Average": "foretune.fusion.average",
    "Basis": "foretune.adapters.basis",
    "CausalLM": "foretune.tasks.objectives.causal_lm",
    "Choice": "foretune.tasks.objectives.choice",
    "Classification": "foretune.tasks.objectives.classification",
    "Comparison": "foretune.evaluation.adaptability",
    "Denoising": "foretune.tasks.objectives.denoising",
    "EFT": "foretune.decoding.eft",
    "FDAlign": "foretune.methods.fd_align",
    "FOMAML": "foretune.methods.fomaml",
    "Forecast": "foretune.forecasting.objective",
    "ForecastMAE": "foretune.forecasting.model",
    "ForecastMAEConfig": "foretune.forecasting.config",
    "FactorisedHeads": "foretune.methods.factorised_heads",
    "ForecastPEFT": "foretune.forecasting.forecast_peft",
    "ForetuneError": "foretune.errors",
    "Frequency": "foretune.pruning.frequency",
    "FromBasis": "foretune.methods.basis",
    "Full": "foretune.methods.full",
    "Fused": "foretune.fusion.fused",
    "HCSMoE": "foretune.pruning.hc_smoe",
    "Head": "foretune.methods.head",
    "HeldOut": "foretune.training.held_out",
    "LoRA": "foretune.methods.lora",
    "NoRetraining": "foretune.methods.none",
    "Outcome": "foretune.training.outcome",
    "PEFTML": "foretune.methods.peft_ml",
    "PromptClassification": "foretune.tasks.objectives.prompts",
    "Pruned": "foretune.pruning.pruned",
    "REAP": "foretune.pruning.reap",
    "RTD": "foretune.decoding.rtd",
    "RandomExperts": "foretune.pruning.random_experts",
    "ReferenceStore": "foretune.decoding.reference_store",
    "Preference": "foretune.tasks.objectives.preference",
    "Regression": "foretune.tasks.objectives.regression",
    "Reptile": "foretune.methods.reptile",
    "Run": "foretune.run",
    "SceneReconstruction": "foretune.forecasting.pretraining",
    "SMILE": "foretune.fusion.smile",
    "SaRA": "foretune.methods.sara",
    "Source": "foretune.tasks.sources",
    "Standard": "foretune.methods.standard",
    "SubspaceSFDA": "foretune.source_free.subspace_sfda",
    "TIES": "foretune.fusion.ties",
    "Task": "foretune.tasks.task",
    "TaskArithmetic": "foretune.fusion.task_arithmetic",
    "TaskCollection": "foretune.tasks.task",
    "UNCURL": "foretune.pruning.uncurl",
    "Unlabelled": "foretune.source_free.unlabelled",
    "UserError": "foretune.errors",
    "adapt": "foretune.training.verbs",
    "compare": "foretune.evaluation.adaptability",
    "decode": "foretune.verbs",
    "fit_basis": "foretune.training.fit_basis",
    "fuse": "foretune.verbs",
    "load_fused": "foretune.fusion.fused",
    "load_model": "foretune.models.loading",
    "load_sparse": "foretune.adapters.sparse",
    "load_tasks": "foretune.tasks.sources",
    "prune": "foretune.verbs",
    "retrain": "foretune.training.verbs",
    "save_basis": "foretune.adapters.basis_file",
    "set_basis": "foretune.adapters.basis_file",
    "tuckerize": "foretune.source_free.tucker",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    """Imports a public name on first use, so that importing foretune does nothing.

    Raises:
        AttributeError: There is no such public name.
    """
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'foretune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
