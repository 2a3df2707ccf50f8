"""`Fused`: several fine-tuned models as one, which the verb `fuse` returns; saving and loading."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import safetensors.torch
import torch
from pydantic import Field
from torch import Tensor, nn
from typing_extensions import TypedDict

from foretune.claims import output_folder
from foretune.errors import UserError
from foretune.files import CONFIG_FILE, FUSED_BASE
from foretune.formats import damage_named, read_json, read_tensors
from foretune.fusion import FORMAT, MODEL_TYPE, RECORD_FILE
from foretune.fusion.finetuned import Source
from foretune.fusion.mixture import (
    LowRankExperts,
    Routing,
    TaskHeads,
    Usage,
    count_usage,
    expert_layers,
    replace_module,
)
from foretune.fusion.verification import verify_on_first_call
from foretune.methods import make
from foretune.models.loading import load_base, save_base

EXPERTS_FILE, HEADS_FILE = "experts.safetensors", "heads.safetensors"
# Part of a layer's name in the file → attribute.
PARTS = {n: n for n in ("up", "down", "gate", "offset", "present", "energy")} | {"bias": "shift"}


@dataclass
class Fused:
    """Several fine-tuned models over one base as one model.

    Args:
        model: The fused model, of the base's class: call it, generate with it, train it.
        names: Names of the fused models, in order.
        method: The method's record as a mapping.
        routing: Shared by the layers with experts; has no effect where there are none.
        labels: Task → class names by number, where heads are kept per task.
        report: Counts and notes: what was fused, what was left out, how much was added.
        tokenizer: The base's tokenizer, saved with the model.
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
        """Name → module that holds one head per task; empty where all tasks share a head."""
        return {n: m for n, m in self.model.named_modules() if isinstance(m, TaskHeads)}

    def set_task(self, task: str | Sequence[str]) -> Fused:
        """Choose the task of the next inputs: its head, and with routing=task its experts.

        Args:
            task: One name for the whole batch, or one per example where there is no head per task.

        Returns:
            This object.

        Raises:
            UserError: There is no such task, or several tasks were given and each has its own head.
        """
        if isinstance(task, str):
            self.routing.index(task)
        elif self.heads:
            raise UserError(
                "each task has its own head, so set_task takes one name for the whole batch"
            )
        else:
            task = list(task)
        for head in self.heads.values():
            head.selected = self.routing.index(str(task))
        if isinstance(task, str) and self.heads:
            self.relabel(task)
        if self.routing.granularity == "task":
            self.routing.choose(task)
        return self

    def set_experts(self, tasks: str | Sequence[str] | None) -> Fused:
        """Send the whole batch, or each example, to the named experts; None restores the routing.

        Returns:
            This object.

        Raises:
            UserError: There is no such expert.
        """
        self.routing.choose(tasks)
        return self

    def add_expert(
        self,
        name: str,
        source: Source,
        samples: Mapping[str, Sequence[Any]] | None = None,
        *,
        allow_unverified: bool = False,
    ) -> Fused:
        """Add one more fine-tuned model, as if SMILE had fused it with the others.

        Args:
            name: Name of the new task.
            source: A model, a folder, a PEFT model or a PEFT folder, as for `foretune.fuse`.
            samples: For gate="activations": texts or batches of every task, the new one included.
            allow_unverified: Whether to take an adapter that does not record its base.

        Returns:
            This object.

        Raises:
            UserError: The name is taken, the model does not fit, or the models were merged.
        """
        options = {"samples": samples, "allow_unverified": allow_unverified}
        self._record_with_experts().add_expert(self, name, source, **options)
        return self

    def remove_expert(self, name: str, samples: Mapping[str, Sequence[Any]] | None = None) -> Fused:
        """Remove one fine-tuned model, as if SMILE had fused the others alone.

        The report's `left_out` still names what only this model changed.

        Args:
            name: Name of its task.
            samples: For gate="activations": texts or batches of every other task.

        Returns:
            This object.

        Raises:
            UserError: There is no such expert, it is the only one, or the models were merged.
        """
        self._record_with_experts().remove_expert(self, name, samples=samples)
        return self

    @contextmanager
    def usage(self) -> Iterator[Usage]:
        """Count which experts are chosen inside the `with` block.

        The counts' `.mean()` and `.layers` are filled when the block ends.
        """
        with count_usage(self.model, self.names) as counts:
            yield counts

    def save(self, folder: str | Path) -> Path:
        """Write a folder that `load_fused` reads.

        It is written completely or not at all, and replaces an earlier fused model. With neither
        experts nor heads per task (an average) it is a model folder of transformers. Otherwise it
        holds experts and heads, the model beneath them in `base/`, and a `config.json` that
        transformers refuses: loaded without foretune the model would answer as its base.

        Raises:
            UserError: The folder holds something other than a fused model.
        """
        folder = Path(folder)
        with output_folder(folder, "fuse", overwrite=True, at_once=True) as part:
            is_plain = not self.heads and not expert_layers(self.model)
            with without_experts(self):
                save_base(self.model, self.tokenizer, part if is_plain else part / FUSED_BASE)
            if not is_plain:
                refusal = json.dumps({"model_type": MODEL_TYPE}, indent=1) + "\n"
                (part / CONFIG_FILE).write_text(refusal, "utf-8")
            _save_tensors(part / EXPERTS_FILE, self._expert_tensors())
            _save_tensors(part / HEADS_FILE, self._head_tensors())
            (part / RECORD_FILE).write_text(json.dumps(self._record(), indent=1) + "\n", "utf-8")
        return folder

    def _record_with_experts(self) -> Any:
        """The method's record.

        Raises:
            UserError: It has no experts.
        """
        method = make(**self.method)
        if not hasattr(method, "add_expert"):
            raise UserError(
                f"{method.name} merges the models into one set of weights: fuse anew instead"
            )
        return method

    def _record(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
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
        tensors = {}
        for name, layer in expert_layers(self.model).items():
            for part, attribute in PARTS.items():
                value = getattr(layer, attribute)
                if value is not None:
                    tensors[f"{name}|{part}"] = value.detach().cpu().contiguous()
        return tensors

    def _head_tensors(self) -> dict[str, Tensor]:
        return {
            f"{name}|{which}|{key}": value.detach().cpu().contiguous().clone()
            for name, module in self.heads.items()
            for which, head in (*enumerate(module.heads), ("base", module.base_head[0]))
            for key, value in head.state_dict().items()
        }

    def relabel(self, task: str) -> None:
        """Sets the task's classes in the model's config, which its loss and pipelines read."""
        config: Any = getattr(self.model, "config", None)
        names = self.labels.get(task)
        if config is None or not names:
            return
        config.id2label = dict(names)
        config.label2id = {label: i for i, label in names.items()}
        self.model.num_labels = len(names)  # type: ignore[assignment]


def load_fused(folder: str | Path) -> Fused:
    """Load a model that `Fused.save` wrote.

    Raises:
        UserError: The folder holds no fused model, or a damaged one.
    """
    folder = Path(folder)
    if not (folder / RECORD_FILE).is_file():
        raise UserError(
            f"{folder} holds no fused model: it has no {RECORD_FILE}; foretune fuse makes one"
        )
    record = read_json(folder / RECORD_FILE, FusedRecord, FORMAT)
    # Version 1 had the base's files in the folder itself.
    base = folder / FUSED_BASE if (folder / FUSED_BASE).is_dir() else folder
    model, tokenizer = load_base(base, dtype="auto")
    routing = Routing(
        record["names"], record["granularity"], record["top_k"], causal=record["causal"]
    )
    with damage_named(folder / RECORD_FILE):
        _replace_layers(model, record, routing, folder)
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
    if record["layers"] and record["report"].get("verified") is not True:
        verify_on_first_call(model, routing, fused.report)
    return fused


class FusedRecord(TypedDict):
    """The content of `fused.json`."""

    method: dict[str, Any]
    names: list[str]
    causal: bool
    granularity: Literal["token", "sequence", "task"]
    top_k: Annotated[int, Field(ge=1)]
    layers: list[str]
    heads: dict[str, list[list[list[int]]]]
    labels: dict[str, dict[Annotated[str, Field(pattern=r"^\d+$")], str]]
    report: dict[str, Any]


def _replace_layers(model: nn.Module, record: FusedRecord, routing: Routing, folder: Path) -> None:
    """Put the layers with experts and the heads of a folder into its base.

    Raises:
        ValueError: The record does not fit the base or the tensors.
    """
    experts = read_tensors(folder / EXPERTS_FILE) if record["layers"] else {}
    heads = read_tensors(folder / HEADS_FILE) if record["heads"] else {}
    num_experts = len(record["names"])
    for name in record["layers"]:
        parts = {attr: experts.get(f"{name}|{part}") for part, attr in PARTS.items()}
        for part in ("up", "gate", "present"):
            tensor = parts[part]
            if tensor is None or len(tensor) != num_experts:
                raise ValueError(
                    f"{EXPERTS_FILE} has no {part} of {num_experts} experts for {name}"
                )
        base = model.get_submodule(name)
        replace_module(model, name, LowRankExperts(base, **parts, routing=routing))  # type: ignore[arg-type]
    for name, widths in record["heads"].items():
        first_head = model.get_submodule(name)
        states = [
            {k.split("|", 2)[2]: v for k, v in heads.items() if k.startswith(f"{name}|{i}|")}
            for i in range(len(widths))
        ]
        if len(states) != num_experts or not all(states):
            raise ValueError(f"{HEADS_FILE} has not {num_experts} heads for {name}")
        copies = [head_with(first_head, state) for state in states]
        prefix = f"{name}|base|"  # version 1 did not have it
        base_state = {k.removeprefix(prefix): v for k, v in heads.items() if k.startswith(prefix)}
        base_head = head_with(first_head, base_state)
        replace_module(model, name, TaskHeads(copies, routing, base_head))


def watch_mask(model: nn.Module, routing: Routing) -> None:
    """Let the layers know which tokens are padding, by a forward pre-hook of the model."""
    model.register_forward_pre_hook(routing.store_mask, with_kwargs=True)


def head_with(head: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a head with the parameters and buffers of `state`, resized to their shapes."""
    resized = copy.deepcopy(head)
    with torch.no_grad():
        for key, value in state.items():
            owner, _, last = key.rpartition(".")
            module = resized.get_submodule(owner)
            old = getattr(module, last)
            if isinstance(old, nn.Parameter):
                new = value.detach().to(device=old.device, dtype=old.dtype).clone()
                setattr(module, last, nn.Parameter(new, requires_grad=old.requires_grad))
            else:
                old.copy_(value)
            if last == "weight" and isinstance(module, nn.Linear):
                module.out_features, module.in_features = value.shape
    return resized


def _widths(head: nn.Module) -> list[list[int]]:
    return [list(p.shape) for p in head.parameters()]


@contextmanager
def without_experts(fused: Fused, *, base_heads: bool = False) -> Iterator[None]:
    """Inside the block the model is its base, with the first task's head or the base's own."""
    model, layers, heads = fused.model, expert_layers(fused.model), fused.heads
    selected = next(iter(heads.values())).selected if heads else None
    for name, layer in layers.items():
        replace_module(model, name, layer.base)
    for name, module in heads.items():
        # transformers resizes a head on loading, by the config; a plain module cannot.
        first = hasattr(model, "config") and not base_heads
        base_head = module.base_head[0].to(next(module.parameters()).device)
        replace_module(model, name, module.heads[0] if first else base_head)
    try:
        if heads:
            fused.relabel(fused.names[0])
        yield
    finally:
        for name, layer in layers.items():
            replace_module(model, name, layer)
        for name, module in heads.items():
            replace_module(model, name, module)
        if heads and selected is not None:
            fused.relabel(fused.names[selected])


def _save_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    if tensors:
        safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
