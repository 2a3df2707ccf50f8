"""Makes the towers known to transformers, so that a folder loads without code that lies in it."""

from __future__ import annotations

from typing import Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
)

from foretune.models.tower import (
    ArrayTowerConfig,
    DualTower,
    DualTowerConfig,
    TowerConfig,
    TowerForArrays,
    TowerForSequenceClassification,
)

TOWERS: dict[str, Any] = {
    model.__name__: model for model in (TowerForSequenceClassification, DualTower, TowerForArrays)
}
"""Name in a config's `architectures` → class."""

_CONFIGS = (TowerConfig, DualTowerConfig, ArrayTowerConfig)
TOWER_TYPES = tuple(config.model_type for config in _CONFIGS)
for _config in _CONFIGS:
    AutoConfig.register(_config.model_type, _config)
AutoModelForSequenceClassification.register(TowerConfig, TowerForSequenceClassification)
AutoModel.register(DualTowerConfig, DualTower)
AutoModel.register(ArrayTowerConfig, TowerForArrays)
AutoModelForImageClassification.register(ArrayTowerConfig, TowerForArrays)  # of arrays of any kind
