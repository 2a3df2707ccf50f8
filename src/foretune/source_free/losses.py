"""Losses of source-free adaptation: what can be asked of predictions without labels or source data.

    symbol   here            shape      meaning
    z, p     logits          (n, C)     outputs, and their softmax
    g        features        (n, d)     what the classifier reads
    ŷ        pseudo_labels   (N,)       class of the nearest centroid, for all N target rows
    S, F     scores, features (N, ·)    banks: the newest p and g of every target row

Papers: Liang, Hu, Feng, "Do We Really Need to Access the Source Data? Source Hypothesis Transfer
for Unsupervised Domain Adaptation" (SHOT), ICML 2020, arXiv:2002.08546. Yang et al., "Exploiting
the Intrinsic Neighborhood Structure for Source-free Domain Adaptation" (NRC), NeurIPS 2021,
arXiv:2110.04202. Yang et al., "Attracting and Dispersing: A Simple Approach for Source-free Domain
Adaptation" (AaD), NeurIPS 2022, arXiv:2205.04183. Ragab et al., "Source-Free Domain Adaptation with
Temporal Imputation for Time Series Data" (MAPU), KDD 2023, arXiv:2307.07542.

Deviations from the reference suite of the time-series benchmarks:
    - SHOT's centroids are of features of unit length without an appended 1, so that the
      pseudo-labels do not depend on the features' scale (paper, eq. 4: cosine distance).
    - Banks are filled once from the model and then kept up to date row by row. The suite draws
      NRC's anew at random in every step, and fills AaD's in shuffled order.
    - AaD's dispersion fades with the share of all steps done (paper: iter / max_iter).
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

OTHERS = 0.1  # NRC: affinity of a neighbour that is not mutual, and of neighbours' neighbours


@dataclasses.dataclass(frozen=True)
class Outputs:
    """What a model says of rows.

    Args:
        features: (n, d) what its classifier reads.
        logits: (n, C).
        sequence: (n, channels, T) features over time, where the loss asks for them.
    """

    features: Tensor
    logits: Tensor
    sequence: Tensor | None = None


class SourceFreeLoss(Protocol):
    """A loss of a batch, with what it remembers of all target rows."""

    refreshes: bool
    """Whether `see` is called at the start of every epoch, or once only."""
    imputes: bool
    """Whether it compares features over time with those imputed from a masked window."""

    def see(self, every: Outputs) -> None:
        """Takes notice of all target rows, in their order."""

    def __call__(
        self, outputs: Outputs, rows: Tensor, done: float, imputed: Tensor | None
    ) -> Tensor:
        """The loss of a batch: `rows` (n,) are the places of its rows, `done` is the share of the
        steps done, `imputed` (n, channels, T) what the imputer makes of the masked windows."""


def entropy(logits: Tensor) -> Tensor:
    """The mean entropy of the predictions, in nats."""
    return -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()


def negative_diversity(logits: Tensor) -> Tensor:
    """−H of the batch's mean prediction: 0 when all say one class, −log C when all are alike."""
    mean = logits.softmax(1).mean(0)
    return (mean * mean.clamp_min(1e-12).log()).sum()


def pseudo_labels(features: Tensor, logits: Tensor) -> Tensor:
    """SHOT's labels (N,): of the nearest centroid by cosine, centroids made twice (eq. 4, 5).

    First each class's centroid is the mean of all features weighted by its probability; then it
    is the mean of the rows that were given the class. Only classes that some row predicts count.
    """
    features = F.normalize(features.float(), dim=1)
    present = F.one_hot(logits.argmax(1), logits.shape[1]).sum(0) > 0
    weights = logits.float().softmax(1)
    for _ in range(2):
        centroids = F.normalize(weights.T @ features, dim=1)
        similarity = (features @ centroids.T).masked_fill(~present, -torch.inf)
        labels = similarity.argmax(1)
        weights = F.one_hot(labels, logits.shape[1]).to(features)
        present = weights.sum(0) > 0
    return labels


class Shot:
    """SHOT: sure predictions, spread over the classes, that agree with the pseudo-labels."""

    refreshes = True
    imputes = False

    def __init__(self, *, entropy: float, diversity: float, labels: float) -> None:
        self.entropy, self.diversity, self.labels = entropy, diversity, labels
        self.pseudo = torch.empty(0, dtype=torch.long)

    def see(self, every: Outputs) -> None:
        self.pseudo = pseudo_labels(every.features, every.logits)

    def __call__(
        self, outputs: Outputs, rows: Tensor, done: float, imputed: Tensor | None
    ) -> Tensor:
        z = outputs.logits
        loss = self.entropy * entropy(z) + self.diversity * negative_diversity(z)
        return loss + self.labels * F.cross_entropy(z, self.pseudo[rows])


class Banks:
    """The newest features (of unit length) and predictions of every target row."""

    def __init__(self, every: Outputs) -> None:
        self.features = F.normalize(every.features.detach().float(), dim=1)
        self.scores = every.logits.detach().float().softmax(1)

    def renew(self, outputs: Outputs, rows: Tensor) -> None:
        self.features[rows] = F.normalize(outputs.features.detach().float(), dim=1)
        self.scores[rows] = outputs.logits.detach().float().softmax(1)

    def nearest(self, rows: Tensor, count: int) -> Tensor:
        """(n, count) places of each row's nearest others by cosine; fewer where there are fewer."""
        similarity = self.features[rows] @ self.features.T
        similarity.scatter_(1, rows[:, None], -torch.inf)  # a row is no neighbour of itself
        return similarity.topk(min(count, len(self.features) - 1), dim=1).indices


class Nrc:
    """NRC: a prediction agrees with those of its neighbours, most with mutual ones."""

    refreshes = imputes = False

    def __init__(self, *, neighbours: int) -> None:
        self.neighbours = neighbours
        self.banks: Banks | None = None

    def see(self, every: Outputs) -> None:
        self.banks = Banks(every)

    def __call__(
        self, outputs: Outputs, rows: Tensor, done: float, imputed: Tensor | None
    ) -> Tensor:
        assert self.banks is not None
        self.banks.renew(outputs, rows)
        p, scores = outputs.logits.softmax(1), self.banks.scores
        near = self.banks.nearest(rows, self.neighbours)  # (n, K)
        beyond = self.banks.nearest(near.flatten(), self.neighbours).view(
            *near.shape, near.shape[1]
        )
        mutual = (beyond == rows[:, None, None]).any(2)
        affinity = torch.where(mutual, 1.0, OTHERS)
        agree = (scores[near] * p[:, None]).sum(2)  # (n, K)
        further = (scores[beyond.flatten(1)] * p[:, None]).sum(2)  # (n, K·M)
        itself = (scores[rows] * p).sum(1)
        neighbourhood = (affinity * agree).sum(1) + OTHERS * further.sum(1) + itself
        return negative_diversity(outputs.logits) - neighbourhood.mean()


class Aad:
    """AaD: predictions are drawn to those of neighbours and pushed from others of the batch."""

    refreshes = imputes = False

    def __init__(self, *, neighbours: int, decay: float) -> None:
        self.neighbours, self.decay = neighbours, decay
        self.banks: Banks | None = None

    def see(self, every: Outputs) -> None:
        self.banks = Banks(every)

    def __call__(
        self, outputs: Outputs, rows: Tensor, done: float, imputed: Tensor | None
    ) -> Tensor:
        assert self.banks is not None
        self.banks.renew(outputs, rows)
        p = outputs.logits.softmax(1)
        near = self.banks.nearest(rows, self.neighbours)
        attract = (self.banks.scores[near] * p[:, None]).sum((1, 2))
        disperse = p @ p.T
        disperse = disperse.sum(1) - disperse.diagonal()
        return (self.dispersion(done) * disperse - attract).mean()

    def dispersion(self, done: float) -> float:
        """λ = (1 + 10·done)^−β: 1 at the start, then less and less."""
        return (1 + 10 * done) ** -self.decay


class Mapu:
    """MAPU: SHOT's two entropies, and features that the source's imputer can still fill in."""

    refreshes = False
    imputes = True

    def __init__(self, *, entropy: float, diversity: float, imputation: float) -> None:
        self.entropy, self.diversity, self.imputation = entropy, diversity, imputation

    def see(self, every: Outputs) -> None:
        pass

    def __call__(
        self, outputs: Outputs, rows: Tensor, done: float, imputed: Tensor | None
    ) -> Tensor:
        assert imputed is not None and outputs.sequence is not None
        z = outputs.logits
        loss = self.entropy * entropy(z) + self.diversity * negative_diversity(z)
        return loss + self.imputation * F.mse_loss(imputed, outputs.sequence)


def mask_patches(x: Tensor, patches: int = 8) -> Tensor:
    """The windows (n, channels, length) with one of `patches` stretches of time set to 0 in each.

    Which one is drawn for each window.
    """
    length = x.shape[-1]
    if length < patches:
        patches = length
    ends = torch.linspace(0, length, patches + 1).round().long().to(x.device)
    chosen = torch.randint(patches, (len(x),), device=x.device)
    time = torch.arange(length, device=x.device)
    hidden = (time >= ends[chosen][:, None]) & (time < ends[chosen + 1][:, None])
    return x.masked_fill(hidden[:, None], 0.0)
