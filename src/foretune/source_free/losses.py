"""Losses of source-free adaptation, which need neither labels nor source data.

    symbol   here             shape      meaning
    z, p     logits           (n, C)     outputs of the classifier, and their softmax
    g        features         (n, d)     inputs of the classifier head
    ŷ        pseudo_labels    (N,)       class of the nearest centroid, for all N target examples
    S, F     scores, features (N, ·)     memory banks: the latest p and g of every target example

Papers: Liang, Hu, Feng, "Do We Really Need to Access the Source Data? Source Hypothesis Transfer
for Unsupervised Domain Adaptation" (SHOT), ICML 2020, arXiv:2002.08546. Yang et al., "Exploiting
the Intrinsic Neighborhood Structure for Source-free Domain Adaptation" (NRC), NeurIPS 2021,
arXiv:2110.04202. Yang et al., "Attracting and Dispersing: A Simple Approach for Source-free Domain
Adaptation" (AaD), NeurIPS 2022, arXiv:2205.04183. Ragab et al., "Source-Free Domain Adaptation with
Temporal Imputation for Time Series Data" (MAPU), KDD 2023, arXiv:2307.07542.

Deviations from the reference suite of the time-series benchmarks:
    - SHOT's centroids are means of unit-length features without an appended 1, so the
      pseudo-labels do not depend on the scale of the features (paper, eq. 4: cosine distance).
    - Memory banks are filled once by the model and then updated example by example. The suite
      re-initialises NRC's at random in every step and fills AaD's in shuffled order.
    - AaD's dispersion decays with the share of steps completed (paper: iter / max_iter).
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

# NRC: affinity of neighbours that are not mutual, and of neighbours' neighbours
NON_MUTUAL_AFFINITY = 0.1


@dataclasses.dataclass(frozen=True)
class Outputs:
    """What a model computes for n examples.

    Args:
        features: (n, d) inputs of the classifier head.
        logits: (n, C) outputs of the classifier.
        sequence: (n, channels, T) features over time; None unless the loss needs them.
    """

    features: Tensor
    logits: Tensor
    sequence: Tensor | None = None


class SourceFreeLoss(Protocol):
    """A loss of a batch, with a state that depends on all target examples.

    Attributes:
        refreshes: Whether `refresh` is called at the start of every epoch, or only once.
        imputes: Whether the loss compares features over time with those imputed from masked
            windows.
    """

    refreshes: bool
    imputes: bool

    def refresh(self, target: Outputs) -> None:
        """Updates the state from the outputs for all N target examples, in their order."""

    def __call__(
        self, outputs: Outputs, indices: Tensor, progress: float, imputed: Tensor | None
    ) -> Tensor:
        """The loss of a batch, a scalar.

        Args:
            outputs: Outputs for the n examples of the batch.
            indices: (n,) their indices among the N target examples.
            progress: Share of the steps completed, from 0 to 1.
            imputed: (n, channels, T) features imputed from masked windows; None unless `imputes`.
        """


def entropy(logits: Tensor) -> Tensor:
    """The mean entropy, in nats, of predictions with logits (n, C); a scalar."""
    return -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()


def negative_diversity(logits: Tensor) -> Tensor:
    """−H of the mean prediction, a scalar; logits (n, C).

    0 if all examples are assigned to one class with certainty, −log C if the mean is uniform.
    """
    mean = logits.softmax(1).mean(0)
    return (mean * mean.clamp_min(1e-12).log()).sum()


def pseudo_labels(features: Tensor, logits: Tensor) -> Tensor:
    """SHOT's pseudo-labels (N,): the class of the nearest centroid by cosine (eq. 4, 5).

    Centroids are computed twice: first as means of all features weighted by the class's
    probability, then as means of the examples assigned to the class. Classes that no example
    predicts are left out.

    Args:
        features: (N, d).
        logits: (N, C).
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


class Shot(SourceFreeLoss):
    """SHOT: confident, diverse predictions that agree with the pseudo-labels.

    Args:
        entropy: Weight of the mean entropy of the predictions.
        diversity: Weight of the negative entropy of the mean prediction.
        labels: Weight of the cross-entropy with the pseudo-labels.
    """

    refreshes = True
    imputes = False

    def __init__(self, *, entropy: float, diversity: float, labels: float) -> None:
        self.entropy, self.diversity, self.labels = entropy, diversity, labels
        self.pseudo = torch.empty(0, dtype=torch.long)

    @override
    def refresh(self, target: Outputs) -> None:
        self.pseudo = pseudo_labels(target.features, target.logits)

    @override
    def __call__(
        self, outputs: Outputs, indices: Tensor, progress: float, imputed: Tensor | None
    ) -> Tensor:
        z = outputs.logits
        loss = self.entropy * entropy(z) + self.diversity * negative_diversity(z)
        return loss + self.labels * F.cross_entropy(z, self.pseudo[indices])


class Banks:
    """Memory banks: the latest unit-length features and predictions of every target example.

    Args:
        target: Outputs for all N target examples, in their order.

    Attributes:
        features: (N, d).
        scores: (N, C) probabilities.
    """

    def __init__(self, target: Outputs) -> None:
        self.features = F.normalize(target.features.detach().float(), dim=1)
        self.scores = target.logits.detach().float().softmax(1)

    def update(self, outputs: Outputs, indices: Tensor) -> None:
        """Replaces the entries at `indices` (n,) with the outputs for these n examples."""
        self.features[indices] = F.normalize(outputs.features.detach().float(), dim=1)
        self.scores[indices] = outputs.logits.detach().float().softmax(1)

    def nearest(self, indices: Tensor, count: int) -> Tensor:
        """(n, min(count, N − 1)) indices of the nearest neighbours by cosine, itself excluded.

        Args:
            indices: (n,) the examples whose neighbours are wanted.
            count: Neighbours per example.
        """
        similarity = self.features[indices] @ self.features.T
        similarity.scatter_(1, indices[:, None], -torch.inf)  # no example is its own neighbour
        return similarity.topk(min(count, len(self.features) - 1), dim=1).indices


class Nrc(SourceFreeLoss):
    """NRC: predictions agree with those of their neighbours, above all of mutual ones.

    Args:
        neighbours: K, neighbours per example.
    """

    refreshes = imputes = False

    def __init__(self, *, neighbours: int) -> None:
        self.neighbours = neighbours
        self.banks: Banks | None = None

    @override
    def refresh(self, target: Outputs) -> None:
        self.banks = Banks(target)

    @override
    def __call__(
        self, outputs: Outputs, indices: Tensor, progress: float, imputed: Tensor | None
    ) -> Tensor:
        assert self.banks is not None
        self.banks.update(outputs, indices)
        p, scores = outputs.logits.softmax(1), self.banks.scores
        nearest = self.banks.nearest(indices, self.neighbours)  # (n, K)
        expanded = self.banks.nearest(nearest.flatten(), self.neighbours)
        expanded = expanded.view(*nearest.shape, nearest.shape[1])  # (n, K, K)
        mutual = (expanded == indices[:, None, None]).any(2)
        affinity = torch.where(mutual, 1.0, NON_MUTUAL_AFFINITY)
        nearest_agreement = (scores[nearest] * p[:, None]).sum(2)  # (n, K)
        expanded_agreement = (scores[expanded.flatten(1)] * p[:, None]).sum(2)  # (n, K·K)
        self_agreement = (scores[indices] * p).sum(1)
        neighbourhood = (
            (affinity * nearest_agreement).sum(1)
            + NON_MUTUAL_AFFINITY * expanded_agreement.sum(1)
            + self_agreement
        )
        return negative_diversity(outputs.logits) - neighbourhood.mean()


class Aad(SourceFreeLoss):
    """AaD: predictions are attracted to their neighbours' and dispersed from the batch's others.

    Args:
        neighbours: K, neighbours per example.
        decay: β of the dispersion's weight λ.
    """

    refreshes = imputes = False

    def __init__(self, *, neighbours: int, decay: float) -> None:
        self.neighbours, self.decay = neighbours, decay
        self.banks: Banks | None = None

    @override
    def refresh(self, target: Outputs) -> None:
        self.banks = Banks(target)

    @override
    def __call__(
        self, outputs: Outputs, indices: Tensor, progress: float, imputed: Tensor | None
    ) -> Tensor:
        assert self.banks is not None
        self.banks.update(outputs, indices)
        p = outputs.logits.softmax(1)
        nearest = self.banks.nearest(indices, self.neighbours)
        attract = (self.banks.scores[nearest] * p[:, None]).sum((1, 2))
        disperse = p @ p.T
        disperse = disperse.sum(1) - disperse.diagonal()
        return (self.dispersion_weight(progress) * disperse - attract).mean()

    def dispersion_weight(self, progress: float) -> float:
        """λ = (1 + 10·progress)^−β, which decays from 1 as progress goes from 0 to 1."""
        return (1 + 10 * progress) ** -self.decay


class Mapu(SourceFreeLoss):
    """MAPU: SHOT's two entropies, and features that the source's imputer can predict.

    Args:
        entropy: Weight of the mean entropy of the predictions.
        diversity: Weight of the negative entropy of the mean prediction.
        imputation: Weight of the mean squared error of the imputed features.
    """

    refreshes = False
    imputes = True

    def __init__(self, *, entropy: float, diversity: float, imputation: float) -> None:
        self.entropy, self.diversity, self.imputation = entropy, diversity, imputation

    @override
    def refresh(self, target: Outputs) -> None:
        pass

    @override
    def __call__(
        self, outputs: Outputs, indices: Tensor, progress: float, imputed: Tensor | None
    ) -> Tensor:
        assert imputed is not None and outputs.sequence is not None
        z = outputs.logits
        loss = self.entropy * entropy(z) + self.diversity * negative_diversity(z)
        return loss + self.imputation * F.mse_loss(imputed, outputs.sequence)


def mask_patches(x: Tensor, patches: int = 8) -> Tensor:
    """Windows (n, channels, length) with one stretch of time per window set to 0.

    Args:
        x: (n, channels, length) windows.
        patches: Stretches of about equal length, of which one is drawn per window.
    """
    length = x.shape[-1]
    if length < patches:
        patches = length
    ends = torch.linspace(0, length, patches + 1).round().long().to(x.device)
    drawn = torch.randint(patches, (len(x),), device=x.device)
    time = torch.arange(length, device=x.device)
    masked = (time >= ends[drawn][:, None]) & (time < ends[drawn + 1][:, None])
    return x.masked_fill(masked[:, None], 0.0)
