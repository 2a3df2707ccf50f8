"""Rows as references: what counts in them, and what is wrong with them."""

from __future__ import annotations

import pytest

import tiny_models
from foretune.decoding.references import choice_prompt, read_references
from foretune.errors import UserError

ROW = {"prompt": "the cat", "label": "red"}
CHOICE = {"context": ["the cat", "sat"], "candidates": ["a", "b", "c"], "answer": 2}


def read(*rows, **options):
    return read_references(rows, tiny_models.tokenizer(special=False), **options)


def test_rotations_of_a_choice_have_the_same_answer_under_every_letter():
    turned = [choice_prompt(CHOICE, turn) for turn in range(3)]
    assert [letter for _, letter in turned] == ["C", "B", "A"]
    for prompt, letter in turned:
        assert f"\n{letter}. c\n" in prompt and prompt.startswith("the cat\nsat\nA. ")


def test_special_tokens_before_a_text_are_kept_and_those_after_it_are_not():
    found = read_references([ROW], tiny_models.tokenizer(special=True))
    assert found.texts[0][0] == 1 and found.texts[0][-1] != 2
    assert found.places == [[2]]


def test_test_rows_take_the_labels_of_the_store():
    store = read(ROW, {"prompt": "a", "label": "blue"})
    assert read(ROW, like=store).values == store.values[:1]
    with pytest.raises(UserError, match=r'row 2 has the label "green".*it has blue, red'):
        read(ROW, {"prompt": "a", "label": "green"}, like=store)
    with pytest.raises(
        UserError, match=r"rows hold text, but the store was built from prompt .or text. and label"
    ):
        read({"text": "the cat"}, like=store)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no rows"),
        ([{}], "row 1: a row needs prompt .or text. and label; or .*this one has nothing"),
        ([ROW, {"prompt": "the"}], "row 2: a row needs .*this one has prompt"),
        ([ROW, {"text": "the cat"}], "row 2 holds text, row 1 prompt .or text. and label"),
        ([{"prompt": " ", "label": "red"}], "row 1: prompt must be text, got ' '"),
        ([{"prompt": 3, "label": "red"}], "row 1: prompt must be text, got 3"),
        ([{"text": ["the"]}], "row 1: text must be text"),
        ([{"prompt": "a", "label": True}], "label must be text or an integer, got True"),
        ([{"prompt": "a", "label": " "}], "label must be text"),
        ([{"prompt": "a", "completion": ""}], "completion must be text"),
        ([{"text": "the"}], "a text needs two tokens or more"),
        ([{**CHOICE, "candidates": ["a"]}], "candidates must be a list of 2 to 26"),
        ([{**CHOICE, "answer": 3}], "answer must be from 0 to 2, got 3"),
        ([{**CHOICE, "answer": "a"}], "answer must be from 0 to 2, got 'a'"),
        (
            [{"prompt": "a", "label": "xx"}, {"prompt": "a", "label": "yy"}],
            'labels "xx" and "yy" are the same tokens to this tokenizer',
        ),
    ],
)
def test_bad_rows_are_named(rows, message):
    with pytest.raises(UserError, match=message):
        read(*rows)


def test_a_prompt_that_is_too_long_is_named():
    with pytest.raises(UserError, match="row 1 has 5 tokens, but the model reads at most 4"):
        read({"prompt": "a b c d e", "label": "red"}, max_tokens=4)


LABELS = ("red cat", "red dog", "blue")


def test_labels_may_begin_alike_and_all_their_tokens_count():
    rows = [{"prompt": "the", "label": label} for label in LABELS]
    found, words = read(*rows), tiny_models.tokenizer(special=False)
    assert found.labels == {label: words(label)["input_ids"] for label in sorted(LABELS)}
    assert found.values == [[1], [2], [0]]
    spelled = found.spelled()
    assert spelled.texts[0] == words("the red")["input_ids"]
    assert spelled.values[0] == words("red cat")["input_ids"] and spelled.places[0] == [0, 1]


def test_a_label_that_another_begins_with_ends_with_the_end_of_text():
    rows = [{"prompt": "the", "label": label} for label in (*LABELS, "red")]
    words = tiny_models.tokenizer(special=False)
    assert all(ids[-1] == words.eos_token_id for ids in read(*rows).labels.values())
    words.eos_token = None
    with pytest.raises(UserError, match='label "red cat" begins with label "red", and the token'):
        read_references(rows, words)


def test_a_prompt_leaves_room_for_the_longest_label():
    rows = [{"prompt": "a b c", "label": label} for label in LABELS]
    read(*rows, max_tokens=4)
    with pytest.raises(UserError, match="row 1 has 4 tokens, but the model reads at most 3"):
        read(*rows, max_tokens=3)


def test_whole_numbers_are_labels():
    assert list(read({"prompt": "a", "label": 7}).labels) == ["7"]


def test_a_classification_row_calls_its_prompt_text():
    named, called = read(ROW), read({"text": ROW["prompt"], "label": "red"})
    assert (called.kind, called.texts, called.values) == ("label", named.texts, named.values)


def test_a_conversation_counts_its_last_answer():
    tokenizer = tiny_models.tokenizer(special=False)
    tokenizer.chat_template = (
        "{% for m in messages %}[CLS] {{ m.content }} [SEP] {% endfor %}"
        "{% if add_generation_prompt %}[CLS] {% endif %}"
    )
    turns = [("user", "a dog"), ("assistant", "red"), ("user", "the cat"), ("assistant", "blue")]
    row = {"messages": [{"role": role, "content": text} for role, text in turns]}
    references = read_references([row, {"prompt": "a", "completion": "the"}], tokenizer)
    ids = tokenizer("[CLS] a dog [SEP] [CLS] red [SEP] [CLS] the cat [SEP] [CLS] blue [SEP]")
    assert references.texts[0] == ids["input_ids"][:-1]
    assert references.values[0] == tokenizer("blue [SEP]")["input_ids"]
    assert references.places[0] == [len(references.texts[0]) - 2, len(references.texts[0]) - 1]
