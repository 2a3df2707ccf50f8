"""Text in, text out: prompts are tokenised and left-padded, `generate` runs, texts come back.

A decode method changes the model by hooks while this runs; nothing here depends on them.
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

from foretune.errors import DivergedError, UserError, did_you_mean
from foretune.models.seeding import seed_generators
from foretune.tasks.messages import Message, checked_prompt
from foretune.tasks.objectives.chat import prompt_text
from foretune.tasks.objectives.text import plain_ids

Prompt = str | list[Message]  # a text, or a conversation that is to be answered

# What `generate` takes besides the fields of a GenerationConfig.
GENERATE_TAKES = ("assistant_model", "logits_processor", "stopping_criteria", "streamer")


@dataclass(frozen=True, kw_only=True)
class Generated:
    """A continuation of one prompt.

    Args:
        prompt: The prompt: a text, or the messages of a conversation.
        text: The continuation, without prompt and special tokens.
        token_ids: Its ids, including an end-of-text token, without padding.
        details: Additions of a method, such as the neighbours of each token; JSON-able.
    """

    prompt: Prompt
    text: str
    token_ids: tuple[int, ...]
    details: dict[str, Any] = field(default_factory=dict)


def generate_texts(
    model: nn.Module,
    tokenizer: Any,
    prompts: str | Sequence[Prompt],
    *,
    max_new_tokens: int = 50,
    batch_size: int = 8,
    seed: int = 0,
    **options: Any,
) -> list[Generated]:
    """Continues each prompt by the model's `generate`, in left-padded batches.

    Args:
        model: A causal language model of transformers or peft.
        tokenizer: Its tokenizer.
        prompts: One prompt or several; a prompt is a text, or a list of messages, which the
            tokenizer's chat template writes.
        max_new_tokens: Maximum length of a continuation.
        batch_size: Prompts per call; always 1 with an `assistant_model`.
        seed: Random seed of sampling; the global random state is not changed.
        options: Options of `generate`: `do_sample`, `temperature`, `num_beams`, …

    Returns:
        One continuation per prompt, in order; with `num_return_sequences`, so many per prompt.

    Raises:
        UserError: The tokenizer is missing, a prompt is empty and the tokenizer has no
            beginning-of-text token, a prompt exceeds the model's positions, or `generate` has no
            such option.
        DivergedError: The model's score of a token is NaN or infinite.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    check_options(options)
    if options.get("assistant_model") is not None:
        batch_size = 1  # transformers drafts for one prompt at a time
    options["logits_processor"] = [_check_scores, *(options.get("logits_processor") or ())]
    repeats = options.get("num_return_sequences") or 1
    pad, end = pad_id(tokenizer), end_ids(model, tokenizer)
    continuations = []
    with torch.random.fork_rng(devices=_cuda(model)), torch.inference_mode():
        seed_generators(seed)
        for start in range(0, len(prompts), batch_size):
            chunk = prompts[start : start + batch_size]
            batch = encode(model, tokenizer, chunk, max_new_tokens)
            ids = model.generate(  # type: ignore[operator]
                **batch,
                max_new_tokens=max_new_tokens,
                pad_token_id=pad,
                eos_token_id=end or None,
                **options,
            )
            new = ids[:, batch["input_ids"].shape[1] :].tolist()
            for i, row in enumerate(new):
                prompt, ids_of_text = chunk[i // repeats], _until_end(row, end)
                text = _continuation(tokenizer, prompt_ids(tokenizer, prompt), ids_of_text)
                continuations.append(
                    Generated(prompt=prompt, text=text, token_ids=tuple(ids_of_text))
                )
    return continuations


def _check_scores(ids: Tensor, scores: Tensor) -> Tensor:
    """The scores, once they are checked; −∞ rules a token out.

    Args:
        ids: (n, tokens) ids so far.
        scores: (n, vocabulary) scores of the next token.

    Raises:
        DivergedError: A score is NaN or +∞, of which the largest would say nothing.
    """
    if not bool((scores < torch.inf).all()):
        raise DivergedError(
            f"a score after {ids.shape[1]} tokens is not finite: the model or its adapter holds "
            "numbers that are too large"
        )
    return scores


def encode(
    model: nn.Module, tokenizer: Any, prompts: Sequence[Prompt], max_new_tokens: int = 0
) -> dict[str, Tensor]:
    """Left-padded `input_ids` and `attention_mask`, (prompts, longest), on the model's device.

    Raises:
        UserError: The tokenizer is missing, a prompt is empty and the tokenizer has no
            beginning-of-text token, or prompt and `max_new_tokens` exceed the model's positions.
    """
    if tokenizer is None:
        raise UserError("the model has no tokenizer: pass one")
    rows = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    room = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    longest = max(len(row) for row in rows)
    if room is not None and longest + max_new_tokens > room:
        raise UserError(
            f"a prompt of {longest} tokens and {max_new_tokens} new tokens exceed the model's "
            f"{room} positions; shorten the prompt or lower max_new_tokens"
        )
    batch = left_padded(rows, pad_id(tokenizer))
    return {key: value.to(device_of(model)) for key, value in batch.items()}


def prompt_ids(tokenizer: Any, prompt: Prompt) -> list[int]:
    """The ids of a prompt, without an end-of-text token that the tokenizer appends.

    Raises:
        UserError: The prompt is empty and the tokenizer has no beginning-of-text token, or it is a
            conversation that cannot be written.
    """
    if not isinstance(prompt, str):
        turns = checked_prompt(prompt, "messages of a prompt")
        return plain_ids(tokenizer, [prompt_text(tokenizer, turns, "a prompt")])[0]
    ids = list(tokenizer(prompt, verbose=False)["input_ids"])
    # Encoders' tokenizers append an end-of-text token, after which a decoder would not continue.
    if ids and ids[-1] == tokenizer.eos_token_id and not prompt.endswith(tokenizer.eos_token):
        ids.pop()
    if not ids and tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id]
    if not ids:
        raise UserError(
            "a prompt is empty, and the tokenizer has no beginning-of-text token to start from"
        )
    return ids


def as_chat(prompt: Prompt) -> list[Message]:
    """The prompt as a conversation; a text is a user's turn.

    >>> as_chat("Hi")
    [{'role': 'user', 'content': 'Hi'}]
    """
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def left_padded(rows: Sequence[Sequence[int]], pad: int) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask`, (rows, longest), of ids padded on the left.

    >>> left_padded([[5], [6, 7]], pad=0)["input_ids"].tolist()
    [[0, 5], [6, 7]]
    """
    longest = max(len(row) for row in rows)
    ids = [[pad] * (longest - len(row)) + list(row) for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def pad_id(tokenizer: Any) -> int:
    """The id for padding: that of the pad token, else of end-of-text, else 0; it is masked."""
    ids = [tokenizer.pad_token_id, tokenizer.eos_token_id, 0] if tokenizer is not None else [0]
    return next(i for i in ids if i is not None)


def end_ids(model: nn.Module, tokenizer: Any) -> list[int]:
    """The end-of-text ids of the model's generation config, else of the tokenizer."""
    config = getattr(model, "generation_config", None)
    ends = getattr(config, "eos_token_id", None)
    if ends is None and tokenizer is not None:
        ends = tokenizer.eos_token_id
    return [] if ends is None else list(ends) if isinstance(ends, list | tuple) else [ends]


def check_options(options: dict[str, Any]) -> None:
    """Checks that `generate` has these options.

    Raises:
        UserError: It has no option of that name.
    """
    names = [*vars(transformers.GenerationConfig()), *GENERATE_TAKES]
    for name in options:
        if name not in names or name.startswith("_"):
            raise UserError(f'generate has no option "{name}".{did_you_mean(name, names)}')


def shared_tokens(tokenizer: Any, others: Sequence[tuple[str, Any]]) -> Tensor | None:
    """The ids that mean the same token to all tokenizers.

    Args:
        tokenizer: Tokenizer of the model that decodes.
        others: (name, tokenizer) of its side models.

    Returns:
        (ids,) bool; None if that is all ids, or if a tokenizer is missing.

    Raises:
        UserError: More than a tenth of the ids that one has in common with the model differ.
    """
    if tokenizer is None or not others:
        return None
    of_model = _tokens(tokenizer)
    all_tokens = [of_model, *(_tokens(vocabulary) for _, vocabulary in others)]
    for (name, _), tokens in zip(others, all_tokens[1:], strict=True):
        size = min(len(of_model), len(tokens))
        different = [i for i in range(size) if of_model[i] != tokens[i]]
        if len(different) > size / 10:
            i = different[0]
            raise UserError(
                f"the tokenizers differ: {len(different)} of {size} ids differ (id {i} is "
                f"{of_model[i]!r} to the model, {tokens[i]!r} to {name}); log-probabilities are "
                "added token by token, so all models must share one tokenizer"
            )
    size = min(len(tokens) for tokens in all_tokens)
    same = torch.tensor([len({t[i] for t in all_tokens}) == 1 for i in range(size)])
    return None if bool(same.all()) and len({len(t) for t in all_tokens}) == 1 else same


def _tokens(tokenizer: Any) -> list[str | None]:
    size = max(tokenizer.get_vocab().values()) + 1
    tokens: list[str | None] = tokenizer.convert_ids_to_tokens(list(range(size)))
    return tokens


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter."""
    return next(model.parameters()).device


def read_prompts(path: str | Path) -> list[Prompt]:
    """Reads prompts: the lines of a text file, or `prompt` or `messages` of each row of .jsonl.

    Args:
        path: The file; "-" for standard input, one prompt per line.

    Raises:
        UserError: The file does not exist, is malformed or has no prompt.
    """
    path = Path(path)
    prompts = list(_prompts(path))
    if not prompts:
        raise UserError(f"no prompt in {'standard input' if str(path) == '-' else path}")
    return prompts


def _prompts(path: Path) -> Iterator[Prompt]:
    if str(path) == "-":
        yield from (line.rstrip("\n") for line in sys.stdin if line.strip())
        return
    if not path.is_file():
        raise UserError(f"no file {path} with prompts")
    try:
        lines = path.read_text("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error.reason}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if path.suffix != ".jsonl":
            yield line
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: not JSON: {error}") from None
        if isinstance(row, dict) and "messages" in row and "prompt" not in row:
            yield checked_prompt(row["messages"], f"{path}, line {number}: messages")
            continue
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            raise UserError(
                f'{path}, line {number}: a row needs text under "prompt", or "messages"'
            )
        yield row["prompt"]


def _continuation(tokenizer: Any, before: list[int], new: list[int]) -> str:
    """The text of `new` after the prompt; decoded alone, its first space would be stripped."""
    head = tokenizer.decode(before, skip_special_tokens=True)
    full = tokenizer.decode([*before, *new], skip_special_tokens=True)
    if full.startswith(head):
        return str(full[len(head) :])
    return str(tokenizer.decode(new, skip_special_tokens=True))


def _until_end(row: list[int], ends: Sequence[int]) -> list[int]:
    """The ids up to and including the first end-of-text; the rest is padding."""
    for place, token in enumerate(row):
        if token in ends:
            return row[: place + 1]
    return row


def _cuda(model: nn.Module) -> list[int]:
    device = device_of(model)
    return [device.index or 0] if device.type == "cuda" else []
