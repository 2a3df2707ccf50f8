"""What a forward pass reads of a model outside its blocks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from typing_extensions import override


@dataclass
class Reads:
    """What was read.

    Args:
        tensors: Name → parameter or buffer.
        modules: Names of the modules that were called.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    modules: list[str] = field(default_factory=list)


@contextlib.contextmanager
def recorded_reads(model: nn.Module, block_list_name: str) -> Iterator[Reads]:
    """Inside the block, records what calls of the model read outside its blocks.

    That is the whole of each module that is called, and every parameter and buffer that a function
    of torch takes. Modules that contain the blocks are not counted as called.
    """
    reads = Reads()
    outside = {
        name: module
        for name, module in model.named_modules()
        if not f"{block_list_name}.".startswith(f"{name}.")
        and not name.startswith(f"{block_list_name}.")
        and name
    }
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    tensors = {k: v for k, v in tensors.items() if not k.startswith(f"{block_list_name}.")}
    with contextlib.ExitStack() as stack:
        for name, module in outside.items():

            def called(module: nn.Module, *_: Any, name: str = name) -> None:
                reads.modules.append(name)
                for key, tensor in (*module.named_parameters(), *module.named_buffers()):
                    reads.tensors[f"{name}.{key}"] = tensor

            stack.callback(module.register_forward_pre_hook(called).remove)
        with _Watch(tensors, reads.tensors):
            yield reads


class _Watch(TorchFunctionMode):
    """Collects those of the tensors that functions of torch take as arguments."""

    def __init__(self, tensors: Mapping[str, Tensor], read: dict[str, Tensor]) -> None:
        super().__init__()
        self.names = {id(tensor): name for name, tensor in tensors.items()}
        self.tensors, self.read = tensors, read

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for value in (*args, *kwargs.values()):
            for item in value if isinstance(value, (list, tuple)) else (value,):
                name = self.names.get(id(item))
                if name is not None:
                    self.read[name] = self.tensors[name]
        return func(*args, **kwargs)
