"""Writes src/foretune/data/land-bank-chats.jsonl.gz, the data of `foretune run chat-quickstart`.

    python benchmarks/language/packaged.py

A row is a question about one statement of land-bank.jsonl.gz and the participant's answer. Of the
participants with at least 34 votes, 12 or more of the rarer kind, the first 100; of each 24 votes
are for training and 10 for testing.
"""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

DATA = Path(__file__).parents[2] / "src" / "foretune" / "data"
ANSWERS = {"agree": "Yes, I agree with that.", "disagree": "No, I disagree with that."}
NUM_TASKS, LEAST_OF_A_KIND = 100, 12
COUNTS = {"train": 24, "test": 10}


def main() -> None:
    votes: dict[str, list[dict[str, Any]]] = defaultdict(list)
    with gzip.open(DATA / "land-bank.jsonl.gz", "rt", encoding="utf-8") as lines:
        for line in lines:
            vote = json.loads(line)
            votes[vote["task"]].append(vote)
    rows: list[dict[str, Any]] = []
    num_tasks = 0
    for task in sorted(votes):
        by_split = {
            "train": [v for v in votes[task] if v["split"] != "test"][: COUNTS["train"]],
            "test": [v for v in votes[task] if v["split"] == "test"][: COUNTS["test"]],
        }
        labels = [vote["label"] for vote in votes[task]]
        is_complete = all(len(by_split[split]) == count for split, count in COUNTS.items())
        if min(map(labels.count, ANSWERS)) < LEAST_OF_A_KIND or not is_complete:
            continue
        num_tasks += 1
        for split, its_votes in by_split.items():
            rows += [chat(task, split, vote) for vote in its_votes]
        if num_tasks == NUM_TASKS:
            break
    text = "".join(json.dumps(row) + "\n" for row in rows)
    packed = gzip.compress(text.encode(), mtime=0)
    (DATA / "land-bank-chats.jsonl.gz").write_bytes(packed)
    print(f"{num_tasks} tasks, {len(rows)} rows, {len(packed) // 1024} kB")


def chat(task: str, split: str, vote: dict[str, Any]) -> dict[str, Any]:
    question = f"{vote['text']} Do you agree?"
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": ANSWERS[vote["label"]]},
    ]
    return {"task": task, "split": split, "messages": messages}


if __name__ == "__main__":
    main()
