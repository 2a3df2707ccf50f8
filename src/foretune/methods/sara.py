"""SaRA: adapt by training only the entries of the smallest absolute value.

Paper: Hu, Zhang, Yi, Huang, Wang, Ma, "SaRA: High-Efficient Diffusion Model Fine-tuning with
Progressive Sparse Low-Rank Adaptation", ICLR 2025, arXiv:2409.06633.

    M = 1[|P0| < θ_t]                                                      (eq. 2)
    P ← P − η ∇P ⊙ M                                                       (eq. 3)
    L = L_task + λ ‖P ⊙ M‖_*                                               (eq. 4, 5)
    η = 10⁻³ exp(−350 θ_t), the default learning rate                      (eq. 12)

    symbol   here          meaning
    P0       model         the original parameters: matrices, kernels, biases, scales
    θ_t      threshold     entries below it are considered idle, and are trained
    λ        nuclear       weight of the low-rank term
    t*       reselect      share of the steps after which M ← M ∧ [|P| < θ_t], the rest of M frozen

Deviations:
    - The optimiser's moments of entries that stay in M are kept at t*; the authors' code makes a
      new optimiser.
    - By default the low-rank term is taken over one random matrix of more than 64 rows and columns
      in each step, as in the authors' code, not over all matrices as in eq. 5 (`nuclear_over`):
      over all of them λ = 5·10⁻³ outweighs the loss of small models. λ is by default that of the
      authors' script, 5·10⁻⁴, a tenth of the paper's. In the authors' default optimiser the term
      has no effect.
    - Parameters of one axis (biases, scales) have no rank and no such term.
    - The task's classification head is trained in full, without the term.
    - Above a threshold of 2·10⁻³, where the fit of eq. 12 ends, the learning rate stays constant:
      at 0.02, which small models need, the formula gives 10⁻⁶.
    - `fraction` in place of `threshold`: models differ in the size of their weights.
Silent in the paper:
    - How to prevent that the change is applied to another base, or to the same one in another
      precision. Here the file holds positions, values and a SHA-256 of each parameter of its base,
      and does not load on a base that differs.
    - Weight decay: AdamW's, on the trained entries only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from typing_extensions import override

from foretune.errors import UserError
from foretune.run import Run, check_at_least, check_one_of, check_positive
from foretune.training.methods import AdaptMethod

if TYPE_CHECKING:
    from torch import Tensor, nn

    from foretune.tasks.task import Objective
    from foretune.training.learners.joint import Learner

PAPER = {
    "title": "SaRA: High-Efficient Diffusion Model Fine-tuning with Progressive Sparse Low-Rank "
    "Adaptation",
    "authors": "Teng Hu and Jiangning Zhang and Ran Yi and Hongrui Huang and Yabiao Wang and "
    "Lizhuang Ma",
    "year": 2025,
    "venue": "ICLR",
    "arxiv": "2409.06633",
}
LARGEST = 2e-3  # largest threshold to which eq. 12 was fitted


@dataclass(frozen=True, kw_only=True)
class SaRA(AdaptMethod):
    """Train the entries of the smallest absolute value, one task after the other.

    Args:
        threshold: θ_t: entries below it in absolute value are trained.
        fraction: Replaces the threshold by the one below which this share of the entries lies.
        learning_rate: Learning rate of AdamW; None for 10⁻³ exp(−350 min(θ_t, 2·10⁻³)).
        nuclear: λ, the weight of the nuclear norm of the trained entries; 0 for off.
        nuclear_over: "one" for the norm of one random matrix of more than 64 rows and columns in
            each step, as in the authors' code; "all" for the sum over all matrices and kernels, as
            in the equation.
        reselect: Share of the steps after which entries that have grown beyond the threshold are
            frozen; None for never.
    """

    threshold: float = 2e-3
    fraction: float | None = None
    learning_rate: float | None = None
    nuclear: float = 5e-4
    nuclear_over: Literal["one", "all"] = "one"
    reselect: float | None = 0.5

    name: ClassVar[str] = "sara"
    label: ClassVar[str] = "SaRA"
    paper: ClassVar[dict[str, Any] | None] = PAPER

    def __post_init__(self) -> None:
        check_positive("threshold", self.threshold)
        if self.fraction is not None:
            _check_positive_share("fraction", self.fraction, up_to_one=True)
        if self.learning_rate is not None:
            check_positive("learning_rate", self.learning_rate)
        if self.nuclear is None or self.nuclear == math.inf:
            raise UserError(f"nuclear must be a number not below 0, got {self.nuclear}; 0 is off")
        check_at_least("nuclear", self.nuclear, 0)
        check_one_of("nuclear_over", self.nuclear_over, ("one", "all"))
        if self.reselect is not None:
            _check_positive_share("reselect", self.reselect, up_to_one=False)

    @override
    def learner(
        self, model: nn.Module, objective: Objective, keys: Sequence[str], run: Run
    ) -> Learner:
        from foretune.adapters.sparse import SparseDelta, task_heads
        from foretune.training.learners.sara import SaRALearner

        heads = task_heads(model, objective.num_outputs())
        indices, threshold = self.support(model, heads)
        delta = SparseDelta(model, indices, threshold=threshold, heads=heads)
        return SaRALearner(
            delta,
            objective,
            learning_rate=self.rate(threshold),
            nuclear=self.nuclear,
            nuclear_over=self.nuclear_over,
            reselect=self.reselect,
        )

    def support(self, model: nn.Module, heads: Sequence[str]) -> tuple[dict[str, Tensor], float]:
        """Positions (m,) of the entries to train, by parameter name, and the threshold (eq. 2)."""
        from foretune.adapters.entries import entries_below, threshold_of

        threshold = self.threshold
        if self.fraction is not None:
            threshold = threshold_of(model, self.fraction, leave_out=heads)
        return entries_below(model, threshold, heads=heads), threshold

    def rate(self, threshold: float) -> float:
        """The learning rate: `learning_rate` if set, else that of eq. 12.

        >>> f"{SaRA().rate(2e-3):.4e}"
        '4.9659e-04'
        """
        if self.learning_rate is not None:
            return self.learning_rate
        return 1e-3 * math.exp(-350 * min(threshold, LARGEST))


def _check_positive_share(name: str, value: Any, *, up_to_one: bool) -> None:
    """Checks that the value is a share above 0 (and below 1 unless `up_to_one`).

    Raises:
        UserError: It is not.
    """
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 < value <= 1 or (value == 1 and not up_to_one):
        end = "at most 1" if up_to_one else "below 1"
        raise UserError(f"{name} must be a number above 0 and {end}, or None; got {value!r}")
