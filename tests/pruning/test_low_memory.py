"""`foretune prune --low-memory`: the same folder, and never the whole checkpoint in memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import tiny_models
from command_line import call
from pruning import tiny_mixtures


def prune(line: str, code: int = 0) -> Any:
    result = call("prune", *line.split())
    assert result.exit_code == code, result.output
    return result


def mixture_in(folder: str, family: str, max_shard_size: str = "20KB", **changes: Any) -> None:
    model = tiny_mixtures.mixture(family, **changes)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    tiny_models.tokenizer().save_pretrained(folder)
    rows = [json.dumps(row) for row in tiny_mixtures.rows(count=20)]
    Path("task.jsonl").write_text("\n".join(rows))


@pytest.mark.parametrize("family", tiny_mixtures.FAMILIES)
def test_the_folder_is_the_one_that_is_made_in_memory(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    mixture_in("mix", family)
    results = []
    for out in ("whole", "mapped --low-memory"):
        line = f"uncurl mix experts=4 --rows task.jsonl --json --out {out}"
        results.append(json.loads(prune(line).stdout))
    losses = [[entry["loss"] for entry in result["scored"]] for result in results]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    auto = transformers.AutoModelForCausalLM
    whole, mapped = (auto.from_pretrained(f).state_dict() for f in ("whole", "mapped"))
    assert list(whole) == list(mapped)
    for name, tensor in whole.items():
        torch.testing.assert_close(mapped[name], tensor)
    files = {path.name for path in Path("mapped").iterdir()}
    assert {"experts.json", "tokenizer.json", "config.json"} <= files
    assert not [path for path in Path("mapped").iterdir() if path.is_dir()]
    assert not list(tmp_path.glob(".unfinished*"))


PEAK = """
import sys, threading, time
import torch, transformers, foretune
from foretune.pruning.folders import prune_folder

def held():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024

def watch():
    while True:
        peak[0] = max(peak[0], held())
        time.sleep(0.002)

torch.set_num_threads(1)
low_memory = sys.argv[1] == "low"
prune_folder(foretune.UNCURL(), "tiny", "task.jsonl", "warm" + sys.argv[1], low_memory=low_memory)
before = held()
peak = [before]
threading.Thread(target=watch, daemon=True).start()
prune_folder(foretune.UNCURL(), "mix", "task.jsonl", sys.argv[1], low_memory=low_memory)
print(peak[0] - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_the_whole_checkpoint_is_never_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory that is not a mapped file, of 16 blocks of 6 MiB."""
    monkeypatch.chdir(tmp_path)
    mixture_in("tiny", "mixtral")
    sizes = {"hidden_size": 128, "intermediate_size": 512, "head_dim": 32}
    mixture_in("mix", "mixtral", **sizes, num_hidden_layers=16, max_shard_size="20MB")
    checkpoint = sum(path.stat().st_size for path in Path("mix").glob("*.safetensors")) / 2**20
    peaks = {}
    for way in ("low", "all"):
        command = [sys.executable, "-c", PEAK, way]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        env["MALLOC_MMAP_THRESHOLD_"] = "262144"  # glibc keeps freed blocks of some MiB otherwise
        done = subprocess.run(command, check=True, env=env, capture_output=True, text=True)
        peaks[way] = float(done.stdout.split()[-1])
    print(
        f"checkpoint {checkpoint:.0f} MiB, in memory {peaks['all']:.0f}, mapped {peaks['low']:.0f}"
    )
    assert peaks["low"] < 0.4 * checkpoint < checkpoint < peaks["all"]
