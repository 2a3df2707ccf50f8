"""Last hidden states of a causal language model: reading them, rewriting the output by them.

A hidden state here is what goes into the output embeddings: after the final norm, before the
vocabulary. It is caught by a hook there, so it is the one that the model's own forward call uses,
with a cache, in beam search or with an adapter; what comes out of the whole model (soft caps
included) is rewritten by a second hook.
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

LOGITS = 2**26  # numbers in the logits of one forward call: 256 MB
TOKENS = 4096  # read in one forward call


def output_embeddings(model: Any) -> nn.Module:
    """The layer from the last hidden state to the vocabulary.

    Raises:
        UserError: It is no causal language model of transformers.
    """
    bare = bare_model(model)
    config = getattr(bare, "config", None)
    what = type(bare).__name__
    if config is None or not hasattr(bare, "get_output_embeddings"):
        raise UserError(f"a causal language model of transformers is needed, got {what}")
    head = bare.get_output_embeddings()
    if config.is_encoder_decoder or not bare.can_generate() or not isinstance(head, nn.Module):
        raise UserError(
            f"a decoder with a language model head is needed, got {what}; AutoModelForCausalLM "
            "loads one"
        )
    return head


def read_states(
    model: Any, rows: Sequence[Sequence[int]], places: Sequence[Sequence[int]]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Hidden states and logits at some positions of some texts.

    Texts are padded on the right, which a causal model does not see, so that positions count from
    0 in every family. The vocabulary is computed at `places` alone.

    Args:
        model: A causal language model, of transformers or peft.
        rows: Token ids of every text.
        places: Positions of every text that are wanted.

    Yields:
        (states (S, d), logits (S, V)) of some texts, S of them one after the other.
    """
    head, device = output_embeddings(model), device_of(model)
    wanted: list[Tensor] = []
    caught: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        states = args[0][wanted[0], wanted[1]]
        caught[:] = [states]
        return (states[None], *args[1:])

    handle = head.register_forward_pre_hook(keep)
    try:
        for start, stop in _batches(rows, places, vocabulary=_vocabulary(model)):
            ids, mask = _right_padded(rows[start:stop], device)
            number = [i for i, some in enumerate(places[start:stop]) for _ in some]
            flat = [place for some in places[start:stop] for place in some]
            wanted[:] = [torch.tensor(number, device=device), torch.tensor(flat, device=device)]
            with torch.no_grad():
                logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[0]
            yield caught[0].detach(), logits
    finally:
        handle.remove()


@contextmanager
def rewritten_logits(model: Any, rewrite: Callable[[Tensor, Tensor], Tensor]) -> Iterator[None]:
    """Inside the block the model's logits are `rewrite(logits, states)`, also in `generate`.

    Args:
        model: A causal language model, changed in place and as it was afterwards.
        rewrite: Of logits (rows, positions, V) and the hidden states (rows, positions, d) that
            they were made of.

    Raises:
        UserError: It is no causal language model; on the way, that it was called with labels or
            for a tuple.
    """
    head, bare = output_embeddings(model), bare_model(model)
    # One entry, the states of the forward call that is under way; emptied by the rewriting, so
    # that a PeftModel around the model does not rewrite a second time.
    caught: list[Tensor] = []
    told: list[bool] = [False]

    def catch(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        caught[:], told[0] = [args[0]], True

    def change(module: nn.Module, args: Any, output: Any) -> Any:
        if not hasattr(output, "logits"):
            raise UserError("the model must return its logits by name: leave out return_dict=False")
        if getattr(output, "loss", None) is not None:
            raise UserError(
                "the loss was computed before the logits were rewritten: call the model without "
                "labels, and take the loss of its logits"
            )
        if not told[0]:
            raise UserError(f"{type(bare).__name__} does not call its output embeddings")
        if caught:
            states = caught.pop()
            output.logits = rewrite(output.logits, states[:, -output.logits.shape[1] :])
        return output

    # Some versions of peft call `forward` of the model inside, past its hooks.
    handles = [head.register_forward_pre_hook(catch), bare.register_forward_hook(change)]
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
    """Cuts texts into batches whose tokens and logits have room."""
    start, longest, wanted = 0, 0, 0
    for i, (row, some) in enumerate(zip(rows, places, strict=True)):
        longest, wanted = max(longest, len(row)), wanted + len(some)
        if i > start and (longest * (i + 1 - start) > TOKENS or wanted * vocabulary > LOGITS):
            yield start, i
            start, longest, wanted = i, len(row), len(some)
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
