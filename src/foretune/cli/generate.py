"""`foretune generate`: text from a model, plainly or by a decode method."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from foretune.cli.output import Json, emit, emit_json, quiet_stdout, table
from foretune.errors import UserError


def generate(
    model: Annotated[str, typer.Argument(help="A model folder, a hub id, or a PEFT folder.")],
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PROMPT] [KEY=VALUE]...",
            help="The prompt, and fields of the method (foretune show METHOD), such as beta=0.5.",
        ),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Prompts: a line each, or .jsonl; - for stdin.")
    ] = None,
    method: Annotated[str | None, typer.Option(help="A decode method; none by default.")] = None,
    tuned: Annotated[
        list[str] | None,
        typer.Option(help="eft: a fine-tuned model or PEFT folder; may be given several times."),
    ] = None,
    untuned: Annotated[
        list[str] | None,
        typer.Option(help="eft: what it was tuned from; not needed for a PEFT folder."),
    ] = None,
    tuned_prompts: Annotated[
        Path | None, typer.Option(help="eft: what tuned models read in place of each prompt.")
    ] = None,
    untuned_prompts: Annotated[
        Path | None, typer.Option(help="eft: what untuned models read in place of each prompt.")
    ] = None,
    speculative: Annotated[
        bool, typer.Option("--speculative", help="eft: the tuned model drafts; the law is kept.")
    ] = False,
    store: Annotated[Path | None, typer.Option(help="rtd: the datastore's folder.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="At most so many for each.")] = 50,
    sample: Annotated[bool, typer.Option("--sample", help="Draw tokens; greedy without.")] = False,
    temperature: Annotated[
        float | None, typer.Option(help="Of drawing; below 1 sharper. Implies --sample.")
    ] = None,
    beams: Annotated[int, typer.Option(min=1, help="Width of beam search.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Seeds drawing.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts at a time.")] = 8,
    beta_sweep: Annotated[
        str | None, typer.Option(metavar="B,B,…", help="eft: compare these values of beta.")
    ] = None,
    oracle: Annotated[
        str | None, typer.Option(help="With --beta-sweep: the large model truly tuned.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="With --beta-sweep: the frontier as an .svg file.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace that file.")] = False,
    json: Json = False,
) -> None:
    """Continue prompts, plainly or with another law of the next token."""
    from foretune.decoding.prompts import check_resources, decode_method, split_words

    prompt, settings = split_words(words or [], method, prompts is not None)
    if method is None and settings:
        raise UserError(
            f"{settings[0]!r} needs a --method; a prompt of several words goes in quotes"
        )
    record = None if method is None else decode_method(method, settings)
    resources = check_resources(
        method, {"tuned": tuned, "untuned": untuned, "store": None if store is None else str(store)}
    )
    betas = _betas(beta_sweep, method)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "seed": seed}
    options |= _drawing(sample, temperature, beams)
    _check_figure(out, betas, oracle, overwrite)
    with quiet_stdout(), _warnings_as_lines():
        from foretune.decoding.generation import read_prompts

        if prompt is None and prompts is None and sys.stdin.isatty():
            raise UserError('no prompt: foretune generate MODEL "text", --prompts FILE, or stdin')
        texts = [prompt] if prompt is not None else read_prompts(prompts or "-")
        own = {"tuned_prompts": tuned_prompts, "untuned_prompts": untuned_prompts}
        read = {k: read_prompts(v) for k, v in own.items() if v is not None}
        if (read or speculative) and method != "eft":
            raise UserError(
                "--tuned-prompts, --untuned-prompts and --speculative need --method eft"
            )
        if betas is not None:
            if read or speculative:
                raise UserError("--beta-sweep takes the same prompts for all and drafts nothing")
            from foretune.decoding.beta_sweep import figure, sweep, table_rows

            rows = sweep(model, texts, record, betas, resources, oracle, **options)
        else:
            from foretune.decoding.prompts import generate as run

            drafting = {"speculative": True} if speculative else {}
            result = run(
                model,
                texts,
                record,
                resources,
                batch_size=batch_size,
                **options,
                **read,
                **drafting,
            )
    if betas is not None:
        if out is not None:
            from foretune.files import write_whole

            write_whole(out, figure(rows) + "\n")
        emit_json({"model": model, "rows": rows}) if json else emit(table(*table_rows(rows)))
    elif json:
        emit_json(result)
    else:
        emit("\n".join(one["text"] for one in result["results"]))


def _drawing(sample: bool, temperature: float | None, beams: int) -> dict[str, Any]:
    if temperature is not None and not temperature > 0:
        raise UserError(f"--temperature must be above 0, got {temperature:g}")
    drawn = sample or temperature is not None
    options: dict[str, Any] = {"do_sample": drawn, "num_beams": beams}
    # From the whole law: without the truncation that a model's generation config may bring along.
    return options | (
        {"temperature": temperature or 1.0, "top_k": 0, "top_p": 1.0} if drawn else {}
    )


def _betas(text: str | None, method: str | None) -> list[float] | None:
    if text is None:
        return None
    if method != "eft":
        raise UserError("--beta-sweep needs --method eft")
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--beta-sweep takes numbers such as 0.5,1,2; got {text!r}") from None


def _check_figure(
    out: Path | None, betas: list[float] | None, oracle: str | None, overwrite: bool
) -> None:
    if betas is None and (out is not None or oracle is not None):
        raise UserError(f"{'--out' if out is not None else '--oracle'} goes with --beta-sweep")
    if out is None:
        return
    if out.suffix != ".svg":
        raise UserError(f"--out is a picture: a name that ends in .svg, got {out}")
    if out.exists() and not overwrite:
        raise UserError(f"{out} exists: --overwrite replaces it")


@contextlib.contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Warnings as one line on stderr, without file and line of code, none for programmers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = lambda message, *_, **__: print(
            f"warning: {message}", file=sys.stderr
        )
        yield
