"""Bases whose linear layers are held in 4 or 8 bits by bitsandbytes, and adapters over them.

Such weights are integers with scales beside them: they cannot be trained, but layers above and
below them can. transformers quantises while it loads; what a layer multiplies by is rounded, so an
adapter records the fingerprint of the original, by which it is recognised on either.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from foretune.errors import UserError
from foretune.models.environment import variable
from foretune.models.precision import KINDS, Precision
from foretune.models.surgery import has_fresh_head, head_modules

INSTALL = "pip install 'foretune[quant]'"


def load_quantised(
    load: Callable[..., Any], config: Any, where: str, precision: Precision
) -> nn.Module:
    """The model that a function loads, with its linear layers quantised; heads stay as they are.

    Args:
        load: Loads the model; takes `config` and `dtype`, and hands other arguments to
            `from_pretrained`.
        config: The config of the original.
        where: The original, for messages.
        precision: With `quantize`.

    Raises:
        UserError: bitsandbytes is missing, or the model is quantised already.
    """
    from transformers import BitsAndBytesConfig

    if getattr(config, "quantization_config", None) is not None:
        raise UserError(f"{where} is quantised already: leave quantize out")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"quantize {precision.quantize} needs bitsandbytes: {INSTALL}")
    original = functools.partial(load, config=config, dtype="auto")
    model = original()
    # Named, because by itself transformers leaves out only the last layer: a head may have several,
    # and a pooler that the checkpoint lacks is copied for each task as heads are.
    output = model.get_output_embeddings()
    excluded = head_modules(model) if has_fresh_head(model) else []
    excluded += [
        name
        for name, module in model.named_modules()
        if module is output or name.rpartition(".")[2] == "pooler"
    ]
    dtype = precision.torch_dtype
    dtype = next(model.parameters()).dtype if dtype == "auto" else dtype
    del model
    if precision.quantize == "nf4":
        options: dict[str, Any] = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": dtype,
        }
    else:
        # Above a threshold, what counts as an outlier depends on the other rows of the batch.
        options = {"load_in_8bit": True, "llm_int8_threshold": 0.0}
    quantization = BitsAndBytesConfig(**options, llm_int8_skip_modules=excluded or None)
    with variable("HF_DEACTIVATE_ASYNC_LOAD", "1"):  # weight by weight: it takes less memory
        model = load(config=config, dtype=dtype, quantization_config=quantization)
    model.foretune_original = original
    return model


def prepare_quantised(model: nn.Module) -> None:
    """Has layers in 4 bits compute the same in training and in evaluation, in place.

    On processors with bfloat16 instructions bitsandbytes repacks the weights in evaluation, rounds
    to bfloat16, and from then on gives no gradient to what lies below. Also silences what it logs
    at every call of a layer in 8 bits.
    """
    layers = quantised_layers(model)
    for layer in layers.values():
        if getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False):
            layer.state_dict()  # which unpacks the weight in place
        layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    if layers:
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


def is_quantised(module: nn.Module) -> bool:
    """Whether a layer is linear and holds its weight as integers."""
    weight = getattr(module, "weight", None)
    return (
        isinstance(module, nn.Linear)
        and isinstance(weight, Tensor)
        and not weight.is_floating_point()
    )


def quantised_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Name → layer, of the linear layers that hold integers."""
    layers = ((name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear))
    return {name: layer for name, layer in layers if is_quantised(layer)}


def quantised_as(model: nn.Module) -> str | None:
    """How the linear layers of a model are held, such as "nf4"; None where none is quantised."""
    layer = next(iter(quantised_layers(model).values()), None)
    if layer is None:
        return None
    state: Any = getattr(layer.weight, "quant_state", None)
    return "int8" if state is None else str(state.quant_type)


def refuse_quantised(model: nn.Module, what: str, advice: str) -> None:
    """Refuses a model whose linear layers are quantised.

    Args:
        model: The model.
        what: What would change its weights.
        advice: What to do instead.

    Raises:
        UserError: They are.
    """
    kind = quantised_as(model)
    if kind is not None:
        raise UserError(
            f"{what} changes the weights of the model, which are held in {KINDS.get(kind, kind)} "
            f"and cannot be trained or added to: {advice}"
        )


def dense_weight(module: nn.Module) -> Tensor:
    """The weight that a layer multiplies by: (out, in), or that of another layer as it is."""
    weight: Any = module.weight
    if not is_quantised(module):
        return weight.detach()
    layer: Any = module
    state = getattr(weight, "quant_state", None)
    if state is not None:
        from bitsandbytes.functional import dequantize_4bit

        prepare_quantised(module)
        return dequantize_4bit(weight.data, state)
    # the scales lie in the weight until the layer is called, then in the layer
    scale = weight.SCB if weight.SCB is not None else layer.state.SCB
    return weight.data.float() * scale[:, None] / 127


def linear_shape(module: Any) -> tuple[int, int]:
    """(outputs, inputs) of a linear layer; a quantised weight has another shape."""
    return module.out_features, module.in_features


def scales(model: nn.Module) -> list[tuple[str, Tensor]]:
    """What the integers of quantised layers are scaled by, by name."""
    layers = quantised_layers(model)
    if not layers:
        return []
    parameters = {name for name, _ in model.named_parameters()}
    return [
        (name, value)
        for name, value in model.state_dict().items()
        if name not in parameters and name.split(".weight.")[0].removesuffix(".SCB") in layers
    ]


def original_parameters(model: nn.Module) -> list[tuple[str, Tensor]]:
    """The parameters by name, where weights that were quantised on loading are the original's.

    Of a checkpoint that is itself quantised, they are the integers and what scales them.
    """
    load: Any = getattr(model, "foretune_original", None)
    if load is None:
        return [*model.named_parameters(), *scales(model)]
    originals = dict(load().named_parameters())
    return [
        (name, p if p.is_floating_point() else originals[name])
        for name, p in model.named_parameters()
    ]
