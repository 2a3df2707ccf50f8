"""Small networks ("towers") on the embeddings of a frozen encoder, or on arrays.

This file is copied into the folder of each model that is saved, so that transformers loads it
without foretune (`trust_remote_code=True`): it imports nothing else than torch and transformers.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling, SequenceClassifierOutput


class TowerConfig(PreTrainedConfig):
    """Sizes of a tower on the embeddings of texts.

    Args:
        encoder: The fields of the frozen encoder's config, with its `model_type`.
        widths: Widths of the hidden layers.
        **fields: Fields of every config, such as `num_labels`.
    """

    model_type = "foretune_tower"

    def __init__(
        self, encoder: dict[str, Any] | None = None, widths: Sequence[int] = (), **fields: Any
    ) -> None:
        self.encoder = encoder
        self.widths = list(widths)
        super().__init__(**fields)


class DualTowerConfig(TowerConfig):
    """Sizes of two towers, for contexts and for responses, on the embeddings of one encoder."""

    model_type = "foretune_dual_tower"


class ArrayTowerConfig(PreTrainedConfig):
    """Sizes of a tower on arrays.

    Args:
        input_size: Numbers in an array.
        widths: Widths of the hidden layers.
        **fields: Fields of every config, such as `num_labels`.
    """

    model_type = "foretune_array_tower"

    def __init__(self, input_size: int = 1, widths: Sequence[int] = (), **fields: Any) -> None:
        self.input_size = input_size
        self.widths = list(widths)
        super().__init__(**fields)


class Shared(dict[str, Any]):
    """What was computed from the frozen encoder; all copies of a model have the same object."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Shared:
        return self


class _Tower(PreTrainedModel):
    """What all towers have in common: copies share the encoder's weights, layers start as torch's.

    A subclass with an encoder is a `TextTower`.
    """

    def _init_weights(self, module: nn.Module) -> None:
        if getattr(module, "starts_at_zero", False):
            for parameter in module.parameters():
                nn.init.zeros_(parameter)
        elif isinstance(module, nn.Linear):
            module.reset_parameters()


class TextTower(_Tower):
    """A tower with a frozen encoder, which is always in eval mode and gets no gradient."""

    def __init__(self, config: TowerConfig, encoder: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        if encoder is None:
            fields = dict(config.encoder or {})
            encoder = AutoModel.from_config(
                AutoConfig.for_model(fields.pop("model_type"), **fields)
            )
        self.encoder: Any = encoder.eval().requires_grad_(False)
        self.shared = Shared()

    def embed(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any
    ) -> Tensor:
        """(n, d) the mean over each text's tokens of the encoder's last hidden states.

        Args:
            input_ids: (n, L) token ids.
            attention_mask: (n, L), 1 at tokens, 0 at padding; None for no padding.
            **inputs: Other arguments of the encoder, such as `token_type_ids`.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        with torch.no_grad():
            output = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **inputs)
        hidden = output.last_hidden_state
        weights = attention_mask.to(hidden.dtype).unsqueeze(-1)
        embeddings: Tensor = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)
        return embeddings

    def train(self, mode: bool = True) -> Any:
        """Sets the mode of all but the encoder, whose dropout stays off."""
        super().train(mode)
        self.encoder.eval()
        return self

    def get_input_embeddings(self) -> nn.Module:
        """The encoder's table of token embeddings."""
        table: nn.Module = self.encoder.get_input_embeddings()
        return table

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        for parameter in self.encoder.parameters():
            memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
        for buffer in self.encoder.buffers():
            memo[id(buffer)] = buffer.detach()
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(self.__dict__, memo))
        return copied


class TowerModel(TextTower):
    """The tower below a head: (n, d) embeddings of texts → (n, last width)."""

    config_class = TowerConfig

    def __init__(self, config: TowerConfig, encoder: PreTrainedModel | None = None) -> None:
        super().__init__(config, encoder)
        self.layers = hidden_layers(self.encoder.config.hidden_size, config.widths)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        embeddings: Tensor | None = None,
        **inputs: Any,
    ) -> Tensor:
        """(n, last width) of texts, or of their (n, d) embeddings."""
        if embeddings is None:
            assert input_ids is not None
            embeddings = self.embed(input_ids, attention_mask, **inputs)
        hidden: Tensor = self.layers(embeddings)
        return hidden


class TowerForSequenceClassification(_Tower):
    """A tower on the embeddings of texts, with a linear head."""

    config_class = TowerConfig
    base_model_prefix = "body"

    def __init__(self, config: TowerConfig, encoder: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.body = TowerModel(config, encoder)
        self.classifier = nn.Linear(config.widths[-1], config.num_labels or 0)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        embeddings: Tensor | None = None,
        labels: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        **_: Any,
    ) -> SequenceClassifierOutput:
        """(n, num_labels) logits of texts, or of their (n, d) embeddings.

        Args:
            input_ids: (n, L) token ids.
            attention_mask: (n, L), 1 at tokens, 0 at padding.
            embeddings: (n, d) what `embed` returns for the texts, instead of their ids.
            labels: (n,) the right labels; with them there is a loss, the mean cross-entropy.
            token_type_ids: (n, L) segments of pairs of texts, for encoders that know them.
            **_: Options of other models, such as `return_dict`; ignored.
        """
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        logits = self.classifier(self.body(input_ids, attention_mask, embeddings, **types))
        return SequenceClassifierOutput(loss=_loss(logits, labels), logits=logits)


class DualTower(TextTower):
    """Two towers on the embeddings of texts: one for contexts, one for responses.

    A tower is the embedding plus what its residual layers add. The layers add nothing at first, so
    a new model is its encoder.
    """

    config_class = DualTowerConfig

    def __init__(self, config: DualTowerConfig, encoder: PreTrainedModel | None = None) -> None:
        super().__init__(config, encoder)
        size = self.encoder.config.hidden_size
        sides = ("context", "response")
        layers = {side: [ResidualLayer(size, width) for width in config.widths] for side in sides}
        self.towers = nn.ModuleDict({side: nn.Sequential(*layers[side]) for side in sides})
        self.post_init()

    def get_context_features(self, embeddings: Tensor) -> Tensor:
        """(n, d) the features of contexts, from their (n, d) embeddings."""
        features: Tensor = self.towers["context"](embeddings)
        return features

    def get_response_features(self, embeddings: Tensor) -> Tensor:
        """(n, d) the features of responses, from their (n, d) embeddings."""
        features: Tensor = self.towers["response"](embeddings)
        return features

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        side: str = "context",
        token_type_ids: Tensor | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPooling:
        """The features of texts, (n, d), as `pooler_output`.

        Args:
            input_ids: (n, L) token ids.
            attention_mask: (n, L), 1 at tokens, 0 at padding.
            side: What the texts are: "context" or "response".
            token_type_ids: (n, L) segments, for encoders that know them.
            **_: Options of other models, such as `return_dict`; ignored.
        """
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        embeddings = self.embed(input_ids, attention_mask, **types)
        return BaseModelOutputWithPooling(pooler_output=self.towers[side](embeddings))


class TowerForArrays(_Tower):
    """A tower on arrays, each flattened, with a linear head."""

    config_class = ArrayTowerConfig

    def __init__(self, config: ArrayTowerConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.layers = hidden_layers(config.input_size, config.widths)
        self.classifier = nn.Linear(config.widths[-1], config.num_labels or 0)
        self.post_init()

    def forward(
        self, x: Tensor, labels: Tensor | None = None, **_: Any
    ) -> SequenceClassifierOutput:
        """(n, num_labels) logits of (n, …) arrays.

        Args:
            x: The arrays.
            labels: (n,) the right labels; with them there is a loss, the mean cross-entropy.
            **_: Options of other models, such as `return_dict`; ignored.
        """
        logits = self.classifier(self.layers(x.flatten(1)))
        return SequenceClassifierOutput(loss=_loss(logits, labels), logits=logits)


class ResidualLayer(nn.Module):
    """x + a network with one hidden layer."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(size, width)
        self.out = nn.Linear(width, size)
        self.out.starts_at_zero = True  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        """(n, size) → (n, size)."""
        y: Tensor = x + self.out(nn.functional.gelu(self.hidden(x)))
        return y


def hidden_layers(size: int, widths: Sequence[int]) -> nn.Sequential:
    """Linear layers of these widths, each followed by GELU."""
    sizes = [size, *widths]
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.GELU()]
    return nn.Sequential(*layers)


def _loss(logits: Tensor, labels: Tensor | None) -> Tensor | None:
    return None if labels is None else nn.functional.cross_entropy(logits, labels)


TowerConfig.register_for_auto_class()
DualTowerConfig.register_for_auto_class()
ArrayTowerConfig.register_for_auto_class()
TowerForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
DualTower.register_for_auto_class("AutoModel")
TowerForArrays.register_for_auto_class("AutoModel")
