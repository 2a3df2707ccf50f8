"""Models that embed inputs and texts into one space: CLIP, SigLIP, and sentence encoders.

A dual encoder has an image tower and a text tower, which transformers calls by
`get_image_features` and `get_text_features`, open_clip by `encode_image` and `encode_text`. A
sentence encoder has a single tower, which reads both the input's text and the label's prompt; an
embedding is the mean over its tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foretune.errors import UserError
from foretune.models.calls import eval_no_grad

SENTENCE_TEMPERATURE = 0.05  # of encoders trained with cosine similarity that have no logit_scale
BATCH = 128


def has_towers(model: nn.Module) -> bool:
    """Whether the model has an image tower and a text tower, as CLIP and SigLIP have.

    >>> has_towers(nn.Linear(2, 2))
    False
    """
    names = ("get_image_features", "get_text_features")
    return is_open_clip(model) or all(hasattr(model, name) for name in names)


def is_open_clip(model: nn.Module) -> bool:
    """Whether the towers are called as open_clip does."""
    return hasattr(model, "encode_image") and hasattr(model, "encode_text")


def embeddings(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """(n, d) embeddings of inputs, of unit length.

    Args:
        model: A dual encoder for `x` (n, channels, height, width), a sentence encoder for
            `input_ids` and `attention_mask` (n, L).
        inputs: Tensors by these names.

    Raises:
        UserError: The model does not read such inputs, or returns no hidden states.
    """
    kind = type(model).__name__
    if "x" in inputs:
        if not has_towers(model):
            raise UserError(
                f"arrays need a model with an image and a text tower (CLIP, SigLIP), got {kind}"
            )
        vectors = _image_vectors(model, inputs["x"])
    else:
        if has_towers(model):
            raise UserError(
                f"text examples need a sentence encoder such as minilm, got {kind}, whose text "
                "tower reads the labels and is not trained"
            )
        vectors = _pooled(model, inputs)
    return F.normalize(vectors.float(), dim=-1)


@torch.no_grad()
def text_embeddings(model: nn.Module, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """(n, d) embeddings of texts, of unit length, by the model in eval mode.

    Args:
        model: A dual encoder or a sentence encoder.
        tokenizer: The model's tokenizer; of open_clip, what `get_tokenizer` returns.
        texts: Texts to embed, truncated to the length that the model reads.

    Raises:
        UserError: `tokenizer` is None, or the model returns no hidden states.
    """
    if tokenizer is None:
        raise UserError("label names are read by the model and need its tokenizer, got None")
    if is_open_clip(model):
        return _open_clip_texts(model, tokenizer, texts)
    config: Any = getattr(model, "config", None)
    text_config = getattr(config, "text_config", config)
    options = {"truncation": True, "return_tensors": "pt", "return_attention_mask": True}
    options["max_length"] = getattr(text_config, "max_position_embeddings", 64)
    # SigLIP was trained on texts padded to full length, and reads the last position.
    options["padding"] = "max_length" if "siglip" in getattr(config, "model_type", "") else True
    device = next(model.parameters()).device
    parts = []
    with eval_no_grad(model):
        for start in range(0, len(texts), BATCH):
            inputs = tokenizer(list(texts[start : start + BATCH]), **options).to(device)
            call = {key: inputs[key] for key in ("input_ids", "attention_mask")}
            if has_towers(model):
                parts.append(_vectors(model.get_text_features(**call)))  # type: ignore[operator]
            else:
                parts.append(_pooled(model, call))
    return F.normalize(torch.cat(parts).float(), dim=-1)


def temperature_of(model: nn.Module) -> float:
    """Temperature that divides cosine similarities: exp(−logit_scale), 0.05 without one."""
    scale = getattr(model, "logit_scale", None)
    return SENTENCE_TEMPERATURE if scale is None else float((-scale.detach()).exp())


def freeze_text(model: nn.Module) -> None:
    """Freeze, in place, what embedding an input does not use: text tower, scales, pooler."""
    if has_towers(model):
        for name, p in model.named_parameters():
            of_texts = name.startswith(("text_model.", "text_projection.", "logit_"))
            if of_texts or (is_open_clip(model) and not name.startswith("visual.")):
                p.requires_grad_(False)
        if hasattr(model, "visual_projection"):  # the module that `Head` trains
            model.head_modules = ["visual_projection"]  # type: ignore[assignment]
        return
    pooler = getattr(model, "pooler", None)
    if isinstance(pooler, nn.Module):
        pooler.requires_grad_(False)


def _image_vectors(model: Any, x: Tensor) -> Tensor:
    """(n, d) embeddings of images (n, channels, height, width)."""
    if is_open_clip(model):
        vectors: Tensor = model.encode_image(x)
        return vectors
    return _vectors(model.get_image_features(pixel_values=x))


def _open_clip_texts(model: Any, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """(n, d) embeddings of texts by a model of open_clip, of unit length.

    Raises:
        UserError: The tokenizer is not one of open_clip.
    """
    device = next(model.parameters()).device
    parts = []
    with eval_no_grad(model):
        for start in range(0, len(texts), BATCH):
            tokens = tokenizer(list(texts[start : start + BATCH]))
            if not isinstance(tokens, Tensor):
                raise UserError(
                    "a model of open_clip reads what its own tokenizer makes: "
                    "open_clip.get_tokenizer(NAME)"
                )
            parts.append(model.encode_text(tokens.to(device)))
    return F.normalize(torch.cat(parts).float(), dim=-1)


def _vectors(output: Any) -> Tensor:
    """The output of `get_image_features`: a tensor, or since transformers 5 a record with one."""
    vectors: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return vectors


def _pooled(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """(n, d) mean over each text's tokens of the last hidden states.

    Raises:
        UserError: The model returns no hidden states.
    """
    mask = inputs["attention_mask"]
    output = model(input_ids=inputs["input_ids"], attention_mask=mask)
    hidden = getattr(output, "last_hidden_state", None)
    if hidden is None:
        raise UserError(
            f"prompts need a model that returns hidden states (AutoModel), got "
            f"{type(model).__name__}"
        )
    weights = mask.to(hidden.dtype).unsqueeze(-1)
    pooled: Tensor = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)
    return pooled
