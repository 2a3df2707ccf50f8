"""The five users' days: what the how-to pages print, typed from the wheel in an empty folder.

The rows and models are tiny. What would take long is cut short as a user would: by an edit of the
recipe that `init` wrote, or by settings behind the line.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny_models
from chat_templates import CHATML
from promises.pages import FENCE, ROOT
from promises.wheel import run_steps

# Recipe → what `init` wrote → what the user writes instead.
FIXED = {
    "seeds: 3 ": "seeds: 1 ",
    "learning_rates: null ": "learning_rate: 1e-2 ",
    "methods: [head, lora, basis]": "method: lora",
    "  steps: 80 ": "  steps: 8 ",
}
EDITS = {
    "tickets.yaml": {
        "name: minilm": "name: tiny",
        "learning_rates: [5e-4, 2e-3]": "learning_rate: 1e-2",
        "  steps: 1000 ": "  steps: 8 ",
        "  steps: 80 ": "  steps: 8 ",
        "seeds: 3 ": "seeds: 1 ",
    },
    "chats.yaml": {
        **FIXED,
        "name: smollm2": "name: tiny",
        "learning_rates: [5e-5, 2e-4]": "learning_rate: 1e-2",
        "  steps: 200 ": "  steps: 8 ",
    },
    "windows.yaml": {
        **FIXED,
        "learning_rates: [5e-4, 2e-3]": "learning_rate: 1e-2",
        "  steps: 1000 ": "  steps: 8 ",
    },
}
# Start of a line → what is typed behind it.
ADDED = {
    "foretune sfda prepare": "--steps 4 --epochs 1",
    "foretune sfda adapt": "steps=4",
    "foretune forecast pretrain": "steps=2 width=16 encoder_depth=1 decoder_depth=1 num_heads=2",
    "foretune forecast adapt": "steps=2 prompts=4 adapter_rank=2",
    "foretune datastore eval": "--lora-steps 2",
    "foretune generate": "--max-new-tokens 4",
}
# Page → the model of a wheel that it names → a folder in its place.
REPLACED = {"steer": {" smollm2 ": " tiny "}}
WORDS = tiny_models.WORDS


def needs(*modules: str) -> pytest.MarkDecorator:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


def edit(recipe: str) -> str:
    """Code that edits a recipe."""
    return f"""
from pathlib import Path

text = Path({recipe!r}).read_text()
for before, after in {EDITS[recipe]!r}.items():
    assert text.count(before) == 1, before
    text = text.replace(before, after)
Path({recipe!r}).write_text(text)
"""


def steps_of(page: str, folder: Path) -> Iterator[tuple[str, str]]:
    """What is typed and run, in the order of the page; scripts are written into the folder."""
    base = ""
    for language, body in FENCE.findall((ROOT / f"docs/howto/{page}.md").read_text("utf-8")):
        first = body.partition("\n")[0]
        if language == "python" and first.startswith("# "):
            (folder / first.removeprefix("# ")).write_text(body)
        elif language == "python":
            yield "code", body
        for line in body.splitlines() if not language else ():
            if line.startswith("BASE="):
                base = line.removeprefix("BASE=")
            elif not line.startswith('{"'):
                assert line.startswith(("foretune ", "python ")), line
                added = [text for start, text in ADDED.items() if line.startswith(start)]
                typed = " ".join([line.replace("$BASE", base), *added])
                for before, after in REPLACED.get(page, {}).items():
                    typed = typed.replace(before, after)
                yield typed, ""
            if line.startswith("foretune init "):
                recipe = line.split()[2]
                yield f"edit {recipe}", edit(recipe)


def day(
    page: str, folder: Path, wheel: Path, before: Sequence[tuple[str, str]] = ()
) -> Mapping[str, str]:
    """Types a page; returns what each line printed."""
    steps = [*before, *steps_of(page, folder)]
    return dict(zip([line for line, _ in steps], run_steps(steps, folder, wheel), strict=True))


def rows_of(page: str) -> list[dict[str, Any]]:
    """The rows that a page prints."""
    plain = [body for lang, body in FENCE.findall((ROOT / f"docs/howto/{page}.md").read_text()) if not lang]
    return [json.loads(line) for body in plain for line in body.splitlines() if line[:2] == '{"']


def write(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def save(model: Any, folder: Path, **fields: Any) -> None:
    """A model and its tokenizer."""
    model.save_pretrained(folder)
    tokenizer = tiny_models.tokenizer()
    for name, value in fields.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(folder)


def words(seed: int, number: int = 5) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, number))


def test_customers(wheel: Path, tmp_path: Path) -> None:
    save(tiny_models.bert(num_hidden_layers=1), tmp_path / "tiny")

    def rows(tasks: range) -> list[dict[str, Any]]:
        return [
            {"task": f"customer-{t}", "text": words(i), "label": ("urgent", "later")[(i + t) % 2]}
            for t in tasks
            for i in range(16)
        ]

    write(tmp_path / "tickets.jsonl", rows_of("customers") + rows(range(1, 21)))
    new = rows(range(21, 23))
    write(tmp_path / "new.jsonl", new)
    write(tmp_path / "unlabelled.jsonl", [{k: r[k] for k in ("task", "text")} for r in new])
    printed = day("customers", tmp_path, wheel)
    for line, text in printed.items(): print(">>>", line); print(text)


@needs("gguf")
def test_chats(wheel: Path, tmp_path: Path) -> None:
    save(
        tiny_models.llama(num_hidden_layers=2, max_position_embeddings=512),
        tmp_path / "tiny",
        chat_template=CHATML,
    )

    def chat(task: str, i: int) -> dict[str, Any]:
        reply = f"{WORDS[int(task[1:])]} " * 4
        turns = {"user": words(i), "assistant": reply.strip()}
        return {"task": task, "messages": [{"role": r, "content": c} for r, c in turns.items()]}

    write(tmp_path / "chats.jsonl", [chat(f"p{t}", i) for t in range(16) for i in range(8)])
    write(tmp_path / "new.jsonl", rows_of("chats") + [chat("p17", i) for i in range(7)])
    printed = day("chats", tmp_path, wheel)
    for line, text in printed.items(): print(">>>", line); print(text)


def test_fuse_and_prune(wheel: Path, tmp_path: Path) -> None:
    from pruning.tiny_mixtures import mixture

    save(tiny_models.bert(num_labels=3, num_hidden_layers=1), tmp_path / "base")
    save(mixture("mixtral", num_hidden_layers=1), tmp_path / "mixture")
    labelled = [
        {"task": task, "text": words(i), "label": "abc"[(i + j) % 3]}
        for j, task in enumerate(("shop", "bank"))
        for i in range(16)
    ]
    write(tmp_path / "labelled.jsonl", labelled)
    texts = [{"task": row["task"], "text": row["text"]} for row in labelled]
    write(tmp_path / "texts.jsonl", texts)
    write(tmp_path / "rows.jsonl", [{"task": "json", "text": words(i)} for i in range(20)])
    adapt = "foretune adapt base --tasks labelled.jsonl method=lora learning_rate=0.01 steps=2 --objective classification"
    printed = day("fuse-prune", tmp_path, wheel, [(adapt, "")])
    for line, text in printed.items(): print(">>>", line); print(text)


def test_sensors(wheel: Path, tmp_path: Path) -> None:
    from foretune.forecasting.scenes import save_scenes
    from foretune.tasks.task import Task, TaskCollection
    from foretune.forecasting.junctions import junctions

    rng = np.random.default_rng(0)
    for name, gain in (("old-sensor", 1.0), ("new-sensor", 0.5)):
        y = np.arange(60) % 3
        x = (gain * (rng.normal(size=(60, 3, 32)) + y[:, None, None])).astype("float32")
        split = np.where(np.arange(60) < 40, "train", "test")
        np.savez(tmp_path / f"{name}.npz", x=x, y=y, split=split)
    old, new = junctions(12, 1), junctions(12, 2)
    save_scenes(tmp_path / "old-town.npz", TaskCollection((Task("old", old[:8], old[8:]),)))
    save_scenes(tmp_path / "new-town.npz", TaskCollection((Task("new", new[:8], (), new[8:]),)))
    printed = day("sensors", tmp_path, wheel)
    for line, text in printed.items(): print(">>>", line); print(text)


def test_steer(wheel: Path, tmp_path: Path) -> None:
    save(
        tiny_models.llama(num_hidden_layers=1, hidden_size=32, max_position_embeddings=512),
        tmp_path / "tiny",
        chat_template=CHATML,
    )
    write(tmp_path / "style.jsonl", rows_of("steer") * 8)
    references = [
        {"prompt": words(i), "completion": words(i + 50), "split": "test" if i % 4 == 3 else "train"} for i in range(24)
    ]
    write(tmp_path / "references.jsonl", references)
    printed = day("steer", tmp_path, wheel)
    for line, text in printed.items(): print(">>>", line); print(text)
