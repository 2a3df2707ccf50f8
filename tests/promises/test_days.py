"""The five users' days: what the how-to pages print, typed from the wheel in an empty folder.

The rows and models are tiny. What would take long is cut short as a user would: by an edit of the
recipe that `init` wrote, or by settings behind the line.
"""

from __future__ import annotations

import csv
import importlib.util
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
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
        "learning_rates: null ": "learning_rates: [1e-2] ",
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


@dataclass(frozen=True)
class Day:
    """A page, and the folder that it is typed in."""

    page: str
    folder: Path
    wheel: Path

    def blocks(self) -> list[tuple[str, str]]:
        """(language, text) of the page's code blocks."""
        return FENCE.findall((ROOT / f"docs/howto/{self.page}.md").read_text("utf-8"))

    def printed_rows(self) -> list[dict[str, Any]]:
        """The rows that the page shows."""
        lines = [
            line for language, body in self.blocks() if not language for line in body.splitlines()
        ]
        return [json.loads(line) for line in lines if line.startswith('{"')]

    def steps(self) -> Iterator[tuple[str, str]]:
        """What is typed and run, in the order of the page; scripts are written into the folder."""
        base = ""
        for language, body in self.blocks():
            first = body.partition("\n")[0]
            if language == "python" and first.startswith("# "):
                (self.folder / first.removeprefix("# ")).write_text(body)
            elif language == "python":
                yield "code", body
            for line in body.splitlines() if not language else ():
                if line.startswith("BASE="):
                    base = line.removeprefix("BASE=")
                elif not line.startswith('{"'):
                    assert line.startswith(("foretune ", "python ")), line
                    typed = line.replace("$BASE", base)
                    for before, after in REPLACED.get(self.page, {}).items():
                        typed = typed.replace(before, after)
                    added = [text for start, text in ADDED.items() if line.startswith(start)]
                    yield " ".join([typed, *added]), ""
                if line.startswith("foretune init "):
                    recipe = line.split()[2]
                    yield f"edit {recipe}", edit(recipe)

    def run(self, before: str = "", after: str = "") -> list[tuple[str, str]]:
        """(what was typed, what it printed) of the page.

        Args:
            before: A command typed before.
            after: Code run afterwards, with the variables of the page's code.
        """
        steps = [(before, "")] if before else []
        steps += [*self.steps(), *([("after", after)] if after else [])]
        texts = run_steps(steps, self.folder, self.wheel)
        return list(zip([line for line, _ in steps], texts, strict=True))

    def write(self, file: str, rows: Sequence[Mapping[str, Any]]) -> None:
        (self.folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows))

    def save(self, model: Any, folder: str, **fields: Any) -> None:
        """Writes a model and its tokenizer."""
        model.save_pretrained(self.folder / folder)
        tokenizer = tiny_models.tokenizer()
        for name, value in fields.items():
            setattr(tokenizer, name, value)
        tokenizer.save_pretrained(self.folder / folder)

    def check_run(self, recipe: str, text: str) -> None:
        """The verdict is printed, with the command of the base that it takes; so is the report."""
        out = f"runs/{recipe}"
        comparison = json.loads((self.folder / out / "comparison.json").read_text("utf-8"))
        assert comparison["verdict"]["sentence"] in text
        assert f"\nReport: {out}/report.html\n" in text
        assert (self.folder / out / "report.html").is_file()
        [command] = [line for line in text.splitlines() if line.startswith("To adapt to new tasks")]
        base = command.split()[command.split().index("adapt", 5) + 1]
        assert (self.folder / base).is_dir() and base.startswith(f"{out}/bases/")


def the(printed: Sequence[tuple[str, str]], start: str) -> str:
    """What the one line printed that starts so."""
    [text] = [text for line, text in printed if line.startswith(f"foretune {start}")]
    return text


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


def words(seed: int, number: int = 5) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, number))


@pytest.mark.slow
def test_customers(wheel: Path, tmp_path: Path) -> None:
    day = Day("customers", tmp_path, wheel)
    day.save(tiny_models.bert(num_hidden_layers=1), "tiny")

    def rows(tasks: range) -> list[dict[str, Any]]:
        return [
            {"task": f"customer-{t}", "text": words(i), "label": ("urgent", "later")[(i + t) % 2]}
            for t in tasks
            for i in range(16)
        ]

    day.write("tickets.jsonl", day.printed_rows() + rows(range(1, 13)))
    new = rows(range(21, 23))
    day.write("new.jsonl", new)
    day.write("unlabelled.jsonl", [{k: row[k] for k in ("task", "text")} for row in new])
    printed = day.run()
    assert "Advice: " in the(printed, "plan")
    day.check_run("tickets", the(printed, "run"))
    assert "2 adapters, none at fault." in the(printed, "check")
    with (tmp_path / "predicted.csv").open() as file:
        predicted = list(csv.DictReader(file))
    assert [row["task"] for row in predicted] == [row["task"] for row in new]
    assert {row["prediction"] for row in predicted} <= {"urgent", "later"}
    header, *listed = the(printed, "ls").partition("\n\n")[0].splitlines()
    assert "score" in header.split()
    assert [line.split()[0] for line in listed] == ["customer-21", "customer-22"]


@pytest.mark.slow
@needs("gguf")
def test_chats(wheel: Path, tmp_path: Path) -> None:
    day = Day("chats", tmp_path, wheel)
    model = tiny_models.llama(num_hidden_layers=2, max_position_embeddings=512)
    day.save(model, "tiny", chat_template=CHATML)

    def chat(task: int, i: int) -> dict[str, Any]:
        turns = {"user": words(i), "assistant": " ".join([WORDS[task]] * 4)}
        messages = [{"role": role, "content": text} for role, text in turns.items()]
        return {"task": f"p{task}", "messages": messages}

    day.write("chats.jsonl", [chat(task, i) for task in range(16) for i in range(8)])
    day.write("new.jsonl", day.printed_rows() + [chat(17, i) for i in range(7)])
    printed = day.run()
    assert "trainable parameters and time" in the(printed, "plan")
    text = the(printed, "run")
    day.check_run("chats", text)
    assert "log-likelihood" in text
    assert (
        text.count(" was asked ") == text.count("tiny says ") == text.count("the adapter of") == 3
    )
    assert "1 adapter, none at fault." in the(printed, "check")
    assert (tmp_path / "lora" / "p17.gguf").is_file()


@pytest.mark.slow
def test_fuse_and_prune(wheel: Path, tmp_path: Path) -> None:
    from pruning.tiny_mixtures import mixture

    day = Day("fuse-prune", tmp_path, wheel)
    day.save(tiny_models.bert(num_labels=3, num_hidden_layers=1), "base")
    day.save(mixture("mixtral", num_hidden_layers=1), "mixture")
    labelled = [
        {"task": task, "text": words(i), "label": "abc"[(i + j) % 3]}
        for j, task in enumerate(("shop", "bank"))
        for i in range(16)
    ]
    day.write("labelled.jsonl", labelled)
    texts = [{k: row[k] for k in ("task", "text")} for row in labelled]
    day.write("texts.jsonl", day.printed_rows() + texts)
    day.write("rows.jsonl", [{"task": "json", "text": words(i)} for i in range(20)])
    settings = "--objective classification method=lora learning_rate=0.01 steps=2"
    after = """
assert logits.shape == (1, 3)
for name in ("best", "averaged", "fused", "routed"):
    fused = foretune.load_fused(name)
    for task in ("shop", "bank"):
        assert fused.set_task(task).model(**inputs).logits.shape == (1, 3), name
from transformers import AutoModelForCausalLM

assert AutoModelForCausalLM.from_pretrained("small")(inputs["input_ids"]).logits.shape[0] == 1
"""
    printed = day.run(f"foretune adapt base --tasks labelled.jsonl {settings}", after)
    auto = the(printed, "fuse auto")
    assert "Measured on held-out rows (8 of shop, 8 of bank), which made no gate:" in auto
    assert "\neach task's own model " in auto and "\nBest: " in auto
    for method in ("average", "smile base shop=adapters/shop bank=adapters/bank --out"):
        assert "parameters more than the base, " in the(printed, f"fuse {method}")
    smile = [text for line, text in printed if line.startswith("foretune fuse smile")]
    assert all("layers have experts, which keep " in text for text in smile)
    compared = the(printed, "prune uncurl")
    assert {line.split()[0] for line in compared.splitlines()} >= {"uncurl", "frequency", "reap"}
    assert "held-out loss" in compared and "Nothing saved: no --out." in compared
    assert "Model: small (plain folder, loads in transformers)" in the(printed, "prune frequency")


@pytest.mark.slow
def test_sensors(wheel: Path, tmp_path: Path) -> None:
    from foretune.forecasting.junctions import junctions
    from foretune.forecasting.scenes import save_scenes
    from foretune.tasks.task import Task, TaskCollection

    day = Day("sensors", tmp_path, wheel)
    y = np.arange(60) % 3
    for file, gain in (("old-sensor", 1.0), ("new-sensor", 0.5)):
        x = np.random.default_rng(0).normal(size=(60, 3, 32)) + y[:, None, None]
        split = np.where(np.arange(60) < 40, "train", "test")
        np.savez(tmp_path / file, x=(gain * x).astype("float32"), y=y, split=split)
    for file, seed in (("old-town", 1), ("new-town", 2)):
        scenes = junctions(12, seed)
        town = Task(file, scenes[:8], (), scenes[8:])
        save_scenes(tmp_path / f"{file}.npz", TaskCollection((town,)))
    printed = day.run()
    plan = the(printed, "plan")
    assert "its own rows alone" in plan and "all tasks pooled" in plan
    day.check_run("windows", the(printed, "run"))
    assert "1 adapter, none at fault." in the(printed, "check")
    assert len((tmp_path / "predicted.jsonl").read_text().splitlines()) == 60
    assert "macro-F1" in the(printed, "sfda eval") and (tmp_path / "shift.html").is_file()
    assert "constant velocity" in the(printed, "forecast eval")
    assert (tmp_path / "page.html").is_file()


@pytest.mark.slow
def test_steer(wheel: Path, tmp_path: Path) -> None:
    day = Day("steer", tmp_path, wheel)
    sizes = {"num_hidden_layers": 1, "hidden_size": 32, "max_position_embeddings": 512}
    day.save(tiny_models.llama(**sizes), "tiny", chat_template=CHATML)
    day.write("style.jsonl", day.printed_rows() * 8)
    references = [
        {"prompt": words(i), "completion": words(i + 50), "split": ("train", "test")[i % 4 == 3]}
        for i in range(24)
    ]
    day.write("references.jsonl", references)
    printed = day.run()
    [sweep] = [text for line, text in printed if "--beta-sweep" in line]
    header, *lines = sweep.splitlines()
    assert header.split() == ["model", "beta", "reward", "KL", "first", "text"]
    assert [line.split("  ")[0] for line in lines] == [
        *("model alone", "EFT", "EFT", "EFT", "small tuned alone")
    ]
    assert (tmp_path / "frontier.svg").is_file()
    scores = the(printed, "datastore eval").splitlines()
    assert scores[0].split()[:2] == ["method", "perplexity"]
    assert [line.split("  ")[0] for line in scores[1:-2]] == [
        *("zero-shot", "token counts", "texts in the prompt", "LoRA", "RTD")
    ]
    [result] = json.loads(printed[-1][1])["results"]
    rows = [near["row"] for token in result["tokens"] for near in token["neighbours"]]
    assert rows and set(rows) <= set(range(len(references)))
