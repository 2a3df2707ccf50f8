"""Writes src/foretune/data/land-bank-chats.jsonl.gz, the data of `foretune run chat-quickstart`.

    python benchmarks/language/packaged.py

A row is a question about one statement of land-bank.jsonl.gz and the participant's answer. Of the
participants with 24 votes to train and 10 to test, the 100 whose training votes are most often
against the majority: they disagree about the same questions, so that a model of their own matters.
"""

from __future__ import annotations

import gzip
import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

DATA = Path(__file__).parents[2] / "src" / "foretune" / "data"
ANSWERS = {"agree": "Yes, I agree with that.", "disagree": "No, I disagree with that."}
NUM_TASKS = 100
COUNTS = {"train": 24, "test": 10}


def main() -> None:
    votes: dict[str, list[dict[str, Any]]] = defaultdict(list)
    with gzip.open(DATA / "land-bank.jsonl.gz", "rt", encoding="utf-8") as lines:
        for line in lines:
            vote = json.loads(line)
            votes[vote["task"]].append(vote)
    balance: Counter[str] = Counter()  # of the training votes on a statement: agree minus disagree
    for its_votes in votes.values():
        training = [v for v in its_votes if v["split"] != "test"]
        balance.update({v["text"]: 1 if v["label"] == "agree" else -1 for v in training})
    chosen: list[tuple[float, str, dict[str, list[dict[str, Any]]]]] = []
    for task, its_votes in votes.items():
        by_split = {
            "train": [v for v in its_votes if v["split"] != "test"][: COUNTS["train"]],
            "test": [v for v in its_votes if v["split"] == "test"][: COUNTS["test"]],
        }
        if all(len(by_split[split]) == count for split, count in COUNTS.items()):
            against = [
                (v["label"] == "agree") != (balance[v["text"]] > 0) for v in by_split["train"]
            ]
            chosen.append((-sum(against) / len(against), task, by_split))
    chosen = sorted(chosen, key=lambda entry: entry[:2])[:NUM_TASKS]
    rows = [
        chat(task, split, vote)
        for _, task, by_split in sorted(chosen, key=lambda entry: entry[1])
        for split, its_votes in by_split.items()
        for vote in its_votes
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    packed = gzip.compress(text.encode(), mtime=0)
    (DATA / "land-bank-chats.jsonl.gz").write_bytes(packed)
    print(f"{len(chosen)} tasks, {len(rows)} rows, {len(packed) // 1024} kB")


def chat(task: str, split: str, vote: dict[str, Any]) -> dict[str, Any]:
    question = f"{vote['text']} Do you agree?"
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": ANSWERS[vote["label"]]},
    ]
    return {"task": task, "split": split, "messages": messages}


if __name__ == "__main__":
    main()
