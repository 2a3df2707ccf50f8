"""`foretune prune`: a mixture of experts becomes a smaller one for one task."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from foretune.cli.output import Json, emit, emit_json, quiet_stdout, table
from foretune.errors import UserError


def prune(
    method: Annotated[str, typer.Argument(help="uncurl, frequency, reap, … (foretune ls).")],
    model: Annotated[str, typer.Argument(help="A mixture's folder or hub id.")],
    changes: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...", help="The method's fields, such as experts=4 router=remap."
        ),
    ] = None,
    rows: Annotated[
        str, typer.Option(help="The task's rows: text, or prompt and completion.")
    ] = ...,  # type: ignore[assignment]
    out: Annotated[Path | None, typer.Option(help="Folder of the smaller model.")] = None,
    task: Annotated[str | None, typer.Option(help="Of several in the file, this one.")] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Score every method on rows held out first.")
    ] = False,
    recover: Annotated[int, typer.Option(min=0, help="Fine-tuning steps after pruning.")] = 0,
    learning_rate: Annotated[float, typer.Option(help="Of these steps.")] = 1e-4,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows in a batch.")] = 8,
    max_tokens: Annotated[int, typer.Option(min=2, help="Longest row.")] = 256,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a pruned model in the folder.")
    ] = False,
    json: Json = False,
) -> None:
    """Prune a mixture of experts for one task."""
    from foretune.pruning.folders import prune_folder, prune_method
    from foretune.run import above_zero

    record = prune_method(method, changes or [])
    above_zero("--learning-rate", learning_rate)
    if out is None and not compare:
        raise UserError("prune needs --out, the folder of the smaller model, or --compare alone")
    with quiet_stdout():
        from foretune.cli.progress import StderrConsole

        result = prune_folder(
            record,
            model,
            rows,
            out,
            task=task,
            compare=compare,
            recover=recover,
            learning_rate=learning_rate,
            batch_size=batch_size,
            max_tokens=max_tokens,
            overwrite=overwrite,
            console=StderrConsole(),
        )
    if json:
        emit_json(result)
        return
    emit(_told(result))


def _told(result: dict[str, Any]) -> str:
    """The table, what it means, and how the folder is loaded."""
    steps = result["recover_steps"]
    header = ["method", "parameters", "experts", "tokens/s", "held-out loss"]
    header += [f"after {steps} steps"] if steps else []
    lines = [table(header, [_line(entry, steps) for entry in result["scored"]])]
    name = result["method"]["name"]
    key = "loss_recovered" if steps else "loss"
    methods = result["scored"][1:]
    best = min(methods, key=lambda entry: entry[key])
    own = next(entry for entry in methods if entry["method"] == name)
    if best is not own:
        lines.append(f"Lowest loss: {best['method']}, {own[key] - best[key]:.4f} below {name}.")
    if "all" in result["normalises"] and result["method"].get("keep_denominator") is False:
        lines.append(
            "This router's softmax runs over all experts, so the weights of those kept have grown; "
            "keep_denominator=true undoes that."
        )
    if result["out"] is None:
        lines.append("Nothing saved: no --out.")
    elif result["loads_with"] == "transformers":
        lines.append(f"Model: {result['out']} (plain folder, loads in transformers)")
    else:
        lines.append(
            f"Model: {result['out']} (loads in foretune alone: "
            f'foretune.load_model("{result["out"]}", head="causal-lm"))'
        )
    return "\n".join(lines)


def _line(entry: dict[str, Any], steps: int) -> list[str]:
    counts = sorted(set(entry["experts"]))
    experts = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    figures = [f"{entry['parameters']:,}", experts, f"{entry['tokens_per_s']:,}"]
    losses = [f"{entry[key]:.4f}" for key in ("loss", *["loss_recovered"] * bool(steps))]
    return [entry["method"], *figures, *losses]
