"""Basis: adapt within the few directions in which the seen tasks' adapters differ.

`foretune.adapters.basis` takes the adapters of the seen tasks as a Gaussian: their mean μ, the
principal directions P_k times the standard deviations along them, and the spread σ outside of
these. A new task t has

    θ_t = μ + Σ_k z_tk P_k + f σ ε_t                                  its adapter
    z_t, ε_t = argmin Σ_j L(x_tj; θ_t) + s/2 · (‖z_t‖² + ‖ε_t‖²)        the posterior mode if s = 1

    symbol     here            meaning
    μ, P_k, σ  the base's basis
    s          strength        strength of the prior
    f          free            prior standard deviation of the free directions, in units of σ

No paper of its own. Its relatives:
    - EigenLoRAx (Kaushik et al. 2025, arXiv:2502.04700) learns coefficients in the principal
      subspace of existing adapters, factor by factor, without mean and prior, and adds random
      directions where adapters are few.
    - ABMLL (Zhang et al. 2025, arXiv:2508.14285) ties the adapters of tasks by a Gaussian prior.
    - LoRe (Bose et al. 2025, arXiv:2504.14439) and PAL (Chen et al. 2024, arXiv:2406.08469): a
      basis of reward models times the weights of a person.
    - Poly (Ponti et al. 2022, arXiv:2202.13914) and MHR (Caccia et al. 2022, arXiv:2211.03831): an
      inventory of adapters, learnt together with which of them a task uses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from typing_extensions import override

from foretune.errors import UserError
from foretune.run import Run, check_at_least, check_int, check_one_of, check_positive
from foretune.training.methods import AdaptMethod

if TYPE_CHECKING:
    from torch import nn

    from foretune.tasks.task import Objective
    from foretune.training.learners.joint import Learner


@dataclass(frozen=True, kw_only=True)
class FromBasis(AdaptMethod):
    """Fit coefficients in the basis of the seen tasks' adapters, under a Gaussian prior.

    Args:
        strength: s, strength of the prior; 0 for none.
        free: f, prior standard deviation of free directions beside the basis, in units of the
            spread of the seen tasks outside the span of the others; 0 for none.
        rank: Number of directions; None for all.
        start: Where a task begins: "mean" at the mean of the seen adapters; "nearest" at the seen
            adapter, within the span, that has the lowest loss on the task's training examples.
        learning_rate: Learning rate of Adam on the coefficients, in standard deviations.
    """

    strength: float = 1.0
    free: float = 0.0
    rank: int | None = None
    start: Literal["mean", "nearest"] = "mean"
    learning_rate: float = 0.1

    name: ClassVar[str] = "basis"
    label: ClassVar[str] = "basis"
    starts_at_base: ClassVar[bool] = False
    slot_fields: ClassVar[tuple[str, ...]] = ("learning_rate", "strength")

    def __post_init__(self) -> None:
        check_at_least("strength", self.strength, 0)
        check_at_least("free", self.free, 0)
        check_int("rank", self.rank, 0, optional=True)
        check_one_of("start", self.start, ("mean", "nearest"))
        check_positive("learning_rate", self.learning_rate)

    @override
    def fits(self, model: nn.Module) -> bool:
        from foretune.adapters.basis_file import basis_of

        return basis_of(model) is not None

    @property
    @override
    def shares_base(self) -> bool:
        return True

    @override
    def learner(
        self, model: nn.Module, objective: Objective, keys: Sequence[str], run: Run
    ) -> Learner:
        from foretune.adapters.basis_bank import coefficients_in, lora_of
        from foretune.adapters.basis_file import basis_of
        from foretune.tasks.labels import shown
        from foretune.training.learners.banks import make_bank
        from foretune.training.learners.basis import BasisLearner

        basis = basis_of(model)
        if basis is None:
            raise UserError(
                "this base has no basis of adapters to adapt in: PEFT-ML writes one beside its "
                "base, fit_basis makes one for any other; or use method lora or head"
            )
        copies_heads = basis.kind != "lora"
        labels = objective.common_labels()
        if copies_heads and labels != tuple(basis.labels):
            answers = "labels of their own" if labels is None else shown(labels) or "none"
            raise UserError(
                f"the basis of this base has heads for the labels {shown(basis.labels) or 'none'}, "
                f"these tasks have {answers}: use method lora or head"
            )
        lora = lora_of(basis, free=self.free > 0)
        bank = make_bank(model, objective, keys, run.seed, lora=lora, head_copies=copies_heads)
        return BasisLearner(
            model,
            objective,
            coefficients=coefficients_in(basis, bank, rank=self.rank, free=self.free),
            learning_rate=self.learning_rate,
            strength=self.strength,
            candidates=None if self.start == "mean" else basis.seen[:, : self.rank],
        )
