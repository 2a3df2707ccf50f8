"""What fine-tuning changed, one tensor at a time.

Each fine-tuned model keeps account of the tensors that were read from it, so that none is dropped
without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from os import PathLike

import torch
from torch import Tensor, nn

from foretune.errors import UserError

Source = nn.Module | str | PathLike[str]


@dataclass(frozen=True)
class LowRank:
    """The change of a weight by LoRA, as a product of two matrices.

    Args:
        up: (out, r), with the scaling.
        down: (r, in); for a convolution `in` covers channels and kernel.
        transposed: Whether the weight is stored as (in, out): `Conv1D` and embeddings.
    """

    up: Tensor
    down: Tensor
    transposed: bool = False

    def dense(self, shape: Sequence[int]) -> Tensor:
        """The change in the weight's shape, float32."""
        product = self.up @ self.down
        return (product.T if self.transposed else product).reshape(*shape)


@dataclass
class Finetuned:
    """One fine-tuned model, as its difference from the base.

    Args:
        name: Name of its task.
        read: Maps the name of a parameter or buffer to its fine-tuned value; None where it is the
            base's.
        names: Names, in the base, of all tensors that the model holds.
        low_rank: Parameter → its change by LoRA, which comes on top of `read`.
        copies: Parameters that an adapter holds whole (PEFT's `modules_to_save`).
        vocabulary: Names of the input and output embeddings, whose rows are tokens.
        labels: Class names by number; empty where the model has none.
        notes: What the user should know about the model.
    """

    name: str
    read: Callable[[str], Tensor | None]
    names: frozenset[str]
    low_rank: dict[str, LowRank] = field(default_factory=dict)
    copies: frozenset[str] = frozenset()
    vocabulary: frozenset[str] = frozenset()
    labels: dict[int, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    _used: set[str] = field(default_factory=set, init=False)

    def change(self, name: str, base: Tensor) -> Tensor | None:
        """Fine-tuned value minus the base's, in its shape and float32; None without a change.

        Raises:
            UserError: The shape differs from the base's, or a number is not finite.
        """
        value, pair = self.read(name), self.low_rank.get(name)
        self.skip(name)
        if value is None and pair is None:
            return None
        if value is not None and value.shape != base.shape:
            raise UserError(self._other_shape(name, value, base))
        change = torch.zeros_like(base, dtype=torch.float32)
        if value is not None:
            change = value.to(base.device).float() - base.detach().float()
        if pair is not None:
            change = change + pair.dense(base.shape).to(base.device)
        self._check_finite(name, change)
        return change if bool(change.any()) else None

    def value(self, name: str, base: Tensor) -> Tensor:
        """The fine-tuned value, which may have another shape than the base's.

        Raises:
            UserError: A number is not finite.
        """
        value, pair = self.read(name), self.low_rank.get(name)
        self.skip(name)
        value = base if value is None else value
        if pair is not None:
            value = (value.float() + pair.dense(value.shape).to(value.device)).to(value.dtype)
        self._check_finite(name, value)
        return value

    def pair(self, name: str) -> LowRank | None:
        """The change of a parameter if it is of low rank and nothing else changed it.

        Raises:
            UserError: A number is not finite.
        """
        if name in self.copies or name not in self.low_rank:
            return None
        self.skip(name)
        pair = self.low_rank[name]
        self._check_finite(name, pair.up)
        self._check_finite(name, pair.down)
        return pair

    def has_other_shape(self, name: str, base: Tensor) -> bool:
        """Whether the shape of a tensor differs from the base's."""
        value = self.read(name)
        return value is not None and value.shape != base.shape

    def skip(self, name: str) -> None:
        """Count a tensor as used."""
        self._used.add(name)

    def unused(self) -> list[str]:
        """Names of the tensors that nothing has used."""
        return sorted(self.names - self._used)

    def _check_finite(self, name: str, tensor: Tensor) -> None:
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise UserError(f"{self.name}: {name} holds NaN or infinite numbers")

    def _other_shape(self, name: str, value: Tensor, base: Tensor) -> str:
        shapes = f"{tuple(value.shape)}, in the base {tuple(base.shape)}"
        if name in self.vocabulary and value.shape[1:] == base.shape[1:]:
            rows = len(value)
            return (
                f"the vocabulary of {self.name} was resized: {name} has shape {shapes}; fuse over "
                f"a base of that size (model.resize_token_embeddings({rows}), save_pretrained)"
            )
        return f"{self.name} was not tuned from this base: {name} has shape {shapes}"


def check_all_used(experts: Sequence[Finetuned]) -> None:
    """Refuse to drop a tensor of a fine-tuned model without a word.

    Raises:
        UserError: There is a tensor that was neither fused nor reported.
    """
    for expert in experts:
        unused = expert.unused()
        if unused:
            raise UserError(
                f"{expert.name} changes {unused[0]}, which cannot be fused: merge the adapter into "
                "its base (merge_and_unload), or leave the module out when fine-tuning"
            )


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Name → buffer of all buffers that are saved with the model, such as batch statistics."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {
        name: value
        for name, value in model.state_dict(keep_vars=True).items()
        if name not in parameters and isinstance(value, Tensor)
    }
