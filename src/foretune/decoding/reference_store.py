"""`ReferenceStore`: the last hidden states of a model on known texts, and the token that followed.

It belongs to one base (and one adapter on it) as an adapter does, whose fingerprints it records.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from foretune.adapters.fingerprint import base_and_adapter
from foretune.decoding.nearest import ExactIndex, FaissIndex, Index, neighbour_weights, votes
from foretune.decoding.output_states import read_states
from foretune.decoding.references import References, read_references
from foretune.decoding.side_models import bare_model
from foretune.errors import UserError
from foretune.files import whole_folder, write_whole
from foretune.run import check_fraction, check_int, check_one_of, check_positive

TENSORS, ABOUT, ROWS = "store.safetensors", "store.json", "rows.jsonl"
NEIGHBOURS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
MULTIPLES = (0.03, 0.1, 0.3, 1.0, 3.0)  # of the automatic temperature
MIXES = (0.0, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0)
SAMPLED = 512  # entries whose neighbours set the automatic temperature
KEY_TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
Search = Literal["exact", "faiss"]


@dataclass(frozen=True, kw_only=True)
class Lookup:
    """How a store is asked.

    Args:
        neighbours: K, entries fetched for a state.
        temperature: T of their weights; None for the automatic one.
        mix: λ, the share of the store in the output.
        heads: H, slices of a state that are looked up apart.
    """

    neighbours: int = 32
    temperature: float | None = None
    mix: float = 1.0
    heads: int = 1

    def __post_init__(self) -> None:
        check_int("neighbours", self.neighbours, 1)
        if self.temperature is not None:
            check_positive("temperature", self.temperature)
        check_fraction("mix", self.mix)
        check_int("heads", self.heads, 1)


@dataclass(frozen=True)
class Found:
    """What a store answers to Q states.

    Args:
        reference: (Q, V), the distribution r over the vocabulary.
        places: (H, Q, K), the entries found, for each head.
        weights: (H, Q, K), of each; they sum to 1 over K.
    """

    reference: Tensor
    places: Tensor
    weights: Tensor


class ReferenceStore:
    """States of a model on reference texts, and what followed them.

    Args:
        keys: (N, d) states.
        values: (N,) the token that followed each.
        own: (N,) log-probability that the model itself gave that token.
        sources: (N,) the row of each entry, from 0.
        rows: The rows, so that an answer can be traced.
        kind: What rows hold: "label", "choice", "completion" or "text".
        labels: Label → token, empty for running text.
        model: Fingerprints of the base and its adapter; see `base_and_adapter`.
        name: Folder or hub id of the model, where it is known.
        lookup: How it is asked.
        tuned: What `tune` found; None before.
    """

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        own: Tensor,
        sources: Tensor,
        *,
        rows: Sequence[Mapping[str, Any]] = (),
        kind: str = "text",
        labels: Mapping[str, int] | None = None,
        model: Mapping[str, str | None] | None = None,
        name: str | None = None,
        lookup: Lookup | None = None,
        tuned: Mapping[str, Any] | None = None,
    ) -> None:
        self.keys, self.values, self.own, self.sources = keys, values, own, sources
        self.rows = [dict(row) for row in rows]
        self.kind, self.labels = kind, dict(labels or {})
        self.model = dict(model) if model is not None else None
        self.name = name
        self.tuned = dict(tuned) if tuned is not None else None
        self.lookup = lookup or Lookup()
        _check_tensors(self)
        _check_heads(self.lookup.heads, keys.shape[1])
        self._indices: dict[tuple[int, str, str], list[Index]] = {}
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
        """Reads rows with a model and keeps its states.

        Args:
            model: A causal language model of transformers or peft, with the adapter on that it
                will have in use.
            rows: Each `{"prompt", "label"}`, `{"context", "candidates", "answer"}`,
                `{"prompt", "completion"}` or `{"text"}`; see `read_references`.
            tokenizer: Of the model.
            heads: Slices of a state that are looked up apart; it can be changed later.
            permute_options: Choice rows once for each rotation of their candidates.
            key_type: "float32", "float16" or "bfloat16"; distances are float32 in any case.

        Returns:
            The store, not tuned. As many neighbours as the authors take, fewer in a small store;
            for labels the store alone answers, as in the authors' code, and running text takes a
            quarter from the store.

        Raises:
            UserError: No causal language model, rows that cannot be read, or states that are not
                finite in `key_type`.

        Example:
            store = ReferenceStore.build(model, rows, tokenizer=tokenizer)
            store.tune()
            store.save("store")
        """
        check_one_of("key_type", key_type, tuple(KEY_TYPES))
        room = getattr(getattr(bare_model(model), "config", None), "max_position_embeddings", None)
        found = read_references(rows, tokenizer, max_tokens=room, permute_options=permute_options)
        return cls.of_references(model, found, rows=rows, heads=heads, key_type=KEY_TYPES[key_type])

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
        """A store of texts that are tokenised already."""
        values = torch.tensor([v for some in references.values for v in some])
        states, own, done = [], [], 0
        for some, logits in read_states(model, references.texts, references.places):
            followed = values[done : done + len(some)].to(logits.device)
            done += len(some)
            log_p = torch.log_softmax(logits.float(), -1)
            own.append(log_p.gather(1, followed[:, None])[:, 0].cpu())
            states.append(some.to(key_type).cpu())
        keys = torch.cat(states)
        if not keys.isfinite().all():
            raise UserError(f"states are not finite in {str(key_type).removeprefix('torch.')}")
        counted = [
            source
            for source, some in zip(references.sources, references.values, strict=True)
            for _ in some
        ]
        _check_heads(heads, keys.shape[1])
        fewest = len(keys)
        if references.has_labels:
            # K near half of a small store mixes in other labels.
            fewest = max(1, len(keys) // (2 * len(references.labels)))
        return cls(
            keys,
            values,
            torch.cat(own),
            torch.tensor(counted),
            rows=rows,
            kind=references.kind,
            labels=references.labels,
            model=base_and_adapter(model),
            lookup=Lookup(
                neighbours=min(32, fewest),
                mix=1.0 if references.has_labels else 0.25,
                heads=heads,
            ),
        )

    def search(
        self, states: Tensor, lookup: Lookup, search: Search = "exact"
    ) -> tuple[Tensor, Tensor]:
        """The nearest entries of every state, for every head.

        Args:
            states: (Q, d).
            lookup: Its `neighbours` and `heads` count.
            search: "exact", or "faiss".

        Returns:
            (squared distances (H, Q, K), float32; entries (H, Q, K)).
        """
        if states.shape[1] != self.keys.shape[1]:
            raise UserError(
                f"states have {states.shape[1]} numbers, those of the store {self.keys.shape[1]}"
            )
        k, heads = min(lookup.neighbours, len(self)), lookup.heads
        indices = self._index(heads, search, states.device)
        parts = states.detach().chunk(heads, dim=1)
        found = [index.search(part, k) for index, part in zip(indices, parts, strict=True)]
        return torch.stack([f[0] for f in found]), torch.stack([f[1] for f in found])

    def reference(
        self, states: Tensor, lookup: Lookup, size: int, search: Search = "exact"
    ) -> Found:
        """The distribution of what followed the nearest entries.

        Args:
            states: (Q, d).
            lookup: How.
            size: V, of the vocabulary.
            search: As of `search`.
        """
        squared, places = self.search(states, lookup, search)
        # H slices have a distance of 1/H of the whole's, times H they share its temperature.
        weights = neighbour_weights(squared * lookup.heads, self.temperature(lookup))
        values = self.values.to(places.device)[places]
        return Found(votes(weights, values, size).mean(0), places, weights)

    def temperature(self, lookup: Lookup) -> float:
        """T of a lookup: what it says, or the mean squared distance of an entry to its K nearest
        ones of other rows."""
        if lookup.temperature is not None:
            return lookup.temperature
        key = (lookup.neighbours, lookup.heads)
        if key not in self._automatic:
            some = _sample(len(self), SAMPLED, seed=0)
            squared, _ = self._others(some, min(lookup.neighbours, len(self)), lookup.heads)
            self._automatic[key] = _mean_distance(squared * lookup.heads)
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

        Every entry's token is predicted by the entries of other rows, mixed with what the model
        itself gave it; the highest mean log-probability wins. λ = 0 is among the choices: the
        store is of no use then.

        Args:
            neighbours: K that are tried, those below half of the store.
            multiples: T that are tried, times the automatic one.
            mixes: λ that are tried.
            sample: Entries that are predicted; all where there are fewer.
            seed: Draws them.

        Returns:
            What was found, in `tuned` and `lookup` too: the lookup, its mean log-probability, that
            of the model alone and that of the store's token counts mixed in.

        Raises:
            UserError: Only one row.
        """
        if int(self.sources.unique().numel()) < 2:
            raise UserError("a store of one row cannot be tuned: nothing is left when it is out")
        heads = self.lookup.heads
        some = _sample(len(self), sample, seed)
        own, wanted = self.own[some].exp(), self.values[some]
        tried = sorted({k for k in neighbours if k <= max(1, len(self) // 2)})
        squared, places = self._others(some, tried[-1], heads)
        right = (self.values[places] == wanted[None, :, None]).float()
        best: tuple[float, Lookup] | None = None
        for k in tried:
            automatic = _mean_distance(squared[..., :k] * heads)
            for multiple in multiples:
                weights = neighbour_weights(squared[..., :k] * heads, automatic * multiple)
                voted = (weights * right[..., :k]).sum(-1).mean(0)
                for mix in mixes:
                    score = _mean_log((1 - mix) * own + mix * voted)
                    if best is None or score > best[0]:
                        best = (
                            score,
                            Lookup(
                                neighbours=k, temperature=automatic * multiple, mix=mix, heads=heads
                            ),
                        )
        assert best is not None
        counts = torch.bincount(self.values, minlength=int(self.values.max()) + 1)
        prior = counts[wanted] / len(self)
        counts_score, counts_mix = max((_mean_log((1 - m) * own + m * prior), m) for m in mixes)
        self.lookup = best[1]
        self.tuned = {
            **dataclasses.asdict(best[1]),
            "log_likelihood": best[0],
            "model_alone": _mean_log(own),
            "with_counts": counts_score,
            "counts_mix": counts_mix,
            "entries": len(some),
        }
        return dict(self.tuned)

    def check_model(self, model: Any) -> None:
        """Refuses a model that the store was not made with.

        Raises:
            UserError: Another base or adapter, by their fingerprints.
        """
        if self.model is None:
            return
        got = base_and_adapter(model)
        if got["base"] != self.model["base"]:
            raise UserError(
                f"the store was made with another base (fingerprint {str(self.model['base'])[:12]},"
                f" this one has {str(got['base'])[:12]}); build it again with this model"
            )
        if got["adapter"] != self.model["adapter"]:
            names = [
                "no adapter" if one is None else f"an adapter (fingerprint {one[:12]})"
                for one in (self.model["adapter"], got["adapter"])
            ]
            raise UserError(
                f"the store was made with {names[0]}, this model has {names[1]}; build it again, "
                "or load the model as it was"
            )

    def save(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Writes the store whole: `store.safetensors`, `store.json`, `rows.jsonl`.

        Raises:
            UserError: Something is in the folder, and it is no store or `overwrite` is false.
        """
        folder = Path(folder)
        check_place(folder, overwrite=overwrite)
        tensors = {
            name: getattr(self, name).contiguous() for name in ("keys", "values", "own", "sources")
        }
        with whole_folder(folder) as part:
            save_file(tensors, part / TENSORS, metadata={"format": "pt"})
            lines = [json.dumps(row, ensure_ascii=False, default=str) for row in self.rows]
            (part / ROWS).write_text("".join(f"{line}\n" for line in lines), "utf-8")
            (part / ABOUT).write_text(self._about(), "utf-8")

    def save_lookup(self, folder: str | Path) -> None:
        """Writes what `tune` found into the store's folder; nothing else changes."""
        write_whole(Path(folder) / ABOUT, self._about())

    @classmethod
    def load(cls, folder: str | Path) -> ReferenceStore:
        """Reads what `save` wrote.

        Raises:
            UserError: No store is there, or its files do not fit one another.
        """
        folder = Path(folder)
        for name in (TENSORS, ABOUT, ROWS):
            if not (folder / name).is_file():
                raise UserError(
                    f"{folder} is no store: it has no {name}; foretune datastore build makes one"
                )
        try:
            about = json.loads((folder / ABOUT).read_text("utf-8"))
            lines = (folder / ROWS).read_text("utf-8").split("\n")
            rows = [json.loads(line) for line in lines if line]
            tensors = load_file(folder / TENSORS)
            return cls(
                *(tensors[name] for name in ("keys", "values", "own", "sources")),
                rows=rows,
                kind=about["kind"],
                labels=about["labels"],
                model=about["model"],
                name=about["name"],
                lookup=Lookup(**about["lookup"]),
                tuned=about["tuned"],
            )
        except (ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
            reason = " ".join(str(error).split())[:120]
            raise UserError(f"{folder} is a damaged store: {reason}; build it again") from error

    def _about(self) -> str:
        known = {
            "kind": self.kind,
            "labels": self.labels,
            "model": self.model,
            "name": self.name,
            "lookup": dataclasses.asdict(self.lookup),
            "tuned": self.tuned,
            "entries": len(self),
            "hidden_size": self.keys.shape[1],
        }
        return json.dumps(known, indent=1, ensure_ascii=False) + "\n"

    def _index(self, heads: int, search: Search, device: torch.device) -> list[Index]:
        key = (heads, search, str(device))
        if key not in self._indices:
            _check_heads(heads, self.keys.shape[1])
            check_one_of("search", search, ("exact", "faiss"))
            made: type = ExactIndex if search == "exact" else FaissIndex
            parts = self.keys.to(device).chunk(heads, dim=1)
            self._indices[key] = [made(part) for part in parts]
        return self._indices[key]

    def _others(self, some: Tensor, k: int, heads: int) -> tuple[Tensor, Tensor]:
        """The nearest entries of other rows, (H, entries, K) each, of some entries."""
        _check_heads(heads, self.keys.shape[1])
        found = [
            ExactIndex(part, self.sources).search(part[some], k, self.sources[some])
            for part in self.keys.chunk(heads, dim=1)
        ]
        return torch.stack([f[0] for f in found]), torch.stack([f[1] for f in found])


def check_place(folder: Path, *, overwrite: bool) -> None:
    """Refuses a folder that a store must not be written to.

    Raises:
        UserError: Something is in it, and it is no store or `overwrite` is false.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; a store is a folder")
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if names and not overwrite:
        raise UserError(f"{folder} is not empty: --overwrite replaces a store, or choose another")
    if names and ABOUT not in names:
        raise UserError(
            f"{folder} holds no store ({', '.join(names[:3])}, …): it is not overwritten; choose "
            "another folder"
        )


def _check_tensors(store: ReferenceStore) -> None:
    shapes = [tuple(t.shape) for t in (store.keys, store.values, store.own, store.sources)]
    n = len(store.keys)
    if store.keys.ndim != 2 or n == 0 or shapes[1:] != [(n,)] * 3:
        raise UserError(f"a store needs keys (N, d) and values, own, sources (N,), got {shapes}")
    if store.rows and int(store.sources.max()) >= len(store.rows):
        raise UserError(f"entries name row {int(store.sources.max())} of {len(store.rows)}")


def _check_heads(heads: int, width: int) -> None:
    if heads < 1 or width % heads:
        raise UserError(f"heads must divide the width of a state, {width}; got {heads}")


def _sample(count: int, most: int, seed: int) -> Tensor:
    drawn = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return drawn[:most].sort().values


def _mean_distance(squared: Tensor) -> float:
    """The mean of the finite ones; never 0, which entries that are all alike would give."""
    known = squared[squared.isfinite()]
    return max(float(known.double().mean()) if len(known) else 1.0, 1e-12)


def _mean_log(probability: Tensor) -> float:
    return float(probability.double().log().mean())
