"""Text in, text out."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_models
from foretune.decoding.generation import (
    encode,
    end_ids,
    generate_texts,
    pad_id,
    prompt_ids,
    read_prompts,
    shared_tokens,
)
from foretune.errors import DivergedError, UserError

PROMPTS = ["the cat sat", "a dog", "one two three red blue"]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_models.llama(seed=1, initializer_range=0.4)


TOKENIZER = tiny_models.tokenizer()


def test_a_batch_gives_what_each_prompt_gives_alone(model: Any) -> None:
    together = generate_texts(model, TOKENIZER, PROMPTS, max_new_tokens=6, do_sample=False)
    alone = [
        generate_texts(model, TOKENIZER, p, max_new_tokens=6, do_sample=False)[0] for p in PROMPTS
    ]
    assert together == alone
    assert [one.prompt for one in together] == PROMPTS
    assert all(0 < len(one.token_ids) <= 6 for one in together)
    said = TOKENIZER.decode(together[0].token_ids, skip_special_tokens=True)
    assert together[0].text == f" {said}"  # the prompt and the text make up what was read


def test_a_text_ends_where_the_model_ends_it(model: Any) -> None:
    [free] = generate_texts(model, TOKENIZER, PROMPTS[0], max_new_tokens=8, do_sample=False)
    third = free.token_ids[2]
    model.generation_config.eos_token_id = [third]
    try:
        short = generate_texts(model, TOKENIZER, PROMPTS, max_new_tokens=8, do_sample=False)[0]
    finally:
        model.generation_config.eos_token_id = 2
    assert short.token_ids == free.token_ids[: free.token_ids.index(third) + 1]


def test_sampling_has_a_seed_and_leaves_the_global_state(model: Any) -> None:
    def draw(seed: int) -> Any:
        return generate_texts(model, TOKENIZER, PROMPTS, seed=seed, do_sample=True)

    before = torch.get_rng_state()
    assert draw(1) == draw(1) != draw(2)
    assert torch.equal(torch.get_rng_state(), before)


def test_several_sequences_come_back_prompt_by_prompt(model: Any) -> None:
    found = generate_texts(
        model, TOKENIZER, PROMPTS, max_new_tokens=3, do_sample=True, num_return_sequences=2
    )
    assert [one.prompt for one in found] == [p for p in PROMPTS for _ in range(2)]


def test_drafting_goes_row_by_row(model: Any) -> None:
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    drafted = generate_texts(model, TOKENIZER, PROMPTS, assistant_model=model, **options)
    assert drafted == generate_texts(model, TOKENIZER, PROMPTS, **options)


def test_scores_that_are_not_finite_are_no_text(model: Any) -> None:
    broken = copy.deepcopy(model)
    with torch.no_grad():
        next(broken.parameters()).fill_(float("nan"))
    with pytest.raises(DivergedError, match="not finite"):
        generate_texts(broken, tiny_models.tokenizer(special=False), "the cat", max_new_tokens=1)


def test_a_prompt_stays_open_at_its_end() -> None:
    assert TOKENIZER("the cat")["input_ids"][-1] == TOKENIZER.eos_token_id
    assert prompt_ids(TOKENIZER, "the cat")[-1] != TOKENIZER.eos_token_id


def test_a_tokenizer_without_pad_token_will_do(model: Any) -> None:
    plain = tiny_models.tokenizer(pad=False, special=False)
    assert pad_id(plain) == plain.eos_token_id
    batch = encode(model, plain, ["a", "a b"])
    assert batch["attention_mask"].tolist() == [[0, 1], [1, 1]]
    assert end_ids(model, plain) == [2]


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("the cat", {"temprature": 1.0}, 'no option "temprature". Did you mean "temperature"?'),
        ("the cat", {"max_new_tokens": 100}, "exceed the model's 64 positions"),
        (" ".join(["cat"] * 70), {}, "a prompt of 71 tokens and 50 new tokens"),
    ],
)
def test_mistakes_are_one_line(
    model: Any, prompt: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as error:
        generate_texts(model, TOKENIZER, prompt, **options)
    assert message in str(error.value)
    with pytest.raises(UserError, match="has no tokenizer"):
        generate_texts(model, None, "the cat")
    with pytest.raises(UserError, match="a prompt is empty"):
        generate_texts(model, tiny_models.tokenizer(special=False), "")


def test_prompts_come_from_text_jsonl_and_standard_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "p.txt").write_text("one\n\ntwo words\n")
    (tmp_path / "p.jsonl").write_text('{"prompt": "one"}\n{"prompt": "two words", "n": 1}\n')
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo words\n"))
    for path in (tmp_path / "p.txt", tmp_path / "p.jsonl", "-"):
        assert read_prompts(path) == ["one", "two words"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "p.jsonl",
            b'{"prompt": "a"}\n{"text": "b"}\n',
            'line 2: a row needs text under "prompt"',
        ),
        ("p.jsonl", b"{prompt}\n", "line 1: not JSON"),
        ("p.txt", b"\n\n", "no prompt in"),
        ("p.txt", b"\xff\xfe", "is not UTF-8 text"),
        (None, b"", "no file .* with prompts"),
    ],
)
def test_bad_prompt_files_are_named(
    tmp_path: Path, name: str | None, content: bytes, message: str
) -> None:
    path = tmp_path / (name or "none.txt")
    if name:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_prompts(path)


class Words:
    """As much of a tokenizer as is asked for its words."""

    def __init__(self, *words: str) -> None:
        self.words = words

    def get_vocab(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self.words)}

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [self.words[i] for i in ids]


def test_ids_are_shared_where_all_tokenizers_have_one_word() -> None:
    words = [f"w{i}" for i in range(30)]
    one = Words(*words)

    def shared(*others: Words) -> Any:
        return shared_tokens(one, [("small", other) for other in others])

    assert shared() is None
    assert shared(Words(*words)) is None
    changed = shared(Words(*words[:4], "odd", *words[5:]), one)
    assert changed is not None and (~changed).nonzero().ravel().tolist() == [4]
    longer = shared(Words(*words, "more"))
    assert longer is not None and longer.shape == (30,) and bool(longer.all())
    with pytest.raises(UserError, match=r"4 of 30 ids differ \(id 0 is 'w0' .*, 'a' to small\)"):
        shared(Words("a", "b", "c", "d", *words[4:]))


CHAT = (
    "{% for m in messages %}[CLS] {{ m.role }} {{ m.content }} [SEP] {% endfor %}"
    "{% if add_generation_prompt %}[CLS] the{% endif %}"
)


def test_a_conversation_is_written_by_the_chat_template(model: Any, tmp_path: Path) -> None:
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = CHAT
    messages = [{"role": "user", "content": "a dog"}]
    ids = prompt_ids(tokenizer, messages)
    written = "[CLS] user a dog [SEP] [CLS] the"
    assert ids == tokenizer(written, add_special_tokens=False)["input_ids"]  # no second [CLS]
    [answer] = generate_texts(model, tokenizer, [messages], max_new_tokens=4, do_sample=False)
    assert answer.prompt == messages and answer.text
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"messages": [{"role": "user", "content": "a dog"}]}\n{"prompt": "the"}\n')
    assert read_prompts(file) == [messages, "the"]
    file.write_text('{"messages": [{"role": "assistant", "content": "a dog"}]}')
    with pytest.raises(UserError, match="line 1: messages begins with a turn of"):
        read_prompts(file)
    answered = [*messages, {"role": "assistant", "content": "the"}]
    with pytest.raises(UserError, match="ends with the assistant's turn"):
        prompt_ids(tokenizer, answered)
    with pytest.raises(UserError, match="the tokenizer has no chat template"):
        prompt_ids(TOKENIZER, messages)
