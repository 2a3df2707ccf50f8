"""Rows for a small chat model, from public files.

    python benchmarks/language/data.py SHARED_FOLDER OUT_FOLDER

    written            from SHARED_FOLDER            a task is      a row is
    opinions.jsonl     opinions/land-bank.jsonl.gz   a participant  a vote on a statement
    preferences.jsonl  opinions/land-bank.jsonl.gz   a participant  two statements: they agree with
                                                                    the first and not the second
    chats.jsonl        convai2/valid.jsonl.gz        a persona      a conversation so far, and what
                                                                    the persona says next
    general.jsonl      nowhere: Python brings it     nothing        the beginning of a help topic

Sources:
    Land bank: Polis, gathered by The Computational Democracy Project, CC BY 4.0.
    ConvAI2: Dinan et al., arXiv:1902.00098. Of each persona the first 24 rows for training and 12
        for testing, so that the three runs cost about the same.
"""

from __future__ import annotations

import gzip
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np

SEED = 0
MOST_PAIRS = {"train": 48, "validation": 12, "test": 24}  # per participant
MOST_CHATS = {"train": 24, "test": 12}  # rows per persona
QUESTION = "What should the Land Bank of our islands do?"

Row = dict[str, Any]


def rows_of(file: Path) -> list[Row]:
    """The rows of a compressed file."""
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def opinions(votes: list[Row]) -> Iterator[Row]:
    """Would this participant agree? The answer is the likelier of two words."""
    for vote in votes:
        yield {
            "task": vote["task"],
            "split": vote["split"],
            "context": [f"{QUESTION} {vote['text']} Do you agree or disagree?"],
            "candidates": ["I agree.", "I disagree."],
            "answer": int(vote["label"] == "disagree"),
        }


def preferences(votes: list[Row]) -> Iterator[Row]:
    """Pairs of two statements of one split, of which the participant agrees with the first."""
    by_side: dict[tuple[str, str], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for vote in votes:
        by_side[vote["task"], vote["split"]][vote["label"]].append(vote["text"])
    rng = np.random.default_rng(SEED)
    for (task, split), sides in by_side.items():
        pairs = [(a, b) for a in sides["agree"] for b in sides["disagree"]]
        drawn = rng.permutation(len(pairs))[: MOST_PAIRS[split]]
        for chosen, rejected in (pairs[i] for i in sorted(drawn)):
            yield {
                "task": task, "split": split, "prompt": QUESTION,
                "chosen": chosen, "rejected": rejected,
            }  # fmt: skip


def chats(turns: list[Row]) -> Iterator[Row]:
    """The last four turns of a conversation as messages; the persona is the assistant."""
    counts: dict[tuple[str, str], int] = defaultdict(int)
    for row in turns:
        split = "test" if row["split"] == "test" else "train"
        counts[row["task"], split] += 1
        if counts[row["task"], split] > MOST_CHATS[split]:
            continue
        texts = [*row["context"][-3:], row["response"]]
        roles = ["user", "assistant", "user", "assistant"][-len(texts) :]
        if roles[0] == "assistant":
            texts, roles = texts[1:], roles[1:]
        messages = [{"role": r, "content": t} for r, t in zip(roles, texts, strict=True)]
        yield {"task": row["task"], "split": split, "messages": messages}


def general() -> Iterator[Row]:
    """Texts that every machine has: the help topics of the Python that runs this."""
    for _, text in sorted(topics.items()):
        words = " ".join(text.split())
        if len(words) >= 400:
            yield {"text": words[:400]}


def main() -> None:
    shared, out = map(Path, sys.argv[1:])
    out.mkdir(parents=True, exist_ok=True)
    votes = rows_of(shared / "opinions" / "land-bank.jsonl.gz")
    collections = {
        "opinions": opinions(votes),
        "preferences": preferences(votes),
        "general": general(),
        "chats": chats(rows_of(shared / "convai2" / "valid.jsonl.gz")),
    }
    for name, rows in collections.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (out / f"{name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
