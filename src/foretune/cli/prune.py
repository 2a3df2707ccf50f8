"""`foretune prune`: prune a mixture of experts for one task."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from foretune.cli.output import Json, TrustRemoteCode, emit, emit_json, quiet_stdout, table
from foretune.errors import UserError
from foretune.models.trusted_code import trusted_code


def prune(
    method: Annotated[str, typer.Argument(help="uncurl, frequency, reap, … (see foretune ls).")],
    model: Annotated[str, typer.Argument(help="Folder or hub id of a mixture of experts.")],
    changes: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...", help="Method settings, such as experts=4 router=remap."
        ),
    ] = None,
    rows: Annotated[
        str,
        typer.Option(help="File of the task's examples: text, or prompt and completion."),
    ] = ...,  # type: ignore[assignment]
    out: Annotated[Path | None, typer.Option(help="Folder for the pruned model.")] = None,
    task: Annotated[str | None, typer.Option(help="Task to read, if the file has several.")] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Also score all other methods on held-out examples.")
    ] = False,
    recover: Annotated[int, typer.Option(min=0, help="Steps of fine-tuning after pruning.")] = 0,
    learning_rate: Annotated[float, typer.Option(help="Learning rate of fine-tuning.")] = 1e-4,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples per batch.")] = 8,
    max_tokens: Annotated[
        int, typer.Option(min=2, help="Maximum length of an example; longer ones are truncated.")
    ] = 256,
    low_memory: Annotated[
        bool,
        typer.Option("--low-memory", help="For a model larger than memory: block by block, slow."),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier pruned model in --out.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
) -> None:
    """Prune a mixture of experts for one task."""
    from foretune.pruning.folders import prune_folder, prune_method
    from foretune.run import check_positive

    record = prune_method(method, changes or [])
    check_positive("--learning-rate", learning_rate)
    _check_out(out, compare)
    with quiet_stdout(), trusted_code(trust_remote_code):
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
            low_memory=low_memory,
            overwrite=overwrite,
            console=StderrConsole(),
        )
    if json:
        emit_json(result)
        return
    emit(_report(result))


def _check_out(out: Path | None, compare: bool) -> None:
    if out is None and not compare:
        raise UserError("prune needs --out, the folder for the pruned model, or --compare alone")


def _report(result: dict[str, Any]) -> str:
    """The table of scores, the best method, and how to load the folder."""
    steps = result["recover_steps"]
    header = ["method", "parameters", "experts", "tokens/s", "held-out loss"]
    header += [f"after {steps} steps"] if steps else []
    lines = [table(header, [_line(entry, steps) for entry in result["scored"]])]
    name = result["method"]["name"]
    key = "loss_recovered" if steps else "loss"
    methods = result["scored"][1:]
    best = min(methods, key=lambda entry: entry[key])
    scored = next(entry for entry in methods if entry["method"] == name)
    if best is not scored:
        lines.append(f"Lowest loss: {best['method']}, {scored[key] - best[key]:.4f} below {name}.")
    if "all" in result["normalises"] and result["method"].get("keep_denominator") is False:
        lines.append(
            "This router's softmax runs over all experts, so the weights of the kept ones have "
            "grown; keep_denominator=true prevents that."
        )
    if result["out"] is None:
        lines.append("Nothing saved: no --out.")
    elif result["loads_with"] == "transformers":
        lines.append(f"Model: {result['out']} (plain folder, loads in transformers)")
    else:
        lines.append(
            f"Model: {result['out']} (only foretune loads it: "
            f'foretune.load_model("{result["out"]}", head="causal-lm"))'
        )
    return "\n".join(lines)


def _line(entry: dict[str, Any], steps: int) -> list[str]:
    counts = sorted(set(entry["experts"]))
    experts = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    figures = [f"{entry['parameters']:,}", experts, f"{entry['tokens_per_s']:,}"]
    losses = [f"{entry[key]:.4f}" for key in ("loss", *["loss_recovered"] * bool(steps))]
    return [entry["method"], *figures, *losses]
