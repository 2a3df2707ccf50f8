"""foretune: retrain foundation models on many tasks so that they adapt better to the next one."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "Adapted": "foretune.training.outcome",
    "AdapterBank": "foretune.adapters.bank",
    "Auto": "foretune.methods.auto",
    "Average": "foretune.methods.average",
    "CausalLM": "foretune.tasks.objectives",
    "Choice": "foretune.tasks.objectives",
    "Classification": "foretune.tasks.objectives",
    "Comparison": "foretune.evaluation.adaptability",
    "Denoising": "foretune.tasks.objectives",
    "EFT": "foretune.methods.eft",
    "FDAlign": "foretune.methods.fd_align",
    "FOMAML": "foretune.methods.fomaml",
    "Forecast": "foretune.tasks.objectives",
    "ForecastMAE": "foretune.models.forecast_mae",
    "ForecastMAEConfig": "foretune.models.forecast_config",
    "ForecastPEFT": "foretune.methods.forecast_peft",
    "ForetuneError": "foretune.errors",
    "Frequency": "foretune.methods.frequency",
    "Full": "foretune.methods.full",
    "Fused": "foretune.models.fused",
    "HCSMoE": "foretune.methods.hc_smoe",
    "Head": "foretune.methods.head",
    "LoRA": "foretune.methods.lora",
    "NoRetraining": "foretune.methods.none",
    "Outcome": "foretune.training.outcome",
    "PEFTML": "foretune.methods.peft_ml",
    "PromptClassification": "foretune.tasks.objectives",
    "Pruned": "foretune.training.pruning",
    "REAP": "foretune.methods.reap",
    "RTD": "foretune.methods.rtd",
    "RandomExperts": "foretune.methods.random_experts",
    "ReferenceStore": "foretune.adapters.reference_store",
    "Regression": "foretune.tasks.objectives",
    "Reptile": "foretune.methods.reptile",
    "Run": "foretune.run",
    "SceneReconstruction": "foretune.tasks.objectives",
    "SMILE": "foretune.methods.smile",
    "SaRA": "foretune.methods.sara",
    "Source": "foretune.tasks.sources",
    "Standard": "foretune.methods.standard",
    "SubspaceSFDA": "foretune.methods.subspace_sfda",
    "TIES": "foretune.methods.ties",
    "Task": "foretune.tasks.task",
    "TaskArithmetic": "foretune.methods.task_arithmetic",
    "TaskCollection": "foretune.tasks.task",
    "UNCURL": "foretune.methods.uncurl",
    "Unlabelled": "foretune.tasks.objectives.unlabelled",
    "UserError": "foretune.errors",
    "adapt": "foretune.training.verbs",
    "compare": "foretune.evaluation.adaptability",
    "decode": "foretune.verbs",
    "fuse": "foretune.verbs",
    "load_fused": "foretune.models.fused",
    "load_model": "foretune.models.loading",
    "load_sparse": "foretune.adapters.sparse",
    "load_tasks": "foretune.tasks.sources",
    "prune": "foretune.verbs",
    "retrain": "foretune.training.verbs",
    "tuckerize": "foretune.models.tucker",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    """Fetches a public name from its room on first use, so that importing foretune does nothing."""
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'foretune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
