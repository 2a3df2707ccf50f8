"""EFT: a large model steered at decoding by what fine-tuning changed in a small one.

Paper: Mitchell et al., "An Emulator for Fine-Tuning Large Language Models using Small Language
Models", ICLR 2024, arXiv:2310.12962.

Fine-tuning maximises a reward r under a penalty on KL(p || p_ref), whose solution is
p ∝ p_ref exp(r / beta). So a fine-tuned model at scale M has the implicit reward
log p_ft^M − log p_ref^M, and any model at scale N can be given it:

    log p(y_t | x, y_<t) = log p_ref^N + beta Σ_k w_k (log p_ft_k^M − log p_ref^M) − log Z_t

    symbol     here      shape                      meaning
    p_ref^N    base      (rows, positions, V)       the model that is steered
    p_ft_k^M   tuned     the same, V of its own     fine-tuned side models
    p_ref^M    untuned   the same, V of its own     what these were tuned from
    beta       beta      ()                         strength; 1 is the paper's
    w_k        weights   (number of tuned,)         of the tuned models

N large, M small is up-scaling; N small, M large is down-scaling.

Deviations:
    - V may differ: the difference is taken over the ids that all side models and the base share,
      each side's law renormalised on them; it is 0 elsewhere
    - `delta_clip` and `uncap` are not in the paper
Silent in the paper:
    - the normaliser belongs to whole sequences; as the authors do, each token has its own
    - laws are those that the models give, with a soft cap on logits where a model has one
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from foretune.errors import UserError
from foretune.method import Method
from foretune.run import check_positive

if TYPE_CHECKING:
    from torch import Tensor

    from foretune.decoding.generation import Generated
    from foretune.decoding.side_models import SideModels

PAPER = {
    "title": "An Emulator for Fine-Tuning Large Language Models using Small Language Models",
    "authors": "Eric Mitchell and Rafael Rafailov and Archit Sharma and Chelsea Finn and "
    "Christopher D. Manning",
    "year": 2024,
    "venue": "ICLR",
    "arxiv": "2310.12962",
}
UNSEEN = 1e-6  # a token below this probability was never learned by the untuned model


@dataclass(frozen=True, kw_only=True)
class EFT(Method):
    """A large model decodes with what fine-tuning changed in a small one.

    Args:
        beta: Times the difference of the side models; 0 is the model alone, 1 the paper's.
            Negative turns the fine-tuning around.
        weights: One for each tuned model; None for equal ones that sum to 1.
        top_p: The difference counts only for the model's most probable tokens, up to this share
            of probability; 1 for all tokens. (Not the sampler's top-p.)
        delta_clip: Bound on the size of the difference, in nats; None for none.
        uncap: Take the difference of the side models before the soft cap that some models put on
            their logits (Gemma 2).
    """

    beta: float = 1.0
    weights: tuple[float, ...] | None = None
    top_p: float = 1.0
    delta_clip: float | None = None
    uncap: bool = False

    name: ClassVar[str] = "eft"
    label: ClassVar[str] = "EFT"
    verb: ClassVar[str] = "decode"
    paper: ClassVar[dict[str, Any] | None] = PAPER
    resources: ClassVar[tuple[str, ...]] = ("tuned", "untuned")

    def __post_init__(self) -> None:
        _finite("beta", self.beta)
        if self.weights is not None:
            if not isinstance(self.weights, list | tuple) or not self.weights:
                raise UserError(f"weights must be a list of numbers, got {self.weights!r}")
            for weight in self.weights:
                _finite("each of weights", weight)
            object.__setattr__(self, "weights", tuple(self.weights))
        check_positive("top_p", self.top_p)
        if self.top_p > 1:
            raise UserError(f"top_p must be a number above 0 and at most 1, got {self.top_p!r}")
        if self.delta_clip is not None:
            check_positive("delta_clip", self.delta_clip)
        if not isinstance(self.uncap, bool):
            raise UserError(f"uncap must be true or false, got {self.uncap!r}")

    def combine(
        self,
        base: Tensor,
        tuned: Sequence[Tensor],
        untuned: Sequence[Tensor],
        shared: Tensor | None = None,
    ) -> Tensor:
        """The log-probabilities of the steered model.

        Args:
            base: Logits of the model, (..., V).
            tuned: Logits of each tuned model, (..., V of its own).
            untuned: Of what each was tuned from; one for all, or one for each.
            shared: (ids,) bool: which ids mean the same token everywhere; None for all.

        Returns:
            float32, (..., V), normalised.
        """
        import torch

        log_p = torch.log_softmax(base.float(), -1)
        delta = self.delta(tuned, untuned, log_p.shape[-1])
        if self.delta_clip is not None:
            delta = delta.clamp(-self.delta_clip, self.delta_clip)
        width = delta.shape[-1]
        if shared is not None:
            known = torch.zeros(width, dtype=torch.bool, device=delta.device)
            known[: len(shared)] = shared[:width].to(delta.device)
            delta = delta.where(known, 0.0)
        if self.top_p < 1:
            delta = delta.where(in_nucleus(log_p, self.top_p)[..., :width], 0.0)
        steered = log_p.clone()
        steered[..., :width] += self.beta * delta
        return torch.log_softmax(steered, -1)

    def delta(self, tuned: Sequence[Tensor], untuned: Sequence[Tensor], width: int) -> Tensor:
        """Σ_k w_k (log p_ft_k − log p_ref), the implicit reward, on the ids that all have."""
        import torch

        width = min(width, *(one.shape[-1] for one in (*tuned, *untuned)))
        refs = [torch.log_softmax(one[..., :width].float(), -1) for one in untuned]
        total = torch.zeros_like(refs[0])
        for k, (weight, one) in enumerate(zip(self._weights(len(tuned)), tuned, strict=True)):
            log_p = torch.log_softmax(one[..., :width].float(), -1)
            ref = refs[k if len(refs) > 1 else 0]
            # A token that both forbid (−inf) has no difference.
            total = total + weight * torch.where(log_p == ref, 0.0, log_p - ref)
        return total

    @contextmanager
    def steer(
        self,
        model: Any,
        *,
        tuned: Any,
        untuned: Any = None,
        shared: Tensor | None = None,
        prompts: Mapping[str, Mapping[str, Tensor]] | None = None,
        prompt_length: int | None = None,
    ) -> Iterator[SideModels]:
        """Inside the block the model's logits, and so `model.generate`, are EFT's.

        Args:
            model: The causal language model that is steered, in place; as it was afterwards.
            tuned: A fine-tuned model, or several.
            untuned: What they were tuned from: one model, or one for each. None where each is a
                `PeftModel`: it is its own base with its adapter off, in the same memory.
            shared: Ids that mean the same token everywhere, (ids,) bool; None for all.
            prompts: "tuned" or "untuned" → `input_ids` and `attention_mask` that these side models
                read in place of the prompt.
            prompt_length: Tokens of the model's own prompt; needed with `prompts`.

        Yields:
            The side models, which count forward calls.

        Raises:
            UserError: Models that cannot be steered, or numbers of them that do not fit.

        Example:
            with EFT(beta=0.5).steer(large, tuned=small_tuned, untuned=small):
                large.generate(ids, max_new_tokens=20, num_beams=4)
        """
        from foretune.decoding.side_models import Side, run_beside

        ups, downs = self._pairs(tuned, untuned)
        prompts = dict(prompts or {})
        if set(prompts) - {"tuned", "untuned"}:
            raise UserError(f"prompts are of tuned and untuned models, got {', '.join(prompts)}")
        if prompts and prompt_length is None:
            raise UserError("prompts of the side models need prompt_length, of the model's own")
        sides = [Side(model=one, prompt=prompts.get("tuned")) for one in ups]
        sides += [
            Side(model=one, adapter_off=off, prompt=prompts.get("untuned")) for one, off in downs
        ]
        caps = [_soft_cap(side.bare) if self.uncap else None for side in sides]
        told: list[bool] = []

        def combine(base: Tensor, logits: list[Tensor]) -> Tensor:
            laws = [before_cap(one, cap) for one, cap in zip(logits, caps, strict=True)]
            high, low = laws[: len(ups)], laws[len(ups) :]
            if not told and self.delta_clip is None and _unheard_of(high, low):
                told.append(True)
                warnings.warn(
                    f"the tuned model wants a token that the untuned one gives less than {UNSEEN:g}"
                    ", which says little: the large model may never emit it, or always; "
                    "delta_clip=10 bounds the difference",
                    stacklevel=2,
                )
            return self.combine(base, high, low, shared)

        with run_beside(model, sides, combine, prompt_length) as beside:
            yield beside

    def decode(
        self,
        model: Any,
        prompts: str | Sequence[str],
        *,
        tokenizer: Any = None,
        tuned: Any = None,
        untuned: Any = None,
        tuned_prompts: Sequence[str] | None = None,
        untuned_prompts: Sequence[str] | None = None,
        speculative: bool = False,
        batch_size: int = 8,
        seed: int = 0,
        **options: Any,
    ) -> list[Generated]:
        """Continues every prompt with the steered model.

        Args:
            model: A causal language model, its folder, or a PEFT folder.
            prompts: One or several.
            tokenizer: Of the model; None takes that of its folder.
            tuned: As of `steer`; folders too.
            untuned: As of `steer`; folders too. None with PEFT folders as `tuned`.
            tuned_prompts: What the tuned models read in place of each prompt.
            untuned_prompts: What the untuned models read in place of each prompt.
            speculative: The first tuned model drafts several tokens that the others check at once:
                the same law, fewer calls of the large model.
            batch_size: Prompts in one call.
            seed: Seeds sampling.
            options: What `generate` takes: `max_new_tokens`, `do_sample`, `num_beams`, …

        Returns:
            One continuation for each prompt, in order.

        Raises:
            UserError: No tuned model, models or tokenizers that do not fit one another.
        """
        from foretune.decoding.generation import check_options, encode, generate_texts
        from foretune.decoding.side_models import bare_model

        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        check_options({k: v for k, v in options.items() if k != "max_new_tokens"})
        given = {"tuned": tuned_prompts, "untuned": untuned_prompts}
        own = {k: [v] if isinstance(v, str) else list(v) for k, v in given.items() if v is not None}
        for kind, texts in own.items():
            if len(texts) != len(prompts):
                raise UserError(f"{len(prompts)} prompts but {len(texts)} {kind}_prompts")
        large, tokenizer, resources = self.load(
            model, tuned=tuned, untuned=untuned, tokenizer=tokenizer
        )
        if speculative:
            drafter = bare_model(_listed(resources["tuned"])[0])
            _check_drafter(drafter, bare_model(large))
            options["assistant_model"], batch_size = drafter, 1
        if getattr(bare_model(large), "generation_config", None) is not None:
            ask = bare_model(large).generation_config.cache_implementation
            options |= {"cache_implementation": "dynamic"} if ask else {}
        found: list[Generated] = []
        for start in range(0, len(prompts), batch_size):
            rows = slice(start, start + batch_size)
            length = encode(large, tokenizer, prompts[rows])["input_ids"].shape[1]
            read = {k: encode(large, tokenizer, texts[rows]) for k, texts in own.items()}
            with self.steer(large, **resources, prompts=read, prompt_length=length):
                found += generate_texts(
                    large,
                    tokenizer,
                    prompts[rows],
                    batch_size=batch_size,
                    seed=seed + start,
                    **options,
                )
        return found

    def load(
        self, model: Any, *, tuned: Any, untuned: Any = None, tokenizer: Any = None
    ) -> tuple[Any, Any, dict[str, Any]]:
        """Loads what is given as a folder: (model, tokenizer, what `steer` takes besides).

        Raises:
            UserError: No tuned model, or tokenizers that do not fit one another.
        """
        from foretune.decoding.generation import shared_tokens

        if tuned is None:
            raise UserError(
                "EFT needs a tuned model: tuned=FOLDER, and untuned=FOLDER of what it was tuned "
                "from unless it is a PEFT folder"
            )
        large, found = _loaded(model)
        tokenizer = tokenizer if tokenizer is not None else found
        names, bases = _listed(tuned), [] if untuned is None else _listed(untuned)
        if len(bases) not in (0, 1, len(names)):
            raise UserError(
                f"{len(names)} tuned models but {len(bases)} untuned: one for all or each"
            )
        loaded = [_loaded(base) for base in bases]
        ups, downs, tokenizers = [], [], [one for _, one in loaded]
        for k, name in enumerate(names):
            base = loaded[k if len(loaded) > 1 else 0][0] if loaded else None
            if _is_adapter(name) and base is not None:
                # peft puts the adapter into the base that it is given; several need one each
                base = copy.deepcopy(base)
            up, own = _loaded(name, base)
            ups.append(up)
            tokenizers.append(own)
            downs.append(up if base is None or _is_adapter(name) else base)
        shared = shared_tokens(tokenizer, [one for one in tokenizers if one is not None])
        resources = {"tuned": ups, "untuned": downs if loaded else None, "shared": shared}
        return large, tokenizer, resources

    def _weights(self, count: int) -> tuple[float, ...]:
        return (1 / count,) * count if self.weights is None else self.weights

    def _pairs(self, tuned: Any, untuned: Any) -> tuple[list[Any], list[tuple[Any, bool]]]:
        """(tuned models, (untuned model, whether its adapter is to be off) for all or each)."""
        ups = _listed(tuned)
        downs = ups if untuned is None else _listed(untuned)
        if len(downs) not in (1, len(ups)):
            raise UserError(
                f"{len(ups)} tuned models but {len(downs)} untuned: one for all or each"
            )
        if self.weights is not None and len(self.weights) != len(ups):
            raise UserError(f"{len(self.weights)} weights for {len(ups)} tuned models")
        if len(downs) > 1 and all(one is downs[0] for one in downs):
            downs = downs[:1]
        # A PeftModel in the place of an untuned model, or the base inside it (which peft has put
        # the adapter into), is meant without its adapter.
        adapted = [one for one in ups if hasattr(one, "disable_adapter")]
        pairs = []
        for one in downs:
            inside = [up for up in adapted if one is up or one is up.get_base_model()]
            pairs.append((inside[0], True) if inside else (one, False))
        if untuned is None and not all(off for _, off in pairs):
            raise UserError(
                "untuned is missing: what the tuned model was tuned from. Only a PeftModel is its "
                "own, with its adapter off"
            )
        return ups, pairs


def in_nucleus(log_p: Tensor, share: float) -> Tensor:
    """Which ids are among the most probable ones that together reach `share`; (..., V) bool.

    The first that reaches it belongs to them, so there is always one.
    """
    import torch

    ordered, places = log_p.sort(-1, descending=True)
    p = ordered.exp()
    inside = p.cumsum(-1) - p < share
    return torch.zeros_like(inside).scatter(-1, places, inside)


def before_cap(logits: Tensor, cap: float | None) -> Tensor:
    """Undoes logits = cap · tanh(logits / cap); what has reached the cap comes back finite."""
    if cap is None:
        return logits
    most = 1 - 1e-6
    return cap * (logits.float() / cap).clamp(-most, most).atanh()


def _soft_cap(model: Any) -> float | None:
    cap: float | None = getattr(model.config, "final_logit_softcapping", None)
    return cap


def _unheard_of(tuned: Sequence[Tensor], untuned: Sequence[Tensor]) -> bool:
    """Whether a tuned model's top token has next to no probability in the untuned one."""
    import torch

    for k, high in enumerate(tuned):
        low = untuned[k if len(untuned) > 1 else 0]
        top = high[:, -1].argmax(-1, keepdim=True)
        inside = top < low.shape[-1]
        log_p = torch.log_softmax(low[:, -1].float(), -1).gather(-1, top.where(inside, 0))
        if bool((inside & (log_p < math.log(UNSEEN))).any()):
            return True
    return False


def _check_drafter(drafter: Any, large: Any) -> None:
    sizes = drafter.config.vocab_size, large.config.vocab_size
    if sizes[0] != sizes[1]:
        raise UserError(
            f"speculative needs a tuned model with the vocabulary of the large one, got {sizes[0]} "
            f"and {sizes[1]} tokens"
        )


def _loaded(one: Any, base: Any = None) -> tuple[Any, Any]:
    """(model, tokenizer) of a folder; (model, None) of a model."""
    from foretune.decoding.peft_model import load_generator

    if isinstance(one, str | PathLike):
        return load_generator(Path(one) if _is_adapter(one) else str(one), base)
    return one, None


def _is_adapter(one: Any) -> bool:
    return isinstance(one, str | PathLike) and (Path(one) / "adapter_config.json").is_file()


def _listed(one: Any) -> list[Any]:
    return list(one) if isinstance(one, list | tuple) else [one]


def _finite(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{name} must be a finite number, got {value!r}")
