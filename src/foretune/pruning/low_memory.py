"""Pruning a checkpoint that is larger than memory: it is mapped, pruned and written block by block.

Tensors stay in the checkpoint's files and are read when a block computes, so that the system can
drop them again. What transformers stores in another form than it computes with (experts that it
joins to one tensor) is written to a scratch folder first, a tensor at a time. In memory are one
block at a time, what lies outside the list of blocks (embeddings, head), and the activations.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor, nn

from foretune.errors import UserError
from foretune.files import WEIGHTS_FILE, WEIGHTS_INDEX_FILE
from foretune.models.loading import load_model, locate
from foretune.models.pretrained import quiet, user_errors
from foretune.models.surgery import block_list
from foretune.pruning import PLAN_FILE
from foretune.pruning.experts import ExpertBlock, set_tensor
from foretune.pruning.pruned import Pruned, check_same, plan_text

SHARD = "model-{:05d}-of-{:05d}.safetensors"


def load_mapped(name: str, scratch: Path) -> tuple[Any, Any]:
    """A mixture whose blocks are mapped from files, and its tokenizer.

    Args:
        name: Folder or hub id of a mixture in safetensors.
        scratch: Folder for the tensors that the checkpoint stores in another form.

    Raises:
        UserError: The model has no single list of blocks, or is not stored in safetensors.
    """
    where = locate(name)
    skeleton, tokenizer = load_model(where, head="causal-lm", weights=False)
    model_class: Any = type(skeleton)
    places = _places(skeleton)
    with quiet(), user_errors(where):
        model = model_class.from_pretrained(
            where, config=skeleton.config, dtype="auto", device_map=places, offload_folder=scratch
        )
    index = _index_of(model)
    from accelerate.hooks import remove_hook_from_module

    remove_hook_from_module(model, recurse=True)
    del model.hf_device_map
    for tensor_name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            entry = index.get(tensor_name, {})
            if "safetensors_file" not in entry:
                raise UserError(f"{name}: --low-memory needs a checkpoint in safetensors")
            stored = _mapped(Path(entry["safetensors_file"]), entry["weight_name"])
            owner, _, leaf = tensor_name.rpartition(".")
            set_tensor(model.get_submodule(owner), leaf, stored.to(tensor.dtype))
    return model.eval(), tokenizer


def _places(model: nn.Module) -> dict[str, str]:
    """Every block on the disk, and all that is outside the list of blocks in memory.

    Raises:
        UserError: The model has no single list of blocks.
    """
    named = block_list(model)
    if named is None:
        raise UserError(f"--low-memory needs one list of blocks, {type(model).__name__} has not")
    blocks = f"{named[0]}."
    places = {f"{blocks}{i}": "disk" for i in range(len(named[1]))}
    for name, _ in model.named_modules():
        above = f"{name.rpartition('.')[0]}." if "." in name else ""
        if blocks.startswith(above) and not blocks.startswith(f"{name}.") and name:
            places.setdefault(name, "cpu")
    return places


def _index_of(model: nn.Module) -> dict[str, dict[str, str]]:
    """Tensor → its file and its name there, as accelerate's hooks know them."""
    for module in model.modules():
        weights = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        while weights is not None and not hasattr(weights, "index"):
            weights = getattr(weights, "dataset", None)
        if weights is not None:
            index: dict[str, dict[str, str]] = weights.index
            return index
    return {}


def _mapped(file: Path, name: str) -> Tensor:
    with safetensors.safe_open(file, framework="pt") as opened:
        tensor: Tensor = opened.get_tensor(name)
    return tensor


class Spill:
    """Moves the experts of a pruned block to a file of a folder, and maps them from there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, block: ExpertBlock) -> None:
        """Moves the experts of this block."""
        file = self.folder / f"{block.name}.safetensors"
        tensors = {name: p.detach() for name, p in block.experts.named_parameters()}
        safetensors.torch.save_file(tensors, file)
        for name in tensors:
            owner, _, leaf = name.rpartition(".")
            set_tensor(block.experts.get_submodule(owner), leaf, _mapped(file, name))


def save_mapped(pruned: Pruned, folder: Path, scratch: Path) -> None:
    """Write a pruned model that transformers loads, a file for each block, and read it again.

    Args:
        pruned: The pruned model.
        folder: Its empty folder.
        scratch: Folder for what reading it again needs.

    Raises:
        ForetuneError: A tensor is not the same when it is read again.
    """
    model: Any = pruned.model
    named = block_list(model)
    assert named is not None  # checked by `load_mapped`
    state = model.state_dict()
    prefixes = [f"{named[0]}.{i}." for i in range(len(named[1]))]
    groups = [{n: t for n, t in state.items() if n.startswith(prefix)} for prefix in prefixes]
    groups.append({n: t for n, t in state.items() if not n.startswith(tuple(prefixes))})
    places: dict[str, str] = {}
    total = 0
    for i, group in enumerate(groups, 1):
        shard = SHARD.format(i, len(groups))
        with tempfile.TemporaryDirectory(dir=scratch) as part, quiet():
            model.save_pretrained(part, state_dict=group, max_shard_size="1000TB")
            shutil.move(Path(part, WEIGHTS_FILE), folder / shard)
            if i == len(groups):
                for file in Path(part).iterdir():
                    shutil.move(file, folder / file.name)
        with safetensors.safe_open(folder / shard, framework="pt") as opened:
            places |= dict.fromkeys(opened.keys(), shard)
        total += (folder / shard).stat().st_size
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / WEIGHTS_INDEX_FILE).write_text(json.dumps(index, indent=1) + "\n")
    if pruned.tokenizer is not None:
        pruned.tokenizer.save_pretrained(folder)
    (folder / PLAN_FILE).write_text(plan_text(pruned), "utf-8")
    check_same(model, load_mapped(str(folder), scratch / "again")[0])
