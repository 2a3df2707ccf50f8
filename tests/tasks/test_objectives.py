"""Objectives against plain reference implementations."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tiny_models
from foretune.errors import UserError
from foretune.models.routing import current_rows
from foretune.tasks.objectives import make_objective, text
from foretune.tasks.objectives.causal_lm import CausalLM
from foretune.tasks.objectives.choice import Choice
from foretune.tasks.objectives.classification import Classification
from foretune.tasks.objectives.regression import Regression
from foretune.tasks.task import Task, TaskCollection

TOKENIZER = tiny_models.tokenizer()
ROWS = [
    {"context": "the cat sat", "candidates": ["on the mat", "red", "a b c d"], "answer": 0},
    {"context": ["one two", "a dog"], "candidates": ["blue", "red"], "answer": 1},
    {"context": "green", "candidates": ["red", "on the mat", "the", "cat"], "answer": 2},
    {"context": "a b c d e f", "candidates": ["red", "dog sat on"], "answer": 0},
]
SLOTS = (2, 0, 2, 1)


def collate(objective, rows=ROWS, slots=SLOTS, *, train=False, seed=0, task="t"):
    encoded = [objective.encode(row, task) for row in rows]
    rng = np.random.default_rng(seed)
    return objective.collate([objective.sample(r, rng) if train else r for r in encoded], slots)


def collection(**tasks):
    return TaskCollection([Task(name, **splits) for name, splits in tasks.items()])


def embedding(model, words):
    ids = torch.tensor([TOKENIZER(words)["input_ids"]])
    mean = model(input_ids=ids).last_hidden_state[0].mean(0)
    return mean / mean.norm()


class Recorder(nn.Module):
    """Records the slot of each row of each forward pass."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config, self.seen = model, getattr(model, "config", None), []

    def forward(self, *args, **kwargs):
        rows = kwargs.get("input_ids", args[0] if args else None)
        slots = current_rows().slots
        assert len(slots) == len(rows)
        self.seen.append(
            [(slot, tuple(row.tolist())) for slot, row in zip(slots, rows, strict=True)]
        )
        return self.model(*args, **kwargs)


# --- choice, bi-encoder


def naive_bi_encoder(model, row, temperature=0.05):
    turns = row["context"] if isinstance(row["context"], str) else " ".join(row["context"])
    context = embedding(model, turns)
    cosines = torch.stack([embedding(model, c) @ context for c in row["candidates"]])
    return -torch.log_softmax(cosines / temperature, 0)[row["answer"]], cosines.argmax()


def test_bi_encoder_equals_a_loop_over_rows_and_candidates():
    model, objective = tiny_models.bert(), Choice(TOKENIZER)
    batch = collate(objective)
    expected = [naive_bi_encoder(model, row) for row in ROWS]
    torch.testing.assert_close(
        objective.losses(model, batch), torch.stack([e[0] for e in expected]), atol=1e-5, rtol=1e-5
    )
    right = [float(e[1] == row["answer"]) for e, row in zip(expected, ROWS, strict=True)]
    assert objective.scores(model, batch).tolist() == right


def test_a_candidate_shared_within_a_slot_is_encoded_once_with_its_slot():
    model, objective = Recorder(tiny_models.bert()), Choice(TOKENIZER)
    objective.losses(model, collate(objective))
    (texts,) = model.seen
    assert [slot for slot, _ in texts] == [0] * 3 + [1] * 3 + [2] * 7
    assert len(set(texts)) == len(texts)
    red = TOKENIZER("red")["input_ids"]
    assert sorted(slot for slot, ids in texts if list(ids[: len(red)]) == red) == [0, 1, 2]
    assert list(texts[0][1][:6]) == TOKENIZER("one two a dog")["input_ids"]


def test_a_context_shared_by_rows_and_candidates_is_encoded_once():
    model, objective = Recorder(tiny_models.bert()), Choice(TOKENIZER)
    rows = [
        ROWS[1],
        {**ROWS[1], "answer": 0},
        {"context": "red", "candidates": ["blue", "one two a dog"], "answer": 0},
    ]
    losses = objective.losses(model, collate(objective, rows, (0, 0, 0)))
    assert len(model.seen[0]) == 3  # "one two a dog", "blue", "red"
    expected = torch.stack([naive_bi_encoder(model.model, row)[0] for row in rows])
    torch.testing.assert_close(losses, expected, atol=1e-5, rtol=1e-5)


def test_gradients_of_ragged_choices_are_finite():
    model, objective = tiny_models.bert(), Choice(TOKENIZER)
    objective.losses(model, collate(objective)).sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients and all(torch.isfinite(g).all() for g in gradients)


def test_contexts_lose_their_beginning_and_candidates_their_end():
    objective = Choice(TOKENIZER, max_context_tokens=4, max_response_tokens=4)
    row = {"context": "a b c d", "candidates": ["a b c d", "e"], "answer": 0}
    encoded = objective.encode(row, "t")
    assert list(encoded["context"]) == TOKENIZER("c d")["input_ids"]
    assert list(encoded["candidates"][0]) == TOKENIZER("a b")["input_ids"]


def test_context_turns_keeps_the_last_ones():
    objective = Choice(TOKENIZER, context_turns=2)
    row = {"context": ["a", "b", "c"], "candidates": ["a", "b"], "answer": 0}
    assert list(objective.encode(row, "t")["context"]) == TOKENIZER("b c")["input_ids"]


def test_training_keeps_the_right_candidate_and_draws_the_others():
    objective = Choice(TOKENIZER, train_candidates=3)
    row = {"context": "a", "candidates": ["b", "c", "d", "e", "f"], "answer": 3}
    drawn = set()
    for seed in range(40):
        batch = collate(objective, [row], (0,), train=True, seed=seed)
        ids = batch.inputs["text_ids"][batch.inputs["index"][0], 1]
        assert len(ids) == 3
        assert TOKENIZER.decode(ids[batch.inputs["answer"][0]]) == "e"
        drawn |= set(ids.tolist())
    assert len(drawn) == 5
    assert collate(objective, [row], (0,), train=False).inputs["index"].shape == (1, 5)


def test_train_candidates_of_rows_with_fewer_keeps_all_of_them():
    objective = Choice(TOKENIZER, train_candidates=3)
    batch = collate(objective, train=True)
    assert batch.inputs["present"].sum(1).tolist() == [3, 2, 3, 2]


# --- choice, cross-encoder


def naive_cross_encoder(model, row):
    losses, wins = [], []
    turns = row["context"] if isinstance(row["context"], str) else " ".join(row["context"])
    for j, candidate in enumerate(row["candidates"]):
        logits = model(**TOKENIZER(turns, candidate, return_tensors="pt")).logits
        losses.append(F.cross_entropy(logits, torch.tensor([int(j == row["answer"])])))
        wins.append(logits[0, 1])
    return torch.stack(losses).mean(), int(torch.stack(wins).argmax() == row["answer"])


@pytest.mark.parametrize("build", [tiny_models.bert, tiny_models.roberta])
def test_cross_encoder_equals_a_loop_over_pairs(build):
    options = {"type_vocab_size": 2} if build is tiny_models.roberta else {}
    model, objective = build(num_labels=2, **options), Choice(TOKENIZER, scoring="cross-encoder")
    batch = collate(objective)
    losses, scores = zip(*(naive_cross_encoder(model, row) for row in ROWS), strict=True)
    torch.testing.assert_close(objective.losses(model, batch), torch.stack(losses))
    assert objective.scores(model, batch).tolist() == list(scores)


def test_cross_encoder_rows_carry_their_slots():
    model = Recorder(tiny_models.bert(num_labels=2))
    objective = Choice(TOKENIZER, scoring="cross-encoder")
    objective.losses(model, collate(objective))
    assert [slot for slot, _ in model.seen[0]] == [0] * 2 + [1] * 2 + [2] * 7


def test_cross_encoder_truncates_the_context_on_the_left():
    objective = Choice(
        TOKENIZER, scoring="cross-encoder", max_context_tokens=5, max_response_tokens=1
    )
    row = {"context": "a b c d", "candidates": ["e f", "g"], "answer": 0}
    assert objective.encode(row, "t")["candidates"][0] == TOKENIZER("c d", "e")["input_ids"]


def test_cross_encoder_refuses_another_head():
    objective = Choice(TOKENIZER, scoring="cross-encoder")
    with pytest.raises(UserError, match="head of 2 outputs, this model's has 3"):
        objective.losses(tiny_models.bert(num_labels=3), collate(objective))


# --- choice, what fit says


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": 3}, r'task "p", test row 1: answer .* 3 candidates \(0 to 2\), got 3'),
        ({"answer": "red"}, "got 'red'"),
        ({"candidates": ["red"]}, "two texts or more"),
        ({"candidates": None}, 'needs "candidates"; the row has context'),
    ],
)
def test_choice_names_a_bad_row(change, message):
    with pytest.raises(UserError, match=message):
        Choice(TOKENIZER).fit(collection(p={"train": ROWS, "test": [ROWS[0] | change]}))


def test_choice_learns_its_chance_level():
    objective = Choice(TOKENIZER).fit(collection(p={"train": ROWS}))
    assert objective.chance() == pytest.approx((1 / 3 + 1 / 2 + 1 / 4 + 1 / 2) / 4)


# --- classification

LABELLED = collection(
    a={"train": [{"text": "the cat", "label": "x"}, {"text": "a dog sat on", "label": "y"}]},
    b={"train": [{"text": "red", "label": n} for n in ("p", "q", "r")]},
)


def labelled(objective):
    rows = [(row, name) for name in ("a", "b") for row in LABELLED[name].train]
    encoded = [objective.encode(row, name) for row, name in rows]
    return objective.collate(encoded, (0, 0, 1, 1, 1))


def test_local_labels_mask_outputs_that_are_not_labels_of_the_task():
    objective = Classification(TOKENIZER).fit(LABELLED)
    model = tiny_models.bert(num_labels=objective.num_outputs())
    batch = labelled(objective)
    logits = model(batch.inputs["input_ids"], batch.inputs["attention_mask"]).logits
    answers, widths = [0, 1, 0, 1, 2], [2, 2, 3, 3, 3]
    rows = list(zip(logits, widths, answers, strict=True))
    expected = torch.stack([-torch.log_softmax(row[:w], 0)[a] for row, w, a in rows])
    losses = objective.losses(model, batch)
    torch.testing.assert_close(losses, expected)
    assert objective.scores(model, batch).tolist() == [
        float(row[:w].argmax() == a) for row, w, a in rows
    ]
    losses.sum().backward()
    assert torch.isfinite(model.classifier.weight.grad).all()
    assert objective.chance() == pytest.approx((1 / 2 + 1 / 3) / 2)


def test_shared_labels_have_one_id_over_all_tasks():
    objective = Classification(TOKENIZER).fit(LABELLED).shared()
    batch = labelled(objective)
    assert objective.num_outputs() == 5
    assert batch.inputs["label"].tolist() == [3, 4, 0, 1, 2]
    assert batch.inputs["valid"].int().tolist() == [[0, 0, 0, 1, 1]] * 2 + [[1, 1, 1, 0, 0]] * 3
    assert objective.shared() is objective


def test_one_label_set_stays_shared_for_unseen_tasks():
    rows = [{"text": "a", "label": n} for n in ("z", "y", "x")]
    objective = Classification(TOKENIZER).fit(collection(a={"train": rows}, b={"train": rows}))
    assert objective.shared() is objective
    unseen = objective.fit(collection(c={"train": rows[:2]}))
    assert [unseen.encode(row, "c")["label"] for row in rows[:2]] == [2, 1]
    assert unseen.encode(rows[0], "c")["valid"] == (1, 2)
    refitted = objective.fit(collection(c={"train": [*rows, {"text": "a", "label": "new"}]}))
    assert refitted.num_outputs() == 4


def test_a_label_that_training_lacks_is_named():
    bad = {"train": LABELLED["a"].train, "test": [{"text": "a", "label": "z"}]}
    with pytest.raises(UserError, match=r"task \"a\": label 'z' of test row 1 .* have 'x', 'y'"):
        Classification(TOKENIZER).fit(collection(a=bad))


def test_a_task_that_was_not_fitted_is_named():
    with pytest.raises(UserError, match='not fitted on task "A"'):
        Classification(TOKENIZER).fit(LABELLED).encode({"text": "a", "label": "x"}, "A")


def test_a_row_without_a_label_is_named():
    with pytest.raises(UserError, match='train row 1: "label" must be'):
        Classification(TOKENIZER).fit(collection(a={"train": [{"text": "a"}]}))


def test_a_head_that_is_too_narrow_is_refused():
    objective = Classification(TOKENIZER).fit(LABELLED)
    with pytest.raises(UserError, match="up to 3 labels, but the model's head has 2"):
        objective.losses(tiny_models.bert(num_labels=2), labelled(objective))


def test_arrays_are_classified_by_position():
    rows = [{"x": np.ones((3, 5)) * i, "y": np.int64(i % 2 + 3)} for i in range(4)]
    objective = Classification().fit(collection(a={"train": rows}))
    model = Recorder(tiny_models.plain(outputs=2))
    batch = collate(objective, rows, (1, 0, 1, 0), task="a")
    expected = F.cross_entropy(
        model.model(torch.tensor(np.stack([r["x"] for r in rows])).float()),
        torch.tensor([0, 1, 0, 1]),
        reduction="none",
    )
    torch.testing.assert_close(objective.losses(model, batch), expected)
    assert [slot for slot, _ in model.seen[0]] == [1, 0, 1, 0]
    assert objective.head == "image-classification"


def test_arrays_of_different_shapes_are_named():
    rows = [{"x": np.ones((3, n)), "y": 0} for n in (5, 6)]
    with pytest.raises(UserError, match=r"train row 2: x has shape \(3, 6\), but \(3, 5\)"):
        Classification().fit(collection(a={"train": rows}))


# --- causal language modelling


@pytest.mark.parametrize("build", [tiny_models.gpt2, tiny_models.llama, tiny_models.qwen2])
def test_text_loss_equals_the_models_own(build):
    model, objective = build(), CausalLM(TOKENIZER)
    rows = [{"text": "the cat sat on the mat"}, {"text": "a dog"}]
    losses = objective.losses(model, collate(objective, rows, (0, 0)))
    for row, loss in zip(rows, losses, strict=True):
        ids = torch.tensor([TOKENIZER(row["text"])["input_ids"]])
        torch.testing.assert_close(loss, model(input_ids=ids, labels=ids).loss)


def test_only_the_completion_counts():
    model, objective = tiny_models.gpt2(), CausalLM(TOKENIZER)
    row = {"prompt": "the cat", "completion": "sat on"}
    loss = objective.losses(model, collate(objective, [row, {"text": "a b c d e f g h"}], (0, 0)))
    ids = torch.tensor([TOKENIZER("the cat sat on")["input_ids"]])
    log_p = model(input_ids=ids).logits[0].log_softmax(-1)
    expected = -torch.stack([log_p[i - 1, ids[0, i]] for i in (3, 4, 5)]).mean()
    torch.testing.assert_close(loss[0], expected)
    torch.testing.assert_close(
        objective.scores(model, collate(objective, [row], (0,))), -expected[None]
    )


def test_an_encoder_decoder_reads_the_prompt_and_writes_the_completion():
    model, objective = Recorder(tiny_models.t5()), CausalLM(TOKENIZER)
    rows = [
        {"prompt": "the cat", "completion": "sat on"},
        {"prompt": "a b c d", "completion": "red blue green"},
    ]
    losses = objective.losses(model, collate(objective, rows, (1, 0)))
    for row, loss in zip(rows, losses, strict=True):
        source = torch.tensor([TOKENIZER(row["prompt"])["input_ids"]])
        target = torch.tensor([TOKENIZER(row["completion"])["input_ids"][1:]])
        torch.testing.assert_close(loss, model.model(input_ids=source, labels=target).loss)
    with pytest.raises(UserError, match='encoder-decoder learns from "prompt"'):
        objective.losses(model, collate(objective, [{"text": "a b"}], (0,)))


def test_prompts_lose_their_beginning():
    objective = CausalLM(TOKENIZER, max_tokens=5)
    encoded = objective.encode({"prompt": "a b c d", "completion": "e"}, "t")
    assert encoded["input_ids"] == TOKENIZER("c d e")["input_ids"]
    assert encoded["learnt"] == [(3, len(encoded["input_ids"]))]
    encoded = objective.encode({"prompt": "a b", "completion": "c d e f g h"}, "t")
    assert encoded["input_ids"] == TOKENIZER("c d e f")["input_ids"][:5]


def test_a_text_of_one_token_has_nothing_to_predict():
    with pytest.raises(UserError, match='task "t": a text needs two tokens'):
        CausalLM(tiny_models.tokenizer(special=False)).encode({"text": "cat"}, "t")


def test_a_row_without_text_is_named():
    with pytest.raises(UserError, match='task "a": a row needs text in "completion"'):
        CausalLM(TOKENIZER).fit(collection(a={"train": [{"prompt": "a"}]}))


# --- regression


def test_regression_sums_the_squared_error_over_outputs():
    rows = [{"x": np.ones((3, 5)) * i, "y": np.arange(4.0) * i} for i in range(3)]
    objective = Regression().fit(collection(a={"train": rows}))
    model = tiny_models.plain(outputs=4)
    batch = collate(objective, rows, (0, 1, 1))
    predicted = model(torch.tensor(np.stack([r["x"] for r in rows])).float())
    truth = torch.tensor(np.stack([r["y"] for r in rows])).float()
    expected = ((predicted - truth) ** 2).sum(1)
    torch.testing.assert_close(objective.losses(model, batch), expected)
    torch.testing.assert_close(objective.scores(model, batch), -expected)


# --- what holds for all

CASES = {
    "bi-encoder": (Choice(TOKENIZER), tiny_models.bert(), ROWS, SLOTS),
    "cross-encoder": (
        Choice(TOKENIZER, scoring="cross-encoder"),
        tiny_models.bert(num_labels=2),
        ROWS,
        SLOTS,
    ),
    "classification": (
        Classification(TOKENIZER, labels={"t": ("x", "y")}),
        tiny_models.llama(num_labels=2),
        [{"text": t, "label": "x"} for t in ("a", "the cat sat on the mat", "red blue")],
        (1, 0, 0),
    ),
    "causal-lm": (
        CausalLM(TOKENIZER),
        tiny_models.llama(),
        [{"text": "the cat sat on"}, {"prompt": "a", "completion": "b"}],
        (0, 1),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_row_alone_has_the_loss_that_it_has_in_a_batch(case):
    objective, model, rows, slots = CASES[case]
    together = objective.losses(model, collate(objective, rows, slots))
    for row, slot, loss in zip(rows, slots, together, strict=True):
        alone = objective.losses(model, collate(objective, [row], (slot,)))
        torch.testing.assert_close(alone, loss[None], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_one_pass_gives_the_scores_and_the_losses(case):
    objective, model, rows, slots = CASES[case]
    batch = collate(objective, rows, slots)
    scores, losses = objective.scores_and_losses(model, batch)
    torch.testing.assert_close(scores, objective.scores(model, batch))
    if case != "cross-encoder":
        torch.testing.assert_close(losses, objective.losses(model, batch))


def test_a_cross_encoder_is_selected_by_its_ranking_alone():
    """A bias that says how often a pair is right changes the loss of the pairs, and no choice."""
    objective, model, rows, slots = CASES["cross-encoder"]
    batch, biased = collate(objective, rows, slots), copy.deepcopy(model)
    biased.classifier.bias.data[1] -= 2
    before, after = (objective.scores_and_losses(m, batch)[1] for m in (model, biased))
    torch.testing.assert_close(before, after)
    assert not torch.allclose(objective.losses(model, batch), objective.losses(biased, batch))


# a decoder's classifier is left out: it finds a row's last token by the pad id
@pytest.mark.parametrize("case", ["bi-encoder", "cross-encoder", "causal-lm"])
def test_the_padding_id_does_not_matter(case):
    objective, model, rows, slots = CASES[case]
    unpadded = tiny_models.tokenizer(pad=False)
    assert text.pad_id(unpadded) != text.pad_id(TOKENIZER)
    losses = [
        obj.losses(model, collate(obj, rows, slots))
        for obj in (objective, type(objective)(unpadded, **_fields(objective)))
    ]
    torch.testing.assert_close(*losses)


def _fields(objective):
    return {k: v for k, v in objective.to_dict().items() if k != "kind"}


@pytest.mark.parametrize("case", CASES)
def test_to_dict_survives_json_and_makes_the_objective_again(case):
    objective = CASES[case][0]
    fields = json.loads(json.dumps(objective.to_dict()))
    assert make_objective(tokenizer=TOKENIZER, **fields) == objective


def test_templates_equal_the_tokenizers_own_special_tokens():
    for tokenizer in (TOKENIZER, tiny_models.tokenizer(special=False)):
        ids = text.plain_ids(tokenizer, ["the cat", "sat"])
        single, pair = text.single_template(tokenizer), text.pair_template(tokenizer)
        assert single.fill(ids[0]) == tokenizer("the cat")["input_ids"]
        assert pair.fill(*ids) == tokenizer("the cat", "sat")["input_ids"]


def test_unknown_kinds_fields_and_values_are_named():
    with pytest.raises(UserError, match='Did you mean "choice"'):
        make_objective("chioce")
    with pytest.raises(UserError, match=r'no field "temprature".*Did you mean "temperature"'):
        make_objective("choice", TOKENIZER, temprature=1.0)
    with pytest.raises(UserError, match='"regression" has no field "x"; it has none'):
        make_objective("regression", None, x=1)
    with pytest.raises(UserError, match="scoring must be one of"):
        Choice(TOKENIZER, scoring="tri-encoder")
    with pytest.raises(UserError, match="leaves no room"):
        Choice(TOKENIZER, max_context_tokens=2).encode(ROWS[0], "t")
    with pytest.raises(UserError, match="needs a tokenizer"):
        Choice().encode(ROWS[0], "t")


def test_the_protocol_can_be_imported_without_torch():
    code = "import sys, foretune.tasks.objectives; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_models_may_return_a_tensor_or_logits():
    tensor = torch.zeros(2)
    assert text.logits_of(tensor) is tensor
    assert text.logits_of(SimpleNamespace(logits=tensor)) is tensor
