"""Check every text before the first training step: can the tokenizer and the model read it?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from foretune.tasks.example import SPLITS, row_name

if TYPE_CHECKING:
    from torch import nn

    from foretune.tasks.task import TaskCollection


@dataclass(frozen=True)
class Alike:
    """Rows whose drawn candidates the model cannot all tell apart.

    Args:
        count: Their number.
        first: The name of the first.
    """

    count: int = 0
    first: str = ""

    def __str__(self) -> str:
        rows = "row has" if self.count == 1 else "rows have"
        return (
            f"{self.count} {rows} candidates that are the same to the model, such as {self.first}: "
            "a tie counts 1/number of equals; a larger max_response_tokens may tell them apart"
        )


def check_texts(tasks: TaskCollection, model: nn.Module) -> Alike:
    """Encodes all examples of the tasks, as training and scoring will.

    Args:
        tasks: Tasks with a fitted objective that has the tokenizer.
        model: The model that will read them.

    Returns:
        The rows with candidates that are the same once encoded.

    Raises:
        UserError: A text has no token, or too few or too many of them, or one that the model does
            not know; the message names task, file and line.
    """
    from foretune.models.capacity import reads
    from foretune.training.data import TaskData, slot_of
    from foretune.training.text_limits import TextLimits, too_long
    from foretune.training.verbs import objective_of

    objective = objective_of(tasks)
    limits = TextLimits.of(model, objective)
    if limits is None:
        return Alike()
    alike = Alike()
    longest: tuple[Any, str] = ((), "")
    for task in tasks:
        data = TaskData([slot_of(task)], objective, limits, max_cached_tokens=0)
        for split in SPLITS:
            for i, example in enumerate(task.split(split)):
                row = data.row(0, split, i)
                candidates = row.get("candidates", ())
                if len(set(map(tuple, candidates))) < len(candidates):
                    first = alike.first or row_name(task.name, split, i, example)
                    alike = Alike(alike.count + 1, first)
                text = max(limits.texts(row, objective), key=len, default=())
                if len(text) > len(longest[0]):
                    longest = text, row_name(task.name, split, i, example)
    text, where = longest
    if limits.positions is None and text and not reads(model, text) and reads(model, text[:2]):
        refusal = too_long(where, len(text), limits.model, None, objective)
        raise refusal
    return alike
