"""The panels of the linear experiment, with what the paper states on each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from foretune.theory import figures
from foretune.theory import linear_extensions as extensions
from foretune.theory import linear_tables as tables
from foretune.theory.panel import Panel


def _panel(name: str, title: str, functions: Sequence[Callable[..., Any]], **texts: Any) -> Panel:
    rows, table, finding = functions
    return Panel(name=name, title=title, rows=rows, table=table, finding=finding, **texts)


EXACT = "Fine-tuning is solved in closed form (reduced-rank regression)."
PANELS = [
    _panel(
        "sweep",
        "Error on the unseen task after fine-tuning at rank k",
        (tables.sweep_rows, tables.sweep_table, tables.sweep_finding),
        paper="LoRA-ML is better than SR for every d, T, N, n and k (curves only, no numbers).",
        here="One of d, T, N, n, k differs from the defaults d = 10, T = 3, N = 5000, n = 100, k "
        "= 1. 'theory' is noise²(2dk − k²)/n, 'floor of SR' the smallest error that a change of "
        "rank k can leave of SR, 'off A*' is ‖A_hat − A*‖² (medians). 'none' adapts from A = 0, "
        f"without retraining. T = 2 is adapted at rank k here. {EXACT}",
    ),
    _panel(
        "curves",
        "Fine-tuning by gradient descent, as in the paper's figure",
        (tables.curves_rows, tables.curves_table, tables.curves_finding),
        paper="The only figure of this experiment: test task loss against fine-tuning iterations. "
        "T = 2 is fine-tuned at rank 3k.",
        here="The paper's learning rates and numbers of steps; the error is that on new inputs, "
        "while the paper shows the loss on the fine-tuning inputs.",
        figure=figures.curves,
    ),
    _panel(
        "rank-at-test",
        "Rank that the unseen task needs",
        (tables.rank_rows, tables.rank_table, tables.rank_finding),
        paper="Theorem 1 and Corollary 1: A_SR − A* has rank kT, so that adapters of rank kT or "
        "less fail and rank k(T+1) is needed. Theorem 3: with T ≥ 3 LoRA-ML recovers A*, so rank "
        "k is enough.",
        here=f"T = 3. {EXACT}",
        figure=figures.rank_at_test,
    ),
    _panel(
        "singular-values",
        "Singular values of A_hat − A*",
        (tables.values_rows, tables.values_table, tables.values_finding),
        paper="Rank kT for SR; 0 for LoRA-ML with T = 3 (Theorem 3), at most 2k with T = 2 "
        "(Theorem 2).",
        here="k = 1, medians over the seeds; the last column has the rank for each seed.",
        figure=figures.singular_values,
    ),
    _panel(
        "rate",
        "Error against the number of shots",
        (tables.rate_rows, tables.rate_table, tables.rate_finding),
        paper="Rate O(kd/n) from the LoRA-ML base.",
        here=f"Means over several draws of the shots, then medians over the seeds. {EXACT}",
        figure=figures.rate,
    ),
    _panel(
        "two-tasks",
        "Two seen tasks only",
        (tables.two_rows, tables.rank_table, tables.two_finding),
        paper="T = 2 is compared at rank 3k, which is enough for LoRA-ML by Theorem 2.",
        here=f"k = 1; ranks k, 2k and 3k. {EXACT}",
    ),
    _panel(
        "offsets",
        "Positive and zero-mean offsets",
        (extensions.offsets_rows, extensions.offsets_table, extensions.offsets_finding),
        paper="R_t* = U_t* U_t*ᵀ only; Theorem 1 is about the rank of the error, and a reviewer "
        "asked about its size.",
        here="d = 10, k = 1. Zero-mean: R_t* = U_t* V_t*ᵀ, with adapters U Vᵀ in retraining. The "
        "large-T values are k²(d−k) + k(d−k)(d−k+1)/T and k(d−k)²/T, derived here, not in the "
        f"paper. The paper's assumption k(T+1) ≤ d does not hold for T ≥ 10. {EXACT}",
        figure=figures.offsets,
    ),
    _panel(
        "symmetry",
        "Symmetric and asymmetric adapters in retraining",
        (extensions.symmetry_rows, extensions.symmetry_table, extensions.symmetry_finding),
        paper="The theory has symmetric adapters U Uᵀ in retraining and asymmetric ones at test.",
        here=f"d = 10, k = 1. {EXACT}",
    ),
    _panel(
        "recovery",
        "How often gradient descent ends away from A*",
        (extensions.recovery_rows, extensions.recovery_table, extensions.recovery_finding),
        paper="Spurious local minima exist for T ≥ 3 but are 'almost never found in practice'; "
        "gradient descent is enough.",
        here="Random problems, N = 5000. Those that have not recovered A* are trained further, to "
        "tell slow from stuck.",
    ),
]
