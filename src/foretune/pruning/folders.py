"""`foretune prune`: a mixture in a folder becomes a smaller one, and what controls would give."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foretune.errors import UserError, did_you_mean
from foretune.files import claim_model_folder
from foretune.methods import METHODS, make, method_class
from foretune.recipes.console import SILENT, Console
from foretune.recipes.overrides import apply_overrides
from foretune.tasks.readers import Row, read_rows
from foretune.tasks.rows import example_of, split_of

if TYPE_CHECKING:
    from torch import nn

MARK = "experts.json"
SHARED = ("experts", "keep_denominator", "router")  # fields that controls take from the method


@dataclasses.dataclass(frozen=True)
class TaskRows:
    """Rows by what they are for; none stands in two of them.

    Args:
        train: For the router's statistics, and for training afterwards.
        held_out: For the score alone.
    """

    train: list[dict[str, Any]]
    held_out: list[dict[str, Any]]


def prune_method(name: str, changes: Sequence[str]) -> Any:
    """The record of a method that prunes, from `field=value` settings.

    Raises:
        UserError: No such method, one of another verb, no such field, a value out of range.
    """
    known = _prune_methods()
    if name not in known:
        raise UserError(
            f'no method to prune with called "{name}"; there are {", ".join(known)}.'
            f"{did_you_mean(name, known)}"
        )
    return make(name, **apply_overrides({}, changes))


def task_rows(source: str, task: str | None = None) -> TaskRows:
    """The rows of a file, cut by their `split`; without one every fifth row is held out.

    Args:
        source: A file or folder of rows with `text`, or `prompt` and `completion`.
        task: Take the rows of this task alone, by their `task` column.

    Raises:
        UserError: Nothing to read, a bad row, no row of that task, nothing to train on or hold out.
    """
    found: dict[str, list[dict[str, Any]]] = {"train": [], "validation": [], "test": []}
    names: dict[str, None] = {}
    for row in read_rows(source):
        name = str(row.fields.get("task"))
        names[name] = None
        if task is None or name == task:
            found[split_of(row)].append(_example(row))
    train, held_out = found["train"], found["test"] or found["validation"]
    if task is not None and not any(found.values()):
        raise UserError(
            f'{source} has no row whose task is "{task}"; it has {", ".join(list(names)[:5])}'
            f"{' …' if len(names) > 5 else ''}.{did_you_mean(task, names)}"
        )
    if not held_out:
        train, held_out = [r for i, r in enumerate(train) if i % 5 != 4], train[4::5]
    if not train or not held_out:
        raise UserError(
            f"{source} has {len(train)} rows to take statistics on and {len(held_out)} to score: "
            "both are needed (rows of split train and test, or five rows without a split)"
        )
    return TaskRows(train, held_out)


def _example(row: Row) -> dict[str, Any]:
    return example_of(row, "causal-lm", ("task", "split"))


def prune_folder(
    method: Any,
    model: str,
    rows: str,
    out: Path | None,
    *,
    task: str | None = None,
    compare: bool = False,
    recover: int = 0,
    learning_rate: float = 1e-4,
    batch_size: int = 8,
    max_tokens: int = 256,
    overwrite: bool = False,
    console: Console = SILENT,
) -> dict[str, Any]:
    """Prunes a model for a task, scores it on rows held out, and saves it.

    Args:
        method: What to prune with.
        model: A mixture's folder or hub id; read in its own dtype.
        rows: File of the task's rows.
        out: Where the smaller model goes; None saves nothing.
        task: Of several in the file, the one.
        compare: Score every other method with as many experts too.
        recover: Steps of fine-tuning on the rows after pruning; 0 for none.
        learning_rate: Of these steps.
        batch_size: Rows in a batch.
        max_tokens: Longest row.
        overwrite: Replace a pruned model in `out`.
        console: Is told how it goes.

    Returns:
        method, out, loads_with, size, held_out (rows), scored: one entry for the model as given and
        for each method, with parameters, experts, loss, tokens_per_s and loss_recovered.
    """
    if out is not None:
        claim_model_folder(out, MARK, overwrite=overwrite)
    data = task_rows(rows, task)
    from foretune.pruning.experts import find_blocks
    from foretune.pruning.plan import counts_of
    from foretune.pruning.prune import opened, prune_with, statistics_of

    given, tokenizer = opened(model, None)
    blocks = find_blocks(given)
    counts_of(method.experts, blocks, grouped=not method.keeps_router)
    methods = [method, *(_controls(method) if compare else [])]
    sizes: dict[str, Any] = {"batch_size": batch_size, "max_tokens": max_tokens}
    bench = Bench(data, tokenizer, recover, learning_rate, sizes)
    console.say(f"statistics on {len(data.train)} rows")
    found = statistics_of(
        given, data.train, tokenizer, outputs=any(m.needs_outputs for m in methods), **sizes
    )
    console.say(f"scoring the model as given on {len(data.held_out)} rows")
    scored = [{"method": "as given", **bench.score(given)[0]}]
    kept: Any = None
    for one in methods:
        console.say(f"pruning and scoring: {one.name}")
        pruned = prune_with(given, found, one, tokenizer=tokenizer)
        figures, tuned = bench.score(pruned.model)
        scored.append({"method": one.name, "loads_with": pruned.loads_with, **figures})
        if one is method:
            kept = dataclasses.replace(pruned, model=tuned)
    kept.scores = {"held_out_rows": len(data.held_out), "recover_steps": recover, "scored": scored}
    if out is not None:
        kept.save(out, overwrite=overwrite)
    return {
        "method": method.to_dict(),
        "out": None if out is None else str(out),
        "loads_with": kept.loads_with,
        "normalises": sorted({block.normalises for block in blocks}),
        "size": kept.size,
        **kept.scores,
    }


@dataclasses.dataclass(frozen=True)
class Bench:
    """Scores models on the same rows, before and after the same short fine-tuning."""

    data: TaskRows
    tokenizer: Any
    recover: int
    learning_rate: float
    sizes: Mapping[str, Any]

    def score(self, model: nn.Module) -> tuple[dict[str, Any], nn.Module]:
        """(figures, the model after fine-tuning, or as it was where there is none)."""
        from foretune.pruning.experts import count_experts
        from foretune.pruning.prune import held_out_loss

        told = held_out_loss(model, self.data.held_out, self.tokenizer, **self.sizes)
        figures: dict[str, Any] = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "experts": count_experts(model),
            "loss": told["loss"],
            "tokens_per_s": round(told["tokens_per_s"]),
        }
        if self.recover:
            model = self.fine_tuned(model)
            told = held_out_loss(model, self.data.held_out, self.tokenizer, **self.sizes)
            figures["loss_recovered"] = told["loss"]
        return figures, model

    def fine_tuned(self, model: nn.Module) -> nn.Module:
        """A copy after some steps on the training rows."""
        import foretune

        objective = foretune.CausalLM(self.tokenizer, max_tokens=self.sizes["max_tokens"])
        task = foretune.Task("rows", self.data.train)
        run = foretune.Run(
            steps=self.recover, batch_size=self.sizes["batch_size"], eval_every=0, weight_decay=0.0
        )
        method = foretune.Standard(learning_rate=self.learning_rate)
        tasks = foretune.TaskCollection((task,), objective)
        tuned: nn.Module = foretune.retrain(model, tasks, method, run).model
        return tuned


def _controls(method: Any) -> list[Any]:
    """The other methods, with as many experts and a router of the same kind."""
    given = method.to_dict()
    found = []
    for name in _prune_methods():
        if name != method.name:
            fields = {f.name for f in dataclasses.fields(method_class(name))}
            found.append(make(name, **{k: given[k] for k in SHARED if k in fields and k in given}))
    return found


def _prune_methods() -> list[str]:
    verbs: dict[str, Any] = {name: method_class(name) for name in METHODS}
    return [name for name, cls in verbs.items() if cls.verb == "prune"]
