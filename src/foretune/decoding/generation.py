"""Text in, text out: prompts become left-padded ids, `generate` runs, continuations come back.

What a decode method changes (a hook on the model) is in place while this runs; nothing here knows
of it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from foretune.errors import UserError, did_you_mean

# What `generate` takes besides the fields of a GenerationConfig.
GENERATE_TAKES = ("assistant_model", "logits_processor", "stopping_criteria", "streamer")


@dataclass(frozen=True, kw_only=True)
class Generated:
    """A continuation of one prompt.

    Args:
        prompt: As it was given.
        text: The continuation, without the prompt and special tokens.
        token_ids: Its ids, an end-of-text token included, padding not.
        details: What a method adds, such as the neighbours of every token; JSON-able.
    """

    prompt: str
    text: str
    token_ids: tuple[int, ...]
    details: dict[str, Any] = field(default_factory=dict)


def generate_texts(
    model: nn.Module,
    tokenizer: Any,
    prompts: str | Sequence[str],
    *,
    max_new_tokens: int = 50,
    batch_size: int = 8,
    seed: int = 0,
    **options: Any,
) -> list[Generated]:
    """Continues every prompt by the model's `generate`, in left-padded batches.

    Args:
        model: A causal language model of transformers or peft.
        tokenizer: Its tokenizer.
        prompts: One or several.
        max_new_tokens: At most so many tokens each.
        batch_size: Prompts in one call; 1 where `assistant_model` drafts.
        seed: Seeds sampling; the global random state is left as it was.
        options: What `generate` takes: `do_sample`, `temperature`, `num_beams`, …

    Returns:
        One for each prompt, in order; `num_return_sequences` of them where that is given.

    Raises:
        UserError: No tokenizer, an empty prompt that has no beginning-of-text token to stand for
            it, a prompt beyond the model's positions, or an option that `generate` does not have.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    check_options(options)
    if options.get("assistant_model") is not None:
        batch_size = 1  # transformers drafts for one row at a time
    repeats = options.get("num_return_sequences") or 1
    pad, end = pad_id(tokenizer), end_ids(model, tokenizer)
    found = []
    with torch.random.fork_rng(devices=_cuda(model)), torch.inference_mode():
        torch.manual_seed(seed)
        for start in range(0, len(prompts), batch_size):
            some = prompts[start : start + batch_size]
            batch = encode(model, tokenizer, some, max_new_tokens)
            ids = model.generate(  # type: ignore[operator]
                **batch,
                max_new_tokens=max_new_tokens,
                pad_token_id=pad,
                eos_token_id=end or None,
                **options,
            )
            new = ids[:, batch["input_ids"].shape[1] :].tolist()
            for i, row in enumerate(new):
                prompt, kept = some[i // repeats], _until_end(row, end)
                text = _continuation(tokenizer, prompt_ids(tokenizer, prompt), kept)
                found.append(Generated(prompt=prompt, text=text, token_ids=tuple(kept)))
    return found


def encode(
    model: nn.Module, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int = 0
) -> dict[str, Tensor]:
    """Prompts as left-padded `input_ids` and `attention_mask`, (prompts, longest), on the device.

    Raises:
        UserError: As of `generate_texts`.
    """
    if tokenizer is None:
        raise UserError("the model comes without a tokenizer: give one")
    rows = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    room = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    longest = max(len(row) for row in rows)
    if room is not None and longest + max_new_tokens > room:
        raise UserError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones are more than the model's "
            f"{room} positions; shorten the prompt or lower max_new_tokens"
        )
    batch = left_padded(rows, pad_id(tokenizer))
    return {key: value.to(device_of(model)) for key, value in batch.items()}


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """The ids of a prompt, open at its end.

    Raises:
        UserError: The prompt is empty and no beginning-of-text token can stand for it.
    """
    ids = list(tokenizer(prompt, verbose=False)["input_ids"])
    # Tokenizers of encoders close a text, after which a decoder has nothing to say.
    if ids and ids[-1] == tokenizer.eos_token_id and not prompt.endswith(tokenizer.eos_token):
        ids.pop()
    if not ids and tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id]
    if not ids:
        raise UserError("a prompt is empty and the tokenizer has no beginning-of-text token")
    return ids


def left_padded(rows: Sequence[Sequence[int]], pad: int) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` of rows of ids, padded on the left.

    >>> left_padded([[5], [6, 7]], pad=0)["input_ids"].tolist()
    [[0, 5], [6, 7]]
    """
    longest = max(len(row) for row in rows)
    ids = [[pad] * (longest - len(row)) + list(row) for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def pad_id(tokenizer: Any) -> int:
    """The id that fills rows: of the pad token, else of end-of-text, else 0; it is masked."""
    known = [tokenizer.pad_token_id, tokenizer.eos_token_id, 0] if tokenizer is not None else [0]
    return next(i for i in known if i is not None)


def end_ids(model: nn.Module, tokenizer: Any) -> list[int]:
    """The ids that end a text: those of the model's generation config, else the tokenizer's."""
    config = getattr(model, "generation_config", None)
    ends = getattr(config, "eos_token_id", None)
    if ends is None and tokenizer is not None:
        ends = tokenizer.eos_token_id
    return [] if ends is None else list(ends) if isinstance(ends, list | tuple) else [ends]


def check_options(options: dict[str, Any]) -> None:
    """Refuses what `generate` does not take.

    Raises:
        UserError: An unknown name.
    """
    known = [*vars(transformers.GenerationConfig()), *GENERATE_TAKES]
    for name in options:
        if name not in known or name.startswith("_"):
            raise UserError(f'generate has no option "{name}".{did_you_mean(name, known)}')


def shared_tokens(tokenizer: Any, others: Sequence[Any]) -> Tensor | None:
    """Which ids are the same token for all tokenizers.

    Args:
        tokenizer: Of the model that decodes.
        others: Of the models beside it.

    Returns:
        (ids,) bool; None where all ids are, or nothing is known.

    Raises:
        UserError: More than a tenth of the ids that all have differ: another tokenizer.
    """
    if tokenizer is None or not others:
        return None
    all_tokens = [_tokens(one) for one in (tokenizer, *others)]
    size = min(len(tokens) for tokens in all_tokens)
    same = torch.tensor([len({t[i] for t in all_tokens}) == 1 for i in range(size)])
    if not same.float().mean() >= 0.9:
        raise UserError(
            f"the models read different tokens: {int((~same).sum())} of {size} ids differ; all "
            "models must have one tokenizer"
        )
    return None if bool(same.all()) and len({len(t) for t in all_tokens}) == 1 else same


def _tokens(tokenizer: Any) -> list[str | None]:
    size = max(tokenizer.get_vocab().values()) + 1
    tokens: list[str | None] = tokenizer.convert_ids_to_tokens(list(range(size)))
    return tokens


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter is."""
    return next(model.parameters()).device


def read_prompts(path: str | Path) -> list[str]:
    """Prompts of a file: of a text file its lines, of .jsonl the `prompt` of each row.

    Args:
        path: The file; "-" for standard input, one prompt a line.

    Raises:
        UserError: No such file, a row without a prompt, or none at all.
    """
    path = Path(path)
    found = list(_prompts(path))
    if not found:
        raise UserError(f"no prompt in {'standard input' if str(path) == '-' else path}")
    return found


def _prompts(path: Path) -> Iterator[str]:
    if str(path) == "-":
        yield from (line.rstrip("\n") for line in sys.stdin if line.strip())
        return
    if not path.is_file():
        raise UserError(f"no file {path} with prompts")
    try:
        lines = path.read_text("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no UTF-8 text: {error.reason}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if path.suffix != ".jsonl":
            yield line
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: no JSON: {error.msg}") from None
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            raise UserError(f'{path}, line {number}: a row needs a text under "prompt"')
        yield row["prompt"]


def _continuation(tokenizer: Any, before: list[int], new: list[int]) -> str:
    """The text of `new` as it stands after the prompt: a decoder strips the first blank."""
    head = tokenizer.decode(before, skip_special_tokens=True)
    whole = tokenizer.decode([*before, *new], skip_special_tokens=True)
    if whole.startswith(head):
        return str(whole[len(head) :])
    return str(tokenizer.decode(new, skip_special_tokens=True))


def _until_end(row: list[int], ends: Sequence[int]) -> list[int]:
    """The ids up to the first end-of-text, that one included: padding follows it."""
    for place, token in enumerate(row):
        if token in ends:
            return row[: place + 1]
    return row


def _cuda(model: nn.Module) -> list[int]:
    device = device_of(model)
    return [device.index or 0] if device.type == "cuda" else []
