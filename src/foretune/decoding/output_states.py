"""Last hidden states of a causal language model: reading them, rewriting logits with them.

The last hidden state is the input of the output embeddings, after the final norm. A hook there
captures it, so it is the state that the model's own forward call uses: with a cache, in beam
search, with an adapter. A second hook rewrites the logits that the model returns (soft caps
included).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from foretune.decoding.generation import device_of
from foretune.decoding.side_models import bare_model
from foretune.errors import UserError

LOGITS = 2**26  # at most so many in one forward call: 256 MB
TOKENS = 4096  # at most so many read in one forward call


def output_embeddings(model: Any) -> nn.Module:
    """The layer from the last hidden state to the vocabulary.

    Raises:
        UserError: The model is not a causal language model of transformers.
    """
    bare = bare_model(model)
    config = getattr(bare, "config", None)
    class_name = type(bare).__name__
    if config is None or not hasattr(bare, "get_output_embeddings"):
        raise UserError(f"a causal language model of transformers is needed, got {class_name}")
    head = bare.get_output_embeddings()
    if config.is_encoder_decoder or not bare.can_generate() or not isinstance(head, nn.Module):
        raise UserError(
            f"a decoder with a language model head is needed, got {class_name}; load one with "
            "AutoModelForCausalLM"
        )
    return head


def read_states(
    model: Any, rows: Sequence[Sequence[int]], places: Sequence[Sequence[int]]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Hidden states and logits at given positions of texts.

    Texts are padded on the right, which a causal model does not attend to, so that positions count
    from 0 in every family. Logits are computed at `places` alone.

    Args:
        model: A causal language model of transformers or peft.
        rows: Token ids of each text.
        places: Positions to read in each text.

    Yields:
        (states (S, d), logits (S, V)) of a batch of texts, with S places in all.
    """
    head, device = output_embeddings(model), device_of(model)
    indices: list[Tensor] = []  # (S,) texts, (S,) positions of the forward call that is under way
    captured: list[Tensor] = []

    def capture(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        states = args[0][indices[0], indices[1]]
        captured[:] = [states]
        return (states[None], *args[1:])

    handle = head.register_forward_pre_hook(capture)
    try:
        for start, stop in _batches(rows, places, vocabulary=_vocabulary(model)):
            ids, mask = _right_padded(rows[start:stop], device)
            texts = [i for i, positions in enumerate(places[start:stop]) for _ in positions]
            flat = [position for positions in places[start:stop] for position in positions]
            indices[:] = [torch.tensor(texts, device=device), torch.tensor(flat, device=device)]
            with torch.no_grad():
                logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[0]
            yield captured[0].detach(), logits
    finally:
        handle.remove()


@contextmanager
def rewritten_logits(model: Any, rewrite: Callable[[Tensor, Tensor], Tensor]) -> Iterator[None]:
    """Inside the block the model's logits are `rewrite(logits, states)`, also in `generate`.

    Args:
        model: A causal language model; changed in place, and restored after the block.
        rewrite: Takes logits (rows, positions, V) and the hidden states (rows, positions, d) that
            they were computed from; returns logits.

    Raises:
        UserError: The model is not a causal language model; inside the block, it is called with
            labels or with return_dict=False.
    """
    head, bare = output_embeddings(model), bare_model(model)
    # One entry, the states of the forward call that is under way; emptied by the rewriting, so
    # that a PeftModel around the model does not rewrite a second time.
    captured: list[Tensor] = []
    head_was_called: list[bool] = [False]

    def capture(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        captured[:], head_was_called[0] = [args[0]], True

    def change(module: nn.Module, args: Any, output: Any) -> Any:
        if not hasattr(output, "logits"):
            raise UserError("logits cannot be rewritten in a tuple: leave out return_dict=False")
        if getattr(output, "loss", None) is not None:
            raise UserError(
                "the model computes its loss before its logits are rewritten: call it without "
                "labels, and compute the loss from its logits"
            )
        if not head_was_called[0]:
            raise UserError(f"{type(bare).__name__} does not call its output embeddings")
        if captured:
            states = captured.pop()
            output.logits = rewrite(output.logits, states[:, -output.logits.shape[1] :])
        return output

    # Some versions of peft call the inner model's `forward` directly, which bypasses its hooks.
    handles = [head.register_forward_pre_hook(capture), bare.register_forward_hook(change)]
    if bare is not model:
        handles.append(model.register_forward_hook(change))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _vocabulary(model: Any) -> int:
    return int(getattr(output_embeddings(model), "out_features", 0) or 1)


def _batches(
    rows: Sequence[Sequence[int]], places: Sequence[Sequence[int]], vocabulary: int
) -> Iterator[tuple[int, int]]:
    """(start, stop) of batches of texts within the limits on tokens and logits."""
    start, longest, num_places = 0, 0, 0
    for i, (row, positions) in enumerate(zip(rows, places, strict=True)):
        longest, num_places = max(longest, len(row)), num_places + len(positions)
        if i > start and (longest * (i + 1 - start) > TOKENS or num_places * vocabulary > LOGITS):
            yield start, i
            start, longest, num_places = i, len(row), len(positions)
    if start < len(rows):
        yield start, len(rows)


def _right_padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    longest = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    return ids.to(device), mask.to(device)
