"""RTD: mix the next-token distribution with one looked up in a store of references.

Paper: Shi et al., "Reference Trustable Decoding: A Training-Free Augmentation Paradigm for Large
Language Models", NeurIPS 2024, arXiv:2409.20181.

    symbol    here          shape     meaning
    h         states        (Q, d)    last hidden state, after the final norm
    k_i v_i   keys values   (N, d)    states of the references and the token that followed each
    K         neighbours              number of entries retrieved, by squared Euclidean distance d
    T         temperature             entries are weighted by softmax(−d / T)
    r         reference     (Q, V)    total weight of the entries that carry each token
    λ         mix                     the output is λ r + (1 − λ) softmax(logits)
    H         heads                   slices of h that are looked up separately; r is their mean

The store is `ReferenceStore` (reference_store.py); nearest.py searches it.

Deviations:
    - the softmax of the weights subtracts the smallest distance. The authors divide exp(−d / T)
      by its sum and stop where that underflows; with distant neighbours that weights heads by
      distance
    - T defaults to the mean squared distance of entries to their K nearest ones from other rows;
      the authors set it by hand for each model (160 to 5000)
    - K is at most N / (2 labels) in small stores of labels
    - K, T, λ can be chosen on the store, leaving out one row at a time
Silent in the paper:
    - whether λ weights r or the model is taken from the authors' code, which uses λ = 1
    - the entries behind each token are returned; that takes one more forward call over the text
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from foretune.errors import UserError
from foretune.method import Method
from foretune.run import check_fraction, check_int, check_one_of, check_positive

if TYPE_CHECKING:
    from torch import Tensor

    from foretune.decoding.generation import Generated, Prompt
    from foretune.decoding.lookup import Lookup
    from foretune.decoding.reference_store import ReferenceStore

PAPER = {
    "title": "Reference Trustable Decoding: A Training-Free Augmentation Paradigm for Large "
    "Language Models",
    "authors": "Luohe Shi and Yao Yao and Zuchao Li and Lefei Zhang and Hai Zhao",
    "year": 2024,
    "venue": "NeurIPS",
    "arxiv": "2409.20181",
}


@dataclass(frozen=True, kw_only=True)
class RTD(Method):
    """Mix the next-token distribution with one looked up in a store of reference states.

    Args:
        neighbours: Number of entries retrieved per token; None for the store's setting.
        temperature: Temperature of the entries' weights, in squared distance; None for the store's
            setting, or the automatic one if `neighbours` or `heads` differ from the store's.
        mix: Weight of the store in the output; 0 is the model alone; None for the store's setting.
        heads: Number of slices of each state that are looked up separately; None for the store's
            setting.
        search: "exact" in torch, or "faiss", which is exact up to 100,000 entries and approximate
            beyond.
    """

    neighbours: int | None = None
    temperature: float | None = None
    mix: float | None = None
    heads: int | None = None
    search: Literal["exact", "faiss"] = "exact"

    name: ClassVar[str] = "rtd"
    label: ClassVar[str] = "RTD"
    verb: ClassVar[str] = "decode"
    paper: ClassVar[dict[str, Any] | None] = PAPER
    resources: ClassVar[tuple[str, ...]] = ("store",)

    def __post_init__(self) -> None:
        check_int("neighbours", self.neighbours, 1, optional=True)
        if self.temperature is not None:
            check_positive("temperature", self.temperature)
        if self.mix is not None:
            check_fraction("mix", self.mix)
        check_int("heads", self.heads, 1, optional=True)
        check_one_of("search", self.search, ("exact", "faiss"))

    def lookup(self, store: ReferenceStore) -> Lookup:
        """The lookup of a store, with this record's fields in place of its own."""
        names = ("neighbours", "temperature", "mix", "heads")
        fields = {k: getattr(self, k) for k in names if getattr(self, k) is not None}
        lookup = dataclasses.replace(store.lookup, **fields)
        alike = (lookup.neighbours, lookup.heads) == (store.lookup.neighbours, store.lookup.heads)
        # A tuned temperature only holds for its number of neighbours and heads.
        if alike or "temperature" in fields:
            return lookup
        return dataclasses.replace(lookup, temperature=None)

    @contextmanager
    def steer(self, model: Any, *, store: Any) -> Iterator[ReferenceStore]:
        """Inside the block the model outputs RTD's logits, also in `model.generate`.

        Args:
            model: A causal language model of transformers or peft; changed in place, and restored
                afterwards.
            store: A `ReferenceStore` built with this model, or its folder.

        Yields:
            The store.

        Raises:
            UserError: The store was built with another model or adapter.

        Example:
            with RTD(mix=0.5).steer(model, store="store"):
                model.generate(ids, max_new_tokens=20)
        """
        from foretune.decoding.nearest import mixed
        from foretune.decoding.output_states import rewritten_logits

        loaded = _store(store)
        loaded.check_model(model)
        lookup = self.lookup(loaded)
        loaded.temperature(lookup)  # computed once, outside of the forward calls

        def rewrite(logits: Tensor, states: Tensor) -> Tensor:
            if lookup.mix == 0:
                return logits
            answer = loaded.reference(
                states.flatten(0, 1), lookup, logits.shape[-1], search=self.search
            )
            return mixed(logits, answer.reference.view(*logits.shape), lookup.mix)

        with rewritten_logits(model, rewrite):
            yield loaded

    def decode(
        self,
        model: Any,
        prompts: str | Sequence[Prompt],
        *,
        tokenizer: Any = None,
        store: Any = None,
        neighbours_shown: int = 3,
        allow_unverified: bool = False,
        **options: Any,
    ) -> list[Generated]:
        """Continues each prompt, and lists the references behind each token.

        Args:
            model: A causal language model, its folder, or a PEFT folder.
            prompts: One prompt or several.
            tokenizer: The model's tokenizer; None for the one in its folder.
            store: A `ReferenceStore` built with this model, or its folder.
            neighbours_shown: Number of entries to list per token, those with the largest weights;
                0 for none, which saves a forward call over the text.
            allow_unverified: Whether to take an adapter that does not record its base.
            options: Options of `generate_texts`: `max_new_tokens`, `seed`, `do_sample`, …

        Returns:
            One continuation per prompt, in order. Its `details["tokens"]` has for each token its
            `text`, `own` (probability under the model), `reference` (under the store), and
            `neighbours`: each `row` (from 0), `weight`, `token`, and `reference`, the row itself.

        Raises:
            UserError: The store is missing, or was built with another model.
        """
        from foretune.decoding.generation import generate_texts

        check_int("neighbours_shown", neighbours_shown, 0)
        model, tokenizer, resources = self.load(
            model, store=store, tokenizer=tokenizer, allow_unverified=allow_unverified
        )
        with self.steer(model, **resources) as loaded:
            texts = generate_texts(model, tokenizer, prompts, **options)
        if not neighbours_shown:
            return texts
        traces = [self.trace(model, tokenizer, loaded, text, neighbours_shown) for text in texts]
        return [
            dataclasses.replace(text, details={"tokens": trace})
            for text, trace in zip(texts, traces, strict=True)
        ]

    def load(
        self, model: Any, *, store: Any, tokenizer: Any = None, allow_unverified: bool = False
    ) -> tuple[Any, Any, dict[str, Any]]:
        """Loads folders: (model, tokenizer, the resources that `steer` takes); see `decode`.

        Raises:
            UserError: The store is missing, or the folder is not one.
        """
        from foretune.decoding.peft_model import load_generator

        if store is None:
            raise UserError(
                "RTD needs a store: store=FOLDER; foretune datastore build MODEL --rows FILE "
                "--out FOLDER makes one"
            )
        loaded = _store(store)  # before the model, which takes longer to load
        if isinstance(model, str | PathLike):
            model, own_tokenizer = load_generator(model, allow_unverified=allow_unverified)  # type: ignore[arg-type]
            tokenizer = tokenizer if tokenizer is not None else own_tokenizer
        return model, tokenizer, {"store": loaded}

    def trace(
        self, model: Any, tokenizer: Any, store: ReferenceStore, text: Generated, shown: int = 3
    ) -> list[dict[str, Any]]:
        """The references behind each token of a continuation; see `decode`."""
        import torch

        from foretune.decoding.generation import prompt_ids
        from foretune.decoding.output_states import read_states

        prompt, new = prompt_ids(tokenizer, text.prompt), list(text.token_ids)
        if not new:
            return []
        places = range(len(prompt) - 1, len(prompt) + len(new) - 1)
        [(states, logits)] = read_states(model, [[*prompt, *new][:-1]], [list(places)])
        lookup = self.lookup(store)
        answer = store.reference(states, lookup, logits.shape[-1], search=self.search)
        model_probs = torch.softmax(logits.float(), -1)
        tokens = []
        for i, token in enumerate(new):
            tokens.append(
                {
                    "text": tokenizer.decode([token]),
                    "own": float(model_probs[i, token]),
                    "reference": float(answer.reference[i, token]),
                    "neighbours": [
                        {
                            "row": int(store.sources[place]),
                            "weight": weight,
                            "token": tokenizer.decode([int(store.next_tokens[place])]),
                            **(
                                {"reference": store.rows[int(store.sources[place])]}
                                if store.rows
                                else {}
                            ),
                        }
                        for place, weight in answer.heaviest(i, shown)
                    ],
                }
            )
        return tokens


def _store(store: Any) -> ReferenceStore:
    from foretune.decoding.reference_store import ReferenceStore

    if isinstance(store, str | PathLike):
        store = ReferenceStore.load(store)  # type: ignore[arg-type]
    if not isinstance(store, ReferenceStore):
        raise UserError(f"store must be a ReferenceStore or its folder, got {type(store).__name__}")
    if store.is_of_encoder:
        raise UserError(
            "this store is of an encoder, which continues no text: foretune datastore predict "
            "STORE --rows FILE gives the labels of rows"
        )
    return store
