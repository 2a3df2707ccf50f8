"""`TextLimits`: whether a model can read what the tokenizer makes of the examples."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from foretune.errors import UserError
from foretune.models.capacity import num_embeddings, num_positions
from foretune.tasks.objectives.text import pad_id
from foretune.tasks.task import Objective


@dataclass(frozen=True)
class TextLimits:
    """What a model can read.

    Args:
        model: Name of the model's class.
        positions: Most tokens at once; None for no known limit.
        embeddings: Number of token ids that it has an embedding for; None if unknown.
        encoder_decoder: Whether prompt and completion are read apart.
    """

    model: str
    positions: int | None
    embeddings: int | None
    encoder_decoder: bool

    @classmethod
    def of(cls, model: nn.Module, objective: Objective) -> TextLimits | None:
        """The limits of a model; None for examples that are not text.

        Raises:
            UserError: The model has no embedding for the padding token.
        """
        tokenizer = objective.tokenizer
        if tokenizer is None:
            return None
        embeddings, fill = num_embeddings(model), pad_id(tokenizer)
        name = type(model).__name__
        if embeddings is not None and fill >= embeddings:
            raise UserError(
                f"the tokenizer pads with token id {fill}, but {name} has embeddings for "
                f"{embeddings}: set tokenizer.pad_token = tokenizer.eos_token, which is masked too"
            )
        config = getattr(model, "config", None)
        encoder_decoder = bool(getattr(config, "is_encoder_decoder", False))
        return cls(name, num_positions(model), embeddings, encoder_decoder)

    def texts(self, row: Mapping[str, Any], objective: Objective) -> Iterable[Sequence[int]]:
        """The token ids of each text of an encoded example, as the model reads it at once."""
        return objective.token_ids(row, encoder_decoder=self.encoder_decoder)

    def check(self, row: Mapping[str, Any], objective: Objective, where: str) -> None:
        """Checks the texts of an encoded example.

        Args:
            row: The encoded example.
            objective: The objective that encoded it.
            where: The name of the example.

        Raises:
            UserError: The model cannot read a text.
        """
        for ids in self.texts(row, objective):
            if self.positions is not None and len(ids) > self.positions:
                refusal = too_long(where, len(ids), self.model, self.positions, objective)
                raise refusal
            if self.embeddings is not None and max(ids, default=0) >= self.embeddings:
                token = max(ids)
                named = objective.tokenizer.convert_ids_to_tokens(token)
                raise UserError(
                    f"{where}: token {named!r} has id {token}, but {self.model} has embeddings for "
                    f"{self.embeddings}: use the model's own tokenizer, or resize its embeddings"
                )


def too_long(
    where: str, length: int, model: str, positions: int | None, objective: Objective
) -> UserError:
    """The error for a text that is longer than the model reads.

    Args:
        where: The name of the example.
        length: Its tokens.
        model: Name of the model's class.
        positions: Most tokens that it reads; None if that is unknown.
        objective: The objective, whose settings limit a text.
    """
    fields: Any = dataclasses.fields(objective)  # type: ignore[arg-type]
    limits = [f.name for f in fields if f.name.startswith("max_") and f.name.endswith("tokens")]
    current = " and ".join(f"{name}={getattr(objective, name)}" for name in limits)
    most = "fewer" if positions is None else f"at most {positions} (its positions)"
    fix = f"lower {current}"
    if positions is not None and len(limits) == 1:
        fix = f"set {limits[0]} to {positions} or less (now {getattr(objective, limits[0])})"
    return UserError(f"{where}: a text of {length} tokens, but {model} reads {most}: {fix}")
