"""RTD: the next token is also looked up in a store of references, by the model's last state.

Paper: Shi et al., "Reference Trustable Decoding: A Training-Free Augmentation Paradigm for Large
Language Models", NeurIPS 2024, arXiv:2409.20181.

    symbol    here          shape     meaning
    h         states        (Q, d)    last hidden state, after the final norm
    k_i v_i   keys values   (N, d)    states of the references and the token that followed each
    K         neighbours              entries fetched, by squared Euclidean distance d
    T         temperature             of their weights softmax(−d / T)
    r         reference     (Q, V)    sum of the weights of the entries that carry each token
    λ         mix                     the output is λ r + (1 − λ) softmax(logits)
    H         heads                   slices of h that are looked up apart; r is their mean

The store and the search are `ReferenceStore` (adapters) and `linalg.nearest`.

Deviations:
    - weights are a softmax that subtracts the least distance. The authors divide exp(−d / T) by
      its sum and stop where that underflows, which with far neighbours weighs heads by distance
    - T is by default the mean squared distance of an entry to its K nearest ones of other rows;
      the authors set it by hand for each model (160 to 5000)
    - K is cut to N / (2 labels) in small stores of labels
    - K, T, λ can be chosen on the store, one row left out at a time
Silent in the paper:
    - which of r and the model λ weighs is read off its authors' code, which is λ = 1
    - the entries behind every token are returned, found by one more forward call over the text
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

    from foretune.decoding.generation import Generated
    from foretune.decoding.reference_store import Lookup, ReferenceStore

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
    """The next token is also looked up in a store of reference states.

    Args:
        neighbours: Entries that are fetched for a token; None for what the store was tuned to.
        temperature: Of their weights, in squared distance; None for what the store was tuned to,
            the automatic one with another number of neighbours or heads.
        mix: Share of the store in the output, 0 is the model alone; None for what the store was
            tuned to.
        heads: Slices of a state that are looked up apart; None for those of the store.
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
        """How a store is asked: its own lookup with this record's fields over it."""
        fields = ("neighbours", "temperature", "mix", "heads")
        own = {k: getattr(self, k) for k in fields if getattr(self, k) is not None}
        made = dataclasses.replace(store.lookup, **own)
        alike = (made.neighbours, made.heads) == (store.lookup.neighbours, store.lookup.heads)
        # A temperature was found for one number of neighbours and heads.
        return (
            made if alike or "temperature" in own else dataclasses.replace(made, temperature=None)
        )

    @contextmanager
    def steer(self, model: Any, *, store: Any) -> Iterator[ReferenceStore]:
        """Inside the block the model's logits, and so `model.generate`, are RTD's.

        Args:
            model: The causal language model, of transformers or peft, in place; as it was
                afterwards.
            store: A `ReferenceStore` made with this model, or its folder.

        Yields:
            The store.

        Raises:
            UserError: The store was made with another model or adapter.

        Example:
            with RTD(mix=0.5).steer(model, store="store"):
                model.generate(ids, max_new_tokens=20)
        """
        from foretune.decoding.nearest import mixed
        from foretune.decoding.output_states import rewritten_logits

        found = _store(store)
        found.check_model(model)
        lookup = self.lookup(found)
        found.temperature(lookup)  # counted once, outside of the forward calls

        def rewrite(logits: Tensor, states: Tensor) -> Tensor:
            if lookup.mix == 0:
                return logits
            answer = found.reference(
                states.flatten(0, 1), lookup, logits.shape[-1], search=self.search
            )
            return mixed(logits, answer.reference.view(*logits.shape), lookup.mix)

        with rewritten_logits(model, rewrite):
            yield found

    def decode(
        self,
        model: Any,
        prompts: str | Sequence[str],
        *,
        tokenizer: Any = None,
        store: Any = None,
        neighbours_shown: int = 3,
        **options: Any,
    ) -> list[Generated]:
        """Continues every prompt, and says which references stand behind every token.

        Args:
            model: A causal language model, its folder, or a PEFT folder.
            prompts: One or several.
            tokenizer: Of the model; None takes that of its folder.
            store: A `ReferenceStore` made with this model, or its folder.
            neighbours_shown: Entries named for each token, those of most weight; 0 for none, which
                saves a forward call over the text.
            options: What `generate_texts` takes: `max_new_tokens`, `seed`, `do_sample`, …

        Returns:
            One continuation for each prompt, in order. Its `details["tokens"]` has for each token
            its `text`, `own` (probability by the model), `reference` (by the store), and
            `neighbours`: each `row` (from 0), `weight`, `token` and the row's text.

        Raises:
            UserError: No store, or one that was made with another model.
        """
        from foretune.decoding.generation import generate_texts

        check_int("neighbours_shown", neighbours_shown, 0)
        model, tokenizer, resources = self.load(model, store=store, tokenizer=tokenizer)
        with self.steer(model, **resources) as used:
            found = generate_texts(model, tokenizer, prompts, **options)
        if not neighbours_shown:
            return found
        return [
            dataclasses.replace(
                one, details={"tokens": self.trace(model, tokenizer, used, one, neighbours_shown)}
            )
            for one in found
        ]

    def load(
        self, model: Any, *, store: Any, tokenizer: Any = None
    ) -> tuple[Any, Any, dict[str, Any]]:
        """Loads what is given as a folder: (model, tokenizer, what `steer` takes besides).

        Raises:
            UserError: No store is given.
        """
        from foretune.decoding.peft_model import load_generator

        if store is None:
            raise UserError(
                "RTD needs a store: store=FOLDER; foretune datastore build MODEL --rows FILE "
                "--out FOLDER makes one"
            )
        found = _store(store)  # before the model, which takes longer to load
        if isinstance(model, str | PathLike):
            model, own = load_generator(model)  # type: ignore[arg-type]
            tokenizer = tokenizer if tokenizer is not None else own
        return model, tokenizer, {"store": found}

    def trace(
        self, model: Any, tokenizer: Any, store: ReferenceStore, text: Generated, shown: int = 3
    ) -> list[dict[str, Any]]:
        """The references behind every token of a continuation; see `decode`."""
        import torch

        from foretune.decoding.generation import prompt_ids
        from foretune.decoding.output_states import read_states

        prompt, new = prompt_ids(tokenizer, text.prompt), list(text.token_ids)
        if not new:
            return []
        places = range(len(prompt) - 1, len(prompt) + len(new) - 1)
        [(states, logits)] = read_states(model, [[*prompt, *new][:-1]], [list(places)])
        lookup = self.lookup(store)
        found = store.reference(states, lookup, logits.shape[-1], search=self.search)
        own = torch.softmax(logits.float(), -1)
        tokens = []
        for i, token in enumerate(new):
            tokens.append(
                {
                    "text": tokenizer.decode([token]),
                    "own": float(own[i, token]),
                    "reference": float(found.reference[i, token]),
                    "neighbours": _heaviest(
                        store, tokenizer, found.places[:, i], found.weights[:, i], shown
                    ),
                }
            )
        return tokens


def _heaviest(
    store: ReferenceStore, tokenizer: Any, places: Tensor, weights: Tensor, shown: int
) -> list[dict[str, Any]]:
    """The entries of most weight, summed over heads, that stand behind one token."""
    total: dict[int, float] = {}
    for place, weight in zip(places.flatten().tolist(), weights.flatten().tolist(), strict=True):
        total[place] = total.get(place, 0.0) + weight / len(places)
    heaviest = sorted(total.items(), key=lambda item: (-item[1], item[0]))[:shown]
    return [
        {
            "row": int(store.sources[place]),
            "weight": weight,
            "token": tokenizer.decode([int(store.values[place])]),
            **({"reference": store.rows[int(store.sources[place])]} if store.rows else {}),
        }
        for place, weight in heaviest
    ]


def _store(store: Any) -> ReferenceStore:
    from foretune.decoding.reference_store import ReferenceStore

    if isinstance(store, ReferenceStore):
        return store
    if isinstance(store, str | PathLike):
        return ReferenceStore.load(store)  # type: ignore[arg-type]
    raise UserError(f"store must be a ReferenceStore or its folder, got {type(store).__name__}")
