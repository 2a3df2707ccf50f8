"""`Lookup`: how a store is queried, and the choice of one by leave-one-row-out likelihood."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from foretune.decoding.nearest import neighbour_weights
from foretune.run import check_fraction, check_int, check_positive

NEIGHBOURS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
MULTIPLES = (0.03, 0.1, 0.3, 1.0, 3.0)  # of the automatic temperature
MIXES = (0.0, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0)


@dataclass(frozen=True, kw_only=True)
class Lookup:
    """How a store is queried.

    Args:
        neighbours: K, the number of entries retrieved for a state.
        temperature: T of their weights; None for the automatic temperature.
        mix: λ, the weight of the store in the output.
        heads: H, the number of slices of a state that are looked up separately.
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


def best_lookup(
    squared: Tensor,
    hits: Tensor,
    model_probs: Tensor,
    *,
    neighbours: Sequence[int],
    multiples: Sequence[float],
    mixes: Sequence[float],
) -> tuple[float, Lookup]:
    """The lookup with the highest mean log-probability of the entries' tokens.

    Args:
        squared: (H, S, K) squared distances of S entries to their nearest entries, ascending.
        hits: (H, S, K) 1.0 where such an entry carries the right token, else 0.0.
        model_probs: (S,) probability of the right token under the model alone.
        neighbours: Values of K to try.
        multiples: Values of T to try, as multiples of the automatic temperature.
        mixes: Values of λ to try.

    Returns:
        (mean log-probability, lookup).
    """
    heads = len(squared)
    best: tuple[float, Lookup] | None = None
    for k in neighbours:
        automatic = mean_distance(squared[..., :k] * heads)
        for multiple in multiples:
            weights = neighbour_weights(squared[..., :k] * heads, automatic * multiple)
            store_probs = (weights * hits[..., :k]).sum(-1).mean(0)
            for mix in mixes:
                score = mean_log((1 - mix) * model_probs + mix * store_probs)
                if best is None or score > best[0]:
                    temperature = automatic * multiple
                    lookup = Lookup(neighbours=k, temperature=temperature, mix=mix, heads=heads)
                    best = (score, lookup)
    assert best is not None
    return best


def mean_distance(squared: Tensor) -> float:
    """The mean of the finite distances, of any shape; above 0 even if all entries are equal."""
    finite = squared[squared.isfinite()]
    return max(float(finite.double().mean()) if len(finite) else 1.0, 1e-12)


def mean_log(probs: Tensor) -> float:
    """The mean log of probabilities of any shape."""
    return float(probs.double().log().mean())
