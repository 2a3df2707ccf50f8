"""How a store is queried, and what it returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from foretune.run import check_fraction, check_int, check_positive

NEIGHBOURS_AT_FIRST = 32
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


@dataclass(frozen=True)
class LookupResult:
    """What a store returns for Q states.

    Args:
        reference: (Q, V) next-token distribution r, or (Q, C) over labels.
        places: (H, Q, K) indices of the retrieved entries, per head.
        weights: (H, Q, K) weight of each; they sum to 1 over K.
    """

    reference: Tensor
    places: Tensor
    weights: Tensor

    def heaviest(self, query: int, most: int) -> list[tuple[int, float]]:
        """(index, weight) of the entries with the largest weights, averaged over heads.

        Args:
            query: Index of the state.
            most: Number of entries.
        """
        total: dict[int, float] = {}
        pairs = zip(
            self.places[:, query].flatten().tolist(),
            self.weights[:, query].flatten().tolist(),
            strict=True,
        )
        for place, weight in pairs:
            total[place] = total.get(place, 0.0) + weight / len(self.places)
        return sorted(total.items(), key=lambda item: (-item[1], item[0]))[:most]


def untuned_lookup(num_entries: int, num_labels: int, heads: int = 1) -> Lookup:
    """How a store is queried that was not tuned.

    As many neighbours as the authors retrieve, fewer in a small store of labels: K near half of
    such a store mixes in other labels. With labels the store alone answers, as in the authors'
    code; for running text its weight is a quarter.

    Args:
        num_entries: Entries of the store.
        num_labels: Its labels; 0 for running text.
        heads: Slices of a state that are looked up separately.

    >>> untuned_lookup(40, 4).neighbours, untuned_lookup(40, 0).mix
    (5, 0.25)
    """
    most = max(1, num_entries // (2 * num_labels)) if num_labels else num_entries
    return Lookup(
        neighbours=min(NEIGHBOURS_AT_FIRST, most), mix=1.0 if num_labels else 0.25, heads=heads
    )


def mean_distance(squared: Tensor) -> float:
    """The mean of the finite distances, of any shape; above 0 even if all entries are equal."""
    finite = squared[squared.isfinite()]
    return max(float(finite.double().mean()) if len(finite) else 1.0, 1e-12)
