"""The trained stories260K model, from llama2.c's binary files to a folder that transformers loads.

    python benchmarks/claims/stories260k.py SHARED_FOLDER/stories260k OUT_FOLDER

    stories260K.bin   7 int32: dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len;
                      then float32 weights, each kind for all layers (`_weights`); the head is the
                      embedding where vocab_size is above 0
    tok512.bin        int32: longest token; then for each token float32 score, int32 length, bytes

llama2.c rotates neighbouring pairs of a head's dimensions (2i, 2i + 1), transformers rotates
(i, i + head_dim / 2): the rows of W_q and W_k are put into that order, head by head, which leaves
every product q·k as it was.

The tokenizer merges the neighbours whose union has the highest score until there are none, as
sentencepiece's BPE does. Here that is a BPE of `tokenizers` whose merges are all ways to cut a
token in two known ones, best score first. Characters outside the vocabulary become bytes, and a
text begins with a space.

Source: Karpathy, llama2.c (MIT), 260,032 parameters trained on TinyStories (Eldan, Li, 2023,
arXiv:2305.07759).
"""

from __future__ import annotations

import argparse
import math
import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

MODEL_FILE, TOKENIZER_FILE = "stories260K.bin", "tok512.bin"
UNK, BOS, EOS = 0, 1, 2
NUM_BYTES = 256  # tokens <0x00> to <0xFF>, right after the three special ones
HEADER = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "seq_len")


class FormatError(Exception):
    """A file is not in llama2.c's format."""


def convert(source: Path, out: Path) -> None:
    """Writes config.json, model.safetensors, tokenizer.json and tokenizer_config.json.

    Args:
        source: Folder with `stories260K.bin` and `tok512.bin`.
        out: Folder that `AutoModelForCausalLM` and `AutoTokenizer` then load.

    Raises:
        FormatError: A file is absent, too short or too long.
    """
    header, arrays = read_model(_bytes(source / MODEL_FILE))
    tokens, scores = read_tokens(_bytes(source / TOKENIZER_FILE), header["vocab_size"])
    model = llama(header, arrays)
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    tokenizer(tokens, scores, header["seq_len"]).save_pretrained(out)


def read_model(content: bytes) -> tuple[dict[str, int], dict[str, np.ndarray]]:
    """(header, arrays by llama2.c's name); those of layers have the layer as first dimension."""
    size = 4 * len(HEADER)
    if len(content) < size:
        raise FormatError(f"{MODEL_FILE} has {len(content)} bytes, its header alone needs {size}")
    header = dict(zip(HEADER, struct.unpack(f"<{len(HEADER)}i", content[:size]), strict=True))
    if header["vocab_size"] <= 0:
        raise FormatError(f"{MODEL_FILE} has a head of its own, which this converter leaves out")
    shapes = _shapes(header)
    wanted = size + 4 * sum(math.prod(shape) for shape in shapes.values())
    if len(content) != wanted:
        raise FormatError(f"{MODEL_FILE} has {len(content)} bytes where its header says {wanted}")
    arrays, place = {}, size
    for name, shape in shapes.items():
        count = math.prod(shape)
        arrays[name] = np.frombuffer(content, "<f4", count, place).reshape(shape).copy()
        place += 4 * count
    return header, arrays


def _shapes(header: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """What the file holds, in its order."""
    dim, hidden, layers, heads, kv_heads, vocab, seq_len = header.values()
    kv = dim // heads * kv_heads
    return {
        "tok_embeddings": (vocab, dim),
        "attention_norm": (layers, dim),
        "wq": (layers, dim, dim),
        "wk": (layers, kv, dim),
        "wv": (layers, kv, dim),
        "wo": (layers, dim, dim),
        "ffn_norm": (layers, dim),
        "w1": (layers, hidden, dim),
        "w2": (layers, dim, hidden),
        "w3": (layers, hidden, dim),
        "norm": (dim,),
        "freq_cos": (seq_len, dim // heads // 2),
        "freq_sin": (seq_len, dim // heads // 2),
    }


def llama(header: dict[str, int], arrays: dict[str, np.ndarray]) -> Any:
    """A `LlamaForCausalLM` in float32 with these weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=header["vocab_size"],
            hidden_size=header["dim"],
            intermediate_size=header["hidden_dim"],
            num_hidden_layers=header["n_layers"],
            num_attention_heads=header["n_heads"],
            num_key_value_heads=header["n_kv_heads"],
            max_position_embeddings=header["seq_len"],
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            bos_token_id=BOS,
            eos_token_id=EOS,
        )
    )
    state = {
        "model.embed_tokens.weight": arrays["tok_embeddings"],
        "lm_head.weight": arrays["tok_embeddings"],
        "model.norm.weight": arrays["norm"],
    }
    for i in range(header["n_layers"]):
        state |= {
            f"model.layers.{i}.{name}.weight": array[i]
            for name, array in {
                "input_layernorm": arrays["attention_norm"],
                "self_attn.q_proj": half_split(arrays["wq"], header["n_heads"]),
                "self_attn.k_proj": half_split(arrays["wk"], header["n_kv_heads"]),
                "self_attn.v_proj": arrays["wv"],
                "self_attn.o_proj": arrays["wo"],
                "post_attention_layernorm": arrays["ffn_norm"],
                "mlp.gate_proj": arrays["w1"],
                "mlp.down_proj": arrays["w2"],
                "mlp.up_proj": arrays["w3"],
            }.items()
        }
    tensors = {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in state.items()}
    model.load_state_dict(tensors)
    return model.eval()


def half_split(weight: np.ndarray, heads: int) -> np.ndarray:
    """(layers, heads · d, dim) with rows 0 2 4 … 1 3 5 … of each head instead of 0 1 2 3 …

    >>> half_split(np.arange(8).reshape(1, 8, 1), heads=2).ravel().tolist()
    [0, 2, 1, 3, 4, 6, 5, 7]
    """
    layers, rows, dim = weight.shape
    pairs = weight.reshape(layers, heads, rows // heads // 2, 2, dim)
    return pairs.swapaxes(2, 3).reshape(layers, rows, dim)


def read_tokens(content: bytes, count: int) -> tuple[list[str], list[float]]:
    """(tokens, their scores), the id being the place."""
    tokens, scores, place = [], [], 4  # after the length of the longest token
    for _ in range(count):
        if place + 8 > len(content):
            raise FormatError(f"{TOKENIZER_FILE} ends after {len(tokens)} of {count} tokens")
        score, length = struct.unpack_from("<fi", content, place)
        place += 8 + length
        tokens.append(content[place - length : place].decode("utf-8"))
        scores.append(score)
    # llama2.c writes line breaks around these names, for show
    tokens[UNK], tokens[BOS], tokens[EOS] = "<unk>", "<s>", "</s>"
    return tokens, scores


def tokenizer(tokens: Sequence[str], scores: Sequence[float], max_tokens: int) -> Any:
    """A fast tokenizer of transformers that cuts texts as llama2.c does."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    fast = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=merges(tokens, scores),
            unk_token=tokens[UNK],
            byte_fallback=True,
        )
    )
    fast.normalizer = normalizers.Prepend(" ")
    fast.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bos = (tokens[BOS], BOS)
    fast.post_processor = processors.TemplateProcessing(
        single=f"{bos[0]} $A", pair=f"{bos[0]} $A {bos[0]} $B", special_tokens=[bos]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        unk_token=tokens[UNK],
        bos_token=tokens[BOS],
        eos_token=tokens[EOS],
        model_max_length=max_tokens,
    )


def merges(tokens: Sequence[str], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Every way to cut a token in two tokens, those of the best-scored token first.

    >>> merges(["<unk>", "<s>", "</s>", *map(str, range(256)), "a", "b", "ab", "aab"],
    ...        [0.0] * 261 + [-1.0, -2.0])
    [('a', 'b'), ('a', 'ab')]
    """
    first = EOS + 1 + NUM_BYTES  # below are special tokens and bytes, which are never merged
    known = set(tokens[first:])
    ranked = sorted(range(first, len(tokens)), key=lambda i: -scores[i])  # ties: lower id first
    return [
        (tokens[i][:cut], tokens[i][cut:])
        for i in ranked
        for cut in range(1, len(tokens[i]))
        if tokens[i][:cut] in known and tokens[i][cut:] in known
    ]


def _bytes(path: Path) -> bytes:
    if not path.is_file():
        raise FormatError(f"no file {path}")
    return path.read_bytes()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path, help=f"folder with {MODEL_FILE} and {TOKENIZER_FILE}")
    parser.add_argument("out", type=Path, help="folder for the model")
    given = parser.parse_args(arguments)
    try:
        convert(given.source, given.out)
    except FormatError as error:
        print(f"stories260k.py: {error}", file=sys.stderr)
        return 2
    print(f"{given.out}: a LlamaForCausalLM and its tokenizer")
    return 0


if __name__ == "__main__":
    sys.exit(main())
