"""EFT and RTD on SmolLM2: the figures against their definitions, and who sees which rows."""

from __future__ import annotations

import gzip
import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
RNG = np.random.default_rng(0)


@pytest.fixture
def claims(monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleType, ModuleType]:
    """(eft_smollm2, rtd_smollm2)."""
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    for name in [name for name in sys.modules if name.split(".")[0] in ("claims", "language")]:
        monkeypatch.delitem(sys.modules, name)
    names = ("claims.eft_smollm2", "claims.rtd_smollm2")
    return importlib.import_module(names[0]), importlib.import_module(names[1])


def write(file: Path, rows: list[dict[str, object]]) -> Path:
    with gzip.open(file, "wt", encoding="utf-8") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in rows)
    return file


def test_figures_are_those_of_their_definitions(claims: tuple[ModuleType, ModuleType]) -> None:
    names, counts, size = ("large", "small", "small tuned", "large tuned"), (3, 1, 20, 4), 7
    said = [RNG.integers(size, size=n) for n in counts for _ in range(6)]  # 24 rows, two chunks
    logits = {name: [2 * RNG.normal(size=(len(ids), size)) for ids in said] for name in names}
    parts = {
        name: [
            (torch.from_numpy(x).float(), torch.from_numpy(ids))
            for x, ids in zip(rows, said, strict=True)
        ]
        for name, rows in logits.items()
    }
    found = claims[0].figures(parts)

    def law(scores: np.ndarray) -> np.ndarray:
        return scores - np.log(np.exp(scores).sum(-1, keepdims=True))

    flat = {name: law(np.concatenate(rows)) for name, rows in logits.items()}
    delta = flat["small tuned"] - flat["small"]
    for name, log_p in {
        "EFT, beta 1.5": law(flat["large"] + 1.5 * delta),
        "small tuned alone": flat["small tuned"],
        "large truly tuned": flat["large tuned"],
    }.items():
        p = np.exp(log_p)
        assert found[name] == pytest.approx(
            {
                "nats": -log_p[np.arange(len(p)), np.concatenate(said)].mean(),
                "kl": (p * (log_p - flat["large"])).sum(-1).mean(),
                "reward": (p * delta).sum(-1).mean(),
            },
            rel=1e-4,
        )
    assert found["EFT, beta 0"] == pytest.approx(found["large base"], abs=1e-5)


def test_no_persona_is_tuned_on_and_tested(
    claims: tuple[ModuleType, ModuleType], tmp_path: Path
) -> None:
    rows = [
        {
            "task": f"p{persona}",
            "split": "test" if i % 3 == 0 else "train",
            "context": [f"remark {i} to p{persona}"],
            "response": f"p{persona} says {i}",
        }
        for persona in range(8)
        for i in range(9)
    ]
    parts = claims[0].split(write(tmp_path / "rows.jsonl.gz", rows))
    who = {
        use: {row["messages"][-1]["content"].split()[0] for row in part}
        for use, part in parts.items()
    }
    assert [len(who[use]) for use in ("distil", "tune", "validation", "test")] == [4, 2, 2, 2]
    assert who["validation"] == who["tune"]
    assert not who["distil"] & who["tune"]
    assert not who["test"] & (who["distil"] | who["tune"])
    texts = [{str(row) for row in parts[use]} for use in ("tune", "validation")]
    assert not texts[0] & texts[1]


def test_references_are_as_many_of_each_intent(
    claims: tuple[ModuleType, ModuleType], tmp_path: Path
) -> None:
    rows = [
        {"task": task, "split": split, "text": f"{split} {i}", "label": f"{task} {i % 2}"}
        for task in ("banking", "travel")
        for split, count in (("train", 40), ("test", 30))
        for i in range(count)
    ]
    file = str(write(tmp_path / "rows.jsonl.gz", rows))
    train, test = claims[1].drawn(file, "banking", 0)
    labels = [row["label"] for row in train]
    assert {label: labels.count(label) for label in labels} == {
        "bank banking 0": 10,
        "bank banking 1": 10,
    }
    assert {row["split"] for row in train} == {"train"}
    assert len(test) == 30
    assert {(row["task"], row["split"]) for row in test} == {("banking", "test")}
    assert [row["text"] for row in train] != [
        row["text"] for row in claims[1].drawn(file, "banking", 1)[0]
    ]
