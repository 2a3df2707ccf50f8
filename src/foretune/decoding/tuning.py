"""Choosing how a store is queried: the score that `eval` prints, leaving out one row at a time.

Each entry is predicted from the entries of other rows. Among all settings the simplest wins whose
score is within one standard error of the highest, where the error is that of the mean difference
between the two over the entries. From simple to less so: the model alone (λ = 0), the setting of a
store that was not tuned, settings with one, two and three of K, T and λ changed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foretune.decoding.lookup import Lookup, mean_distance, untuned_lookup
from foretune.decoding.nearest import neighbour_weights, votes
from foretune.errors import UserError
from foretune.tasks.objectives.accuracy import accuracies
from foretune.training.adapted_scores import simplest, standard_error

Score = Callable[[Tensor, float], Tensor]  # (weights (H, S, K), λ) → scores (S,)


@dataclasses.dataclass(frozen=True)
class Trial:
    """One setting.

    Args:
        lookup: The setting, with a temperature of its own.
        changed: How many of K, T and λ differ from the store that was not tuned; −1 for the model
            alone.
        scores: (S,) score of each entry, higher is better.
    """

    lookup: Lookup
    changed: int
    scores: Tensor

    @property
    def mean(self) -> float:
        """The mean score."""
        return float(self.scores.mean())


def tune_store(
    store: Any,
    *,
    neighbours: Sequence[int],
    multiples: Sequence[float],
    mixes: Sequence[float],
    sample: int,
    seed: int,
) -> tuple[Lookup, dict[str, Any]]:
    """The best setting of a store, and what was measured; see `ReferenceStore.tune`.

    Raises:
        UserError: The store has only one row.
    """
    if int(store.sources.unique().numel()) < 2:
        raise UserError("a store of one row cannot be tuned; build it from two or more")
    predicted = store.sampled(sample, seed)
    entries = store.scored[predicted] if store.scored is not None else predicted
    start = untuned_lookup(len(store), len(store.labels), store.lookup.heads)
    start = dataclasses.replace(start, temperature=store.temperature(start))
    allowed = {k for k in neighbours if k <= max(1, len(store) // 2)} | {start.neighbours}
    squared, places = store.nearest_in_other_rows(entries, max(allowed), start.heads)
    values, answers = store.values[places], store.values[entries]
    model_probs = None if store.model_log_probs is None else store.model_log_probs[predicted].exp()
    measure = _accuracy(values, answers, model_probs, len(store.labels))
    if not store.labels:
        assert model_probs is not None
        measure = _log_likelihood(values, answers, model_probs)
    trials = list(
        _trials(
            squared * start.heads,
            start,
            measure,
            sorted(allowed),
            sorted({*multiples, 1.0}),
            sorted({*mixes, start.mix}) if model_probs is not None else [1.0],
        )
    )
    best, chosen = choose(trials)
    untuned = next(trial for trial in trials if trial.changed == 0)
    alone = next((trial for trial in trials if trial.changed < 0), None)
    measured = {
        **dataclasses.asdict(chosen.lookup),
        "metric": "accuracy" if store.labels else "log-likelihood per token",
        "score": chosen.mean,
        "standard_error": error_of(chosen.scores),
        "untuned": untuned.mean,
        "model_alone": None if alone is None else alone.mean,
        "best": best.mean,
        "entries": len(entries),
    }
    if not store.labels:
        assert model_probs is not None
        measured |= _with_counts(store, entries, model_probs, mixes)
    return chosen.lookup, measured


def choose(trials: Sequence[Trial]) -> tuple[Trial, Trial]:
    """(the trial with the highest mean, the simplest within one standard error of it).

    >>> a = Trial(Lookup(neighbours=1), 2, torch.tensor([1.0, 1.0, 0.0, 1.0]))
    >>> b = Trial(Lookup(neighbours=8), 0, torch.tensor([1.0, 1.0, 0.0, 0.0]))
    >>> [trial.lookup.neighbours for trial in choose([a, b])]
    [1, 8]
    """
    finite = [trial for trial in trials if bool(trial.scores.isfinite().all())] or list(trials)
    ordered = sorted(finite, key=lambda trial: (trial.changed, -trial.mean))
    best = max(ordered, key=lambda trial: trial.mean)
    scores = np.stack([trial.scores.double().numpy() for trial in ordered])
    return best, ordered[simplest(scores)]


def error_of(scores: Tensor) -> float:
    """The standard error of the mean of scores (n,)."""
    return float(standard_error(scores.double().numpy()))


def _trials(
    squared: Tensor,
    start: Lookup,
    measure: Score,
    neighbours: Sequence[int],
    multiples: Sequence[float],
    mixes: Sequence[float],
) -> Iterator[Trial]:
    """All settings; of those with λ = 0, which are one, the first alone.

    Args:
        squared: (H, S, K) squared distances times H, ascending.
        start: The setting of a store that was not tuned.
        measure: Scores the entries.
        neighbours: Values of K.
        multiples: Values of T, as multiples of the automatic temperature.
        mixes: Values of λ.
    """
    alone = False
    for k in neighbours:
        near = squared[..., :k]
        untuned = k == start.neighbours
        automatic = start.temperature if untuned else mean_distance(near)
        assert automatic is not None
        for multiple in multiples:
            weights = neighbour_weights(near, automatic * multiple)
            for mix in mixes:
                if mix == 0 and alone:
                    continue
                alone = alone or mix == 0
                lookup = dataclasses.replace(
                    start, neighbours=k, temperature=automatic * multiple, mix=mix
                )
                changed = (not untuned) + (multiple != 1) + (mix != start.mix)
                yield Trial(lookup, changed if mix else -1, measure(weights, mix))


def _accuracy(
    values: Tensor, answers: Tensor, model_probs: Tensor | None, num_labels: int
) -> Score:
    """Accuracies of S entries, from labels (H, S, K) of neighbours and the model's (S, C)."""

    def score(weights: Tensor, mix: float) -> Tensor:
        reference = votes(weights, values[..., : weights.shape[-1]], num_labels).mean(0)
        probs = reference if model_probs is None else (1 - mix) * model_probs + mix * reference
        return accuracies(probs, answers).double()

    return score


def _log_likelihood(values: Tensor, answers: Tensor, model_probs: Tensor) -> Score:
    """Log-probabilities of S tokens, from tokens (H, S, K) of neighbours and the model's (S,)."""
    hits = (values == answers[None, :, None]).float()

    def score(weights: Tensor, mix: float) -> Tensor:
        reference = (weights * hits[..., : weights.shape[-1]]).sum(-1).mean(0)
        return ((1 - mix) * model_probs + mix * reference).double().log()

    return score


def _with_counts(
    store: Any, entries: Tensor, model_probs: Tensor, mixes: Sequence[float]
) -> dict[str, float]:
    """The score of the store's token counts, mixed in as well as can be, and that λ."""
    counts = torch.bincount(store.values, minlength=int(store.values.max()) + 1)
    frequency = counts[store.values[entries]] / len(store)
    score, mix = max(
        (float(((1 - mix) * model_probs + mix * frequency).double().log().mean()), mix)
        for mix in mixes
    )
    return {"with_counts": score, "counts_mix": mix}
