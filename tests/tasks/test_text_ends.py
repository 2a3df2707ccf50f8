"""Where a text that is predicted ends, and which texts have nothing to predict."""

from __future__ import annotations

import pytest
from tokenizers import Regex, normalizers

import tiny_models
from foretune.errors import UserError
from foretune.tasks.objectives.causal_lm import CausalLM
from foretune.tasks.objectives.choice import Choice
from foretune.tasks.objectives.classification import Classification
from foretune.tasks.objectives.prompts import PromptClassification
from foretune.tasks.objectives.text import pair_template, single_template

TOKENIZER = tiny_models.tokenizer()
END = TOKENIZER.eos_token_id


def test_a_completion_that_ends_with_the_end_of_text_gets_no_second_one():
    for completion in ("the cat", "the cat [SEP]"):
        row = {"prompt": "a", "completion": completion}
        encoded = CausalLM(TOKENIZER).encode(row, "t")
        assert encoded["target"] == TOKENIZER("the cat")["input_ids"][1:]
        assert encoded["target"].count(END) == 1


def test_a_completion_of_a_store_ends_alike():
    references = pytest.importorskip("foretune.decoding.references")
    for completion in ("the cat", "the cat [SEP]"):
        row = {"prompt": "a", "completion": completion}
        [values] = references.read_references([row], TOKENIZER).values
        assert values == CausalLM(TOKENIZER).encode(row, "t")["target"]


def test_a_text_that_ends_with_the_end_of_text_gets_no_second_one():
    for text in ("the cat", "the cat [SEP]"):
        encoded = CausalLM(TOKENIZER).encode({"text": text}, "t")
        assert encoded["input_ids"] == TOKENIZER("the cat")["input_ids"]


@pytest.mark.parametrize("max_tokens", [3, 4, 5])
def test_a_text_that_is_cut_is_not_closed(max_tokens):
    ids = CausalLM(TOKENIZER, max_tokens=max_tokens).encode({"text": "a b c d e"}, "t")["input_ids"]
    assert ids == TOKENIZER("a b c d e")["input_ids"][:max_tokens]
    assert END not in ids


@pytest.mark.parametrize("max_tokens", [4, 5, 6])
def test_a_candidate_is_closed_only_where_it_ends(max_tokens):
    objective = Choice(TOKENIZER, scoring="causal", max_response_tokens=max_tokens)
    row = {"context": "a", "candidates": ["a b c d e", "red [SEP]"], "answer": 0}
    longer, shorter = objective.encode(row, "t")["candidates"]
    assert (longer[-1] == END) == (max_tokens == 6)
    assert shorter == TOKENIZER("red")["input_ids"][1:]


@pytest.mark.parametrize(
    ("objective", "row"),
    [
        (Classification(TOKENIZER, labels={"t": ("x",)}), {"text": "\t", "label": "x"}),
        (PromptClassification(TOKENIZER, labels={"t": ("x",)}), {"text": "\t", "label": "x"}),
        (CausalLM(TOKENIZER), {"text": "\t"}),
        (CausalLM(TOKENIZER), {"prompt": "\t", "completion": "a"}),
        (CausalLM(TOKENIZER), {"prompt": "a", "completion": "\t"}),
        (Choice(TOKENIZER), {"context": "\t", "candidates": ["a", "b"], "answer": 0}),
        (Choice(TOKENIZER), {"context": "a", "candidates": ["\t", "b"], "answer": 0}),
    ],
)
def test_a_text_of_no_token_is_named(objective, row):
    with pytest.raises(UserError, match=r'task "t": the tokenizer makes no token of'):
        objective.encode(row, "t")


@pytest.mark.parametrize(
    ("objective", "row"),
    [
        (Classification(TOKENIZER, labels={"t": ("x",)}), {"text": "a \ud800", "label": "x"}),
        (CausalLM(TOKENIZER), {"text": "a \ud800"}),
        (Choice(TOKENIZER), {"context": "a", "candidates": ["a \ud800", "b"], "answer": 0}),
    ],
)
def test_half_a_surrogate_pair_is_named(objective, row):
    with pytest.raises(UserError, match=r'task "t": character 3 is half of a surrogate pair'):
        objective.encode(row, "t")


def test_an_empty_prompt_leaves_the_leading_special_tokens():
    encoded = CausalLM(TOKENIZER).encode({"prompt": "", "completion": "a"}, "t")
    assert encoded["input_ids"] == TOKENIZER("a")["input_ids"]


def test_tokens_added_later_count():
    tokenizer = tiny_models.tokenizer()
    before = CausalLM(tokenizer).encode({"text": "the cow"}, "t")["input_ids"]
    tokenizer.add_tokens(["cow"])
    after = CausalLM(tokenizer).encode({"text": "the cow"}, "t")["input_ids"]
    assert before[2] == tokenizer.unk_token_id
    assert after[2] == len(tokenizer) - 1


@pytest.mark.parametrize("unknown", [True, False])
def test_special_tokens_are_found_where_the_tokenizer_does_not_know_a(unknown):
    tokenizer = tiny_models.tokenizer(unknown=unknown)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("a", "" if unknown else "zz")
    for template in (single_template(tokenizer), pair_template(tokenizer)):
        assert (template.before, template.after) == ((1,), (2,))


def test_a_tokenizer_without_a_word_is_refused():
    tokenizer = tiny_models.tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(Regex("."), "")
    with pytest.raises(UserError, match="makes no token of any of 100 words"):
        single_template(tokenizer)
