"""What is learnt of a conversation is what the assistant says and the token that ends its turn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from chat_templates import FAMILIES, Family, tokenizer_of
from foretune.errors import UserError
from foretune.tasks.leakage import find_leaks
from foretune.tasks.objectives.causal_lm import CausalLM
from foretune.tasks.sources import Source, load_tasks
from foretune.tasks.task import Task, TaskCollection

FAMILY = pytest.mark.parametrize("name", FAMILIES)
ANSWERS = ("hello, here I am", "No,  it is 日本 é.\n\n- one\n- two")


def turn(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def conversation(family: Family, answers: tuple[str, ...] = ANSWERS) -> list[dict[str, Any]]:
    system = [turn("system", "Be brief.")] * family.has_system
    questions = ("Who is there?", "hello\n\nIs it two?", "And?")
    pairs = zip(questions, answers, strict=False)
    return [*system, *(t for q, a in pairs for t in (turn("user", q), turn("assistant", a)))]


def encoded(
    family: Family, messages: list[dict[str, Any]], **fields: Any
) -> tuple[Any, dict[str, Any]]:
    tokenizer = tokenizer_of(family)
    fields = {"max_tokens": 1000, **fields}
    return tokenizer, CausalLM(tokenizer, **fields).encode({"messages": messages}, "t")


def decoded(tokenizer: Any, row: dict[str, Any]) -> list[str]:
    return [tokenizer.decode(row["input_ids"][a:b]) for a, b in row["learnt"]]


@FAMILY
def test_last_turn_is_learnt_with_its_end_and_nothing_else(name: str) -> None:
    family = FAMILIES[name]
    tokenizer, row = encoded(family, conversation(family))
    [learnt] = decoded(tokenizer, row)
    assert learnt.removeprefix(family.opening).strip() == (ANSWERS[1] + family.end).strip()
    assert learnt.startswith(family.opening)


@FAMILY
def test_what_comes_before_is_the_prompt_of_generation(name: str) -> None:
    family = FAMILIES[name]
    messages = conversation(family)
    tokenizer, row = encoded(family, messages)
    prompt = tokenizer.apply_chat_template(
        messages[:-1], add_generation_prompt=True, return_dict=False
    )
    [(begin, end)] = row["learnt"]
    assert row["input_ids"][:begin] == prompt
    assert end == len(row["input_ids"])
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    written = "".join(tokenizer.decode(row["input_ids"]).split())
    assert "".join(whole.split()).startswith(written.removesuffix(family.end.strip()))


@FAMILY
def test_all_turns_are_learnt_if_asked(name: str) -> None:
    family = FAMILIES[name]
    tokenizer, row = encoded(family, conversation(family), train_on="all")
    learnt = decoded(tokenizer, row)
    assert len(learnt) == 2
    for text, answer in zip(learnt, ANSWERS, strict=True):
        assert answer in text
        words = text.replace(family.opening, "").replace(answer, "").strip()
        assert words in (family.end.strip(), "<|end|>", "")  # harmony ends others differently
    assert learnt[1].rstrip().endswith(family.end.strip())


@FAMILY
def test_a_long_conversation_loses_its_oldest_exchanges(name: str) -> None:
    family = FAMILIES[name]
    messages = conversation(family, (*ANSWERS, "Yes."))
    tokenizer, whole = encoded(family, messages)
    _, row = encoded(family, messages, max_tokens=len(whole["input_ids"]) - 1)
    kept = [*messages[: family.has_system], *messages[family.has_system + 2 :]]
    assert row == encoded(family, kept)[1]
    assert ("Be brief." in tokenizer.decode(row["input_ids"])) == family.has_system
    last = [*messages[: family.has_system], *messages[-2:]]
    size = len(encoded(family, last)[1]["input_ids"])
    assert encoded(family, messages, max_tokens=size)[1] == encoded(family, last)[1]
    with pytest.raises(UserError, match=rf"alone has {size} tokens, and max_tokens is {size - 1}"):
        encoded(family, messages, max_tokens=size - 1)


def test_an_end_that_the_words_bring_along_is_learnt_once() -> None:
    family = FAMILIES["chatml"]
    messages = [turn("user", "Hi"), turn("assistant", "Yes<|im_end|>")]
    assert decoded(*encoded(family, messages)) == ["Yes<|im_end|>"]


def test_turns_of_weight_0_are_read_and_not_learnt() -> None:
    family = FAMILIES["chatml"]
    messages = conversation(family)
    messages[2]["weight"] = 0
    assert decoded(*encoded(family, messages, train_on="all")) == [ANSWERS[1] + "<|im_end|>"]
    messages[4]["weight"], messages[2]["weight"] = 0, 1
    assert decoded(*encoded(family, messages, train_on="all")) == [ANSWERS[0] + "<|im_end|>"]
    with pytest.raises(UserError, match="the last assistant's turn has weight 0: set train_on"):
        encoded(family, messages)


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "He"}, {"type": "text", "text": "llo"}]
    messages = [turn("user", parts), turn("assistant", parts)]
    assert decoded(*encoded(FAMILIES["chatml"], messages)) == ["Hello<|im_end|>"]


TOOLS = """{%- for t in tools or [] -%}{{ '<|im_start|>tools\\n' + t | tojson + '<|im_end|>\\n' }}
{%- endfor -%}
{%- for m in messages -%}
{{ '<|im_start|>' + m.role + '\\n' + m.content }}
{%- for c in m.tool_calls or [] -%}{{ '<tool>' + c | tojson + '</tool>' }}{%- endfor -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""


def test_calls_of_tools_are_learnt() -> None:
    special = ("<|im_start|>", "<tool>", "</tool>", "<|im_end|>")
    family = Family(TOOLS, special, "<|im_end|>")
    messages = [
        turn("user", "Weather?"),
        turn("assistant", None, tool_calls=[{"name": "weather"}]),
        turn("tool", "rain"),
        turn("assistant", "It rains."),
    ]
    tokenizer = tokenizer_of(family)
    objective = CausalLM(tokenizer, max_tokens=1000, train_on="all")
    row = objective.encode({"messages": messages, "tools": [{"name": "weather"}]}, "t")
    assert decoded(tokenizer, row) == [
        '<tool>{"name": "weather"}</tool><|im_end|>',
        "It rains.<|im_end|>",
    ]
    assert tokenizer.decode(row["input_ids"]).startswith('<|im_start|>tools\n{"name": "weather"}')


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("Hi", "messages must be a list of messages, got"),
        ([], "messages is empty"),
        (["Hi"], 'turn 1 must have "role" and "content"'),
        (
            [{"from": "human", "value": "Hi"}],
            "turn 1: role and content missing; it has from, value",
        ),
        ([turn("human", "Hi")], 'unknown role "human"; roles are system, user, assistant, tool'),
        (
            [turn("assistant", "Hi")],
            'begins with a turn of "assistant": a user\'s turn comes first',
        ),
        ([turn("system", "Hi")], "has a system turn only"),
        ([turn("user", "Hi")], 'ends with a turn of "user"'),
        ([turn("user", " "), turn("assistant", "Hi")], "turn 1: content is empty"),
        ([turn("user", "Hi"), turn("assistant", None)], "turn 2: content missing"),
        ([turn("user", "Hi"), turn("assistant", 3)], "content must be text or text parts, got 3"),
        ([turn("user", [{"type": "image_url"}])], "only parts of type text are read, got"),
        ([turn("user", "Hi", weight=0), turn("assistant", "Yes")], "weight is 0 or 1, of an"),
        ([turn("user", "Hi"), turn("assistant", "Yes", weight=0)], "every assistant's turn has"),
        (
            [turn("user", "Hi"), turn("system", "x"), turn("assistant", "Yes")],
            "turn 2: a system turn can only be the first",
        ),
    ],
)
def test_bad_conversations_are_named(messages: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        encoded(FAMILIES["chatml"], messages)
    assert 'task "t"' in str(error.value) and "\n" not in str(error.value)


def test_a_template_that_refuses_is_quoted() -> None:
    with pytest.raises(UserError, match=r"chat template refuses the conversation: .*System role"):
        encoded(FAMILIES["gemma"], conversation(FAMILIES["chatml"]))
    twice = [turn("user", "a"), turn("user", "b"), turn("assistant", "c")]
    with pytest.raises(UserError, match=r"refuses the conversation: .*roles must alternate"):
        encoded(FAMILIES["llama-2"], twice)


def test_a_tokenizer_without_template_is_named() -> None:
    tokenizer = tokenizer_of(FAMILIES["chatml"])
    tokenizer.chat_template = None
    messages = conversation(FAMILIES["chatml"])
    with pytest.raises(UserError, match=r"no chat template: set model.chat_template to a file"):
        CausalLM(tokenizer).encode({"messages": messages}, "t")


def test_other_names_of_keys_and_roles_are_mapped(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]
    row = {"task": "t", "conversations": turns}
    (tmp_path / "chats.jsonl").write_text(json.dumps(row) + "\n")
    names = {"role": "from", "content": "value", "roles": {"human": "user", "gpt": "assistant"}}
    columns = {"conversations": "messages"}
    source = Source(source=str(tmp_path / "chats.jsonl"), columns=columns, messages=names)
    [task] = load_tasks(source, "causal-lm")[0]
    assert task.train[0]["messages"] == [turn("user", "Hi"), turn("assistant", "Yes")]
    with pytest.raises(UserError, match=r"chats\.jsonl line 1: messages, turn 1: role and content"):
        load_tasks(Source(source=str(tmp_path / "chats.jsonl"), columns=columns), "causal-lm")
    with pytest.raises(UserError, match=r"messages\.roles maps names in the source to system"):
        Source(source="x", messages={"roles": {"human": "person"}})
    with pytest.raises(UserError, match="messages maps role, content, roles to other names"):
        Source(source="x", messages={"from": "role"})


def test_a_conversation_that_occurs_again_is_a_leak() -> None:
    def chat(answer: str) -> dict[str, Any]:
        return {"messages": [turn("user", "Who?"), turn("assistant", answer)]}

    task = Task("t", [chat("I"), chat("you")], [], [chat("I")])
    [leak] = find_leaks(TaskCollection((task,)))
    assert (leak.count, leak.sample) == (1, "Who?")


R1 = """{%- for m in messages -%}
{%- if m.role == 'assistant' -%}
{{ '<｜Assistant｜>' + m.content.split('</think>')[-1] + '<｜end｜>' }}
{%- else -%}{{ '<｜User｜>' + m.content }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<｜Assistant｜><think>\\n' }}{%- endif -%}"""
CALLS = """{%- for m in messages -%}
{{ '<|im_start|>' + m.role + '\\n' + (m.content if drops is not defined else '') }}
{%- for c in m.tool_calls or [] -%}{{ '<tool>' + c | tojson }}{%- endfor -%}
{{ END if m.role != 'assistant' or not m.tool_calls }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""


def test_a_prompt_that_opens_a_part_for_reasoning_is_cut_back_to_what_is_written() -> None:
    family = Family(R1, ("<｜User｜>", "<｜Assistant｜>", "<｜end｜>"), "<｜end｜>")
    messages = [turn("user", "6 * 7?"), turn("assistant", "<think>6 * 7</think>It is 42.")]
    tokenizer, row = encoded(family, [*messages, *messages], train_on="all")
    assert decoded(tokenizer, row) == ["It is 42.<｜end｜>"] * 2
    before = tokenizer.decode(row["input_ids"][: row["learnt"][0][0]])
    assert before == "<｜User｜>6 * 7?<｜Assistant｜>"


def test_words_that_occur_in_a_header_are_not_taken_for_the_turn() -> None:
    family = FAMILIES["harmony"]
    for word in ("final", "a", "user"):
        messages = [turn("user", word), turn("assistant", word)]
        learnt = decoded(*encoded(family, [*messages, *messages], train_on="all"))
        opening = "<|channel|>final<|message|>"
        assert learnt == [f"{opening}{word}<|end|>", f"{opening}{word}<|return|>"]


def test_calls_among_turns_that_are_written_in_two_ways() -> None:
    family = FAMILIES["thinking"]
    messages = [
        turn("user", "Rain?"),
        turn("assistant", "I look."),
        turn("user", "Yes"),
        turn("assistant", "It rains."),
        turn("user", "thanks"),
        turn("assistant", "welcome"),
    ]
    learnt = decoded(*encoded(family, messages, train_on="all"))
    opening = "<think>\n\n</think>\n\n"
    assert learnt == ["I look.<|im_end|>", "It rains.<|im_end|>", f"{opening}welcome<|im_end|>"]


def test_calls_that_a_template_does_not_write_are_refused() -> None:
    calling = turn("assistant", None, tool_calls=[{"name": "rain"}])
    after = [turn("tool", "wet"), turn("assistant", "It rains.")]
    for name in ("phi-3", "llama-3"):
        with pytest.raises(
            UserError, match=r"(does not write what turn 2 says|writes turn 2 otherwise)"
        ):
            encoded(FAMILIES[name], [turn("user", "Rain?"), calling, *after], train_on="all")
        [learnt] = decoded(*encoded(FAMILIES[name], [turn("user", "Rain?"), calling, *after]))
        assert learnt == f"It rains.{FAMILIES[name].end}"


def test_a_call_without_a_token_behind_it_is_learnt_whole() -> None:
    special = ("<|im_start|>", "<tool>", "<|im_end|>")
    family = Family(CALLS.replace("END", "'<|im_end|>'"), special, "<|im_end|>")
    calling = turn("assistant", "I look.", tool_calls=[{"name": "rain"}])
    messages = [turn("user", "Rain?"), calling, turn("tool", "wet"), turn("assistant", "Yes.")]
    learnt = decoded(*encoded(family, messages, train_on="all"))
    assert learnt == ['I look.<tool>{"name": "rain"}', "Yes.<|im_end|>"]
    none = turn("assistant", "I look.", tool_calls=[])
    assert decoded(*encoded(FAMILIES["phi-3"], [turn("user", "Rain?"), none])) == ["I look.<|end|>"]


def test_marks_around_the_words_alone_are_extended_by_what_ends_the_turn() -> None:
    template = FAMILIES["chatml with marks"].template
    inside = template.replace(
        "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}",
        "{% generation %}{{ m.content }}{% endgeneration %}{{ '<|im_end|>\\n' }}",
    )
    assert inside != template
    family = Family(inside, FAMILIES["chatml"].special, "<|im_end|>")
    messages = conversation(family)
    learnt = decoded(*encoded(family, messages, train_on="all"))
    assert learnt == [answer + "<|im_end|>" for answer in ANSWERS]


def test_an_end_that_is_not_flagged_as_special_is_learnt() -> None:
    family = FAMILIES["chatml"]
    tokenizer = tokenizer_of(Family(family.template, ("<|im_start|>", "</s>"), "</s>"))
    tokenizer.add_tokens(["<|im_end|>"])
    objective = CausalLM(tokenizer, max_tokens=1000)
    row = objective.encode({"messages": conversation(family)}, "t")
    assert decoded(tokenizer, row) == [ANSWERS[1] + "<|im_end|>"]


def test_messages_win_beside_other_columns(tmp_path: Path) -> None:
    row = {"task": "t", "prompt": "Hi", "messages": [turn("user", "Hi"), turn("assistant", "Yes")]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    [task] = load_tasks(Source(source=str(tmp_path / "rows.jsonl")), "causal-lm")[0]
    assert task.train[0]["messages"] == row["messages"]
    (tmp_path / "rows.jsonl").write_text(json.dumps({**row, "text": "Hi", "messages": "bad"}))
    with pytest.raises(UserError, match="messages must be a list of messages"):
        load_tasks(Source(source=str(tmp_path / "rows.jsonl")), "causal-lm")
    half = {"task": "t", "messages": [turn("user", "\ud800"), turn("assistant", "Yes")]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(half))
    with pytest.raises(UserError, match=r"line 1: messages, turn 1: character 1 is half of"):
        load_tasks(Source(source=str(tmp_path / "rows.jsonl")), "causal-lm")
