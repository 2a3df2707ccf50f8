"""A base of which every process holds a part (FSDP2); adapters are not touched by it.

Each block is gathered when it is called and its gradients are summed into the parts afterwards. An
adapted layer reads its weight inside the block's forward, where it is whole.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from foretune.models.surgery import block_list


def shard(model: nn.Module, device: torch.device, size: int) -> None:
    """Shards the parameters in place, block by block; they become DTensors under the same names.

    Args:
        model: Whole, on any device, the same on every process.
        device: Where the parts go.
        size: Processes.
    """
    mesh = init_device_mesh(device.type, (size,))
    found = block_list(model)
    for block in () if found is None else found[1]:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to(device)  # buffers
    for module in _sharded(model):
        # A step's loss is a sum over the processes. Gloo cannot scale while it sums.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    # The last block hands out a view of what it made; no model of transformers writes into it.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")


@contextlib.contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Inside the block each process has all weights and may call the model as often as it likes.

    A model that is not sharded is left alone.
    """
    modules = _sharded(model)
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in modules:
            module.reshard()
            module.set_reshard_after_forward(id(module) != id(model), recurse=False)


def whole_model(model: nn.Module, plain: nn.Module) -> nn.Module:
    """`plain`, a model that is not sharded, with the weights of one that is."""
    tensors = {name: whole(t).cpu() for name, t in model.state_dict().items()}
    plain.load_state_dict(tensors)
    return plain


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded; every process must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that may be sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(current: Tensor, value: Tensor) -> Tensor:
    """`value` on the device of `current` and sharded as it is."""
    value = value.to(current.device)
    if isinstance(current, DTensor) and not isinstance(value, DTensor):
        mesh, placements = current.device_mesh, current.placements
        return distribute_tensor(value, mesh, placements, src_data_rank=None)
    return value


def _sharded(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]
