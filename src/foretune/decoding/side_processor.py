"""Side models in a `LogitsProcessor`: for a list of processors that `generate` is given.

A processor sees the ids so far and the model's scores, but neither its cache nor its attention
mask. So each side has a cache of its own, with the ids that it was read for. The next call takes
from it, for each row, the row with the longest common prefix, drops what lies behind that prefix
and reads the rest: one token after greedy decoding, sampling or a step of beams, whose rows have
changed places; a few tokens back and forth when drafts are checked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor

from foretune.decoding.side_models import (
    Side,
    bare_model,
    check_decoder,
    evaluating,
    positions_of,
    run_side,
)
from foretune.errors import UserError

PADDING = -1  # in place of the id of padding


class SideProcessor(LogitsProcessor):
    """Replaces scores by a function of them and of the side models' logits.

    Args:
        sides: The side models.
        combine: (scores (rows, 1, V), logits of each side (rows, 1, V_k)) → log-probabilities
            (rows, 1, V), normalised: beam search adds them up.
        attention_mask: (prompts, tokens) of the prompts, 0 at padding on the left; None where no
            prompt is padded.

    Raises:
        UserError: A side is no decoder, or the mask does not have two dimensions.
    """

    def __init__(
        self,
        sides: Sequence[Side],
        combine: Callable[[Tensor, list[Tensor]], Tensor],
        attention_mask: Tensor | None,
    ) -> None:
        for side in sides:
            check_decoder(bare_model(side.model))
        if attention_mask is not None and attention_mask.ndim != 2:
            raise UserError(
                "attention_mask must have shape (prompts, tokens), got "
                f"{tuple(attention_mask.shape)}"
            )
        self.sides, self.combine, self.attention_mask = list(sides), combine, attention_mask
        self.side_forwards = 0  # forward calls of all side models so far
        self._caches: list[DynamicCache] = []
        self._read: Tensor | None = None  # (rows, tokens) what the caches hold
        self._warned: set[Side] = set()

    @torch.no_grad()
    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """The log-probabilities of the next token, (rows, V), float32.

        Args:
            input_ids: (rows, tokens) ids so far, with the prompt.
            scores: (rows, V) logits or log-probabilities of the model.

        Raises:
            UserError: The ids are not continuations of the prompts that the mask is of.
        """
        mask = self._mask(input_ids)
        start = self._keep(input_ids.masked_fill(mask == 0, PADDING))
        positions = positions_of(mask, input_ids.shape[1] - start)
        logits = []
        with evaluating([side.bare for side in self.sides]):
            for side, cache in zip(self.sides, self._caches, strict=True):
                inputs = {
                    "input_ids": input_ids[:, start:],
                    "attention_mask": mask,
                    "position_ids": positions,
                }
                self.side_forwards += 1
                logits.append(run_side(side, inputs, cache, 1, self._warned).to(scores.device))
        return self.combine(scores[:, None], logits)[:, 0]  # type: ignore[return-value]

    def _mask(self, ids: Tensor) -> Tensor:
        """(rows, tokens) 0 at padding.

        Raises:
            UserError: The ids are not continuations of the prompts that the mask is of.
        """
        if self.attention_mask is None:
            return torch.ones_like(ids)
        prompts, length = self.attention_mask.shape
        if len(ids) % prompts or ids.shape[1] < length:
            raise UserError(
                f"the attention_mask is of {prompts} prompts of {length} tokens, but generate "
                f"passes ids of shape {tuple(ids.shape)}: a batch of prompts needs a processor "
                "of its own"
            )
        # Beams, or several returned sequences of a prompt, stand next to one another.
        mask = self.attention_mask.to(ids).repeat_interleave(len(ids) // prompts, 0)
        return torch.cat([mask, torch.ones_like(ids[:, length:])], 1)

    def _keep(self, ids: Tensor) -> int:
        """Reduces the caches to what they share with `ids`, (rows, tokens).

        Returns:
            Number of tokens that need not be read again; at least one is always read.
        """
        before, self._read = self._read, ids
        if before is not None:
            common, rows = _longest_prefixes(ids, before)
            shared = min(common, ids.shape[1] - 1)
            if shared:
                for cache in self._caches:
                    cache.crop(shared - before.shape[1])
                    if rows is not None:
                        cache.batch_select_indices(rows)
                return shared
        # Without a config every layer keeps all tokens, sliding windows too, and can be cropped.
        self._caches = [DynamicCache() for _ in self.sides]
        return 0


def _longest_prefixes(ids: Tensor, before: Tensor) -> tuple[int, Tensor | None]:
    """The rows of `before` that begin most like each row of `ids`.

    Returns:
        (length of the prefix that all rows have in common with theirs, (rows,) index of theirs;
        None if each has the one at its own place).
    """
    width = min(before.shape[1], ids.shape[1])
    ids, before = ids[:, :width], before[:, :width]
    if torch.equal(ids, before):
        return width, None
    lengths = (ids[:, None] == before[None]).long().cumprod(-1).sum(-1)  # (rows, rows before)
    longest, rows = lengths.max(1)
    if len(ids) == len(before) and torch.equal(lengths.diagonal(), longest):
        return int(longest.min()), None
    return int(longest.min()), rows
