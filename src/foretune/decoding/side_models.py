"""Side models: they run beside a steered model on the same tokens, each with its own KV cache.

A hook after the steered model's forward runs the side models on the same inputs and replaces its
logits by a function of all logits. To `generate` it is one model, so everything works: greedy
decoding, sampling, beams, left-padded batches, assisted decoding.

`generate` owns the KV cache: it crops, reorders and repeats it. A hook before the forward turns the
cache, while it is empty, into one that carries the side models' caches along. A cache that was
filled without them is refused: the side models would see a single token.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, StaticCache

from foretune.errors import UserError
from foretune.models.calls import CACHE_NAMES, cache_among, cache_argument


@dataclass(frozen=True, kw_only=True, eq=False)
class Side:
    """One side model.

    Args:
        model: A causal language model of transformers or peft.
        adapter_off: Run it without its adapter (`PeftModel` only).
        prompt: `input_ids` and `attention_mask`, (rows, tokens), left-padded, that it reads
            instead of the steered model's prompt.
    """

    model: Any
    adapter_off: bool = False
    prompt: Mapping[str, Tensor] | None = None

    @property
    def bare(self) -> Any:
        """The transformers model inside, with its adapters."""
        return bare_model(self.model)

    @property
    def key(self) -> tuple[int, bool, int]:
        """Identifies the side whose tokens a cache holds."""
        return id(self.bare), self.adapter_off, id(self.prompt) if self.prompt else 0


def bare_model(model: Any) -> Any:
    """The model inside a `PeftModel`, whose forward `generate` calls; other models themselves."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@dataclass(eq=False, repr=False)
class SideModels:
    """The hooks on a steered model, and the number of forward calls.

    Args:
        model: The steered model, of transformers.
        sides: Its side models.
        combine: (logits of the model, logits of each side) → logits; each (rows, positions, V)
            with the V of its model, positions aligned.
        prompt_length: Tokens of the steered model's prompt; needed if a side has its own prompt.
        forwards: Forward calls of the steered model so far.
        side_forwards: Forward calls of all side models so far.
    """

    model: Any
    sides: Sequence[Side]
    combine: Callable[[Tensor, list[Tensor]], Tensor]
    prompt_length: int | None = None
    forwards: int = 0
    side_forwards: int = 0
    _busy: bool = False
    _warned: set[Side] = field(default_factory=set)

    def before(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Names all arguments, and makes the cache carry the sides' caches along.

        Raises:
            UserError: The call cannot be steered.
        """
        if self._busy:  # the steered model is a side model too
            return None
        kwargs = _named(self.model, args, kwargs)
        _check_arguments(kwargs)
        use_cache = kwargs.get("use_cache")
        if use_cache is None:
            use_cache = getattr(self.model.config, "use_cache", True)
        caches = [kwargs.pop(name, None) for name in CACHE_NAMES]  # deprecated or not
        cache = next((cache for cache in caches if cache is not None), None)
        if cache is None and use_cache:
            cache = DynamicCache(config=self.model.config)
        if cache is not None:
            carry(cache, [side.key for side in self.sides])
        return (), {**kwargs, str(cache_argument(self.model)): cache}

    def after(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        """Replaces the logits.

        Raises:
            UserError: The model returns a tuple, or a side's cache is out of step.
        """
        if self._busy:
            return None
        if not hasattr(out, "logits"):
            raise UserError("a steered model cannot return a tuple: leave out return_dict=False")
        self.forwards += 1
        num_positions = out.logits.shape[1]
        cache = cache_among(kwargs.values())
        self._busy = True
        try:
            with torch.no_grad():
                logits = [
                    self._run(side, None if cache is None else (cache, i), kwargs, num_positions)
                    for i, side in enumerate(self.sides)
                ]
        finally:
            self._busy = False
        out.logits = self.combine(
            out.logits, [side_logits.to(out.logits.device) for side_logits in logits]
        )
        return out

    def _run(
        self,
        side: Side,
        cached: tuple[Any, int] | None,
        kwargs: dict[str, Any],
        num_positions: int,
    ) -> Tensor:
        """The logits of one side at the last positions, (rows, num_positions, V).

        `cached`: the steered model's cache and the index of the side in it.
        """
        main, cache = (None, None) if cached is None else (cached[0], cached[0].sides[cached[1]])
        ids = kwargs["input_ids"]
        past = 0 if main is None else main.get_seq_length() - ids.shape[1]
        inputs = self._inputs(side, kwargs, past, num_positions)
        _check_length(cache, past, 0 if side.prompt is None else self._offset(side))
        self.side_forwards += 1
        return run_side(side, inputs, cache, num_positions, self._warned)

    def _inputs(
        self, side: Side, kwargs: dict[str, Any], past: int, num_positions: int
    ) -> dict[str, Tensor | None]:
        """Ids, mask and positions for a side; `past` tokens are in the steered model's cache.

        Raises:
            UserError: A side with its own prompt is called with a part of the prompt.
        """
        ids, mask = kwargs["input_ids"], kwargs.get("attention_mask")
        if side.prompt is None:
            positions = kwargs.get("position_ids")
            if positions is None and mask is not None:
                positions = positions_of(mask, ids.shape[1])
            return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        length, rows = self.prompt_length or 0, ids.shape[0]
        if past == 0 and not num_positions - 1 <= ids.shape[1] - length:
            raise UserError(
                "a side model with its own prompt needs the full prompt in one forward call, and "
                "logits after it only: leave out prefill_chunk_size"
            )
        read = {k: v.to(ids.device) for k, v in side.prompt.items()}
        repeats = rows // read["input_ids"].shape[0]  # beams, or several returned sequences
        read = {k: v.repeat_interleave(repeats, 0) for k, v in read.items()}
        if mask is None:
            mask = torch.ones(rows, past + ids.shape[1], dtype=torch.long, device=ids.device)
        if past == 0:
            ids = torch.cat([read["input_ids"], ids[:, length:]], 1)
        mask = torch.cat([read["attention_mask"], mask[:, length:]], 1)
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": positions_of(mask, ids.shape[1]),
        }

    def _offset(self, side: Side) -> int:
        assert side.prompt is not None
        return side.prompt["input_ids"].shape[1] - (self.prompt_length or 0)


def run_side(
    side: Side,
    inputs: Mapping[str, Tensor | None],
    cache: Any,
    num_positions: int,
    warned: set[Side],
) -> Tensor:
    """The logits of one side at the last positions, (rows, num_positions, V).

    Args:
        side: The side model.
        inputs: `input_ids` (rows, new tokens), `attention_mask` (rows, all tokens) and
            `position_ids` (rows, new tokens).
        cache: Its KV cache, which is filled; None for none.
        num_positions: Number of positions whose logits are wanted.
        warned: Sides that have been warned of ids that they do not have; added to.
    """
    takes = inspect.signature(side.bare.forward).parameters
    device = next(side.bare.parameters()).device
    read = {k: v for k, v in inputs.items() if k in takes or k != "position_ids"}
    read["input_ids"] = _readable(side, inputs["input_ids"], warned)
    read = {k: None if v is None else v.to(device) for k, v in read.items()}
    cache_options = {str(cache_argument(side.bare)): cache, "use_cache": cache is not None}
    keep = {"logits_to_keep": num_positions} if "logits_to_keep" in takes else {}
    off = side.model.disable_adapter() if side.adapter_off else contextlib.nullcontext()
    with off:
        out = side.bare(**read, **keep, **cache_options)
    logits: Tensor = out.logits[:, -num_positions:]
    return logits


def _readable(side: Side, ids: Any, warned: set[Side]) -> Any:
    """The ids (rows, tokens), with end-of-text in place of ids that a side does not have."""
    vocabulary = side.bare.get_input_embeddings().weight.shape[0]
    unknown = ids >= vocabulary
    if not bool(unknown.any()):
        return ids
    end = side.bare.config.eos_token_id
    end = end[0] if isinstance(end, list) and end else end
    if side not in warned:
        warned.add(side)
        warnings.warn(
            f"a side model has {vocabulary} tokens and cannot read token "
            f"{int(ids[unknown][0])}: it reads end-of-text instead",
            stacklevel=2,
        )
    return ids.masked_fill(unknown, end if isinstance(end, int) and end < vocabulary else 0)


@contextlib.contextmanager
def run_beside(
    model: Any,
    sides: Sequence[Side],
    combine: Callable[[Tensor, list[Tensor]], Tensor],
    prompt_length: int | None = None,
) -> Iterator[SideModels]:
    """Inside the block the model's logits are `combine(its own logits, logits of the sides)`.

    Args:
        model: A causal language model of transformers or peft; steered in place, and restored
            after the block.
        sides: Side models; the model itself may be among them.
        combine: Computes the new logits; see `SideModels`.
        prompt_length: Tokens of the model's prompt; needed if a side has its own prompt.

    Yields:
        The hooks, which count forward calls.

    Raises:
        UserError: A model is not a decoder, or keeps a recurrent state, which cannot be rolled
            back.
    """
    for decoder in [model, *(side.model for side in sides)]:
        check_decoder(bare_model(decoder))
    target = bare_model(model)
    beside = SideModels(target, sides, combine, prompt_length)
    with evaluating([target, *(side.bare for side in sides)]):
        first = target.register_forward_pre_hook(beside.before, with_kwargs=True)
        second = target.register_forward_hook(beside.after, with_kwargs=True)
        try:
            yield beside
        finally:
            first.remove()
            second.remove()


def check_decoder(model: Any) -> None:
    """Checks that a model is a decoder-only causal language model with a KV cache.

    Raises:
        UserError: It is not; the message names its class.
    """
    name = type(model).__name__
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "generate") or not model.can_generate():
        raise UserError(f"a causal language model is needed, got a {name}")
    if config.is_encoder_decoder:
        raise UserError(f"a decoder-only model is needed, got the encoder-decoder {name}")
    if getattr(model, "_is_stateful", False):  # private: nothing public says it
        raise UserError(f"{name} keeps a recurrent state; a model with a KV cache is needed")
    if cache_argument(model) is None:
        raise UserError(f"{name} takes no KV cache; a model with one is needed")


class _Carrier:
    """A cache that carries the side models' caches, which follow every operation on it."""

    sides: list[Any]
    keys: list[tuple[int, bool, int]]

    def _all(self, what: str, *args: Any) -> None:
        getattr(super(), what)(*args)
        for cache in self.sides:
            getattr(cache, what)(*args)

    def crop(self, tokens_to_remove: int) -> None:
        self._all("crop", tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._all("reorder_cache", beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._all("batch_repeat_interleave", repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._all("batch_select_indices", indices)

    def reset(self) -> None:
        self._all("reset")


def carry(cache: Any, keys: Sequence[tuple[int, bool, int]]) -> None:
    """Makes an empty cache carry the sides' caches, in place; checks a cache that already does.

    In place and by changing its class, so that the user's cache object stays in use, and a deep
    copy of it (a prompt that is computed once) copies the sides' caches too.

    Raises:
        UserError: Not a cache of transformers, a static one, or one that was filled without these
            sides or with others.
    """
    cls = type(cache)
    if not issubclass(cls, Cache):
        raise UserError(f"a cache must be of a Cache class of transformers, got {cls.__name__}")
    if issubclass(cls, StaticCache):
        raise UserError('steering needs a dynamic cache: cache_implementation="dynamic"')
    carries, filled = isinstance(cache, _Carrier), cache.get_seq_length() > 0
    if carries and cache.keys == list(keys):
        return
    if carries and filled:
        raise UserError("this cache was filled with other side models: start with a new one")
    if filled:
        raise UserError(
            "this cache was filled without the side models: start with a new one, or with none"
        )
    if not carries:
        cache.__class__ = type(f"{cls.__name__}WithSides", (_Carrier, cls), {})
    # Without a config every layer keeps all tokens, sliding windows too, and can be cropped.
    cache.sides = [DynamicCache() for _ in keys]
    cache.keys = list(keys)


def _check_length(cache: Any, past: int, offset: int) -> None:
    if cache is None:
        return
    length, expected = cache.get_seq_length(), past + offset if past else 0
    if length != expected:
        raise UserError(
            f"the cache of a side model holds {length} tokens instead of {expected}: it was used "
            "outside of the `steer` block; start with a new one"
        )


def _named(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    names = list(inspect.signature(model.forward).parameters)
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _check_arguments(kwargs: Mapping[str, Any]) -> None:
    if kwargs.get("labels") is not None:
        raise UserError(
            "a steered model computes no loss: leave out labels, and compute it from the logits"
        )
    if kwargs.get("input_ids") is None:
        raise UserError("the side models need tokens: pass input_ids, not inputs_embeds")
    if isinstance(kwargs.get("logits_to_keep"), Tensor):
        raise UserError("logits_to_keep of a steered model must be an integer, got a tensor")
    mask = kwargs.get("attention_mask")
    if mask is not None and getattr(mask, "ndim", 0) != 2:
        raise UserError("the attention_mask of a steered model must have shape (rows, tokens)")


def positions_of(mask: Tensor, last: int) -> Tensor:
    """(rows, last) positions of the last tokens, counted without padding."""
    return (mask.long().cumsum(1) - 1).clamp(min=0)[:, -last:]


@contextlib.contextmanager
def evaluating(models: Sequence[nn.Module]) -> Iterator[None]:
    """Eval mode inside; restores modes and requires_grad (which peft changes) afterwards."""
    modules = {m: m.training for model in models for m in model.modules()}
    trainable = {p: p.requires_grad for model in models for p in model.parameters()}
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        for module, training in modules.items():
            module.training = training
        for parameter, requires_grad in trainable.items():
            parameter.requires_grad_(requires_grad)
