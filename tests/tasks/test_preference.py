"""Preferences: the losses against their equations, their rows, and training by every verb."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import foretune
import tiny_models
from chat_templates import FAMILIES, tokenizer_of
from foretune.errors import UserError
from foretune.models.routing import route
from foretune.run import Run
from foretune.tasks.leakage import find_leaks
from foretune.tasks.objectives.preference import Preference
from foretune.tasks.preferences import checked_pair
from foretune.tasks.sources import Source, load_tasks
from foretune.tasks.task import Task, TaskCollection

TOKENIZER = tiny_models.tokenizer(special=False)
ROWS = [
    {"prompt": "the cat", "chosen": "sat red blue", "rejected": "one"},
    {"prompt": "a dog", "chosen": "two", "rejected": "one red"},
    {"prompt": "a", "chosen": "blue", "rejected": "red"},
]


def encoded(objective: Preference, rows: Any = ROWS) -> list[dict[str, Any]]:
    return [objective.encode(row, "t") for row in rows]


def log_p(model: Any, ids: list[int], begin: int) -> float:
    """log p of ids[begin:] after ids[:begin], as the definition has it."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].double().numpy()
    logits -= logits.max(1, keepdims=True)
    table = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    return float(sum(table[i - 1, ids[i]] for i in range(begin, len(ids))))


def test_reward_loss_is_that_of_bradley_and_terry() -> None:
    model = tiny_models.llama(num_labels=1, seed=3, initializer_range=0.5)
    model.config.pad_token_id = 0
    objective = Preference(TOKENIZER)
    batch = objective.collate(encoded(objective), [1, 0, 1])
    with torch.no_grad():
        scores, losses = objective.scores_and_losses(model, batch)
        rewards = [
            [float(model(input_ids=torch.tensor([ids])).logits) for ids in row["texts"]]
            for row in encoded(objective)
        ]
    margins = np.array([chosen - rejected for chosen, rejected in rewards])
    np.testing.assert_allclose(losses, np.log1p(np.exp(-margins)), rtol=1e-4)
    assert scores.tolist() == (margins > 0).astype(float).tolist()
    assert torch.equal(objective.losses(model, batch), losses)


def test_dpo_loss_is_equation_7() -> None:
    policy = tiny_models.llama(seed=4, initializer_range=0.5)
    reference = tiny_models.llama(seed=5, initializer_range=0.5)
    objective = Preference(TOKENIZER, scoring="dpo", beta=0.3).bind(reference)
    rows = encoded(objective)
    expected = []
    for row in rows:
        terms = [
            log_p(policy, ids, begin) - log_p(reference, ids, begin)
            for ids, (begin, _) in zip(row["texts"], row["learnt"], strict=True)
        ]
        expected.append(np.log1p(np.exp(-0.3 * (terms[0] - terms[1]))))
    with torch.no_grad():
        for _ in range(2):  # the second time the reference's values are known
            losses = objective.losses(policy, objective.collate(rows, [0, 2, 1]))
            np.testing.assert_allclose(losses, expected, rtol=1e-4)
        # a model that is the reference has no preference
        scores, losses = objective.scores_and_losses(reference, objective.collate(rows, [0] * 3))
    np.testing.assert_allclose(losses, np.log(2), rtol=1e-5)
    assert scores.tolist() == [0.5] * 3


def test_prompt_and_answers_are_cut_to_fit() -> None:
    objective = Preference(TOKENIZER, max_tokens=5)
    row = {"prompt": "the cat sat", "chosen": "red blue", "rejected": "one"}
    [pair] = encoded(objective, [row])
    texts = ["cat sat red blue [SEP]", "cat sat one [SEP]"]  # the same prompt
    assert pair["texts"] == [TOKENIZER(text)["input_ids"] for text in texts]
    assert pair["learnt"] == [(2, 5), (2, 4)]
    [pair] = encoded(objective, [{**row, "chosen": "one two red blue cat"}])
    assert pair["texts"][0] == TOKENIZER("sat one two red blue")["input_ids"]  # no end after a cut
    [pair] = encoded(objective, [{**row, "chosen": "red [SEP]"}])
    assert pair["texts"][0] == TOKENIZER("the cat sat red [SEP]")["input_ids"]  # one end
    same = {"prompt": "a", "chosen": "one two red blue cat", "rejected": "one two red blue the"}
    with pytest.raises(UserError, match="both answers are the same to the model, at most 5 tokens"):
        encoded(objective, [same])


def test_conversations_come_in_three_forms() -> None:
    tokenizer = tokenizer_of(FAMILIES["chatml"])
    objective = Preference(tokenizer, max_tokens=300)
    question = {"role": "user", "content": "Who?"}
    answers = {s: {"role": "assistant", "content": s} for s in ("chosen", "rejected")}
    forms: list[dict[str, Any]] = [
        {"prompt": [question], "chosen": "chosen", "rejected": "rejected"},
        {"prompt": [question], **{side: [turn] for side, turn in answers.items()}},
        {side: [question, turn] for side, turn in answers.items()},
        {"prompt": "Who?", **{side: [turn] for side, turn in answers.items()}},
    ]
    first, *others = encoded(objective, forms)
    assert all(other == first for other in others)
    for side, ids, (begin, end) in zip(answers, first["texts"], first["learnt"], strict=True):
        assert tokenizer.decode(ids[begin:end]) == f"{side}<|im_end|>"
    long = [{"role": "user", "content": "x" * 400}, {"role": "assistant", "content": "y"}, question]
    assert encoded(objective, [{**forms[0], "prompt": long}]) == [first]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "one"}, "rejected missing: a preference has prompt, chosen and"),
        ({"prompt": "a", "chosen": "one", "rejected": "one"}, "are the same, so neither is"),
        ({"prompt": "a", "chosen": " ", "rejected": "one"}, "chosen is empty"),
        ({"prompt": 3, "chosen": "two", "rejected": "one"}, "prompt must be text or messages"),
        ({"prompt": "a", "chosen": "two", "rejected": []}, "must both be texts, or both messages"),
        (
            {
                "chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
                "rejected": [
                    {"role": "user", "content": "c"},
                    {"role": "assistant", "content": "d"},
                ],
            },
            "may differ in their last turn only",
        ),
    ],
)
def test_bad_rows_are_named(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    import json

    with pytest.raises(UserError, match=message):
        encoded(Preference(TOKENIZER), [row])
    (tmp_path / "rows.jsonl").write_text(json.dumps({"task": "t", **row}))
    with pytest.raises(UserError, match=rf"rows\.jsonl line 1: .*{message}"):
        load_tasks(Source(source=str(tmp_path / "rows.jsonl")), "preference")


def people(number: int = 4) -> TaskCollection:
    """Half of the people prefer red to blue, whatever is asked; the others blue to red."""
    prompts = ["the cat", "a dog", "the dog sat", "a cat", "one", "two", "the", "a"]
    answers = [("red", "blue"), ("blue", "red")]
    return TaskCollection(
        tuple(
            Task(
                f"p{i}",
                *(
                    [
                        {"prompt": p, "chosen": answers[i % 2][0], "rejected": answers[i % 2][1]}
                        for p in part
                    ]
                    for part in (prompts[:6], prompts[6:7], prompts[7:])
                ),
            )
            for i in range(number)
        )
    )


@pytest.mark.parametrize("scoring", ["reward", "dpo"])
@pytest.mark.parametrize(
    "method", [foretune.LoRA(learning_rate=3e-2), foretune.Full(learning_rate=3e-3)]
)
def test_people_who_disagree_are_each_learnt(scoring: Any, method: Any) -> None:
    model = tiny_models.llama(num_labels=1 if scoring == "reward" else None, seed=1)
    model.config.pad_token_id = 0
    before = copy.deepcopy(model.state_dict())
    tasks = people().with_objective(Preference(TOKENIZER, scoring=scoring))
    run = Run(steps=40, batch_size=6)
    adapted = foretune.adapt(model, tasks, method, run)
    assert adapted.scores == {(name, 0): 1.0 for name in tasks.names}
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("form", ["lora", "last-layer"])
def test_a_reward_model_is_retrained_with_a_part_for_each_person(form: Any) -> None:
    model = tiny_models.llama(num_labels=1, seed=1)
    model.config.pad_token_id = 0
    tasks = people(6).with_objective(Preference(TOKENIZER))
    method = foretune.PEFTML(form=form, learning_rate=3e-3, adapter_learning_rate=3e-2)
    outcome = foretune.retrain(model, tasks, method, Run(steps=60, batch_size=6))
    assert outcome.history[-1]["loss"] < 0.3  # one shared model cannot be below log 2
    shared = foretune.retrain(model, tasks, foretune.Standard(learning_rate=3e-3), Run(steps=60))
    assert shared.history[-1]["loss"] > 0.6


def test_dpo_compares_with_the_model_before_training() -> None:
    model = tiny_models.llama(seed=1)
    tasks = people().with_objective(Preference(TOKENIZER, scoring="dpo", beta=1.0))
    one_mind = tasks.subset(["p0", "p2"])
    outcome = foretune.retrain(
        model, one_mind, foretune.Standard(learning_rate=3e-3), Run(steps=40)
    )
    objective = Preference(TOKENIZER, scoring="dpo", beta=1.0).bind(model)
    rows = encoded(objective, one_mind["p0"].test)
    with torch.no_grad(), route(None):
        loss = objective.losses(outcome.model, objective.collate(rows, [0])).item()
    assert loss < 0.5  # log 2 before training
    assert outcome.history[-1]["loss"] < 0.3


def test_a_reference_is_read_in_eval_mode() -> None:
    model = tiny_models.llama(seed=1, attention_dropout=0.5).train()
    objective = Preference(TOKENIZER, scoring="dpo").bind(model)
    batch = objective.collate(encoded(objective), [0] * 3)
    assert objective.reference is not None
    first = objective.reference.log_likelihoods(batch.inputs)
    again = Preference(TOKENIZER, scoring="dpo").bind(model).reference
    assert again is not None and torch.equal(again.log_likelihoods(batch.inputs), first)
    assert model.training


def test_what_a_turn_has_beside_its_words_counts() -> None:
    question = {"role": "user", "content": "Rain?"}
    calls = [
        {"role": "assistant", "content": None, "tool_calls": [{"name": name}]} for name in "ab"
    ]
    pair = checked_pair({"prompt": [question], "chosen": [calls[0]], "rejected": [calls[1]]}, "row")
    assert isinstance(pair.chosen, dict) and pair.chosen["tool_calls"] == [{"name": "a"}]
    # UltraFeedback: a text as prompt, and whole conversations
    answers = [{"role": "assistant", "content": text} for text in ("Yes", "No")]
    row = {"prompt": "Rain?", "chosen": [question, answers[0]], "rejected": [question, answers[1]]}
    pair = checked_pair(row, "row")
    assert (pair.prompt, pair.chosen, pair.rejected) == ([question], *answers)


def test_copies_of_whole_conversations_are_leaks() -> None:
    def row(word: str) -> dict[str, Any]:
        turns = [{"role": "user", "content": word}]
        answers = [{"role": "assistant", "content": text} for text in ("Yes", "No")]
        return {side: [*turns, a] for side, a in zip(("chosen", "rejected"), answers, strict=True)}

    seen = TaskCollection((Task("a", [row(w) for w in "abcd"], [], []),))
    unseen = TaskCollection((Task("b", [row("x")], [], [row("c"), row("y")]),))
    [leak] = find_leaks(seen, unseen)
    assert (leak.count, leak.sample) == (1, "c")
    prompts = [{"prompt": [{"role": "user", "content": "c"}], "chosen": "Yes", "rejected": "No"}]
    [leak] = find_leaks(TaskCollection((Task("a", prompts, [], prompts),)))
    assert leak.sample == "c"


def test_names_of_keys_and_roles_are_mapped_in_preferences_too(tmp_path: Path) -> None:
    import json

    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]
    row = {"task": "t", "chosen": turns, "rejected": [turns[0], {"from": "gpt", "value": "No"}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    names = {"role": "from", "content": "value", "roles": {"human": "user", "gpt": "assistant"}}
    source = Source(source=str(tmp_path / "rows.jsonl"), messages=names)
    [task] = load_tasks(source, "preference")[0]
    assert task.train[0]["chosen"][1] == {"role": "assistant", "content": "Yes"}
