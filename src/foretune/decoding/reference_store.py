"""`ReferenceStore`: a model's last hidden states on reference texts, and the token after each.

Like an adapter, a store belongs to one base (and one adapter on it); it records their fingerprints.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from foretune.adapters.fingerprint import base_and_adapter
from foretune.claims import output_folder
from foretune.decoding import STORE_FILE
from foretune.decoding.index_folder import store_indices
from foretune.decoding.lookup import (
    MIXES,
    MULTIPLES,
    NEIGHBOURS,
    Lookup,
    best_lookup,
    mean_distance,
    mean_log,
)
from foretune.decoding.nearest import ExactIndex, FaissIndex, Index, neighbour_weights, votes
from foretune.decoding.output_states import read_states
from foretune.decoding.references import References, read_references
from foretune.decoding.side_models import bare_model
from foretune.decoding.store_checks import check_heads, check_tensors
from foretune.decoding.store_folder import (
    read_store,
    write_metadata,
    write_store,
)
from foretune.errors import UserError
from foretune.formats import damage_named
from foretune.run import check_one_of

TENSOR_NAMES = ("keys", "values", "own", "sources")  # in the file; own: model_log_probs
SAMPLED = 512  # entries whose neighbours determine the automatic temperature
KEY_TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
Search = Literal["exact", "faiss"]


@dataclass(frozen=True)
class LookupResult:
    """What a store returns for Q states.

    Args:
        reference: (Q, V) next-token distribution r.
        places: (H, Q, K) indices of the retrieved entries, per head.
        weights: (H, Q, K) weight of each; they sum to 1 over K.
    """

    reference: Tensor
    places: Tensor
    weights: Tensor


class ReferenceStore:
    """A model's states on reference texts, and the tokens that followed them.

    Args:
        keys: (N, d) states.
        values: (N,) the token that followed each.
        model_log_probs: (N,) log-probability of that token under the model alone.
        sources: (N,) the row that each entry comes from, counted from 0.
        rows: The rows themselves, so that an answer can be traced.
        kind: What rows hold: "label", "choice", "completion" or "text".
        labels: Label → token; empty for running text.
        model: Fingerprints of the base and its adapter; see `base_and_adapter`.
        name: Folder or hub id of the model; None if unknown.
        lookup: How the store is queried by default.
        tuned: What `tune` returned; None before.
    """

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        model_log_probs: Tensor,
        sources: Tensor,
        *,
        rows: Sequence[Mapping[str, Any]] = (),
        kind: str = "text",
        labels: Mapping[str, int] | None = None,
        model: Mapping[str, Any] | None = None,
        name: str | None = None,
        lookup: Lookup | None = None,
        tuned: Mapping[str, Any] | None = None,
    ) -> None:
        self.keys, self.values, self.sources = keys, values, sources
        self.model_log_probs = model_log_probs
        self.rows = [dict(row) for row in rows]
        self.kind, self.labels = kind, dict(labels or {})
        self.model = dict(model) if model is not None else None
        self.name = name
        self.tuned = dict(tuned) if tuned is not None else None
        self.lookup = lookup or Lookup()
        check_tensors(*_tensors(self), num_rows=len(self.rows))
        check_heads(self.lookup.heads, keys.shape[1])
        self.folder: Path | None = None  # where it is saved
        self._exact: dict[tuple[int, str], list[ExactIndex]] = {}
        self._faiss: dict[int, list[FaissIndex]] = {}
        self._automatic: dict[tuple[int, int], float] = {}

    def __len__(self) -> int:
        return len(self.keys)

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
                it will be used with.
            rows: Each `{"prompt", "label"}`, `{"context", "candidates", "answer"}`,
                `{"prompt", "completion"}` or `{"text"}`; see `read_references`.
            tokenizer: The model's tokenizer.
            heads: Number of slices of a state that are looked up separately; can be changed later.
            permute_options: Read choice rows once per rotation of their candidates.
            key_type: "float32", "float16" or "bfloat16"; distances are always float32.

        Returns:
            The store, not tuned. Its lookup retrieves as many neighbours as the authors do, fewer
            in a small store. With labels the store alone answers, as in the authors' code; for
            running text its weight is a quarter.

        Raises:
            UserError: The model is not a causal language model, a row cannot be read, or states
                are not finite in `key_type`.

        Example:
            store = ReferenceStore.build(model, rows, tokenizer=tokenizer)
            store.tune()
            store.save("store")
        """
        check_one_of("key_type", key_type, tuple(KEY_TYPES))
        room = getattr(getattr(bare_model(model), "config", None), "max_position_embeddings", None)
        references = read_references(
            rows, tokenizer, max_tokens=room, permute_options=permute_options
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
        values = references.flat_values()
        states, log_probs, start = [], [], 0
        for batch, logits in read_states(model, references.texts, references.places):
            next_tokens = values[start : start + len(batch)].to(logits.device)
            start += len(batch)
            log_p = torch.log_softmax(logits.float(), -1)
            log_probs.append(log_p.gather(1, next_tokens[:, None])[:, 0].cpu())
            states.append(batch.to(key_type).cpu())
        keys = torch.cat(states)
        if not keys.isfinite().all():
            raise UserError(f"states are not finite in {str(key_type).removeprefix('torch.')}")
        sources = [
            source
            for source, text_values in zip(references.sources, references.values, strict=True)
            for _ in text_values
        ]
        check_heads(heads, keys.shape[1])
        max_neighbours = len(keys)
        if references.has_labels:
            # K near half of a small store mixes in other labels.
            max_neighbours = max(1, len(keys) // (2 * len(references.labels)))
        return cls(
            keys,
            values,
            torch.cat(log_probs),
            torch.tensor(sources),
            rows=rows,
            kind=references.kind,
            labels=references.labels,
            model=base_and_adapter(model),
            lookup=Lookup(
                neighbours=min(32, max_neighbours),
                mix=1.0 if references.has_labels else 0.25,
                heads=heads,
            ),
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
        squared, places = self.search(states, lookup, search)
        # A slice's distance is about 1/H of the full state's; times H it fits its temperature.
        weights = neighbour_weights(squared * lookup.heads, self.temperature(lookup))
        values = self.values.to(places.device)[places]
        return LookupResult(votes(weights, values, size).mean(0), places, weights)

    def temperature(self, lookup: Lookup) -> float:
        """T of a lookup.

        Without one of its own: the mean squared distance of entries to their K nearest entries
        from other rows.
        """
        if lookup.temperature is not None:
            return lookup.temperature
        key = (lookup.neighbours, lookup.heads)
        if key not in self._automatic:
            sample = _sample(len(self), SAMPLED, seed=0)
            k = min(lookup.neighbours, len(self))
            squared, _ = self._nearest_in_other_rows(sample, k, lookup.heads)
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

        The token of each entry is predicted from the entries of other rows, mixed with the model's
        own distribution; the highest mean log-probability wins. λ = 0 is among the choices: the
        store is then of no use.

        Args:
            neighbours: Values of K to try, as far as they are at most half of the store.
            multiples: Values of T to try, as multiples of the automatic temperature.
            mixes: Values of λ to try.
            sample: Number of entries to predict; all if there are fewer.
            seed: Random seed of that sample.

        Returns:
            The chosen lookup's fields, its mean log-probability, that of the model alone and that
            of the store's token counts mixed in. Also kept in `tuned` and `lookup`.

        Raises:
            UserError: The store has only one row.
        """
        if int(self.sources.unique().numel()) < 2:
            raise UserError("a store of one row cannot be tuned; build it from two or more")
        heads = self.lookup.heads
        entries = _sample(len(self), sample, seed)
        model_probs, tokens = self.model_log_probs[entries].exp(), self.values[entries]
        candidates = sorted({k for k in neighbours if k <= max(1, len(self) // 2)})
        squared, places = self._nearest_in_other_rows(entries, candidates[-1], heads)
        hits = (self.values[places] == tokens[None, :, None]).float()
        score, self.lookup = best_lookup(
            squared, hits, model_probs, neighbours=candidates, multiples=multiples, mixes=mixes
        )
        counts = torch.bincount(self.values, minlength=int(self.values.max()) + 1)
        frequency = counts[tokens] / len(self)
        counts_score, counts_mix = max(
            (mean_log((1 - mix) * model_probs + mix * frequency), mix) for mix in mixes
        )
        self.tuned = {
            **dataclasses.asdict(self.lookup),
            "log_likelihood": score,
            "model_alone": mean_log(model_probs),
            "with_counts": counts_score,
            "counts_mix": counts_mix,
            "entries": len(entries),
        }
        return dict(self.tuned)

    def check_model(self, model: Any) -> None:
        """Checks that the store was built with this model.

        Raises:
            UserError: The fingerprint of the base or of the adapter differs, or the store names a
                token that the model does not have.
        """
        vocabulary = getattr(getattr(bare_model(model), "config", None), "vocab_size", None)
        largest = int(self.values.max())
        if isinstance(vocabulary, int) and largest >= vocabulary:
            raise UserError(
                f"the store names token {largest} of a model with {vocabulary} tokens; rebuild it"
            )
        if self.model is None:
            return
        actual = base_and_adapter(model)
        if actual["base"] != self.model["base"]:
            raise UserError(
                f"the store was built with another base (fingerprint {str(self.model['base'])[:12]}"
                f", this model has {str(actual['base'])[:12]}); rebuild it with this model"
            )
        if actual["adapter"] != self.model["adapter"]:
            expected, present = (
                "no adapter" if digest is None else f"an adapter (fingerprint {digest[:12]})"
                for digest in (self.model["adapter"], actual["adapter"])
            )
            raise UserError(
                f"the store was built with {expected}, this model has {present}; rebuild it, or "
                "load the model as it was"
            )

    def save(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Writes `store.safetensors`, `store.json` and `rows.jsonl` into a new folder.

        Raises:
            UserError: The folder is not empty, and is not a store or `overwrite` is false.
        """
        tensors = {n: t.contiguous() for n, t in zip(TENSOR_NAMES, _tensors(self), strict=True)}
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
            store = cls(
                *(tensors[name] for name in TENSOR_NAMES),
                rows=rows,
                kind=metadata["kind"],
                labels=metadata["labels"],
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

    def _nearest_in_other_rows(self, entries: Tensor, k: int, heads: int) -> tuple[Tensor, Tensor]:
        """(squared distances, indices) of their nearest entries from other rows, (H, S, K) each."""
        per_head = [
            index.search(index.keys[entries], k, self.sources[entries])
            for index in self._exact_index(heads, self.keys.device)
        ]
        return torch.stack([h[0] for h in per_head]), torch.stack([h[1] for h in per_head])


def _tensors(store: ReferenceStore) -> tuple[Tensor, ...]:
    """The tensors of a store in the order of `TENSOR_NAMES`."""
    return store.keys, store.values, store.model_log_probs, store.sources


def _sample(count: int, size: int, seed: int) -> Tensor:
    """(size,) ascending indices below `count`, drawn without replacement."""
    drawn = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return drawn[:size].sort().values
