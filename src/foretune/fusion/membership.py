"""Adding an expert to a fused model, and removing one, as if all were fused anew."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foretune.errors import UserError
from foretune.fusion.activation_gate import RIDGE, set_gates
from foretune.fusion.finetuned import Finetuned, Source
from foretune.fusion.fused import Fused, without_experts
from foretune.fusion.heads import are_equal, head_names, labels_of
from foretune.fusion.mixture import (
    LowRankExperts,
    TaskHeads,
    energy_kept,
    expert_layers,
    replace_module,
)
from foretune.fusion.skeleton import open_finetuned
from foretune.fusion.verification import verify_on_first_call

Samples = Mapping[str, Sequence[Any]]


def add_expert(
    fused: Fused,
    method: Any,
    name: str,
    source: Source,
    samples: Samples | None = None,
    *,
    allow_unverified: bool = False,
) -> None:
    """Add one more fine-tuned model to a model that SMILE fused, in place.

    Args:
        fused: The fused model.
        method: Any's record, by which it was fused.
        name: Name of the new task.
        source: A model, a folder, a PEFT model or a PEFT folder, as for `foretune.fuse`.
        samples: For gate="activations": texts or batches of every task, the new one included.
        allow_unverified: Whether to take an adapter that does not record its base.

    Raises:
        UserError: The name is taken, the model does not fit, or this fusion cannot be changed.
    """
    _check_rest(method)
    if name in fused.names:
        raise UserError(f'there is an expert "{name}" already; remove_expert("{name}") removes it')
    _check_samples(method, samples, [*fused.names, name])
    single = dataclasses.replace(method, top_k=1, gate="weights", routing="token")
    with without_experts(fused, base_heads=True), torch.no_grad():
        expert = open_finetuned(name, source, fused.model, allow_unverified=allow_unverified)
        alone = single.fuse(fused.model, {name: source}, allow_unverified=allow_unverified)
        heads = head_names(fused.model, [expert])
    _add_layers(fused, alone)
    _add_heads(fused, alone, expert, heads)
    _rename(fused, [*fused.names, name])
    left_out = [n for n in alone.report["left_out"] if n not in fused.report["left_out"]]
    fused.report["left_out"] = [*fused.report["left_out"], *left_out]
    fused.report["notes"] = [*fused.report["notes"], *alone.report["notes"]]
    _finish(fused, method, samples)
    if alone.report["verified"] is not True:
        verify_on_first_call(fused.model, fused.routing, fused.report)


def remove_expert(fused: Fused, method: Any, name: str, samples: Samples | None = None) -> None:
    """Remove one fine-tuned model from a model that SMILE fused, in place.

    The report's `left_out` still names what only this model changed.

    Args:
        fused: The fused model.
        method: Any's record, by which it was fused.
        name: Name of its task.
        samples: For gate="activations": texts or batches of every other task.

    Raises:
        UserError: There is no such expert, it is the only one, or this fusion cannot be changed.
    """
    _check_rest(method)
    index = fused.routing.index(name)
    others = [i for i in range(len(fused.names)) if i != index]
    if not others:
        raise UserError(f"{name} is the only expert; without it the model is its base")
    _check_samples(method, samples, [fused.names[i] for i in others])
    for layer_name, layer in expert_layers(fused.model).items():
        present = bool(layer.present[others].any())
        replace_module(fused.model, layer_name, _selected(layer, others) if present else layer.base)
    _remove_head(fused, index, others)
    _rename(fused, [fused.names[i] for i in others])
    fused.labels.pop(name, None)
    notes = fused.report["notes"]
    fused.report["notes"] = [n for n in notes if not n.startswith((f"{name}:", f"{name} "))]
    top_k = min(fused.routing.top_k, len(others))
    fused.routing.top_k = fused.method["top_k"] = top_k
    _finish(fused, method, samples)


def _check_rest(method: Any) -> None:
    if method.rest == "average":
        raise UserError("rest=average merges the models' other parameters: fuse anew instead")


def _check_samples(method: Any, samples: Samples | None, names: Sequence[str]) -> None:
    if method.gate == "weights":
        if samples is not None:
            raise UserError("samples are for gate=activations; gate=weights takes none")
        return
    missing = [name for name in names if not (samples or {}).get(name)]
    if missing:
        raise UserError(
            "gate=activations is made of all tasks together, so samples of every task are needed; "
            f"none for {', '.join(missing)}"
        )


def _rename(fused: Fused, names: Sequence[str]) -> None:
    fused.names, fused.routing.names = list(names), list(names)


def _finish(fused: Fused, method: Any, samples: Samples | None) -> None:
    """Gates of the present experts, and the report's figures."""
    fused.routing.weights = None
    if samples is not None:
        selected = [head.selected for head in fused.heads.values()]
        set_gates(fused, {n: samples[n] for n in fused.names}, method.gate_k, RIDGE)
        for head, index in zip(fused.heads.values(), selected, strict=True):
            head.selected = index
    fused.report.pop("measured", None)
    fused.report["layers"] = len(expert_layers(fused.model))
    fused.report["energy_kept"] = energy_kept(fused.model)
    total = sum(p.numel() for p in fused.model.parameters())
    fused.report["extra_parameters"] = total - fused.report["base_parameters"]


# --- layers ---------------------------------------------------------------------------------------


def _add_layers(fused: Fused, alone: Fused) -> None:
    old, new = expert_layers(fused.model), expert_layers(alone.model)
    for name in {**old, **new}:
        example = old.get(name) or new[name]
        base = old[name].base if name in old else fused.model.get_submodule(name)
        before = _parts(old[name]) if name in old else _absent(example, len(fused.names))
        after = _parts(new[name]) if name in new else _absent(example, 1)
        sides = ((before, after, len(fused.names)), (after, before, 1))
        for side, beside, num in sides:
            if side["shift"] is None and beside["shift"] is not None:
                side["shift"] = beside["shift"].new_zeros(num, beside["shift"].shape[1])
        device = example.present.device
        parts = {key: _joined(key, before[key], after[key], device) for key in before}
        joined = LowRankExperts(base, **parts, routing=fused.routing)  # type: ignore[arg-type]
        replace_module(fused.model, name, joined)


def _parts(layer: LowRankExperts) -> dict[str, Tensor | None]:
    up, gate = layer.up.detach(), layer.gate.detach()
    down = None if layer.down is None else layer.down.detach()
    shift = None if layer.shift is None else layer.shift.detach()
    parts = {"up": up, "down": down, "gate": gate, "offset": None, "shift": shift}
    return {**parts, "present": layer.present, "energy": layer.energy}


def _absent(example: LowRankExperts, num: int) -> dict[str, Tensor | None]:
    """Parts of experts that do not change a layer, of the example's sizes."""
    parts = _parts(example)
    up, down, gate = parts["up"], parts["down"], parts["gate"]
    assert up is not None and gate is not None
    size_out, size_in = up.shape[1], gate.shape[2]
    return {
        "up": up.new_zeros(num, size_out, size_in if down is None else 1),
        "down": None if down is None else up.new_zeros(num, 1, size_in),
        "gate": gate.new_zeros(num, 1, size_in),
        "offset": None,
        "shift": None if parts["shift"] is None else up.new_zeros(num, size_out),
        "present": torch.zeros(num, dtype=torch.bool),
        "energy": -torch.ones(num),
    }


def _joined(key: str, a: Tensor | None, b: Tensor | None, device: torch.device) -> Tensor | None:
    """The experts of both, those of lower rank padded with zeros."""
    if a is None or b is None:
        return None  # neither side has it, or it is "energy" in a folder of version 1
    if key in ("up", "down", "gate"):
        dim = 2 if key == "up" else 1
        rank = max(a.shape[dim], b.shape[dim])
        a, b = (_padded(tensor, dim, rank) for tensor in (a, b))
    return torch.cat([a.to(device), b.to(device)])


def _padded(tensor: Tensor, dim: int, size: int) -> Tensor:
    missing = size - tensor.shape[dim]
    return F.pad(tensor, (0, missing) if dim == 2 else (0, 0, 0, missing))


def _selected(layer: LowRankExperts, experts: Sequence[int]) -> LowRankExperts:
    """A layer with only those experts, without the zeros that padded them to another's rank."""
    parts = {
        key: None if value is None else value[list(experts)] for key, value in _parts(layer).items()
    }
    up, down, gate, shift = parts["up"], parts["down"], parts["gate"], parts["shift"]
    assert up is not None and gate is not None
    if down is not None:
        rank = _rank(down)
        parts["up"], parts["down"] = up[:, :, :rank].contiguous(), down[:, :rank].contiguous()
    parts["gate"] = gate[:, : _rank(gate)].contiguous()
    if shift is not None and not bool(shift.any()):
        parts["shift"] = None
    return LowRankExperts(layer.base, **parts, routing=layer.routing)  # type: ignore[arg-type]


def _rank(rows: Tensor) -> int:
    """(T, r, in) → number of leading rows after which all are zero, at least 1."""
    nonzero = rows.flatten(2).any(2).any(0).nonzero()
    return int(nonzero.max()) + 1 if len(nonzero) else 1


# --- heads ----------------------------------------------------------------------------------------


def _add_heads(fused: Fused, alone: Fused, expert: Finetuned, names: Sequence[str]) -> None:
    """One head more, or the first heads per task where the new one differs from the shared one."""
    new = {name: alone.model.get_submodule(name) for name in names}
    for name, head in new.items():
        old = fused.model.get_submodule(name)
        if isinstance(old, TaskHeads):
            old.heads.append(head)
    if fused.heads or not new:
        if fused.heads:
            fused.labels[expert.name] = labels_of(expert, list(new.values())[-1].state_dict())
        return
    shared = {name: fused.model.get_submodule(name) for name in names}
    if all(are_equal(shared[n].state_dict(), head.state_dict()) for n, head in new.items()):
        return
    config: Any = getattr(fused.model, "config", None)
    width = len(list(list(shared.values())[-1].state_dict().values())[-1])
    shown = dict(getattr(config, "id2label", None) or {i: f"LABEL_{i}" for i in range(width)})
    fused.labels.update({name: dict(shown) for name in fused.names})
    fused.labels[expert.name] = labels_of(expert, list(new.values())[-1].state_dict())
    for name, head in new.items():
        copies: list[nn.Module] = [copy.deepcopy(shared[name]) for _ in fused.names]
        heads = TaskHeads([*copies, head], fused.routing, shared[name])
        replace_module(fused.model, name, heads)


def _remove_head(fused: Fused, index: int, others: Sequence[int]) -> None:
    """One head fewer, or a single one where those that stay are equal."""
    if not fused.heads:
        return
    for head in fused.heads.values():
        if head.selected is not None:
            place = head.selected
            head.selected = None if place == index else place - (place > index)
        del head.heads[index]
    first = [module.heads[0].state_dict() for module in fused.heads.values()]
    if all(
        are_equal(state, head.state_dict())
        for state, module in zip(first, fused.heads.values(), strict=True)
        for head in module.heads
    ):
        fused.relabel(fused.names[others[0]])
        fused.labels.clear()
        for name, module in fused.heads.items():
            replace_module(fused.model, name, module.heads[0])
