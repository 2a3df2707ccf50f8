"""Exported adapters are what PEFT makes of the folders."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import tiny_models
from command_line import call, the_error
from foretune.models.loading import save_base

gguf = pytest.importorskip("gguf")
TOKENIZER = tiny_models.tokenizer(special=False)
IDS = torch.tensor([[5, 6, 7, 8, 9]])


def adapted(model: Any, tmp_path: Path, *settings: str) -> tuple[Path, Path]:
    """A base, and the folder of two adapters on it."""
    save_base(model, TOKENIZER, tmp_path / "base")
    rows = [
        {"task": task, "text": f"the {word} cat {task}"}
        for task in ("one", "two")
        for word in ("a", "red", "blue", "sat")
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = (
        "--tasks",
        tmp_path / "rows.jsonl",
        "--objective",
        "causal-lm",
        "method=lora",
        "steps=4",
    )
    out = ("--out", tmp_path / "adapters", "learning_rate=0.05", *settings)
    shown = call("adapt", tmp_path / "base", *words, *out)
    assert shown.exit_code == 0, shown.output
    return tmp_path / "base", tmp_path / "adapters"


def by_peft(base: Path, adapter: Path) -> Any:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)


def test_a_merged_model_gives_the_logits_of_its_adapter(tmp_path: Path) -> None:
    base, adapters = adapted(tiny_models.llama(seed=1), tmp_path)
    shown = call("export", base, adapters / "one", "--out", tmp_path / "merged")
    assert shown.exit_code == 0, shown.output
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        expected = by_peft(base, adapters / "one")(input_ids=IDS).logits
        torch.testing.assert_close(merged(input_ids=IDS).logits, expected)
    assert (tmp_path / "merged" / "tokenizer.json").is_file()
    assert "one adapter at a time is merged, got 2" in the_error(
        "export", base, adapters, "--out", tmp_path / "both"
    )
    assert "was trained on another base" in the_error(
        "export", tmp_path / "merged", adapters / "one", "--out", tmp_path / "again"
    )
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("settings", [(), ("lora={r: 4, lora_alpha: 6, use_rslora: true}",)])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_gguf_files_hold_the_adapters_change(
    kind: str, settings: tuple[str, ...], tmp_path: Path
) -> None:
    model = getattr(tiny_models, kind)(seed=1)
    base, adapters = adapted(model, tmp_path, *settings)
    out = tmp_path / "files"
    shown = call("export", base, adapters, "--format", "gguf", "--out", out)
    assert shown.exit_code == 0, shown.output
    for task in ("one", "two"):
        reader = gguf.GGUFReader(out / f"{task}.gguf")
        fields = {name: field.contents() for name, field in reader.fields.items()}
        assert (fields["general.type"], fields["adapter.type"]) == ("adapter", "lora")
        assert fields["general.architecture"] == kind
        tensors = {t.name: np.array(t.data) for t in reader.tensors}
        peft = by_peft(base, adapters / task)
        plain = dict(AutoModelForCausalLM.from_pretrained(base).named_parameters())
        merged = dict(peft.merge_and_unload().named_parameters())
        for layer in range(model.config.num_hidden_layers):
            for theirs, ours in {"attn_q": "self_attn.q_proj", "ffn_down": "mlp.down_proj"}.items():
                a, b = (tensors[f"blk.{layer}.{theirs}.weight.lora_{f}"] for f in "ab")
                change = fields["adapter.lora.alpha"] / len(a) * (b @ a)
                name = f"model.layers.{layer}.{ours}.weight"
                expected = (merged[name] - plain[name]).detach()
                assert expected.abs().max() > 1e-4
                if kind == "llama" and theirs == "attn_q":  # the halves of a head alternate
                    heads = model.config.num_attention_heads
                    halves = expected.unflatten(0, (heads, 2, -1)).transpose(1, 2)
                    expected = halves.reshape(expected.shape)
                np.testing.assert_allclose(change, expected, atol=1e-5)


def test_adapters_of_one_name_are_not_written_over_one_another(tmp_path: Path) -> None:
    base, adapters = adapted(tiny_models.llama(seed=1), tmp_path)
    (tmp_path / "others").mkdir()
    shutil.copytree(adapters / "one", tmp_path / "others" / "one")
    folders = (adapters / "one", tmp_path / "others" / "one")
    message = the_error("export", base, *folders, "--format", "gguf", "--out", tmp_path / "files")
    assert "have the same name, and so would their files" in message
    shown = call("check", base, adapters / "one", tmp_path / "adapters" / ".." / "adapters" / "one")
    assert shown.exit_code == 0 and "1 adapter, none" in shown.stdout  # one folder, named twice


def test_a_merged_classifier_names_the_labels_of_its_task(tmp_path: Path) -> None:
    model = tiny_models.llama(num_labels=2, seed=1)
    model.config.pad_token_id, model.config.id2label = 0, {0: "x", 1: "y"}
    save_base(model, TOKENIZER, tmp_path / "base")
    rows = [{"task": "t", "text": w, "label": w} for w in ("red", "blue", "the")] * 2
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ("--tasks", tmp_path / "rows.jsonl", "--objective", "classification", "method=lora")
    more = ("--out", tmp_path / "adapters", "steps=2", "tasks.test=0", "tasks.validation=0")
    assert call("adapt", tmp_path / "base", *words, *more).exit_code == 0
    assert call("check", tmp_path / "base", tmp_path / "adapters").exit_code == 0
    shown = call("export", tmp_path / "base", tmp_path / "adapters", "--out", tmp_path / "merged")
    assert shown.exit_code == 0, shown.output
    names = json.loads((tmp_path / "merged" / "config.json").read_text())["id2label"]
    labels = json.loads((tmp_path / "adapters" / "t" / "labels.json").read_text())
    assert [names[str(i)] for i in range(3)] == labels


def test_what_gguf_cannot_hold_is_named(tmp_path: Path) -> None:
    base, adapters = adapted(tiny_models.gpt2(seed=1), tmp_path)
    message = the_error("export", base, adapters, "--format", "gguf", "--out", tmp_path / "files")
    assert "adapters of gpt2 are not written as GGUF; of llama, mistral, qwen2, qwen3" in message
    assert not (tmp_path / "files").exists()


@pytest.mark.skipif(find_spec("onnxscript") is None, reason="needs the onnx extra")
class TestOnnx:
    """Encoders and classifiers for runtimes without torch."""

    def outputs(self, file: Path, **inputs: torch.Tensor) -> torch.Tensor:
        """What onnxruntime computes."""
        import onnxruntime

        session = onnxruntime.InferenceSession(str(file))
        arrays = {name: value.numpy() for name, value in inputs.items()}
        return torch.from_numpy(session.run(None, arrays)[0])

    @pytest.mark.parametrize("build", [tiny_models.bert, tiny_models.roberta, tiny_models.llama])
    def test_a_classifier_gives_the_logits_of_each_adapter(
        self, build: Any, tmp_path: Path
    ) -> None:
        model = build(num_labels=2, num_hidden_layers=2, seed=1).float()
        model.config.pad_token_id = 0
        save_base(model, TOKENIZER, tmp_path / "base")
        rows = [
            {"task": task, "text": f"the {word} cat", "label": label}
            for task, labels in (("one", "xy"), ("two", "yx"))
            for word, label in zip(("red", "blue"), labels, strict=True)
        ]
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        adapt = ("adapt", tmp_path / "base", "--tasks", tmp_path / "rows.jsonl", "method=lora")
        adapters = tmp_path / "adapters"
        words = ("--objective", "classification", "steps=3", "learning_rate=0.05")
        shown = call(*adapt, *words, "--out", adapters)
        assert shown.exit_code == 0, shown.output
        out = tmp_path / "onnx"
        shown = call("export", tmp_path / "base", adapters, "--format", "onnx", "--out", out)
        assert shown.exit_code == 0, shown.output
        mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
        inputs = {"input_ids": IDS.repeat(2, 1) * mask, "attention_mask": mask}
        for task in ("one", "two"):
            base = type(model).from_pretrained(tmp_path / "base")
            stock = PeftModel.from_pretrained(base, adapters / task).eval()
            with torch.no_grad():
                expected = stock(**inputs).logits
            logits = self.outputs(out / task / "model.onnx", **inputs)
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
            names = {path.name for path in (out / task).iterdir()}
            assert {"model.onnx", "config.json", "labels.json", "tokenizer.json"} <= names

    @pytest.mark.parametrize("build", [tiny_models.bert, tiny_models.vit])
    def test_a_base_alone(self, build: Any, tmp_path: Path) -> None:
        model = build(num_hidden_layers=2, seed=1).float().eval()
        save_base(
            model, TOKENIZER if model.main_input_name == "input_ids" else None, tmp_path / "b"
        )
        shown = call("export", tmp_path / "b", "--format", "onnx", "--out", tmp_path / "out")
        assert shown.exit_code == 0, shown.output
        if model.main_input_name == "input_ids":
            inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
            expected = model(**inputs).last_hidden_state
        else:
            inputs = {"pixel_values": torch.randn(4, 3, 8, 8)}
            expected = model(**inputs).logits
        output = self.outputs(tmp_path / "out" / "model.onnx", **inputs)
        torch.testing.assert_close(output, expected.detach(), atol=1e-4, rtol=1e-4)

    def test_pairs_of_texts_keep_their_segments(self, tmp_path: Path) -> None:
        from foretune.models.onnx_file import write_onnx

        sizes = {"num_hidden_layers": 2, "type_vocab_size": 2}
        model = tiny_models.bert(num_labels=2, initializer_range=0.5, **sizes).float()
        tokenizer = tiny_models.tokenizer()
        tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
        write_onnx(model.eval(), tmp_path, tokenizer)
        inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
        segments = torch.tensor([[0, 0, 1, 1, 1]])
        with torch.no_grad():
            expected = model(**inputs, token_type_ids=segments).logits
            assert not torch.allclose(model(**inputs).logits, expected, atol=1e-3)
        output = self.outputs(tmp_path / "model.onnx", **inputs, token_type_ids=segments)
        torch.testing.assert_close(output, expected, atol=1e-4, rtol=1e-4)

    def test_a_file_that_computes_something_else_is_not_left(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("foretune.models.onnx_file._difference", lambda *_: 0.5)
        save_base(tiny_models.bert(num_hidden_layers=2).float(), TOKENIZER, tmp_path / "base")
        out = tmp_path / "out"
        line = the_error("export", tmp_path / "base", "--format", "onnx", "--out", out)
        assert "the file computes other outputs (by 0.5" in line
        assert not out.exists()

    def test_mistakes(self, tmp_path: Path) -> None:
        save_base(tiny_models.llama().float(), TOKENIZER, tmp_path / "base")
        out = ("--out", tmp_path / "out")
        onnx = ("--format", "onnx")
        assert "generates text" in the_error("export", tmp_path / "base", *onnx, *out)
        assert "needs an adapter" in the_error("export", tmp_path / "base", *out)
