"""What identifies a model and a tokenizer beside the weights: settings, functions, vocabulary."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from torch import nn

# Keys of a config that do not change what a model computes, or that go with its weights.
VOLATILE = (
    *("transformers_version", "architectures", "dtype", "torch_dtype"),
    *("id2label", "label2id", "num_labels", "problem_type", "auto_map", "use_cache"),
)


def config_of(model: nn.Module) -> dict[str, Any]:
    """The settings of a model as JSON types.

    Of a model of transformers that is its config; of another, a digest of its modules' classes and
    of their attributes that are numbers, strings or functions.
    """
    config: Any = getattr(model, "config", None)
    if hasattr(config, "to_dict"):
        fields = {
            k: v for k, v in config.to_dict().items() if k not in VOLATILE and not k.startswith("_")
        }
        plain: dict[str, Any] = json.loads(json.dumps(fields, default=str, sort_keys=True))
        return plain
    modules = [
        (name, type(module).__qualname__, sorted(_attributes(module)))
        for name, module in model.named_modules()
    ]
    return {"modules": _digest(modules)}


def tokenizer_digest(tokenizer: Any) -> str | None:
    """A digest of all that a tokenizer makes of a text; None without a tokenizer."""
    if tokenizer is None:
        return None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = json.loads(backend.to_str()) if backend is not None else {}
    # How the last batch was padded and cut.
    state = {key: value for key, value in state.items() if key not in ("padding", "truncation")}
    if not state and hasattr(tokenizer, "get_vocab"):
        state = tokenizer.get_vocab()
    special = getattr(tokenizer, "special_tokens_map", None)
    return _digest([state, special, getattr(tokenizer, "chat_template", None)])


def _attributes(module: nn.Module) -> list[tuple[str, str]]:
    attributes = []
    for name, value in vars(module).items():
        if name.startswith("_") or name == "training":
            continue
        if value is None or isinstance(value, bool | int | float | str | tuple):
            attributes.append((name, repr(value)))
        elif callable(value) and hasattr(value, "__name__"):
            attributes.append((name, str(value.__name__)))
    return attributes


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=20).hexdigest()
