"""Conversations that cannot be learnt: `plan` says why in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import tiny_models
from chat_templates import FAMILIES, tokenizer_of
from command_line import call
from foretune.models.loading import save_base

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}
REFUSES_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BAD = {
    "role unknown": ([{"role": "robot", "content": "Hi"}, ANSWER], "chatml", 'role "robot"'),
    "assistant first": ([ANSWER, USER, ANSWER], "chatml", "a user's turn comes first"),
    "empty turn": ([USER, {"role": "assistant", "content": ""}], "chatml", "empty"),
    "ends with the user": ([USER, ANSWER, USER], "chatml", "assistant"),
    "all turns masked": ([USER, {**ANSWER, "weight": 0}], "chatml", "weight"),
    "system turn refused": (
        [{"role": "system", "content": "Be kind."}, USER, ANSWER],
        REFUSES_SYSTEM,
        "no system turns",
    ),
    "no template": ([USER, ANSWER], None, "chat_template"),
    "no conversation": ([], "chatml", "empty"),
    "not turns": ("Hi", "chatml", "list of messages"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_conversation_is_one_line(name: str, tmp_path: Path) -> None:
    messages, template, reason = BAD[name]
    tokenizer: Any = tokenizer_of(FAMILIES["chatml"])
    if template != "chatml":
        tokenizer.chat_template = template
    model = tiny_models.llama(vocab_size=len(tokenizer)).float()
    save_base(model, tokenizer, tmp_path / "model")
    good = [USER, ANSWER]
    rows = [{"task": task, "messages": good} for task in "abc" for _ in range(4)]
    rows[5]["messages"] = messages
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "recipe.yaml").write_text(f"""
name: tiny
model: {{name: {tmp_path / "model"}}}
tasks: {{source: {tmp_path / "rows.jsonl"}, unseen: [a]}}
objective: {{kind: causal-lm, max_tokens: 60}}
retrain: {{methods: [none, standard], steps: 1}}
adapt: {{method: lora}}
""")
    result = call("plan", tmp_path / "recipe.yaml")
    assert result.exit_code == 2, result.output
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and reason in errors[0], result.stderr
    assert "Traceback" not in result.output
