"""Writes docs/performance.md and the speed lines of the README from results/speed-*.json.

python benchmarks/speed/page.py            # write it
python benchmarks/speed/page.py --check    # is it up to date?
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "results"
PAGE = HERE.parents[1] / "docs" / "performance.md"
README = HERE.parents[1] / "README.md"

Rows = list[dict[str, Any]]

INTRO = """# Performance

*This page is made by `python benchmarks/speed/page.py` from `benchmarks/results/speed-*.json`.*

All speed claims of foretune are ratios to a cost that cannot be avoided: the *floor*, a plain full
fine-tuning step of the same model on the same tokens, in one batch, with the same fused optimiser
and no adapters. Variants take turns in one process, in a new order each time; a number is the
median of the ratios over the turns, and the range after it is their minimum and maximum. Time is
the CPU time of the process. The process keeps freed memory, as the command line of foretune does
([why](design.md)); the floor benefits from that as much as the rest.
"""


def main() -> None:
    pages = {PAGE: page(), README: readme()}
    if "--check" not in sys.argv:
        for file, text in pages.items():
            file.write_text(text, encoding="utf-8")
        return
    for file, text in pages.items():
        if not file.is_file() or file.read_text("utf-8") != text:
            print(f"{file.name} is older than the results; run python benchmarks/speed/page.py")
            sys.exit(1)


def readme() -> str:
    """The README with its speed lines, between the two markers, regenerated."""
    before, rest = README.read_text("utf-8").split("<!-- speed -->\n")
    _, after = rest.split("<!-- end of speed -->", 1)
    return f"{before}<!-- speed -->\n{summary()}<!-- end of speed -->{after}"


def summary() -> str:
    """The main ratios, one line each."""
    data = {
        name: json.loads((RESULTS / f"speed-{name}.json").read_text("utf-8"))["rows"]
        for name in ("meta-step", "ragged", "memory", "adaptation")
    }
    steps = [r for r in data["meta-step"] if "to_floor" in r and r["precision"] == "fp32"]
    medians = [r["to_floor"]["ours"]["median"] for r in steps if r["threads"] == 1]
    many = max((r for r in steps if r["peft_to_ours"]), key=lambda r: r["tasks"])
    packed = [r["to_padded_floor"]["median"] for r in data["ragged"]]
    fills = [r["fill"] for r in data["ragged"]]
    adapting = next(r for r in data["adaptation"] if r["what"] == "adapt" and "peft_to_ours" in r)
    scoring = max((r for r in data["adaptation"] if r["what"] == "score"), key=lambda r: r["tasks"])
    memory = {(r["tasks"], r["variant"]): r["megabytes"] for r in data["memory"]}
    shares = [mb / memory[t, "floor"] for (t, v), mb in memory.items() if v == "ours"]
    quarters = [mb / memory[t, "floor"] for (t, v), mb in memory.items() if "quarter" in v]
    return (
        f"- a PEFT-ML step over 2 to {max(r['tasks'] for r in steps)} tasks: "
        f"{min(medians):.2f} to {max(medians):.2f} of plain fine-tuning on the same tokens, "
        f"{statistics.geometric_mean(medians):.2f} on average; a peft loop over {many['tasks']} "
        f"tasks takes {many['peft_to_ours']['median']:.1f} times as long\n"
        f"- batches of dialogues, {100 * min(fills):.0f} to {100 * max(fills):.0f} % tokens "
        f"when padded: {min(packed):.2f} to {max(packed):.2f} of plain fine-tuning with padding\n"
        f"- memory: {max(shares):.2f} of plain fine-tuning's, {max(quarters):.2f} with a quarter "
        "of the batch at a time\n"
        f"- adapting {adapting['tasks']} unseen tasks: a peft loop takes "
        f"{adapting['peft_to_ours']['median']:.1f} times as long, the best loop with one adapter "
        f"{adapting['reused_to_ours']['median']:.1f}; scoring with {scoring['tasks']:,} adapters: "
        f"{scoring['to_base']['ours']['median']:.2f} of the base model's forward pass\n"
    )


def page() -> str:
    parts = [INTRO]
    for name, section in SECTIONS.items():
        file = RESULTS / f"speed-{name}.json"
        if file.is_file():
            data = json.loads(file.read_text("utf-8"))
            parts += [section(data), again(data)]
    return "\n".join(parts)


def again(data: dict[str, Any]) -> str:
    machine = data["machine"]
    versions = machine["versions"]
    return (
        f"To reproduce: `{data['command']}`. Measured on {machine['cpu_cores']} CPU cores "
        f"({machine.get('processor') or 'x86-64'}), torch {versions['torch']}, transformers "
        f"{versions['transformers']}, peft {versions['peft']}.\n"
    )


def meta_step(data: dict[str, Any]) -> str:
    rows = [row for row in data["rows"] if "not_run" not in row]
    left = [row for row in data["rows"] if "not_run" in row]
    plain = [row for row in rows if row["precision"] == "fp32" and row["threads"] == 1]
    medians = [row["to_floor"]["ours"]["median"] for row in plain]
    errors = [row["gradient_error"] for row in plain if row["gradient_error"] is not None]
    peft = [row["peft_to_ours"]["median"] for row in plain if row["peft_to_ours"]]
    lines = [
        "## A meta-retraining step compared with a plain step\n",
        f"PEFT-ML's joint step over all tasks, every linear layer adapted at rank 8, costs "
        f"**{statistics.geometric_mean(medians):.2f} of the floor** in the geometric mean of "
        f"{len(medians)} cells (maximum {max(medians):.2f}), one thread, fp32. A peft loop over "
        f"the tasks takes {min(peft):.2f} to {max(peft):.2f} times as long as ours. The gradients "
        "of the base and of all adapters differ from the peft loop's by at most "
        f"{max(errors):.0e} of each tensor's maximum.\n",
        table(
            ["model", "tasks × examples × length", "precision", "threads", "ours / floor",
             "peft loop / floor", "authors' loop / floor", "peft loop / ours"],
            [
                [row["model"], cell(row), row["precision"], row["threads"],
                 shown(row["to_floor"]["ours"]), shown(row["to_floor"].get("peft")),
                 shown(row["to_floor"].get("authors")), shown(row["peft_to_ours"])]
                for row in sorted(rows, key=lambda r: (r["precision"] != "fp32", r["threads"]))
            ],
        ),
    ]  # fmt: skip
    if left:
        lines.append(
            "Not run, because a step takes too long on two CPU cores: "
            + ", ".join(f"{row['model']} {cell(row)}" for row in left)
            + ".\n"
        )
    return "\n".join(lines)


def memory(data: dict[str, Any]) -> str:
    cells: dict[tuple, dict[str, float]] = {}
    for row in data["rows"]:
        key = (row["model"], f"{row['tasks']} × {row['batch']} × {row['length']}")
        cells.setdefault(key, {})[row["variant"]] = row["megabytes"]
    variants = list(next(iter(cells.values())))
    return "\n".join(
        [
            "## Memory\n",
            "Peak memory of one forward and backward pass beyond weights and gradients, in MB (and "
            "as a share of the floor's). `a quarter at once` is a token budget of a quarter of the "
            "batch, `blocks computed again` is gradient checkpointing; neither changes the "
            "gradients.\n",
            table(
                ["model", "tasks × examples × length", *variants],
                [
                    [*key, *(f"{mb[v]:.0f} ({mb[v] / mb['floor']:.2f})" for v in variants)]
                    for key, mb in cells.items()
                ],
            ),
        ]
    )


def ragged(data: dict[str, Any]) -> str:
    return "\n".join(
        [
            "## Examples of different lengths\n",
            "Context and reply of ConvAI2, tokenised by MiniLM's tokenizer. Padding is removed "
            "inside unmodified Hugging Face models; attention stays within each example. `fill` is "
            "the share of positions that are tokens when the whole batch is padded.\n",
            table(
                ["model", "tasks × examples", "fill", "ours / packed floor", "ours / padded floor",
                 "peft loop / ours"],
                [
                    [row["model"], f"{row['tasks']} × {row['batch']}", row["fill"],
                     shown(row["to_packed_floor"]), shown(row["to_padded_floor"]),
                     shown(row["peft_to_ours"])]
                    for row in data["rows"]
                ],
            ),
        ]
    )  # fmt: skip


def adaptation(data: dict[str, Any]) -> str:
    parts = {what: [r for r in data["rows"] if r["what"] == what] for what in
             ("adapt", "score", "top layers")}  # fmt: skip
    return "\n".join(
        [
            "## Many unseen tasks on a frozen base\n",
            "One training step of the adapters of all tasks. `reused` is one adapter that serves "
            "all tasks in turn, without the cost of swapping its weights.\n",
            table(
                ["model", "tasks × examples × length", "peft loop / ours", "reused loop / ours"],
                [
                    [row["model"], cell(row), shown(row.get("peft_to_ours")),
                     shown(row["reused_to_ours"])]
                    for row in parts["adapt"]
                ],
            ),
            "Scoring with all adapters in mixed batches of 64 examples, compared with the forward "
            "pass of the base alone.\n",
            table(
                ["model", "tasks × examples × length", "ours / base", "peft loop / base"],
                [
                    [row["model"], cell(row), shown(row["to_base"]["ours"]),
                     shown(row["to_base"].get("peft"))]
                    for row in parts["score"]
                ],
            ),
            "Adapters in the upper third of the layers: a training step that recomputes the layers "
            "below every time, compared with one that computes them once and caches the result.\n",
            table(
                ["model", "tasks × examples × length", "every step / once"],
                [[r["model"], cell(r), shown(r["every_to_once"])] for r in parts["top layers"]],
            ),
        ]
    )  # fmt: skip


def bank(data: dict[str, Any]) -> str:
    return "\n".join(
        [
            "## Building the adapters\n",
            "CPU seconds to create rank-8 adapters on every linear layer of a 12 × 768 encoder. "
            "The first build in a process may take longer where the system allocates memory "
            "slowly.\n",
            table(
                ["system", "tasks", "CPU seconds", "first build"],
                [
                    [row["system"], row["tasks"], row["cpu_seconds"], row["first_cpu_seconds"]]
                    for row in data["rows"]
                ],
            ),
        ]
    )


def pipeline(data: dict[str, Any]) -> str:
    rates = [row for row in data["rows"] if row["part"] == "tokens a second"]
    large = [row for row in data["rows"] if row["part"] == "large collection"]
    return "\n".join(
        [
            "## The data pipeline\n",
            "Tokens per CPU second, one thread: TaskData, sampler and collate alone, compared with "
            "what a PEFT-ML step on MiniLM consumes. Fresh rows are tokenised on the fly; warm "
            "rows are already tokenised.\n",
            table(
                ["objective", "rows", "pipeline", "training", "ratio"],
                [
                    [row["kind"], row["measured"], f"{row['pipeline_tokens_per_cpu_second']:,}",
                     row["training_tokens_per_cpu_second"], f"{row['ratio']:.0f}"]
                    for row in rates
                ],
            ),
            f"A JSONL collection of {large[0]['tasks']:,} tasks and {large[0]['rows']:,} rows. "
            "Memory is what is added to a process that has imported everything; for "
            "`foretune plan`, what is added to the plan of 1,000 rows.\n",
            table(
                ["objective", "what", "CPU seconds", "memory, MB"],
                [
                    [row["kind"], row["measured"], f"{row['cpu_seconds']:.0f}", f"{added(row):.0f}"]
                    for row in large
                ],
            ),
        ]
    )  # fmt: skip


def added(row: dict[str, Any]) -> float:
    if "peak_mb_of_a_small_plan" in row:
        return row["peak_mb"] - row["peak_mb_of_a_small_plan"]
    return row["peak_mb_beyond_imports"]


def gpu(data: dict[str, Any]) -> str:
    rows = [row for row in data["rows"] if "not_run" not in row]
    return "\n".join(
        [
            f"## On a GPU ({data['device']})\n",
            table(
                ["model", "tasks", "lengths", "variant", "ms per step", "share of the matrix rate",
                 "peak MB"],
                [
                    [row["model"], row["tasks"], row["lengths"], row["variant"],
                     f"{1000 * row['seconds']:.1f}", row["share_of_matrix_rate"], row["peak_mb"]]
                    for row in rows
                ],
            ),
        ]
    )  # fmt: skip


SECTIONS: dict[str, Callable[[dict[str, Any]], str]] = {
    "meta-step": meta_step,
    "ragged": ragged,
    "memory": memory,
    "adaptation": adaptation,
    "bank": bank,
    "pipeline": pipeline,
    "gpu": gpu,
}


def cell(row: dict[str, Any]) -> str:
    return f"{row['tasks']} × {row['batch']} × {row['length']}"


def shown(ratio: dict[str, float] | None) -> str:
    if ratio is None:
        return ""
    return f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
