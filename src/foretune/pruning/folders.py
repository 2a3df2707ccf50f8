"""`foretune prune` on folders: prune a mixture, score it beside the other methods, save it."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foretune.claims import output_folder
from foretune.errors import UserError, did_you_mean
from foretune.methods import make, method_class_of, methods_of
from foretune.pruning.method import ExpertPruning
from foretune.recipes.console import SILENT, Console
from foretune.recipes.overrides import apply_overrides
from foretune.tasks.readers import Row, read_rows
from foretune.tasks.rows import example_of, split_of

if TYPE_CHECKING:
    from torch import nn

SHARED_FIELDS = (
    "experts",
    "budget",
    "keep_denominator",
    "router",
)  # which compared methods have in common


@dataclasses.dataclass(frozen=True)
class TaskExamples:
    """A task's examples, split without overlap.

    Args:
        train: Examples for the router's statistics and for fine-tuning after pruning.
        held_out: Examples for scoring only.
    """

    train: list[dict[str, Any]]
    held_out: list[dict[str, Any]]


def prune_method(name: str, changes: Sequence[str]) -> Any:
    """The record of a pruning method, from `field=value` settings.

    Raises:
        UserError: No such method, one of another verb, no such field, a value out of range.
    """
    method_class_of(name, "prune")
    return make(name, **apply_overrides({}, changes))


def task_examples(source: str, task: str | None = None) -> TaskExamples:
    """The examples of a file by their `split`; without splits every fifth one is held out.

    Args:
        source: A file or folder of rows with `text`, or `prompt` and `completion`.
        task: Read only the rows with this value in their `task` column.

    Raises:
        UserError: Nothing to read, a bad row, no row of that task, or no examples in either split.
    """
    splits: dict[str, list[dict[str, Any]]] = {"train": [], "validation": [], "test": []}
    names: dict[str, None] = {}
    for row in read_rows(source):
        name = str(row.fields.get("task"))
        names[name] = None
        if task is None or name == task:
            splits[split_of(row)].append(_example(row))
    train, held_out = splits["train"], splits["test"] or splits["validation"]
    if task is not None and not any(splits.values()):
        raise UserError(
            f'{source} has no row whose task is "{task}"; its tasks: {", ".join(list(names)[:5])}'
            f"{' …' if len(names) > 5 else ''}.{did_you_mean(task, names)}"
        )
    if not held_out:
        train, held_out = [e for i, e in enumerate(train) if i % 5 != 4], train[4::5]
    if not train or not held_out:
        raise UserError(
            f"{source} has {len(train)} training and {len(held_out)} held-out examples, and both "
            "are needed: give rows of split train and test, or at least five rows without a split"
        )
    return TaskExamples(train, held_out)


def _example(row: Row) -> dict[str, Any]:
    return example_of(row, "causal-lm", ("task", "split"))


def prune_folder(
    method: ExpertPruning,
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
    low_memory: bool = False,
    overwrite: bool = False,
    console: Console = SILENT,
) -> dict[str, Any]:
    """Prune a model for a task, score it on held-out examples, and save it.

    Args:
        method: Record of the pruning method.
        model: Folder or hub id of a mixture of experts, loaded in its own dtype.
        rows: File of the task's examples.
        out: Folder for the pruned model; None saves nothing.
        task: Task to read, if the file has several.
        compare: Also score all other methods with the same number of experts.
        recover: Steps of fine-tuning on the task's examples after pruning; 0 for none.
        learning_rate: Learning rate of these steps.
        batch_size: Examples per batch.
        max_tokens: Maximum length of an example; longer ones are truncated.
        low_memory: Map the model from its files, prune and write it block by block.
        overwrite: Replace a pruned model in `out`.
        console: Reports progress.

    Returns:
        method, out, loads_with, normalises (of the routers), size, held_out_rows (their number),
        recover_steps, and scored: one entry for the input model ("as given") and per method, with
        parameters, experts, loss, tokens_per_s and, after fine-tuning, loss_recovered.
    """
    if low_memory:
        check_low_memory(method, compare, recover)
    with contextlib.ExitStack() as claim:
        folder = None
        if out is not None:
            place = output_folder(
                out, "prune", overwrite=overwrite, at_once=True, reads=[model, rows]
            )
            folder = claim.enter_context(place)
        examples = task_examples(rows, task)
        from foretune.pruning.budgets import counts_of
        from foretune.pruning.experts import find_blocks
        from foretune.pruning.prune import collect_statistics, load_if_path, prune_with

        options: dict[str, Any] = {}
        if low_memory:
            from foretune.pruning.low_memory import Spill, load_mapped, save_mapped

            scratch = Path(claim.enter_context(tempfile.TemporaryDirectory(dir=folder)))
            original, tokenizer = load_mapped(model, scratch)
            options = {"in_place": True, "after_block": Spill(scratch)}
        else:
            original, tokenizer = load_if_path(model, None)
        blocks = find_blocks(original)
        counts_of(method.experts, blocks, grouped=not method.keeps_router, budget=method.budget)
        methods = [method, *(_controls(method) if compare else [])]
        sizes: dict[str, Any] = {"batch_size": batch_size, "max_tokens": max_tokens}
        scorer = Scorer(examples, tokenizer, recover, learning_rate, sizes)
        console.say(f"collecting statistics on {len(examples.train)} examples")
        statistics = collect_statistics(
            original,
            examples.train,
            tokenizer,
            outputs=any(m.needs_outputs for m in methods),
            **sizes,
        )
        console.say(f"scoring the input model on {len(examples.held_out)} examples")
        scored = [{"method": "as given", **scorer.score(original)[0]}]
        chosen: Any = None
        for candidate in methods:
            console.say(f"pruning and scoring: {candidate.name}")
            pruned = prune_with(original, statistics, candidate, tokenizer=tokenizer, **options)
            figures, tuned = scorer.score(pruned.model)
            scored.append({"method": candidate.name, "loads_with": pruned.loads_with, **figures})
            if candidate is method:
                chosen = dataclasses.replace(pruned, model=tuned)
        chosen.scores = {
            "held_out_rows": len(examples.held_out),
            "recover_steps": recover,
            "scored": scored,
        }
        if folder is not None and low_memory:
            save_mapped(chosen, folder, scratch)
        elif folder is not None:
            chosen.save(folder)
    return {
        "method": method.to_dict(),
        "out": None if out is None else str(out),
        "loads_with": chosen.loads_with,
        "normalises": sorted({block.normalises for block in blocks}),
        "size": chosen.size,
        **chosen.scores,
    }


def check_low_memory(method: ExpertPruning, compare: bool, recover: int) -> None:
    """Checks that a method can be applied block by block.

    Raises:
        UserError: The folder would not be plain, or the command does more than to prune.
    """
    if compare or recover:
        raise UserError(
            "--low-memory prunes by one method and trains nothing: leave --compare and "
            "--recover out"
        )
    fields = method.to_dict()
    plain = isinstance(method.experts, int) or method.experts is None
    if (
        not plain
        or method.budget == "score"
        or method.keeps_router
        or fields.get("keep_denominator")
    ):
        raise UserError(
            "--low-memory writes plain folders only: leave router=remap, keep_denominator=true, "
            "budget=score and a list of experts out"
        )


@dataclasses.dataclass(frozen=True)
class Scorer:
    """Scores models on the same examples, before and after the same short fine-tuning."""

    examples: TaskExamples
    tokenizer: Any
    recover: int
    learning_rate: float
    sizes: Mapping[str, Any]

    def score(self, model: nn.Module) -> tuple[dict[str, Any], nn.Module]:
        """(figures, the model after fine-tuning, or the model itself without any)."""
        from foretune.pruning.experts import count_experts
        from foretune.pruning.prune import held_out_loss

        scores = held_out_loss(model, self.examples.held_out, self.tokenizer, **self.sizes)
        figures: dict[str, Any] = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "experts": count_experts(model),
            "loss": scores["loss"],
            "tokens_per_s": round(scores["tokens_per_s"]),
        }
        if self.recover:
            model = self.fine_tune(model)
            scores = held_out_loss(model, self.examples.held_out, self.tokenizer, **self.sizes)
            figures["loss_recovered"] = scores["loss"]
        return figures, model

    def fine_tune(self, model: nn.Module) -> nn.Module:
        """A copy of the model, fine-tuned for `recover` steps on the training examples."""
        import foretune

        objective = foretune.CausalLM(self.tokenizer, max_tokens=self.sizes["max_tokens"])
        task = foretune.Task("rows", self.examples.train)
        run = foretune.Run(
            steps=self.recover, batch_size=self.sizes["batch_size"], eval_every=0, weight_decay=0.0
        )
        method = foretune.Standard(learning_rate=self.learning_rate)
        tasks = foretune.TaskCollection((task,), objective)
        tuned: nn.Module = foretune.retrain(model, tasks, method, run).model
        return tuned


def _controls(method: ExpertPruning) -> list[Any]:
    """The other methods, with the same number of experts and the same kind of router."""
    shared = {k: v for k, v in method.to_dict().items() if k in SHARED_FIELDS}
    controls = []
    for name in methods_of("prune"):
        if name != method.name:
            fields = {f.name for f in dataclasses.fields(method_class_of(name, "prune"))}
            controls.append(make(name, **{k: v for k, v in shared.items() if k in fields}))
    return controls
