"""A base that is sharded over the processes (FSDP2); adapters are not.

Each block is unsharded when it is called and its gradients are summed into the shards afterwards.
An adapted layer reads its weight inside the block's forward, where it is unsharded.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from foretune.models.surgery import block_list


def shard(model: nn.Module, device: torch.device, size: int) -> None:
    """Shards the parameters in place, block by block; they become DTensors under the same names.

    Args:
        model: Unsharded, on any device, the same in all processes.
        device: The device of the shards.
        size: Number of processes.
    """
    mesh = init_device_mesh(device.type, (size,))
    blocks = block_list(model)
    for block in () if blocks is None else blocks[1]:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to(device)  # buffers
    for module in _sharded(model):
        # A step's loss is a sum over the processes. Gloo cannot scale while it sums.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    # The last block returns a view of its output; no model of transformers writes into it.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")


def reshard(model: nn.Module) -> None:
    """Frees weights that a call without a backward pass has left whole; all else is unchanged.

    The outermost module keeps its own until the backward pass.
    """
    for module in _sharded(model):
        module.reshard()


def load_full_weights(plain: nn.Module, model: nn.Module) -> nn.Module:
    """Loads the weights of `model`, which is sharded, into `plain`, which is not; returns it."""
    tensors = {name: full_tensor(t).cpu() for name, t in model.state_dict().items()}
    plain.load_state_dict(tensors)
    return plain


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor of any shape, gathered where it is sharded; all processes must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_tensor(tensor: Tensor) -> Tensor:
    """This process's shard, of any shape, of a tensor that may be sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def place_like(current: Tensor, value: Tensor) -> Tensor:
    """`value` on the device and with the sharding of `current`, which has the same shape."""
    value = value.to(current.device)
    if isinstance(current, DTensor) and not isinstance(value, DTensor):
        mesh, placements = current.device_mesh, current.placements
        return distribute_tensor(value, mesh, placements, src_data_rank=None)
    return value


def _sharded(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]
