"""The randomised SVD of large layers against the exact one: time, and energy that is lost.

python benchmarks/claims/low_rank.py

Matrices whose i-th singular value is i^(-p), and Gaussian noise, whose spectrum is flat: the worst
case. 64 triplets of two sizes; of noise medians of 3 runs that take turns; one thread.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULT = Path(__file__).resolve().parents[1] / "results" / "low_rank.json"
RANK, RUNS = 64, 3
SHAPES = ((1024, 4096), (2048, 2048))
DECAYS = (1.0, 0.5, 0.25, 0.0)


def matrix(shape: tuple[int, int], decay: float) -> Any:
    """(out, in) with that decay of its singular values; Gaussian noise for 0."""
    import torch

    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(shape, generator=generator)
    if decay == 0:
        return noise
    size = min(shape)
    u = torch.linalg.qr(torch.randn(shape[0], size, generator=generator)).Q
    v = torch.linalg.qr(noise.T[:, :size] if shape[1] >= size else noise).Q
    return u * torch.arange(1, size + 1).float().pow(-decay) @ v.T


def measure(shape: tuple[int, int], decay: float) -> dict[str, Any]:
    """Seconds and energy of both."""
    import torch

    from foretune.linalg.low_rank import randomised_svd

    a = matrix(shape, decay)
    seconds: dict[str, list[float]] = {"exact": [], "randomised": []}
    energy = {}
    for _ in range(RUNS if decay == 0 else 1):
        start = time.process_time()
        values = torch.linalg.svd(a, full_matrices=False)[1][:RANK]
        seconds["exact"].append(time.process_time() - start)
        start = time.process_time()
        sketched = randomised_svd(a, RANK)[1]
        seconds["randomised"].append(time.process_time() - start)
        energy = {
            "exact": float(values.square().sum()),
            "randomised": float(sketched.square().sum()),
        }
    total = float(a.square().sum())
    return {
        "shape": shape,
        "decay": decay,
        "share_held": energy["exact"] / total,
        "lost": 1 - energy["randomised"] / energy["exact"],
        "seconds": {name: statistics.median(taken) for name, taken in seconds.items()},
    }


def table(result: dict[str, Any]) -> str:
    """One line per matrix."""
    lines = [
        "| matrix | singular values | energy in 64 triplets, % | of that lost, % | times faster |",
        "|---" * 5 + "|",
    ]
    for row in result["rows"]:
        name = "noise (flat)" if row["decay"] == 0 else f"i^−{row['decay']:g}"
        faster = row["seconds"]["exact"] / row["seconds"]["randomised"]
        lost = max(0.0, 100 * row["lost"])
        lines.append(
            f"| {row['shape'][0]} × {row['shape'][1]} | {name} | {100 * row['share_held']:.1f} "
            f"| {lost:.3f} | {faster:.0f} |"
        )
    return "\n".join(lines)


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {"all": table}


def main() -> None:
    """Measures and writes the result."""
    import torch

    from foretune.training.record import environment

    torch.set_num_threads(1)
    rows = [measure(shape, decay) for shape in SHAPES for decay in DECAYS]
    result = {"claim": "low_rank", "rank": RANK, "runs": RUNS, "rows": rows}
    result |= {"threads": 1, "environment": environment()}
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
