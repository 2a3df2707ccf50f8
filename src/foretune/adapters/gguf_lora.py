"""LoRA adapters as GGUF files, for llama.cpp.

The format: `general.type` is "adapter", `adapter.type` "lora", and each adapted weight has two
tensors, `NAME.lora_a` (r, in) and `NAME.lora_b` (out, r), where NAME is the weight's in the base's
GGUF file. llama.cpp scales by alpha / r. Llama's queries and keys lie there with the two halves of
each head interleaved, so the rows of their B are reordered.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from foretune.adapters.peft_names import PREFIX
from foretune.adapters.stored_adapter import StoredAdapter
from foretune.errors import UserError

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""`model_type` of a config → architecture of GGUF; those whose weights are known to fit."""
INTERLEAVED = ("llama",)  # architectures whose queries and keys are reordered


def write_gguf_lora(stored: StoredAdapter, model: nn.Module, file: Path) -> None:
    """Writes an adapter as a GGUF file.

    Args:
        stored: The adapter, as `read_adapter` reads it.
        model: Its base.
        file: The file to write.

    Raises:
        UserError: The base is of another architecture, the adapter is not plain LoRA, or the
            package gguf is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise UserError('GGUF needs the package gguf: pip install "foretune[smollm]"') from error

    config: Any = getattr(model, "config", None)
    kind = getattr(config, "model_type", type(model).__name__)
    if kind not in ARCHITECTURES:
        raise UserError(
            f"adapters of {kind} are not written as GGUF; of {', '.join(ARCHITECTURES)} they are"
        )
    architecture, scale = ARCHITECTURES[kind], _alpha(stored)
    number = next(n for n, a in gguf.MODEL_ARCH_NAMES.items() if a == architecture)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, scale)
    for layer, (a, b) in _factors(stored).items():
        name = names.get_name(f"{layer}.weight", try_suffixes=(".weight",))
        if name is None:
            raise UserError(f"{layer} has no name in GGUF files of {architecture}")
        count = heads.get(name.split(".")[-2])
        if architecture in INTERLEAVED and count is not None:
            b = b.unflatten(0, (count, 2, -1)).transpose(1, 2).reshape(b.shape)
        for suffix, factor in (("lora_a", a), ("lora_b", b)):
            writer.add_tensor(f"{name}.{suffix}", factor.numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _factors(stored: StoredAdapter) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer → (A, B).

    Raises:
        UserError: The adapter has something else.
    """
    factors: dict[str, dict[str, Tensor]] = {}
    for name, tensor in stored.tensors.items():
        layer, separator, factor = name.removeprefix(PREFIX).partition(".lora_")
        if factor not in ("A.weight", "B.weight") or not separator:
            raise UserError(
                f"GGUF files hold plain LoRA, and this adapter has {name.removeprefix(PREFIX)}: "
                "merge it into the base instead (--format merged)"
            )
        factors.setdefault(layer, {})[factor[0]] = tensor.float()
    return {layer: (pair["A"], pair["B"]) for layer, pair in factors.items()}


def _alpha(stored: StoredAdapter) -> float:
    """The alpha by which llama.cpp comes to the adapter's scale.

    Raises:
        UserError: Layers have ranks or alphas of their own, or the adapter is not LoRA.
    """
    config = stored.config
    if (feature := stored.beyond_plain_lora()) is not None:
        raise UserError(f"GGUF files hold plain LoRA, and this adapter has {feature}")
    alpha, rank = float(config.get("lora_alpha") or 8), int(config.get("r", 8))
    return alpha * math.sqrt(rank) if config.get("use_rslora") else alpha
