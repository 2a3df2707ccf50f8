"""Subspace SFDA: adapt a factorised classifier to unlabelled data by tuning only its Tucker cores.

Paper: "Efficient Source-Free Time-Series Adaptation via Parameter Subspace Disentanglement", ICLR
2025, arXiv:2410.02147.

    symbol   here                     shape             meaning
    W        layer.weight             (out, in, K)      weight of a convolution
    T        layer.core               (r_out, r_in, K)  core; the only part tuned on the target
    V₁ V₂    out_factor, in_factor    (out, r) (in, r)  bases of its two channel modes, frozen
    RF       rank_factor                                r = C / RF

Source: train; factorise W ≈ T ×₁ V₁ ×₂ V₂ by HOOI (source_free/hooi.py); fine-tune all factors.
Target: T is tuned by a source-free loss (source_free/losses.py); V₁, V₂ and the classifier are
frozen, so any change of W lies in span(V₁) × span(V₂). The paper's PAC-Bayes argument: fewer
trainable parameters give a smaller ‖W_target − W_source‖ and a tighter bound on the target error.

Deviations:
    - AdamW with the `Run`'s schedule; the reference suite of the losses uses Adam and halves the
      learning rate every 50 epochs. The source is trained without label smoothing.
    - Losses: see the deviations in source_free/losses.py.
    - MAPU's imputer is trained after the classifier, on its frozen features, not jointly with it.
    - Beyond the paper: Conv2d and linear layers (where T is the r × r core of LoRA-XS).
Silent in the available sources (abstract, reviews, summaries; no code is public):
    - What batch normalisation does on the target: `bn`. By default the statistics follow the
      target and the weights are frozen.
    - Ranks of the first layer: its input channels are those of the data and keep their full rank.
    - Whether V₁ and V₂ are re-orthonormalised after fine-tuning: here they are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from typing_extensions import override

from foretune.errors import UserError
from foretune.run import Run, check_at_least, check_int, check_one_of, check_positive
from foretune.training.methods import AdaptMethod

if TYPE_CHECKING:
    from torch import nn

    from foretune.source_free.learner import SourceFreeLearner
    from foretune.source_free.losses import SourceFreeLoss
    from foretune.tasks.task import Objective

PAPER = {
    "title": "Efficient Source-Free Time-Series Adaptation via Parameter Subspace Disentanglement",
    "authors": "Gaurav Patel and Christopher Sandino and Behrooz Mahasseni and Ellen L Zippi and "
    "Erdrin Azemi and Ali Moin and Juri Minxha",
    "year": 2025,
    "venue": "ICLR",
    "arxiv": "2410.02147",
}
# Loss weights of the time-series suite for human activity recognition.
ENTROPY = {"shot": 0.6709, "mapu": 0.05897}
DIVERSITY = {"shot": 0.8969, "mapu": 0.2759}


@dataclass(frozen=True, kw_only=True)
class SubspaceSFDA(AdaptMethod):
    """Tune only the cores of a factorised classifier on unlabelled examples.

    Args:
        learning_rate: Learning rate of the tuned parameters.
        loss: "shot", "nrc", "aad", or "mapu" (for a model with an imputer: `add_imputer`).
        tuned: "core" for the Tucker cores, "all" for everything but the classifier, "batch-norm"
            for the weights of batch normalisation.
        bn: Batch normalisation: "stats" lets its statistics follow the target, "affine" also tunes
            its weights, "frozen" changes neither. `tuned` "all" and "batch-norm" tune the weights
            unless frozen.
        rank_factor: RF: a model without Tucker layers is factorised, a mode of C channels with
            rank C // RF. None leaves its layers unchanged.
        entropy: Weight of the mean entropy of the predictions (shot, mapu); None for the default
            of the loss.
        diversity: Weight of the entropy of the mean prediction (shot, mapu); None for the default
            of the loss.
        pseudo_labels: Weight of the cross-entropy with the pseudo-labels (shot).
        imputation: Weight of the imputation error (mapu).
        neighbours: K, neighbours per example (nrc, aad).
        decay: β of the dispersion weight λ = (1 + 10·share of the steps)^−β (aad).

    Raises:
        UserError: A value is out of range; the message names the field.
    """

    learning_rate: float = 1e-3
    loss: Literal["shot", "nrc", "aad", "mapu"] = "shot"
    tuned: Literal["core", "all", "batch-norm"] = "core"
    bn: Literal["stats", "frozen", "affine"] = "stats"
    rank_factor: int | None = 4
    entropy: float | None = None
    diversity: float | None = None
    pseudo_labels: float = 0.3312
    imputation: float = 0.5
    neighbours: int = 5
    decay: float = 10.0

    name: ClassVar[str] = "subspace-sfda"
    label: ClassVar[str] = "subspace SFDA"
    paper: ClassVar[dict[str, Any] | None] = PAPER

    def __post_init__(self) -> None:
        check_positive("learning_rate", self.learning_rate)
        check_one_of("loss", self.loss, ("shot", "nrc", "aad", "mapu"))
        check_one_of("tuned", self.tuned, ("core", "all", "batch-norm"))
        check_one_of("bn", self.bn, ("stats", "frozen", "affine"))
        check_int("rank_factor", self.rank_factor, 1, optional=True)
        check_at_least("entropy", self.entropy, 0)
        check_at_least("diversity", self.diversity, 0)
        for name in ("pseudo_labels", "imputation", "decay"):
            if getattr(self, name) is None:
                raise UserError(f"{name} must be a number not below 0, got None")
            check_at_least(name, getattr(self, name), 0)
        check_int("neighbours", self.neighbours, 1)
        if self.tuned == "batch-norm" and self.bn == "frozen":
            raise UserError("tuned=batch-norm with bn=frozen trains nothing; use bn=affine")

    @override
    def learner(
        self, model: nn.Module, objective: Objective, keys: Sequence[str], run: Run
    ) -> SourceFreeLearner:
        from foretune.source_free.learner import SourceFreeLearner
        from foretune.source_free.tucker import tucker_layers, tuckerize
        from foretune.source_free.unlabelled import Unlabelled

        if not isinstance(objective, Unlabelled):
            raise UserError(
                f"{self.name} adapts to unlabelled examples; give the tasks the objective "
                "Unlabelled(source=…), whose source is the fitted Classification of the source"
            )
        factored: dict[str, Any] = {}
        if self.rank_factor is not None and not tucker_layers(model):
            factored = tuckerize(model, rank_factor=self.rank_factor)
        self._set_trainable(model)
        return SourceFreeLearner(
            model,
            objective,
            learning_rate=self.learning_rate,
            loss=self._loss(model),
            bn=self.bn,
            tuned_state=self._tuned_state(model, factored),
            factored=factored,
            method=self.to_dict(),
        )

    def _set_trainable(self, model: nn.Module) -> None:
        """Freezes everything but what `tuned` and `bn` select among the trainable parameters.

        Raises:
            UserError: Nothing is left to train.
        """
        from foretune.models.surgery import batch_norms, head_modules
        from foretune.source_free.tucker import core_parameters

        affine = {f"{name}.{p}" for name in batch_norms(model) for p in ("weight", "bias")}
        selected = set(core_parameters(model)) if self.tuned == "core" else set()
        if self.tuned == "all":
            fixed = (*head_modules(model), "imputer")
            names = [name for name, _ in model.named_parameters()]
            selected = {n for n in names if not n.startswith(tuple(f"{m}." for m in fixed))}
        if self.bn == "affine" or self.tuned == "batch-norm":
            selected |= affine
        if self.bn == "frozen":
            selected -= affine
        for name, p in model.named_parameters():
            p.requires_grad_(p.requires_grad and name in selected)
        if not any(p.requires_grad for p in model.parameters()):
            raise UserError(
                f"tuned={self.tuned} matches no trainable parameter of {type(model).__name__}; "
                "core needs a rank_factor or a model from `foretune sfda prepare`, batch-norm "
                "needs batch-norm layers"
            )

    def _tuned_state(self, model: nn.Module, factored: dict[str, Any]) -> list[str]:
        """The keys of the state that adaptation may change, or that factorising has added."""
        from foretune.models.surgery import batch_norms

        state = list(model.state_dict())
        changed = {name for name, p in model.named_parameters() if p.requires_grad}
        running = tuple(f"{name}." for name in batch_norms(model))
        if running and self.bn != "frozen":
            parameters = dict(model.named_parameters())
            changed |= {n for n in state if n.startswith(running) and n not in parameters}
        in_factored = tuple(f"{name}." for name in factored)
        return [n for n in state if n in changed or (in_factored and n.startswith(in_factored))]

    def _loss(self, model: nn.Module) -> SourceFreeLoss:
        from foretune.source_free.losses import Aad, Mapu, Nrc, Shot

        if self.loss == "nrc":
            return Nrc(neighbours=self.neighbours)
        if self.loss == "aad":
            return Aad(neighbours=self.neighbours, decay=self.decay)
        entropy = ENTROPY[self.loss] if self.entropy is None else self.entropy
        diversity = DIVERSITY[self.loss] if self.diversity is None else self.diversity
        if self.loss == "shot":
            return Shot(entropy=entropy, diversity=diversity, labels=self.pseudo_labels)
        if not hasattr(model, "imputer"):
            raise UserError(
                "loss mapu needs an imputer trained on the source; run `foretune sfda prepare "
                "--imputer` or call add_imputer(model, source, run)"
            )
        return Mapu(entropy=entropy, diversity=diversity, imputation=self.imputation)
