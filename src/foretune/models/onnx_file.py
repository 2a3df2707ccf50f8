"""Models as ONNX files, for runtimes without torch.

torch's exporter traces the model once and keeps the numbers of rows and of tokens open. Every file
is run by onnxruntime afterwards, on rows of other numbers and lengths, and compared: exporters have
written files that read padding as text.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from foretune.errors import UserError
from foretune.models.calls import eval_no_grad
from foretune.models.digests import text_tower
from foretune.models.pretrained import reason_of
from foretune.models.surgery import CLASSIFIERS
from foretune.models.tower import DualTower

FILE = "model.onnx"
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
SHAPES = ((2, 6), (3, 9), (1, 4))  # rows and tokens; the first is traced
TOLERANCE = 1e-3  # of the largest output


def check_packages() -> None:
    """Checks that what writes and runs ONNX files is installed.

    Raises:
        UserError: It is not.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"ONNX files need {', '.join(missing)}: pip install 'foretune[onnx]'")


def write_onnx(model: nn.Module, folder: Path, tokenizer: Any = None) -> float:
    """Writes model.onnx: `logits` of a classifier, `last_hidden_state` of an encoder.

    Args:
        model: A model of transformers that reads token ids or images.
        folder: An existing folder.
        tokenizer: Its tokenizer. Where that makes `token_type_ids`, by which pairs of texts are
            told apart, the file takes them, too.

    Returns:
        The largest difference between what onnxruntime and torch compute, as a share of the largest
        output.

    Raises:
        UserError: A package is missing, the model cannot be exported, or the file computes
            something else.
    """
    check_packages()
    kind = type(model).__name__
    if getattr(model, "get_output_embeddings", lambda: None)() is not None:
        raise UserError(
            f"{kind} generates text, which ONNX is not written for: export encoders and classifiers"
        )
    segments = "token_type_ids" in getattr(tokenizer, "model_input_names", ())
    inputs = _inputs(model, *SHAPES[0], segments)
    dims = ("rows", "tokens") if "input_ids" in inputs else ("rows",)
    open_dims = {name: dict.fromkeys(range(len(dims)), torch.export.Dim.DYNAMIC) for name in inputs}
    traced = _ByName(model, tuple(inputs))
    path = folder / FILE
    with eval_no_grad(model), _quiet():
        try:
            torch.onnx.export(
                traced,
                tuple(inputs.values()),
                str(path),
                dynamo=True,
                dynamic_shapes={"inputs": tuple(open_dims.values())},
                input_names=list(inputs),
                output_names=[traced.output],
                external_data=False,
                verbose=False,
            )
        except Exception as error:  # whatever the exporter cannot trace
            cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
            raise UserError(f"{kind} cannot be written as ONNX: {reason_of(cause)}") from error
        difference = _difference(model, traced, path, segments)
    if difference > TOLERANCE:
        raise UserError(
            f"{kind} cannot be written as ONNX: the file computes other outputs (by "
            f"{difference:.2g} of the largest)"
        )
    return difference


class _ByName(nn.Module):
    """A model that takes its inputs in order, and returns one tensor."""

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, names
        is_classifier = type(model).__name__.endswith(CLASSIFIERS)
        self.output = "logits" if is_classifier else "last_hidden_state"

    @override
    def forward(self, *inputs: Tensor) -> Tensor:
        """The output (rows, …) for inputs (rows, …)."""
        result: Tensor = self.model(**dict(zip(self.names, inputs, strict=True)))[self.output]
        return result


def _inputs(model: Any, rows: int, tokens: int, segments: bool) -> dict[str, Tensor]:
    """Inputs of a model: ids, mask and segments (rows, tokens), the last row padded; or images.

    Raises:
        UserError: It reads something else.
    """
    tower = text_tower(model)
    config = model.config if tower is None else tower.encoder.config
    generator = torch.Generator().manual_seed(rows)
    if getattr(config, "vocab_size", None) is not None and not isinstance(model, DualTower):
        pad = getattr(config, "pad_token_id", None) or 0
        ids = torch.randint(config.vocab_size, (rows, tokens), generator=generator)
        mask = torch.ones_like(ids)
        if rows > 1:
            mask[-1, tokens // 2 :] = 0
        ids = torch.where((ids == pad) & (mask > 0), (pad + 1) % config.vocab_size, ids)
        inputs = {"input_ids": torch.where(mask > 0, ids, pad), "attention_mask": mask}
        if segments and getattr(config, "type_vocab_size", 0) > 1:
            inputs["token_type_ids"] = (torch.arange(tokens) >= tokens // 2).long() * mask
        return inputs
    if model.main_input_name == "pixel_values":
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        shape = (rows, config.num_channels, height, width)
        return {"pixel_values": torch.randn(shape, generator=generator)}
    raise UserError(f"{type(model).__name__} reads neither token ids nor images: no ONNX file")


def _difference(model: nn.Module, traced: _ByName, path: Path, segments: bool) -> float:
    """The largest difference of the file's outputs from the model's, relative to the largest."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    worst = 0.0
    for rows, tokens in SHAPES:
        inputs = _inputs(model, rows, tokens, segments)
        expected = traced(*inputs.values())
        [output] = session.run(None, {name: x.numpy() for name, x in inputs.items()})
        change = (torch.from_numpy(output) - expected).abs()
        if traced.output == "last_hidden_state" and "attention_mask" in inputs:
            change = change * inputs["attention_mask"][..., None]
        worst = max(worst, float(change.max() / expected.abs().max().clamp(min=1e-9)))
    return worst


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Inside the block the exporter says nothing below errors."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
