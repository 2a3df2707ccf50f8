"""`foretune generate` on folders: continuing prompts with a model or a decode method."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from foretune.errors import UserError, did_you_mean
from foretune.methods import make, method_class_of
from foretune.recipes.overrides import apply_overrides, split_arguments

if TYPE_CHECKING:
    from foretune.decoding.generation import Prompt

WHAT_IT_IS = {
    "tuned": "a fine-tuned model or a PEFT folder",
    "store": "foretune datastore build MODEL --rows FILE --out FOLDER makes one",
}


def decode_method(name: str, settings: Sequence[str]) -> Any:
    """The record of a decode method.

    Args:
        name: A method whose verb is decode.
        settings: `KEY=VALUE` for its fields.

    Raises:
        UserError: There is no such method or field, the method is not a decode method, or a
            setting does not read KEY=VALUE.
    """
    method_class_of(name, "decode")
    return make(name, **apply_overrides({}, settings))


def split_words(
    words: Sequence[str], method: str | None, from_elsewhere: bool
) -> tuple[str | None, list[str]]:
    """(prompt, settings) from the words after the model on the command line.

    The first word is the prompt, unless prompts come from elsewhere or it sets a field.

    Raises:
        UserError: One of the other words is not a setting, or `method` is not a decode method.

    >>> split_words(["a=b", "beta=1"], "eft", False)
    ('a=b', ['beta=1'])
    >>> split_words(["beta=1"], "eft", False)
    (None, ['beta=1'])
    """
    record_class = method_class_of(method, "decode") if method else None
    fields = [f.name for f in dataclasses.fields(record_class)] if record_class else []
    prompt = [] if from_elsewhere else split_arguments(words[:1], fields)[1]
    settings = list(words[len(prompt) :])
    _, stray = split_arguments(settings)
    if stray:
        raise UserError(
            f'"{stray[0]}" must read KEY=VALUE; put a prompt of several words in quotes'
        )
    return (prompt[0] if prompt else None), settings


def check_resources(method: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of --tuned, --untuned and --store that are set, for the method that takes them.

    Raises:
        UserError: The method does not take one of them, or lacks one.
    """
    resources = {key: value for key, value in options.items() if value}
    takes = method_class_of(method, "decode").resources if method else ()
    for key in resources:
        if key not in takes:
            who = (
                f"{method} takes {', '.join(f'--{k}' for k in takes)}"
                if method
                else "there is no --method"
            )
            raise UserError(f"--{key} does not apply: {who}.{did_you_mean(key, takes)}")
    if takes and takes[0] not in resources:
        raise UserError(f"{method} needs --{takes[0]} FOLDER: {WHAT_IT_IS[takes[0]]}")
    return {
        key: value[0] if isinstance(value, list) and len(value) == 1 else value
        for key, value in resources.items()
    }


def generate(
    model: str,
    prompts: Sequence[Prompt],
    method: Any,
    resources: Mapping[str, Any],
    *,
    allow_unverified: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Continues each prompt.

    Args:
        model: A model folder, a hub id, or a PEFT folder.
        prompts: Prompts to continue.
        method: The record of a decode method; None for the model alone.
        resources: The method's side models or store.
        allow_unverified: Whether to take adapters that do not record their base.
        options: `max_new_tokens`, `batch_size`, `seed`, and options of the model's `generate`.

    Returns:
        JSON-able: model, method, results (prompt, text, num_tokens, and the method's details),
        seconds (with loading).
    """
    began = time.perf_counter()
    if method is None:
        from foretune.decoding.generation import generate_texts
        from foretune.decoding.peft_model import load_generator

        loaded, tokenizer = load_generator(model, allow_unverified=allow_unverified)
        texts = generate_texts(loaded, tokenizer, prompts, **options)
    else:
        options["allow_unverified"] = allow_unverified
        texts = method.decode(model, prompts, **resources, **options)
    return {
        "model": model,
        "method": None if method is None else method.to_dict(),
        "results": [
            {"prompt": text.prompt, "text": text.text, "num_tokens": len(text.token_ids)}
            | text.details
            for text in texts
        ],
        "seconds": round(time.perf_counter() - began, 3),
    }
