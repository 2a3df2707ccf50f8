"""EFT: decode from a large model with the change that fine-tuning made to a small one.

Paper: Mitchell et al., "An Emulator for Fine-Tuning Large Language Models using Small Language
Models", ICLR 2024, arXiv:2310.12962.

Fine-tuning maximises a reward r under a penalty on KL(p || p_ref), whose solution is
p ∝ p_ref exp(r / beta). So a fine-tuned model at scale M has the implicit reward
log p_ft^M − log p_ref^M, which can be added to any model at scale N:

    log p(y_t | x, y_<t) = log p_ref^N + beta Σ_k w_k (log p_ft_k^M − log p_ref^M) − log Z_t

    symbol     here      shape                      meaning
    p_ref^N    base      (rows, positions, V)       the steered model
    p_ft_k^M   tuned     (rows, positions, V_k)     fine-tuned side models
    p_ref^M    untuned   (rows, positions, V_k)     the models that these were tuned from
    beta       beta      ()                         strength; 1 in the paper
    w_k        weights   (number of tuned,)         weights of the tuned models

N large, M small is up-scaling; N small, M large is down-scaling.

Deviations:
    - vocabularies may differ: the difference is taken over the ids that all side models and the
      base share, with each side's distribution renormalised on them; it is 0 elsewhere
    - `delta_clip` and `uncap` are not in the paper
Silent in the paper:
    - the normaliser belongs to whole sequences; as the authors do, each token has its own
    - the distributions are those that the models output, after a soft cap on logits if any
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from foretune.errors import UserError
from foretune.files import ADAPTER_CONFIG_FILE
from foretune.method import Method
from foretune.run import check_positive

if TYPE_CHECKING:
    from torch import Tensor

    from foretune.decoding.generation import Generated, Prompt
    from foretune.decoding.side_models import SideModels
    from foretune.decoding.side_processor import SideProcessor

PAPER = {
    "title": "An Emulator for Fine-Tuning Large Language Models using Small Language Models",
    "authors": "Eric Mitchell and Rafael Rafailov and Archit Sharma and Chelsea Finn and "
    "Christopher D. Manning",
    "year": 2024,
    "venue": "ICLR",
    "arxiv": "2310.12962",
}


@dataclass(frozen=True, kw_only=True)
class EFT(Method):
    """Decode from a large model with the change that fine-tuning made to a small one.

    Args:
        beta: Factor of the side models' difference: 0 is the model alone, 1 the paper's choice;
            negative values reverse the fine-tuning.
        weights: One weight per tuned model; None for equal weights that sum to 1.
        top_p: Apply the difference only to the model's most probable tokens, up to this total
            probability; 1 for all tokens. (Not the sampler's top-p.)
        delta_clip: Bound on the absolute difference, in nats; None for none.
        uncap: Take the side models' difference before the soft cap that some models (Gemma 2) put
            on their logits.
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
            base: (…, V) logits of the model.
            tuned: (…, V_k) logits of each tuned model.
            untuned: (…, V_k) logits of the models that these were tuned from: one for all, or one
                per tuned model.
            shared: (ids,) bool, the ids that mean the same token to all models; None for all.

        Returns:
            (…, V), float32, normalised.
        """
        import torch

        from foretune.decoding.token_distributions import in_nucleus

        log_p = torch.log_softmax(base.float(), -1)
        delta = self.delta(tuned, untuned, log_p.shape[-1])
        if self.delta_clip is not None:
            delta = delta.clamp(-self.delta_clip, self.delta_clip)
        width = delta.shape[-1]
        if shared is not None:
            comparable = torch.zeros(width, dtype=torch.bool, device=delta.device)
            comparable[: len(shared)] = shared[:width].to(delta.device)
            delta = delta.where(comparable, 0.0)
        if self.top_p < 1:
            delta = delta.where(in_nucleus(log_p, self.top_p)[..., :width], 0.0)
        steered = log_p.clone()
        steered[..., :width] += self.beta * delta
        return torch.log_softmax(steered, -1)

    def delta(self, tuned: Sequence[Tensor], untuned: Sequence[Tensor], width: int) -> Tensor:
        """Σ_k w_k (log p_ft_k − log p_ref), the implicit reward, on the ids that all models have.

        Args:
            tuned: (…, V_k) logits of each tuned model.
            untuned: (…, V_k) logits of the models that these were tuned from.
            width: V, the vocabulary of the steered model.

        Returns:
            (…, min(V, V_k)), float32.
        """
        import torch

        width = min(width, *(logits.shape[-1] for logits in (*tuned, *untuned)))
        refs = [torch.log_softmax(logits[..., :width].float(), -1) for logits in untuned]
        total = torch.zeros_like(refs[0])
        for k, (weight, logits) in enumerate(zip(self._weights(len(tuned)), tuned, strict=True)):
            log_p = torch.log_softmax(logits[..., :width].float(), -1)
            ref = refs[k if len(refs) > 1 else 0]
            # The difference is 0 where both forbid a token (−inf).
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
        """Inside the block the model outputs EFT's logits, also in `model.generate`.

        Args:
            model: The causal language model to steer; changed in place, and restored afterwards.
            tuned: A fine-tuned model, or several.
            untuned: The model that they were tuned from, or one per tuned model. None if each is a
                `PeftModel`, which serves as its own base with its adapter off, at no extra memory.
            shared: (ids,) bool, the ids that mean the same token to all models; None for all.
            prompts: "tuned" or "untuned" → `input_ids` and `attention_mask` that these side models
                read instead of the model's prompt.
            prompt_length: Tokens of the model's prompt; needed with `prompts`.

        Yields:
            The side models, which count forward calls.

        Raises:
            UserError: A model cannot be steered, or the numbers of models do not match.

        Example:
            with EFT(beta=0.5).steer(large, tuned=small_tuned, untuned=small):
                large.generate(ids, max_new_tokens=20, num_beams=4)
        """
        from foretune.decoding.eft_sides import sides_of
        from foretune.decoding.side_models import run_beside

        prompts = dict(prompts or {})
        if set(prompts) - {"tuned", "untuned"}:
            raise UserError(f"prompts takes tuned and untuned, got {', '.join(prompts)}")
        if prompts and prompt_length is None:
            raise UserError("prompts of the side models need the model's prompt_length")
        sides, combine = sides_of(self, tuned, untuned, shared, prompts)
        with run_beside(model, sides, combine, prompt_length) as beside:
            yield beside

    def processor(
        self,
        *,
        tuned: Any,
        untuned: Any = None,
        attention_mask: Tensor | None,
        shared: Tensor | None = None,
    ) -> SideProcessor:
        """EFT for a list of logits processors, where the model itself is to be left alone.

        The same distribution as inside `steer`, whatever processors follow; those that `generate`
        puts before it (a repetition penalty) act on the model's own scores. With an
        `assistant_model` the draft is steered as well, which changes no output.

        Args:
            tuned: A fine-tuned model, or several.
            untuned: The model that they were tuned from, or one per tuned model; None if each is a
                `PeftModel`.
            attention_mask: (prompts, tokens) that `generate` is given, which a processor does not
                see; None where no prompt is padded.
            shared: (ids,) bool, the ids that mean the same token to all models; None for all.

        Returns:
            A processor for one batch of prompts.

        Raises:
            UserError: A side model is no decoder, or the numbers of models do not match.

        Example:
            processor = EFT().processor(tuned=tuned, untuned=small, attention_mask=None)
            large.generate(ids, logits_processor=[processor], num_beams=4)
        """
        from foretune.decoding.eft_sides import sides_of
        from foretune.decoding.side_processor import SideProcessor

        return SideProcessor(*sides_of(self, tuned, untuned, shared), attention_mask)

    def decode(
        self,
        model: Any,
        prompts: str | Sequence[Prompt],
        *,
        tokenizer: Any = None,
        tuned: Any = None,
        untuned: Any = None,
        tuned_prompts: Sequence[Prompt] | None = None,
        untuned_prompts: Sequence[Prompt] | None = None,
        speculative: bool = False,
        batch_size: int = 8,
        seed: int = 0,
        allow_unverified: bool = False,
        **options: Any,
    ) -> list[Generated]:
        """Continues each prompt with the steered model.

        Args:
            model: A causal language model, its folder, or a PEFT folder.
            prompts: One prompt or several.
            tokenizer: The model's tokenizer; None for the one in its folder.
            tuned: A fine-tuned model or its folder, or several; a PEFT folder will do.
            untuned: The model or folder that they were tuned from, or one per tuned model; None
                if `tuned` are PEFT folders.
            tuned_prompts: What the tuned models read instead of each prompt.
            untuned_prompts: What the untuned models read instead of each prompt.
            speculative: The first tuned model drafts several tokens, which the others check at
                once: the output distribution is unchanged, the large model is called less often.
            batch_size: Prompts per call.
            seed: Random seed of sampling.
            allow_unverified: Whether to take adapters that do not record their base.
            options: Options of `generate`: `max_new_tokens`, `do_sample`, `num_beams`, …

        Returns:
            One continuation per prompt, in order.

        Raises:
            UserError: The tuned model is missing, or models or tokenizers do not fit together.
        """
        from foretune.decoding.eft_sides import listed
        from foretune.decoding.generation import check_options, encode, generate_texts
        from foretune.decoding.side_models import bare_model

        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        check_options({k: v for k, v in options.items() if k != "max_new_tokens"})
        by_kind = {"tuned": tuned_prompts, "untuned": untuned_prompts}
        side_prompts = {
            kind: [texts] if isinstance(texts, str) else list(texts)
            for kind, texts in by_kind.items()
            if texts is not None
        }
        for kind, texts in side_prompts.items():
            if len(texts) != len(prompts):
                raise UserError(f"{len(prompts)} prompts but {len(texts)} {kind}_prompts")
        large, tokenizer, resources = self.load(
            model,
            tuned=tuned,
            untuned=untuned,
            tokenizer=tokenizer,
            allow_unverified=allow_unverified,
        )
        if speculative:
            drafter = bare_model(listed(resources["tuned"])[0])
            _check_drafter(drafter, bare_model(large))
            options["assistant_model"], batch_size = drafter, 1
        if getattr(bare_model(large), "generation_config", None) is not None:
            cache = bare_model(large).generation_config.cache_implementation
            options |= {"cache_implementation": "dynamic"} if cache else {}
        continuations: list[Generated] = []
        for start in range(0, len(prompts), batch_size):
            rows = slice(start, start + batch_size)
            length = encode(large, tokenizer, prompts[rows])["input_ids"].shape[1]
            read = {k: encode(large, tokenizer, texts[rows]) for k, texts in side_prompts.items()}
            with self.steer(large, **resources, prompts=read, prompt_length=length):
                continuations += generate_texts(
                    large,
                    tokenizer,
                    prompts[rows],
                    batch_size=batch_size,
                    seed=seed + start,
                    **options,
                )
        return continuations

    def load(
        self,
        model: Any,
        *,
        tuned: Any,
        untuned: Any = None,
        tokenizer: Any = None,
        allow_unverified: bool = False,
    ) -> tuple[Any, Any, dict[str, Any]]:
        """Loads folders: (model, tokenizer, the resources that `steer` takes); see `decode`.

        Raises:
            UserError: The tuned model is missing, the numbers of models do not match, or the
                tokenizers differ.
        """
        from foretune.decoding.eft_sides import listed
        from foretune.decoding.generation import shared_tokens

        if tuned is None:
            raise UserError(
                "EFT needs a tuned model: tuned=FOLDER, and unless that is a PEFT folder, "
                "untuned=FOLDER of the model that it was tuned from"
            )
        options = {"allow_unverified": allow_unverified}
        large, own_tokenizer = _loaded(model, **options)
        tokenizer = tokenizer if tokenizer is not None else own_tokenizer
        names, bases = listed(tuned), [] if untuned is None else listed(untuned)
        if len(bases) not in (0, 1, len(names)):
            raise UserError(
                f"{len(names)} tuned models but {len(bases)} untuned: give one, or one for each"
            )
        loaded = [_loaded(base, **options) for base in bases]
        ups, downs = [], []
        tokenizers = [
            (_name_of(base, "untuned"), base_tokenizer)
            for base, (_, base_tokenizer) in zip(bases, loaded, strict=True)
        ]
        for k, name in enumerate(names):
            base = loaded[k if len(loaded) > 1 else 0][0] if loaded else None
            if _is_adapter(name) and base is not None:
                # peft injects the adapter into the base, so each adapter needs its own copy
                base = copy.deepcopy(base)
            up, side_tokenizer = _loaded(name, base, **options)
            ups.append(up)
            tokenizers.append((_name_of(name, "tuned"), side_tokenizer))
            downs.append(up if base is None or _is_adapter(name) else base)
        present = [(name, side) for name, side in tokenizers if side is not None]
        shared = shared_tokens(tokenizer, present)
        resources = {"tuned": ups, "untuned": downs if loaded else None, "shared": shared}
        return large, tokenizer, resources

    def _weights(self, count: int) -> tuple[float, ...]:
        return (1 / count,) * count if self.weights is None else self.weights


def _check_drafter(drafter: Any, large: Any) -> None:
    sizes = drafter.config.vocab_size, large.config.vocab_size
    if sizes[0] != sizes[1]:
        raise UserError(
            "speculative needs a tuned model with the vocabulary of the large one, got "
            f"{sizes[0]} and {sizes[1]} tokens"
        )


def _loaded(source: Any, base: Any = None, *, allow_unverified: bool) -> tuple[Any, Any]:
    """(model, tokenizer) of a folder; (model, None) of a model."""
    from foretune.decoding.peft_model import load_generator

    if isinstance(source, str | PathLike):
        name = Path(source) if _is_adapter(source) else str(source)
        return load_generator(name, base, allow_unverified=allow_unverified)
    return source, None


def _name_of(source: Any, kind: str) -> str:
    return str(source) if isinstance(source, str | PathLike) else f"the {kind} model"


def _is_adapter(source: Any) -> bool:
    return isinstance(source, str | PathLike) and (Path(source) / ADAPTER_CONFIG_FILE).is_file()


def _finite(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{name} must be a finite number, got {value!r}")
