"""`foretune generate` on folders: continuing prompts with a model or a decode method."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

from foretune.errors import UserError, did_you_mean
from foretune.methods import METHODS, make, method_class
from foretune.recipes.yaml_io import parse_yaml

WHAT_IT_IS = {
    "tuned": "a fine-tuned model or a PEFT folder",
    "store": "foretune datastore build MODEL --rows FILE --out FOLDER makes one",
}


def decode_method(name: str, settings: Sequence[str]) -> Any:
    """The record of a decode method.

    Args:
        name: A method whose verb is decode.
        settings: `key=value` for its fields.

    Raises:
        UserError: There is no such method or field, or the method is not a decode method.
    """
    classes: dict[str, Any] = {method: method_class(method) for method in [name, *METHODS]}
    if classes[name].verb != "decode":
        names = [method for method in METHODS if classes[method].verb == "decode"]
        raise UserError(
            f"{name} is not a decode method; generate takes --method {' or '.join(names)}"
        )
    fields = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise UserError(f"expected KEY=VALUE, got {setting!r}; a prompt goes in quotes")
        fields[key] = parse_yaml(value, key)
    return make(name, **fields)


def split_words(
    words: Sequence[str], method: str | None, from_elsewhere: bool
) -> tuple[str | None, list[str]]:
    """(prompt, settings) from the words after the model on the command line.

    The first word is the prompt, unless prompts come from elsewhere or it sets a field.

    >>> split_words(["a=b", "beta=1"], "eft", False)
    ('a=b', ['beta=1'])
    >>> split_words(["beta=1"], "eft", False)
    (None, ['beta=1'])
    """
    fields = [f.name for f in dataclasses.fields(method_class(method))] if method else []
    first = words[0] if words else None
    if first is None or from_elsewhere or first.partition("=")[0] in fields:
        return None, list(words)
    return first, list(words[1:])


def check_resources(method: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of --tuned, --untuned and --store that are set, for the method that takes them.

    Raises:
        UserError: The method does not take one of them, or lacks one.
    """
    resources = {key: value for key, value in options.items() if value}
    takes = getattr(method_class(method), "resources", ()) if method else ()
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
    prompts: Sequence[str],
    method: Any,
    resources: Mapping[str, Any],
    **options: Any,
) -> dict[str, Any]:
    """Continues each prompt.

    Args:
        model: A model folder, a hub id, or a PEFT folder.
        prompts: Prompts to continue.
        method: The record of a decode method; None for the model alone.
        resources: The method's side models or store.
        options: `max_new_tokens`, `batch_size`, `seed`, and options of the model's `generate`.

    Returns:
        JSON-able: model, method, results (prompt, text, num_tokens, and the method's details),
        seconds (with loading).
    """
    began = time.perf_counter()
    if method is None:
        from foretune.decoding.generation import generate_texts
        from foretune.decoding.peft_model import load_generator

        loaded, tokenizer = load_generator(model)
        texts = generate_texts(loaded, tokenizer, prompts, **options)
    else:
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
