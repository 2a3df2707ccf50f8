"""How the weights of a base are held: dtype, device, and whether linear layers are quantised."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from foretune.errors import UserError, did_you_mean

if TYPE_CHECKING:
    import torch

Quantize = Literal["nf4", "int8"]
DType = Literal["float32", "bfloat16", "float16"]
KINDS = {"nf4": "4 bits (nf4)", "int8": "8 bits (int8)"}


@dataclass(frozen=True)
class Precision:
    """How the weights of a base are held.

    Args:
        dtype: Dtype of the weights that are not quantised, and of the computation; "auto" for that
            of the checkpoint.
        quantize: How linear layers are held; None for `dtype` as well.
        device: Where a model that generates or fills a store is placed.

    Raises:
        UserError: There is no such quantisation.
    """

    dtype: torch.dtype | str = "float32"
    quantize: str | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.quantize is not None and self.quantize not in KINDS:
            raise UserError(
                f"quantize must be one of {', '.join(KINDS)}; got {self.quantize!r}."
                f"{did_you_mean(str(self.quantize), KINDS)}"
            )

    @property
    def torch_dtype(self) -> Any:
        """The dtype, or "auto"."""
        import torch

        is_name = isinstance(self.dtype, str) and self.dtype != "auto"
        return getattr(torch, str(self.dtype)) if is_name else self.dtype


_AROUND: ContextVar[Precision | None] = ContextVar("precision", default=None)


@contextlib.contextmanager
def held_in(dtype: DType, quantize: Quantize | None, device: str = "cpu") -> Iterator[None]:
    """Inside the block models are loaded like this, unless a call says otherwise."""
    token = _AROUND.set(Precision(dtype, quantize, device))
    try:
        yield
    finally:
        _AROUND.reset(token)


def precision_of(dtype: torch.dtype | str | None, quantize: str | None) -> Precision:
    """How a call loads a model; what it leaves None is as `held_in` says, by default float32."""
    around = _AROUND.get() or Precision()
    return Precision(around.dtype if dtype is None else dtype, quantize or around.quantize)


def device_around() -> str:
    """The device that `held_in` names, by default the CPU."""
    return (_AROUND.get() or Precision()).device
