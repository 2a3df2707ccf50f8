"""`ReferenceStore`: a model's last hidden states on reference texts, and what followed each.

Like an adapter, a store belongs to one base (and one adapter on it); it records their fingerprints.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from foretune.adapters.fingerprint import base_and_adapter
from foretune.claims import output_folder
from foretune.decoding import STORE_FILE
from foretune.decoding.encoder_states import is_encoder, room_of
from foretune.decoding.index_folder import store_indices
from foretune.decoding.lookup import (
    MIXES,
    MULTIPLES,
    NEIGHBOURS,
    Lookup,
    LookupResult,
    mean_distance,
    untuned_lookup,
)
from foretune.decoding.model_scores import drawn_entries, states_of
from foretune.decoding.nearest import ExactIndex, FaissIndex, Index, neighbour_weights, votes
from foretune.decoding.references import References, read_references
from foretune.decoding.side_models import bare_model
from foretune.decoding.store_checks import check_heads, check_store_model, check_tensors
from foretune.decoding.store_folder import (
    labels_and_values,
    read_store,
    write_metadata,
    write_store,
)
from foretune.decoding.tuning import tune_store
from foretune.errors import UserError
from foretune.formats import damage_named
from foretune.run import check_one_of

# In the file; own: model_log_probs. The last two may be absent.
TENSOR_NAMES = ("keys", "values", "sources", "own", "scored")
SAMPLED = 512  # entries whose neighbours determine the automatic temperature
KEY_TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
Search = Literal["exact", "faiss"]


class ReferenceStore:
    """A model's states on reference texts, and the tokens or labels that followed them.

    Args:
        keys: (N, d) states.
        values: (N,) the token that followed each, or the index of the label that did.
        model_log_probs: What the model alone gives: (N,) log-probability of the token that followed
            each entry; with labels (S, C) of all labels, normalised, for the entries `scored`; None
            where it is not known.
        sources: (N,) the row that each entry comes from, counted from 0.
        scored: (S,) entries whose labels the model has scored; None without labels.
        rows: The rows themselves, so that an answer can be traced.
        kind: What rows hold: "label", "choice", "completion" or "text".
        labels: Label → its tokens; empty for running text.
        model: Fingerprints of the base and its adapter; see `base_and_adapter`.
        name: Folder or hub id of the model; None if unknown.
        lookup: How the store is queried by default.
        tuned: What `tune` returned; None before.
    """

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        model_log_probs: Tensor | None,
        sources: Tensor,
        *,
        scored: Tensor | None = None,
        rows: Sequence[Mapping[str, Any]] = (),
        kind: str = "text",
        labels: Mapping[str, Sequence[int]] | None = None,
        model: Mapping[str, Any] | None = None,
        name: str | None = None,
        lookup: Lookup | None = None,
        tuned: Mapping[str, Any] | None = None,
    ) -> None:
        self.keys, self.values, self.sources = keys, values, sources
        self.model_log_probs, self.scored = model_log_probs, scored
        self.rows = [dict(row) for row in rows]
        self.kind, self.labels = kind, {k: list(v) for k, v in (labels or {}).items()}
        self.model = dict(model) if model is not None else None
        self.name = name
        self.tuned = dict(tuned) if tuned is not None else None
        self.lookup = lookup or Lookup()
        check_tensors(
            *(keys, values, model_log_probs, sources, scored),
            num_rows=len(self.rows),
            num_labels=len(self.labels),
        )
        check_heads(self.lookup.heads, keys.shape[1])
        self.folder: Path | None = None  # where it is saved
        self._exact: dict[tuple[int, str], list[ExactIndex]] = {}
        self._faiss: dict[int, list[FaissIndex]] = {}
        self._automatic: dict[tuple[int, int], float] = {}

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def is_of_encoder(self) -> bool:
        """Whether the states are an encoder's, whose labels have no tokens."""
        return bool(self.labels) and not any(self.labels.values())

    @property
    def next_tokens(self) -> Tensor:
        """(N,) the token that followed each entry; of a label its first one."""
        if not self.labels:
            return self.values
        return torch.tensor([tokens[0] for tokens in self.labels.values()])[self.values]

    @classmethod
    def build(
        cls,
        model: Any,
        rows: Sequence[Mapping[str, Any]],
        *,
        tokenizer: Any,
        heads: int = 1,
        permute_options: bool = True,
        key_type: str = "float32",
    ) -> ReferenceStore:
        """Runs a model on rows and stores its states.

        Args:
            model: A causal language model of transformers or peft, with the adapter enabled that
                it will be used with; or an encoder, whose store classifies rows with labels.
            rows: Each `{"prompt", "label"}`, `{"context", "candidates", "answer"}`,
                `{"prompt", "completion"}` or `{"text"}`; see `read_references`.
            tokenizer: The model's tokenizer.
            heads: Number of slices of a state that are looked up separately; can be changed later.
            permute_options: Read choice rows once per rotation of their candidates.
            key_type: "float32", "float16" or "bfloat16"; distances are always float32.

        Returns:
            The store, not tuned; see `untuned_lookup`. Labels of several tokens are scored by the
            model for 1,000 entries at most, which takes a call for every label.

        Raises:
            UserError: The model is neither a causal language model nor an encoder, a row cannot
                be read, or states are not finite in `key_type`.

        Example:
            store = ReferenceStore.build(model, rows, tokenizer=tokenizer)
            store.tune()
            store.save("store")
        """
        check_one_of("key_type", key_type, tuple(KEY_TYPES))
        references = read_references(
            rows,
            tokenizer,
            max_tokens=room_of(model),
            permute_options=permute_options,
            for_encoder=is_encoder(bare_model(model)),
        )
        return cls.of_references(
            model, references, rows=rows, heads=heads, key_type=KEY_TYPES[key_type]
        )

    @classmethod
    def of_references(
        cls,
        model: Any,
        references: References,
        *,
        rows: Sequence[Mapping[str, Any]] = (),
        heads: int = 1,
        key_type: torch.dtype = torch.float32,
    ) -> ReferenceStore:
        """Builds a store from tokenised texts.

        Raises:
            UserError: States are not finite in `key_type`, or cannot be cut into `heads` slices.
        """
        states, log_probs, scored = states_of(model, references)
        keys = states.to(key_type)
        if not keys.isfinite().all():
            raise UserError(f"states are not finite in {str(key_type).removeprefix('torch.')}")
        sources = [
            source
            for source, text_values in zip(references.sources, references.values, strict=True)
            for _ in text_values
        ]
        check_heads(heads, keys.shape[1])
        return cls(
            keys,
            references.flat_values(),
            log_probs,
            torch.tensor(sources),
            scored=scored,
            rows=rows,
            kind=references.kind,
            labels=references.labels,
            model=base_and_adapter(model),
            lookup=untuned_lookup(len(keys), len(references.labels), heads),
        )

    def search(
        self, states: Tensor, lookup: Lookup, search: Search = "exact"
    ) -> tuple[Tensor, Tensor]:
        """The nearest entries of each state, per head.

        Args:
            states: (Q, d).
            lookup: Only its `neighbours` and `heads` are used.
            search: "exact" or "faiss".

        Returns:
            (squared distances (H, Q, K), float32; indices of the entries (H, Q, K)).

        Raises:
            UserError: The states have another width than the store's.
        """
        if states.shape[1] != self.keys.shape[1]:
            raise UserError(
                f"states must have the store's width {self.keys.shape[1]}, got {states.shape[1]}"
            )
        k, heads = min(lookup.neighbours, len(self)), lookup.heads
        indices = self._index(heads, search, states.device)
        parts = states.detach().chunk(heads, dim=1)
        per_head = [index.search(part, k) for index, part in zip(indices, parts, strict=True)]
        return torch.stack([h[0] for h in per_head]), torch.stack([h[1] for h in per_head])

    def reference(
        self, states: Tensor, lookup: Lookup, size: int, search: Search = "exact"
    ) -> LookupResult:
        """The distribution of the tokens that followed the nearest entries.

        Args:
            states: (Q, d).
            lookup: How to query the store.
            size: V, the size of the vocabulary.
            search: "exact" or "faiss".
        """
        places, weights = self._weighted(states, lookup, search)
        values = self.next_tokens.to(places.device)[places]
        return LookupResult(votes(weights, values, size).mean(0), places, weights)

    def label_reference(
        self, states: Tensor, lookup: Lookup, search: Search = "exact"
    ) -> LookupResult:
        """The distribution of the labels of the nearest entries.

        Args:
            states: (Q, d).
            lookup: How to query the store.
            search: "exact" or "faiss".

        Returns:
            Its `reference` is (Q, C), over labels.
        """
        places, weights = self._weighted(states, lookup, search)
        values = self.values.to(places.device)[places]
        return LookupResult(votes(weights, values, len(self.labels)).mean(0), places, weights)

    def label_log_probs(self, states: Tensor, model_log_p: Tensor | None, lookup: Lookup) -> Tensor:
        """log(λ r + (1 − λ) p) of the labels, (Q, C).

        Args:
            states: (Q, d).
            model_log_p: (Q, C) log p of the model alone, normalised over the labels; None for none,
                and λ is 1.
            lookup: How to query the store.
        """
        reference = self.label_reference(states, lookup).reference
        if model_log_p is None:
            return reference.log()
        return ((1 - lookup.mix) * model_log_p.exp() + lookup.mix * reference).log()

    def _weighted(self, states: Tensor, lookup: Lookup, search: Search) -> tuple[Tensor, Tensor]:
        """(indices, weights) of the nearest entries of states (Q, d), (H, Q, K) each."""
        squared, places = self.search(states, lookup, search)
        # A slice's distance is about 1/H of the full state's; times H it fits its temperature.
        return places, neighbour_weights(squared * lookup.heads, self.temperature(lookup))

    def temperature(self, lookup: Lookup) -> float:
        """T of a lookup.

        Without one of its own: the mean squared distance of entries to their K nearest entries
        from other rows.
        """
        if lookup.temperature is not None:
            return lookup.temperature
        key = (lookup.neighbours, lookup.heads)
        if key not in self._automatic:
            sample = drawn_entries(len(self), SAMPLED, seed=0)
            k = min(lookup.neighbours, len(self))
            squared, _ = self.nearest_in_other_rows(sample, k, lookup.heads)
            self._automatic[key] = mean_distance(squared * lookup.heads)
        return self._automatic[key]

    def tune(
        self,
        *,
        neighbours: Sequence[int] = NEIGHBOURS,
        multiples: Sequence[float] = MULTIPLES,
        mixes: Sequence[float] = MIXES,
        sample: int = 2000,
        seed: int = 0,
    ) -> dict[str, Any]:
        """Chooses K, T and λ by leaving out one row at a time.

        Each entry is predicted from the entries of other rows, mixed with the model's own
        distribution. What counts is what `eval` prints: with labels the accuracy, else the mean
        log-probability of the token. The simplest setting wins that is within one standard error
        of the best; the model alone (λ = 0) and the setting of a store that was not tuned are
        among them.

        Args:
            neighbours: Values of K to try, as far as they are at most half of the store.
            multiples: Values of T to try, as multiples of the automatic temperature.
            mixes: Values of λ to try; 1 alone where the model's own distribution is not known.
            sample: Number of entries to predict; all if there are fewer.
            seed: Random seed of that sample.

        Returns:
            The chosen lookup's fields, the `metric`, its mean `score` over the entries with its
            `standard_error`, and the scores of the `best` setting, of the `untuned` one and of the
            model alone (`model_alone`); for running text that of the store's token counts mixed in
            (`with_counts`). Also kept in `tuned` and `lookup`.

        Raises:
            UserError: The store has only one row.
        """
        self.lookup, self.tuned = tune_store(
            self,
            neighbours=neighbours,
            multiples=multiples,
            mixes=mixes,
            sample=sample,
            seed=seed,
        )
        return dict(self.tuned)

    def sampled(self, size: int, seed: int) -> Tensor:
        """(size,) entries, ascending, drawn without replacement; see `scored` if there is one."""
        return drawn_entries(len(self if self.scored is None else self.scored), size, seed)

    def check_model(self, model: Any) -> None:
        """Checks that the store was built with this model.

        Raises:
            UserError: As `check_store_model`.
        """
        largest = None if self.is_of_encoder else int(self.next_tokens.max())
        check_store_model(model, self.model, largest)

    def save(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Writes `store.safetensors`, `store.json` and `rows.jsonl` into a new folder.

        Raises:
            UserError: The folder is not empty, and is not a store or `overwrite` is false.
        """
        parts = (self.keys, self.values, self.sources, self.model_log_probs, self.scored)
        named = zip(TENSOR_NAMES, parts, strict=True)
        tensors = {name: tensor.contiguous() for name, tensor in named if tensor is not None}
        with output_folder(Path(folder), "datastore", overwrite=overwrite, at_once=True) as part:
            write_store(part, tensors, self.rows, self._metadata())
        self.folder = Path(folder)

    def save_lookup(self, folder: str | Path) -> None:
        """Writes the result of `tune` into the store's folder; nothing else changes."""
        write_metadata(Path(folder), self._metadata())

    @classmethod
    def load(cls, folder: str | Path) -> ReferenceStore:
        """Reads the folder that `save` wrote.

        Raises:
            UserError: The folder is not a store, or its files do not match.
        """
        folder = Path(folder)
        tensors, rows, metadata = read_store(folder)
        with damage_named(folder / STORE_FILE):
            labels, values, model_log_p = labels_and_values(metadata, tensors)
            store = cls(
                tensors["keys"],
                values,
                model_log_p,
                tensors["sources"],
                scored=tensors.get("scored"),
                rows=rows,
                kind=metadata["kind"],
                labels=labels,
                model=metadata["model"],
                name=metadata["name"],
                lookup=Lookup(**metadata["lookup"]),
                tuned=metadata["tuned"],
            )
        store.folder = folder
        return store

    def _metadata(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "labels": self.labels,
            "model": self.model,
            "name": self.name,
            "lookup": dataclasses.asdict(self.lookup),
            "tuned": self.tuned,
            "rows": len(self.rows),
            "entries": len(self),
            "hidden_size": self.keys.shape[1],
        }

    def _index(self, heads: int, search: Search, device: torch.device) -> Sequence[Index]:
        check_one_of("search", search, ("exact", "faiss"))
        if search == "exact":
            return self._exact_index(heads, device)
        if heads not in self._faiss:
            check_heads(heads, self.keys.shape[1])
            self._faiss[heads] = store_indices(self.keys, heads, self.folder)
        return self._faiss[heads]

    def _exact_index(self, heads: int, device: torch.device) -> list[ExactIndex]:
        key = (heads, str(device))
        if key not in self._exact:
            check_heads(heads, self.keys.shape[1])
            keys, sources = self.keys.to(device), self.sources.to(device)
            self._exact[key] = [ExactIndex(part, sources) for part in keys.chunk(heads, dim=1)]
        return self._exact[key]

    def nearest_in_other_rows(self, entries: Tensor, k: int, heads: int) -> tuple[Tensor, Tensor]:
        """(squared distances, indices) of their nearest entries from other rows, (H, S, K) each."""
        per_head = [
            index.search(index.keys[entries], k, self.sources[entries])
            for index in self._exact_index(heads, self.keys.device)
        ]
        return torch.stack([h[0] for h in per_head]), torch.stack([h[1] for h in per_head])
