"""Models that run beside another one: on the same tokens, each with its own KV cache.

A hook after the model's forward runs the side models on what it was given and replaces its logits
by a function of all of them. Everything that `generate` does then works, because it sees one model:
greedy, sampling, beams, left-padded batches, assisted decoding.

`generate` owns the KV cache, and rolls it back, reorders and repeats it. A hook before the forward
turns the cache, while it is empty, into one that takes the caches of the side models along. A cache
that was filled without them is refused: the side models would see one token only.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, StaticCache

from foretune.errors import UserError
from foretune.models.calls import CACHE_NAMES, cache_among, cache_argument


@dataclass(frozen=True, kw_only=True, eq=False)
class Side:
    """One model beside the steered one.

    Args:
        model: A causal language model of transformers or peft.
        adapter_off: Run it without its adapter (a `PeftModel` only).
        prompt: `input_ids` and `attention_mask` that it reads in place of the prompt; (rows,
            tokens), padded on the left.
    """

    model: Any
    adapter_off: bool = False
    prompt: Mapping[str, Tensor] | None = None

    @property
    def bare(self) -> Any:
        """The model of transformers inside, adapters included."""
        return bare_model(self.model)

    @property
    def key(self) -> tuple[int, bool, int]:
        """What a cache of this side belongs to."""
        return id(self.bare), self.adapter_off, id(self.prompt) if self.prompt else 0


def bare_model(model: Any) -> Any:
    """The model in a `PeftModel`: `generate` calls its forward, not the wrapper's."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@dataclass(eq=False, repr=False)
class SideModels:
    """What the hooks do and count.

    Args:
        model: The steered model of transformers.
        sides: The models beside it.
        combine: (logits of the model, logits of each side) → logits; all (rows, positions,
            vocabulary of its own), positions aligned.
        prompt_length: Tokens of the steered model's prompt; where a side has a prompt of its own.
        forwards: Forward calls of the steered model so far, and
        side_forwards: of all side models.
    """

    model: Any
    sides: Sequence[Side]
    combine: Callable[[Tensor, list[Tensor]], Tensor]
    prompt_length: int | None = None
    forwards: int = 0
    side_forwards: int = 0
    _busy: bool = False
    _warned: bool = False

    def before(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Names all arguments, and makes the cache one that takes the sides' caches along."""
        if self._busy:  # the steered model is a side model too
            return None
        kwargs = _named(self.model, args, kwargs)
        _refuse_what_cannot_be(kwargs)
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
        """Replaces the logits."""
        if self._busy:
            return None
        if not hasattr(out, "logits"):
            raise UserError("a steered model returns its logits by name: leave return_dict alone")
        self.forwards += 1
        kept = out.logits.shape[1]
        cache = cache_among(kwargs.values())
        self._busy = True
        try:
            with torch.no_grad():
                logits = [
                    self._run(side, None if cache is None else (cache, i), kwargs, kept)
                    for i, side in enumerate(self.sides)
                ]
        finally:
            self._busy = False
        out.logits = self.combine(out.logits, [one.to(out.logits.device) for one in logits])
        return out

    def _run(
        self, side: Side, cached: tuple[Any, int] | None, kwargs: dict[str, Any], kept: int
    ) -> Tensor:
        """The logits of one side at the last `kept` positions."""
        main, own = (None, None) if cached is None else (cached[0], cached[0].sides[cached[1]])
        ids = kwargs["input_ids"]
        past = 0 if main is None else main.get_seq_length() - ids.shape[1]
        inputs = self._inputs(side, kwargs, past, kept)
        _check_length(own, past, 0 if side.prompt is None else self._offset(side))
        takes = inspect.signature(side.bare.forward).parameters
        inputs["input_ids"] = self._known(side, inputs["input_ids"])
        device = next(side.bare.parameters()).device
        inputs = {
            k: None if v is None else v.to(device)
            for k, v in inputs.items()
            if k in takes or k != "position_ids"
        }
        cache = {str(cache_argument(side.bare)): own, "use_cache": own is not None}
        keep = {"logits_to_keep": kept} if "logits_to_keep" in takes else {}
        self.side_forwards += 1
        off = side.model.disable_adapter() if side.adapter_off else contextlib.nullcontext()
        with off:
            out = side.bare(**inputs, **keep, **cache)
        return out.logits[:, -kept:]

    def _inputs(
        self, side: Side, kwargs: dict[str, Any], past: int, kept: int
    ) -> dict[str, Tensor | None]:
        """Ids, mask and positions for a side; `past` tokens of the steered model lie behind."""
        ids, mask = kwargs["input_ids"], kwargs.get("attention_mask")
        if side.prompt is None:
            positions = kwargs.get("position_ids")
            if positions is None and mask is not None:
                positions = _positions(mask, ids.shape[1])
            return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        length, rows = self.prompt_length or 0, ids.shape[0]
        if past == 0 and not kept - 1 <= ids.shape[1] - length:
            raise UserError(
                "a side model with a prompt of its own needs the whole prompt in one forward and "
                "the logits behind it only: leave prefill_chunk_size alone"
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
            "position_ids": _positions(mask, ids.shape[1]),
        }

    def _offset(self, side: Side) -> int:
        assert side.prompt is not None
        return side.prompt["input_ids"].shape[1] - (self.prompt_length or 0)

    def _known(self, side: Side, ids: Any) -> Any:
        """Ids that a side lacks become its end-of-text: it cannot read them."""
        known = side.bare.get_input_embeddings().weight.shape[0]
        unknown = ids >= known
        if not bool(unknown.any()):
            return ids
        end = side.bare.config.eos_token_id
        end = end[0] if isinstance(end, list) and end else end
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"a side model has {known} tokens and cannot read token "
                f"{int(ids[unknown][0])}: it reads its end-of-text there",
                stacklevel=2,
            )
        return ids.masked_fill(unknown, end if isinstance(end, int) and end < known else 0)


@contextlib.contextmanager
def run_beside(
    model: Any,
    sides: Sequence[Side],
    combine: Callable[[Tensor, list[Tensor]], Tensor],
    prompt_length: int | None = None,
) -> Iterator[SideModels]:
    """Inside the block the model's logits are `combine(its own, those of the sides)`.

    Args:
        model: A causal language model of transformers or peft; steered in place, and as it was
            after the block.
        sides: What runs beside it; the model itself may be among them.
        combine: As of `SideModels`.
        prompt_length: Tokens of its prompt, where a side has a prompt of its own.

    Yields:
        The side models, which count forward calls.

    Raises:
        UserError: A model that is no decoder, or keeps its state where it cannot be rolled back.
    """
    for one in [model, *(side.model for side in sides)]:
        check_decoder(bare_model(one))
    target = bare_model(model)
    beside = SideModels(target, sides, combine, prompt_length)
    with _as_it_was([target, *(side.bare for side in sides)]):
        first = target.register_forward_pre_hook(beside.before, with_kwargs=True)
        second = target.register_forward_hook(beside.after, with_kwargs=True)
        try:
            yield beside
        finally:
            first.remove()
            second.remove()


def check_decoder(model: Any) -> None:
    """Refuses what is no decoder-only causal language model with a KV cache.

    Raises:
        UserError: Says which class was got.
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
    """A cache with the caches of the side models, which follow all that is done to it."""

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
    """Makes an empty cache take the sides' caches along, in place; checks one that does already.

    In place and by its class, so that the user's own cache object stays the one that is used, and
    a deep copy of it (a prompt that is computed once) copies the sides' caches too.

    Raises:
        UserError: No cache of transformers, a static one, one filled without these sides, or one
            of other sides.
    """
    cls = type(cache)
    if not issubclass(cls, Cache):
        raise UserError(f"a cache is one of transformers' Cache classes, got {cls.__name__}")
    if issubclass(cls, StaticCache):
        raise UserError('steering needs a dynamic cache: cache_implementation="dynamic"')
    carries, filled = isinstance(cache, _Carrier), cache.get_seq_length() > 0
    if carries and cache.keys == list(keys):
        return
    if carries and filled:
        raise UserError("this cache was filled beside other models: begin with a fresh one")
    if filled:
        raise UserError(
            "this cache was filled without the side models: begin with a fresh one, or with none"
        )
    if not carries:
        cache.__class__ = type(f"{cls.__name__}WithSides", (_Carrier, cls), {})
    # Without a config every layer keeps all tokens, also of sliding windows, and can be cropped.
    cache.sides = [DynamicCache() for _ in keys]
    cache.keys = list(keys)


def _check_length(cache: Any, past: int, offset: int) -> None:
    if cache is None:
        return
    have, need = cache.get_seq_length(), past + offset if past else 0
    if have != need:
        raise UserError(
            f"the cache of a side model holds {have} tokens where {need} are behind: it was used "
            "outside of the block that steers; begin with a fresh one"
        )


def _named(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    names = list(inspect.signature(model.forward).parameters)
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _refuse_what_cannot_be(kwargs: Mapping[str, Any]) -> None:
    if kwargs.get("labels") is not None:
        raise UserError("a steered model has no loss: leave labels away and use its logits")
    if kwargs.get("input_ids") is None:
        raise UserError("the side models read tokens: give input_ids, not inputs_embeds")
    if isinstance(kwargs.get("logits_to_keep"), Tensor):
        raise UserError("a steered model takes a number as logits_to_keep, got a tensor")
    mask = kwargs.get("attention_mask")
    if mask is not None and getattr(mask, "ndim", 0) != 2:
        raise UserError("a steered model takes an attention_mask of shape (rows, tokens)")


def _positions(mask: Tensor, last: int) -> Tensor:
    """Positions of the last tokens, counted without padding."""
    return (mask.long().cumsum(1) - 1).clamp(min=0)[:, -last:]


@contextlib.contextmanager
def _as_it_was(models: Sequence[nn.Module]) -> Iterator[None]:
    """Eval mode inside; afterwards the modes and what may train (peft switches it) as before."""
    modules = {m: m.training for model in models for m in model.modules()}
    wanted = {p: p.requires_grad for model in models for p in model.parameters()}
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        for module, training in modules.items():
            module.training = training
        for parameter, requires_grad in wanted.items():
            parameter.requires_grad_(requires_grad)
