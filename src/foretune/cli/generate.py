"""`foretune generate`: text from a model, alone or with a decode method."""

from __future__ import annotations

import contextlib
import math
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from foretune.claims import claim_file
from foretune.cli.output import (
    AllowUnverified,
    DeviceOption,
    DTypeOption,
    Json,
    QuantizeOption,
    TrustRemoteCode,
    emit,
    emit_json,
    quiet_stdout,
    table,
)
from foretune.errors import UserError
from foretune.models.precision import held_in
from foretune.models.trusted_code import trusted_code
from foretune.run import MAX_SEED, check_device_name


def generate(
    model: Annotated[str, typer.Argument(help="A model folder, a hub id, or a PEFT folder.")],
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PROMPT] [KEY=VALUE]...",
            help="The prompt, and fields of the method such as beta=0.5 (foretune show METHOD).",
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="File of prompts: one per line, or .jsonl with prompt or messages; - for stdin."
        ),
    ] = None,
    chat: Annotated[
        bool,
        typer.Option("--chat", help="Each prompt is a user's message, answered by a chat model."),
    ] = False,
    method: Annotated[
        str | None, typer.Option(help="Decode method (default: the model alone).")
    ] = None,
    tuned: Annotated[
        list[str] | None,
        typer.Option(help="eft: a fine-tuned model or PEFT folder; can be repeated."),
    ] = None,
    untuned: Annotated[
        list[str] | None,
        typer.Option(help="eft: the model it was tuned from; not needed with a PEFT folder."),
    ] = None,
    tuned_prompts: Annotated[
        Path | None, typer.Option(help="eft: file of prompts for the tuned models.")
    ] = None,
    untuned_prompts: Annotated[
        Path | None, typer.Option(help="eft: file of prompts for the untuned models.")
    ] = None,
    speculative: Annotated[
        bool,
        typer.Option(
            "--speculative", help="eft: the tuned model drafts; output distribution unchanged."
        ),
    ] = False,
    store: Annotated[Path | None, typer.Option(help="rtd: folder of the datastore.")] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Maximum number of new tokens per prompt.")
    ] = 50,
    sample: Annotated[
        bool, typer.Option("--sample", help="Sample tokens (default: greedy decoding).")
    ] = False,
    temperature: Annotated[
        float | None, typer.Option(help="Sampling temperature; implies --sample.")
    ] = None,
    beams: Annotated[int, typer.Option(min=1, max=1024, help="Number of beams.")] = 1,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Random seed of sampling.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts per batch.")] = 8,
    beta_sweep: Annotated[
        str | None, typer.Option(metavar="B,B,…", help="eft: compare these values of beta.")
    ] = None,
    oracle: Annotated[
        str | None, typer.Option(help="With --beta-sweep: the fine-tuned large model.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="With --beta-sweep: write the frontier to this .svg file.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the --out file.")] = False,
    dtype: DTypeOption = "float32",
    quantize: QuantizeOption = None,
    device: DeviceOption = "cpu",
    trust_remote_code: TrustRemoteCode = False,
    allow_unverified: AllowUnverified = False,
    json: Json = False,
) -> None:
    """Continue prompts with a model, plain or with EFT or RTD."""
    from foretune.decoding.prompts import check_resources, split_words

    prompt, settings = split_words(words or [], method, prompts is not None)
    record = _record(method, settings)
    resources = check_resources(
        method, {"tuned": tuned, "untuned": untuned, "store": None if store is None else str(store)}
    )
    check_device_name("--device", device)
    betas = _betas(beta_sweep, method)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "seed": seed}
    options |= _sampling(sample, temperature, beams)
    sources = [model, prompts, tuned_prompts, untuned_prompts, store, oracle]
    reads = [str(read) for read in (*sources, *(tuned or ()), *(untuned or ())) if read is not None]
    _check_figure(out, betas, oracle, overwrite, reads)
    loading = held_in(dtype, quantize, device)
    with quiet_stdout(), trusted_code(trust_remote_code), loading, _warnings_as_lines():
        from foretune.decoding.generation import as_chat, read_prompts

        texts = [prompt] if prompt is not None else _read(prompts)
        if chat:
            texts = [as_chat(text) for text in texts]
        files = {"tuned_prompts": tuned_prompts, "untuned_prompts": untuned_prompts}
        side_prompts = {k: read_prompts(file) for k, file in files.items() if file is not None}
        if chat:
            side_prompts = {k: [as_chat(text) for text in v] for k, v in side_prompts.items()}
        _check_side_options(method, betas, bool(side_prompts or speculative))
        if betas is not None:
            from foretune.decoding.beta_sweep import figure, sweep, table_rows

            options["allow_unverified"] = allow_unverified
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
                allow_unverified=allow_unverified,
                **options,
                **side_prompts,
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
        emit("\n".join(continuation["text"] for continuation in result["results"]))


def _record(method: str | None, settings: list[str]) -> Any:
    from foretune.decoding.prompts import decode_method

    if method is not None:
        return decode_method(method, settings)
    if settings:
        raise UserError(
            f"{settings[0]!r} needs a --method; put a prompt of several words in quotes"
        )
    return None


def _read(prompts: Path | None) -> list[Any]:
    """Prompts of a file or of stdin.

    Raises:
        UserError: There is no prompt.
    """
    from foretune.decoding.generation import read_prompts

    if prompts is None and sys.stdin.isatty():
        raise UserError('no prompt: give foretune generate MODEL "text", --prompts FILE, or stdin')
    return read_prompts(prompts or "-")


def _check_side_options(method: str | None, betas: list[float] | None, side_options: bool) -> None:
    names = "--tuned-prompts, --untuned-prompts and --speculative"
    if side_options and method != "eft":
        raise UserError(f"{names} need --method eft")
    if side_options and betas is not None:
        raise UserError(f"{names} cannot be combined with --beta-sweep")


def _sampling(sample: bool, temperature: float | None, beams: int) -> dict[str, Any]:
    if temperature is not None and not 1e-6 <= temperature < math.inf:
        raise UserError(
            f"--temperature must be a number from 0.000001 on, got {temperature:g}; leave it and "
            "--sample out to take the likeliest token"
        )
    do_sample = sample or temperature is not None
    options: dict[str, Any] = {"do_sample": do_sample, "num_beams": beams}
    # From the full distribution, without the truncation that a generation config may set.
    return options | (
        {"temperature": temperature or 1.0, "top_k": 0, "top_p": 1.0} if do_sample else {}
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
    out: Path | None,
    betas: list[float] | None,
    oracle: str | None,
    overwrite: bool,
    reads: list[str],
) -> None:
    if betas is None and (out is not None or oracle is not None):
        raise UserError(f"{'--out' if out is not None else '--oracle'} needs --beta-sweep")
    if out is None:
        return
    if out.suffix != ".svg":
        raise UserError(f"--out must be an .svg file, got {out}")
    claim_file(out, overwrite=overwrite, reads=reads)


@contextlib.contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Prints UserWarnings as one line on stderr each; other warnings are ignored."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = lambda message, *_, **__: print(
            f"warning: {message}", file=sys.stderr
        )
        yield
