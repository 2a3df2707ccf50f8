"""`foretune adapt BASE method=sara` as a user types it."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import command_line
import tiny_models
from foretune import load_sparse
from foretune.models.loading import load_base, load_module, save_base

MODEL = """\
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.out = nn.Conv2d(4, 1, 3, padding=1)

    def forward(self, noisy, t):
        return self.out(torch.tanh(self.conv(noisy)))

def build():
    torch.manual_seed(0)
    return Net()
"""
call = partial(command_line.call, "adapt")
the_error = partial(command_line.the_error, "adapt")
SARA = ("method=sara", "fields.fraction=0.2", "steps=2", "learning_rate=0.01")


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """base/ and images.npz in the current folder."""
    monkeypatch.chdir(tmp_path)
    Path("model.py").write_text(MODEL)
    model = load_module("model.py")
    save_base(model, None, "base")
    x = np.random.default_rng(0).uniform(-1, 1, (12, 1, 6, 6)).astype("f4")
    np.savez("images.npz", x=x, task=np.array(["a"] * 6 + ["b"] * 6))
    return model


def arguments(*more: str) -> list[str]:
    return ["base", "--tasks", "images.npz", "--objective", "denoising", "--out", "out", *more]


def test_one_sparse_file_per_task_comes_out(base: nn.Module) -> None:
    pytest.importorskip("diffusers")
    result = call(*arguments("--json", *SARA))
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert summary["metric"] == "negative denoising loss" and set(summary["scores"]) == {"a", "b"}
    for name in "ab":
        files = {path.name for path in Path("out", name).iterdir()}
        assert files == {"sparse_delta.safetensors", "trained_on.json", "README.md"}
        loaded = load_sparse(load_base("base")[0], Path("out", name))
        pairs = zip(loaded.parameters(), base.parameters(), strict=True)
        moved = sum(int((p != q).sum()) for p, q in pairs)
        assert 0 < moved <= summary["cost"]["trainable_parameters"] == round(0.2 * 77)
    assert json.loads(call(*arguments("--json", *SARA)).stdout)["there"] == ["a", "b"]
    assert call(*arguments("--overwrite", *SARA)).exit_code == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["fields.fractoin=0.1"], 'sara has no field "fractoin".*Did you mean "fraction"'),
        (["fields.fraction=2"], "fraction must be a number above 0 and at most 1, or None; got 2"),
        (["fields.threshold=1e-9"], "raise threshold, or set fraction"),
        (["fields=3"], "fields"),
    ],
)
def test_bad_settings_are_one_line_and_leave_nothing(
    base: nn.Module, settings: list[str], message: str
) -> None:
    pytest.importorskip("diffusers")
    import re

    assert re.search(message, the_error(*arguments("method=sara", *settings)))
    assert not list(Path().glob("out/**/*.safetensors"))


def test_a_text_model_is_adapted_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = tiny_models.bert(num_labels=2, num_hidden_layers=1)
    model.save_pretrained("base")
    tiny_models.tokenizer().save_pretrained("base")
    rows = [{"task": "t", "text": f"the {w}", "label": w} for w in ("red", "blue", "cat")] * 4
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = call(
        *("base", "--tasks", "rows.jsonl", "--objective", "classification", "--out", "out"),
        *("method=sara", "fields.threshold=0.01", "steps=2"),
    )
    assert result.exit_code == 0, result.output
    loaded = load_sparse(load_base("base")[0], "out/t")
    assert loaded.classifier.weight.shape == (3, 16)
    assert not torch.equal(loaded.classifier.weight[:2], model.classifier.weight)
