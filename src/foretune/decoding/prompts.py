"""`foretune generate`: prompts on a model, plainly or by a decode method."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

from foretune.errors import UserError, did_you_mean
from foretune.methods import METHODS, make, method_class
from foretune.recipes.yaml_io import parse_yaml

RESOURCES = ("tuned", "untuned", "store")  # options that belong to a method, not to `generate`
WHAT_IT_IS = {
    "tuned": "a fine-tuned model or a PEFT folder",
    "store": "foretune datastore build MODEL --rows FILE --out FOLDER makes one",
}


def decode_method(name: str, settings: Sequence[str]) -> Any:
    """The record of a decode method.

    Args:
        name: A row of the table whose verb is decode.
        settings: `key=value` for its fields.

    Raises:
        UserError: No such method, another verb, no such field.
    """
    classes: dict[str, Any] = {one: method_class(one) for one in [name, *METHODS]}
    if classes[name].verb != "decode":
        known = [one for one in METHODS if classes[one].verb == "decode"]
        raise UserError(f"{name} is no method to generate with; there are {', '.join(known)}")
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
    """(prompt, settings) of what stands behind the model on the command line.

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


def check_resources(method: str | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """What is given of --tuned, --untuned, --store, for the method that takes it.

    Raises:
        UserError: Something that this method does not take, or lacks.
    """
    some = {key: value for key, value in given.items() if value}
    takes = getattr(method_class(method), "resources", ()) if method else ()
    for key in some:
        if key not in takes:
            who = (
                f"{method} takes {', '.join(f'--{k}' for k in takes)}" if method else "no --method"
            )
            raise UserError(f"--{key} is of no use here: {who}.{did_you_mean(key, takes)}")
    if takes and takes[0] not in some:
        raise UserError(f"{method} needs --{takes[0]} FOLDER: {WHAT_IT_IS[takes[0]]}")
    return {k: v[0] if isinstance(v, list) and len(v) == 1 else v for k, v in some.items()}


def generate(
    model: str,
    prompts: Sequence[str],
    method: Any,
    resources: Mapping[str, Any],
    **options: Any,
) -> dict[str, Any]:
    """Continues every prompt.

    Args:
        model: A model folder, a hub id, or a PEFT folder.
        prompts: Texts.
        method: A decode method; None for the model as it is.
        resources: Side models or a store, as the method takes them.
        options: What `generate` takes, and `max_new_tokens`, `batch_size`, `seed`.

    Returns:
        JSON-able: model, method, results (prompt, text, num_tokens and what the method adds),
        seconds, loading included.
    """
    began = time.perf_counter()
    if method is None:
        from foretune.decoding.generation import generate_texts
        from foretune.decoding.peft_model import load_generator

        loaded, tokenizer = load_generator(model)
        found = generate_texts(loaded, tokenizer, prompts, **options)
    else:
        found = method.decode(model, prompts, **resources, **options)
    return {
        "model": model,
        "method": None if method is None else method.to_dict(),
        "results": [
            {"prompt": one.prompt, "text": one.text, "num_tokens": len(one.token_ids)} | one.details
            for one in found
        ],
        "seconds": round(time.perf_counter() - began, 3),
    }
