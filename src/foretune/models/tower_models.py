"""Building models with a tower (`models/tower.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModel

from foretune.errors import UserError
from foretune.models.calls import dummy_rows, eval_no_grad
from foretune.models.pretrained import build, load_tokenizer, read_config
from foretune.models.seeding import seed_generators
from foretune.models.tower import (
    ArrayTowerConfig,
    DualTower,
    DualTowerConfig,
    TowerConfig,
    TowerForArrays,
    TowerForSequenceClassification,
)
from foretune.printable import in_one_line

WIDEST = 65_536


def check_widths(widths: Sequence[int]) -> list[int]:
    """The widths of a tower's hidden layers.

    Raises:
        UserError: There are none, or one is not a positive integer of a layer's size.
    """
    are_sizes = all(
        isinstance(w, int) and not isinstance(w, bool) and 1 <= w <= WIDEST for w in widths
    )
    if not widths or not are_sizes:
        raise UserError(
            f"tower must be a list of the widths of its hidden layers, each from 1 to {WIDEST}, "
            f"such as [64, 64]; got {list(widths)}"
        )
    return list(widths)


def text_tower_on(
    where: str,
    widths: Sequence[int],
    head: str,
    num_labels: int | None,
    trusted: bool,
    seed: int,
    dtype: Any = torch.float32,
) -> tuple[nn.Module, Any]:
    """A new tower on a frozen encoder, and the encoder's tokenizer.

    Args:
        where: Folder or hub id of the encoder.
        widths: Widths of the hidden layers; with head "none", of the residual layers on each side.
        head: "classification" for texts, "none" for contexts and responses.
        num_labels: Outputs of the classification head; None for 2.
        trusted: Whether code that comes with the encoder may be executed.
        seed: Random seed of the tower's weights.
        dtype: Dtype of the weights.

    Raises:
        UserError: The model is not an encoder of texts, or cannot be loaded.
    """
    if head not in ("classification", "none"):
        raise UserError(
            f'a tower gives labels for texts, or compares contexts and responses; head "{head}" '
            "needs the model's own layers: leave tower out"
        )
    sizes = check_widths(widths)
    config = read_config(where, trusted)
    if isinstance(config, (TowerConfig, ArrayTowerConfig)):
        raise UserError(f"{where} has a tower already: load it without tower")
    if getattr(config, "auto_map", None):
        raise UserError(
            f"{where} brings Python code of its own, which a tower saved with it would lack: use "
            "an encoder that transformers has itself"
        )
    encoder = build(AutoModel, where, config, trusted, seed, dtype, fresh_head=False)
    tokenizer = load_tokenizer(where, trusted)
    _check_encoder(where, encoder, tokenizer)
    described = encoder.config.to_dict()
    for name in ("_name_or_path", "transformers_version"):  # of the folder that it was read from
        described.pop(name, None)
    fields = {"encoder": described, "widths": sizes}
    with torch.random.fork_rng(devices=[]):
        seed_generators(seed)
        if head == "none":
            model: Any = DualTower(DualTowerConfig(**fields), encoder)
        else:
            config = TowerConfig(**fields, num_labels=2 if num_labels is None else num_labels)
            model = TowerForSequenceClassification(config, encoder)
    return model.to(encoder.dtype).eval(), tokenizer


def array_tower(input_size: int, widths: Sequence[int], outputs: int, seed: int = 0) -> nn.Module:
    """A new tower on arrays.

    Args:
        input_size: Numbers in an array.
        widths: Widths of the hidden layers.
        outputs: Outputs of the head.
        seed: Random seed of the weights.

    Raises:
        UserError: The widths are not those of layers.
    """
    config = ArrayTowerConfig(input_size, check_widths(widths), num_labels=outputs)
    with torch.random.fork_rng(devices=[]):
        seed_generators(seed)
        return TowerForArrays(config).eval()


def _check_encoder(where: str, encoder: nn.Module, tokenizer: Any) -> None:
    """Checks that a model turns token ids into hidden states.

    Raises:
        UserError: It does not, or it has no tokenizer.
    """
    kind = type(encoder).__name__
    reason = "it has no tokenizer" if tokenizer is None else None
    if reason is None and getattr(encoder.config, "is_encoder_decoder", False):
        reason = "it reads texts twice, as an encoder and as a decoder"
    size = getattr(encoder.config, "hidden_size", None)
    if reason is None and getattr(encoder.config, "vocab_size", None) is None:
        reason = "it does not read token ids"
    if reason is None:
        try:
            with eval_no_grad(encoder):
                states = encoder(**dummy_rows(encoder)).last_hidden_state
            if states.dim() != 3 or states.shape[-1] != size:
                reason = f"its last hidden states are not (texts, tokens, {size})"
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
            reason = f"it gives no hidden states for token ids ({in_one_line(str(error))[:100]})"
    if reason is not None:
        raise UserError(
            f"a tower needs an encoder of texts, which {where} ({kind}) is not: {reason}"
        )
