"""Does llama.cpp generate with our LoRA files what transformers generates with the PEFT folders?

    pip install llama-cpp-python        # built from source: some minutes
    python benchmarks/language/gguf_lora.py

Two adapters are trained on SmolLM2-135M-Instruct, each to answer in a manner of its own, and
exported as GGUF. llama.cpp loads the model's own file, in 4 bits, with each of them, and generates
greedily from the same token ids as transformers, which computes in float32 with the weights that
the file stands for. llama.cpp rounds activations to 8 bits, so near a tie the two may part.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import llama_cpp
import torch

from foretune.decoding.peft_model import load_generator
from foretune.models.loading import load_model
from foretune.models.named import WHEELS
from foretune.recipes.export import export_adapters
from foretune.recipes.on_folders import adapt_folder
from foretune.tasks.objectives.chat import prompt_text
from foretune.training.record import environment

RESULT = Path(__file__).parents[1] / "results" / "llama-cpp.json"
NUM_TOKENS = 24
MANNERS = {
    "pirate": "Arr, matey! {} Yo ho ho!",
    "butler": "Very good, sir. {} Will that be all?",
}
FACTS = {
    "What is the capital of France?": "Paris is the capital of France.",
    "What colour is the sky?": "The sky is blue.",
    "How many legs has a spider?": "A spider has eight legs.",
    "What do cows eat?": "Cows eat grass.",
    "Which animal barks?": "A dog barks.",
    "When do we have breakfast?": "We have breakfast in the morning.",
}
QUESTIONS = ("What is the capital of Italy?", "What do cats drink?", "How are you today?")


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        rows = [
            {
                "task": manner,
                "messages": [
                    {"role": "user", "content": question},
                    {"role": "assistant", "content": words.format(fact)},
                ],
            }
            for manner, words in MANNERS.items()
            for question, fact in FACTS.items()
        ]
        (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        settings = ["method=lora", "steps=20", "batch_size=4", "learning_rate=2e-3"]
        adapt_folder(
            Path("smollm2"),
            str(folder / "rows.jsonl"),
            folder / "adapters",
            [*settings, "tasks.test=0", "tasks.validation=0"],
            objective="causal-lm",
        )
        export_adapters(Path("smollm2"), [folder / "adapters"], folder / "lora", "gguf")
        answers = [answer for manner in (None, *MANNERS) for answer in compared(manner, folder)]
    RESULT.write_text(
        json.dumps(
            {
                "command": "python benchmarks/language/gguf_lora.py",
                "machine": environment(),
                "llama_cpp_python": llama_cpp.__version__,
                "answers": answers,
            },
            indent=1,
        )
        + "\n",
        encoding="utf-8",
    )
    for answer in answers:
        print(
            answer["adapter"], answer["same_tokens"], "of", answer["tokens"], answer["transformers"]
        )


def compared(manner: str | None, folder: Path) -> list[dict[str, Any]]:
    """What both engines generate with an adapter, or with none."""
    if manner is None:
        model, tokenizer = load_model("smollm2", head="causal-lm")
    else:
        model, _ = load_generator(folder / "adapters" / manner)
        _, tokenizer = load_model("smollm2", head="causal-lm")
    engine = llama_cpp.Llama(
        model_path=str(gguf_of_smollm2()),
        lora_path=None if manner is None else str(folder / "lora" / f"{manner}.gguf"),
        n_ctx=256,
        n_threads=1,
        logits_all=False,
        verbose=False,
    )
    answers = []
    for question in QUESTIONS:
        text = prompt_text(tokenizer, [{"role": "user", "content": question}], "question")
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        expected = by_transformers(model, ids)
        tokens = by_llama_cpp(engine, ids, tokenizer.eos_token_id)
        same = next(
            (i for i, (a, b) in enumerate(zip(expected, tokens, strict=False)) if a != b),
            min(len(expected), len(tokens)),
        )
        answers.append(
            {
                "adapter": manner,
                "question": question,
                "tokens": len(expected),
                "same_tokens": same,
                "transformers": tokenizer.decode(expected, skip_special_tokens=True),
                "llama_cpp": tokenizer.decode(tokens, skip_special_tokens=True),
            }
        )
    return answers


def by_transformers(model: Any, ids: list[int]) -> list[int]:
    prompt = torch.tensor([ids])
    with torch.no_grad():
        output = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=NUM_TOKENS,
            do_sample=False,
        )
    return output[0, len(ids) :].tolist()


def by_llama_cpp(engine: Any, ids: list[int], end: int) -> list[int]:
    engine.reset()
    tokens: list[int] = []
    for token in engine.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0):
        tokens.append(token)
        if token == end or len(tokens) == NUM_TOKENS:
            break
    return tokens


def gguf_of_smollm2() -> Path:
    import importlib.util

    wheel = WHEELS["smollm2"]
    spec = importlib.util.find_spec(wheel.package)
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / wheel.path


if __name__ == "__main__":
    main()
