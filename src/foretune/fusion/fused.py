"""`Fused`: several models in one, as the verb `fuse` returns it; saved, loaded, told its task."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from foretune.errors import UserError
from foretune.files import whole_folder
from foretune.fusion.mixture import (
    LowRankExperts,
    Routing,
    TaskHeads,
    Usage,
    count_usage,
    expert_layers,
    replace_module,
)
from foretune.models.loading import load_base, save_base

RECORD, EXPERTS, HEADS = "fused.json", "experts.safetensors", "heads.safetensors"
PARTS = ("up", "down", "gate", "offset", "bias", "present")


@dataclass
class Fused:
    """Several fine-tuned models over one base as one model.

    Args:
        model: The fused model, of the base's class: call it, generate with it, train it.
        names: Of what was fused, in order.
        method: The method's record, as a mapping.
        routing: What the layers with experts share; of no effect where there are none.
        labels: Task → the names of its classes by number, where they are known.
        report: Counts and notes: what was fused, what was left out, how much was added.
        tokenizer: Of the base, saved with the model.
    """

    model: nn.Module
    names: list[str]
    method: dict[str, Any]
    routing: Routing
    labels: dict[str, dict[int, str]] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)
    tokenizer: Any = None

    @property
    def heads(self) -> dict[str, TaskHeads]:
        """Name → module that holds a head for each task; empty where all share one."""
        return {n: m for n, m in self.model.named_modules() if isinstance(m, TaskHeads)}

    def set_task(self, task: str | Sequence[str]) -> Fused:
        """Says which task comes next: its head answers, and with routing=task its experts.

        Args:
            task: One name for all rows, or, where tasks have no heads of their own, one for each.

        Returns:
            Itself.

        Raises:
            UserError: There is no such task, or heads cannot answer for several at once.
        """
        if isinstance(task, str):
            self.routing.index(task)
        elif self.heads:
            raise UserError(
                "each task has a head of its own: set_task takes one name, for all rows of a batch"
            )
        else:
            task = list(task)
        for head in self.heads.values():
            head.selected = self.routing.index(str(task))
        if isinstance(task, str) and self.heads:
            self._relabel(task)
        if self.routing.granularity == "task":
            self.routing.choose(task)
        return self

    def set_experts(self, tasks: str | Sequence[str] | None) -> Fused:
        """Sends all rows (or each row) to the named experts, whatever the routing; None undoes it.

        Returns:
            Itself.

        Raises:
            UserError: There is no such expert.
        """
        self.routing.choose(tasks)
        return self

    @contextmanager
    def usage(self) -> Iterator[Usage]:
        """Counts which experts are chosen while the block lasts.

        The result's `.mean()` and `.layers` are filled when the block ends.
        """
        with count_usage(self.model, self.names) as counted:
            yield counted

    def save(self, folder: str | Path) -> Path:
        """Writes a model folder, with experts, heads and `fused.json` beside the base's files.

        The folder appears whole or not at all. `load_fused` reads it; for a method without experts
        and heads (an average), so does transformers. A fused model that is there is replaced.

        Raises:
            UserError: Something else is in the folder.
        """
        folder = Path(folder)
        held = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
        if held and RECORD not in held:
            raise UserError(
                f"{folder} holds no fused model ({', '.join(held[:3])}, …), so it is not replaced; "
                "choose another folder"
            )
        with whole_folder(folder) as part:
            with _without_experts(self):
                save_base(self.model, self.tokenizer, part)
            _save_tensors(part / EXPERTS, self._expert_tensors())
            _save_tensors(part / HEADS, self._head_tensors())
            (part / RECORD).write_text(json.dumps(self._record(), indent=1) + "\n", "utf-8")
        return folder

    def _record(self) -> dict[str, Any]:
        return {
            "format": 1,
            "method": self.method,
            "names": self.names,
            "causal": self.routing.causal,
            "granularity": self.routing.granularity,
            "top_k": self.routing.top_k,
            "layers": list(expert_layers(self.model)),
            "heads": {
                name: [_widths(head) for head in module.heads]
                for name, module in self.heads.items()
            },
            "labels": self.labels,
            "report": self.report,
        }

    def _expert_tensors(self) -> dict[str, Tensor]:
        found = {}
        for name, layer in expert_layers(self.model).items():
            for part in PARTS:
                value = getattr(layer, part)
                if value is not None:
                    found[f"{name}|{part}"] = value.detach().cpu().contiguous()
        return found

    def _head_tensors(self) -> dict[str, Tensor]:
        return {
            f"{name}|{i}|{key}": value.detach().cpu().contiguous().clone()
            for name, module in self.heads.items()
            for i, head in enumerate(module.heads)
            for key, value in head.state_dict().items()
        }

    def _relabel(self, task: str) -> None:
        """Tells the model the task's classes, which its loss and its pipelines go by."""
        config: Any = getattr(self.model, "config", None)
        names = self.labels.get(task)
        if config is None or not names:
            return
        config.id2label = dict(names)
        config.label2id = {label: i for i, label in names.items()}
        self.model.num_labels = len(names)  # type: ignore[assignment]


def load_fused(folder: str | Path) -> Fused:
    """Reads what `Fused.save` wrote.

    Raises:
        UserError: The folder holds no fused model, or a broken one.
    """
    folder = Path(folder)
    if not (folder / RECORD).is_file():
        raise UserError(
            f"{folder} holds no fused model: it has no {RECORD}; foretune fuse makes one"
        )
    record = json.loads((folder / RECORD).read_text("utf-8"))
    model, tokenizer = load_base(folder, dtype="auto")
    routing = Routing(
        record["names"], record["granularity"], record["top_k"], causal=record["causal"]
    )
    experts, heads = _read_tensors(folder / EXPERTS), _read_tensors(folder / HEADS)
    for name in record["layers"]:
        parts = {part: experts.get(f"{name}|{part}") for part in PARTS}
        base = model.get_submodule(name)
        replace_module(model, name, LowRankExperts(base, **parts, routing=routing))  # type: ignore[arg-type]
    for name, widths in record["heads"].items():
        first = model.get_submodule(name)
        tensors = [
            {k.split("|", 2)[2]: v for k, v in heads.items() if k.startswith(f"{name}|{i}|")}
            for i in range(len(widths))
        ]
        replace_module(model, name, TaskHeads([head_with(first, t) for t in tensors], routing))
    labels = {task: {int(k): v for k, v in m.items()} for task, m in record["labels"].items()}
    fused = Fused(
        model.eval(),
        record["names"],
        record["method"],
        routing,
        labels,
        record["report"],
        tokenizer,
    )
    watch_mask(model, routing)
    return fused


def watch_mask(model: nn.Module, routing: Routing) -> None:
    """Lets the layers know which tokens are padding."""
    model.register_forward_pre_hook(routing.note, with_kwargs=True)


def head_with(head: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a head that holds these values, as wide as they are."""
    made = copy.deepcopy(head)
    with torch.no_grad():
        for key, value in tensors.items():
            owner, _, last = key.rpartition(".")
            module = made.get_submodule(owner)
            old = getattr(module, last)
            if isinstance(old, nn.Parameter):
                fresh = value.detach().to(device=old.device, dtype=old.dtype).clone()
                setattr(module, last, nn.Parameter(fresh, requires_grad=old.requires_grad))
            else:
                old.copy_(value)
            if last == "weight" and isinstance(module, nn.Linear):
                module.out_features, module.in_features = value.shape
    return made


def _widths(head: nn.Module) -> list[list[int]]:
    return [list(p.shape) for p in head.parameters()]


@contextmanager
def _without_experts(fused: Fused) -> Iterator[None]:
    """The model as its base with the first task's head, while the block lasts."""
    model, layers, heads = fused.model, expert_layers(fused.model), fused.heads
    selected = next(iter(heads.values())).selected if heads else None
    for name, layer in layers.items():
        replace_module(model, name, layer.base)
    for name, module in heads.items():
        replace_module(model, name, module.heads[0])
    try:
        if heads:
            fused._relabel(fused.names[0])
        yield
    finally:
        for name, layer in layers.items():
            replace_module(model, name, layer)
        for name, module in heads.items():
            replace_module(model, name, module)
        if heads and selected is not None:
            fused._relabel(fused.names[selected])


def _save_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    if tensors:
        safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})


def _read_tensors(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        return {}
    try:
        return safetensors.torch.load_file(file)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"cannot read {file}: {' '.join(str(error).split())[:200]}") from error
