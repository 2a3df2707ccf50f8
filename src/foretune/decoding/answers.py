"""What a model answered before retraining, and what it answers as a new user's: side by side."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from foretune.evaluation.report.advice import best_base
from foretune.files import write_whole
from foretune.recipes.console import SILENT, Console
from foretune.tasks.messages import Message
from foretune.tasks.sources import load_tasks

if TYPE_CHECKING:
    from foretune.recipes.schema import Recipe
    from foretune.tasks.task import Task

ANSWERS_FILE = "answers.json"
MAX_NEW_TOKENS = 40


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The answers to one question.

    Args:
        task: The unseen task whose adapter answers.
        question: The conversation that is answered.
        reference: The answer in the task's test rows.
        before: The answer of the model before retraining.
        adapted: The answer of the best base with the task's adapter.
    """

    task: str
    question: list[Message]
    reference: str
    before: str
    adapted: str


def answer_unseen(
    recipe: Recipe, comparison: Mapping[str, Any], console: Console = SILENT
) -> list[dict[str, Any]]:
    """Has the model as it was, and adapters of unseen tasks, answer test rows of these tasks.

    The adapters are those of the first repeat on the base of the verdict. Written to answers.json
    in the folder of the run, too.

    Args:
        recipe: The recipe of a run that has ended, with conversations as rows.
        comparison: The comparison of the run.
        console: Is told what happens.

    Returns:
        The fields of `Answer`, as many as the recipe's `answers`; questions first that two tasks
        answer differently.

    Raises:
        UserError: A question and an answer do not fit into the model's positions.
    """
    from foretune.decoding.generation import generate_texts
    from foretune.decoding.peft_model import load_generator
    from foretune.models.loading import load_model
    from foretune.training.outcome import folder_names

    _, unseen = load_tasks(recipe.source(), recipe.objective.kind)
    assert unseen is not None and recipe.model.name is not None  # `Recipe` checks both
    rows = questions_of(list(unseen), recipe.answers)
    console.say(f"answering {len(rows)} questions of unseen tasks")
    names = folder_names((task.name, 0) for task in unseen)
    trusted = recipe.model.trust_remote_code
    model, tokenizer = load_model(
        recipe.model.name,
        head="causal-lm",
        chat_template=recipe.model.chat_template,
        trust_remote_code=trusted,
    )
    questions = [messages[:-1] for _, messages in rows]
    options: dict[str, Any] = {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": False}
    before = generate_texts(model, tokenizer, questions, **options)
    del model
    answers: list[Answer] = []
    folder = recipe.folder / "adapters" / best_base(comparison)["name"]
    for (task, messages), plain in zip(rows, before, strict=True):
        adapted, _ = load_generator(folder / names[task, 0], trust_remote_code=trusted)
        [text] = generate_texts(adapted, tokenizer, [messages[:-1]], **options)
        answers.append(
            Answer(
                task=task,
                question=messages[:-1],
                reference=str(messages[-1]["content"]),
                before=plain.text.strip(),
                adapted=text.text.strip(),
            )
        )
    records = [asdict(answer) for answer in answers]
    write_whole(recipe.folder / ANSWERS_FILE, json.dumps(records, indent=1, ensure_ascii=False))
    return records


def questions_of(tasks: Sequence[Task], most: int) -> list[tuple[str, list[Message]]]:
    """(task, conversation) of test rows; first those whose question another task answers otherwise.

    Args:
        tasks: Tasks; their examples without `messages` are left out.
        most: Largest number of rows.
    """
    rows: dict[tuple[str, str], tuple[str, list[Message]]] = {}  # one of each question and answer
    for task in tasks:
        for example in task.test:
            if "messages" in example:
                messages = list(example["messages"])
                key = str(messages[:-1]), str(messages[-1]["content"])
                rows.setdefault(key, (task.name, messages))
    answers = Counter(question for question, _ in rows)
    first_place = {question: i for i, (question, _) in enumerate(rows)}
    order = sorted(rows, key=lambda key: (answers[key[0]] == 1, first_place[key[0]]))
    return [rows[key] for key in order[:most]]
