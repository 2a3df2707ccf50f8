"""How many tokens a model reads at once, and how many it has embeddings for."""

from __future__ import annotations

import pytest
import torch
import transformers as tr

import tiny_models
from foretune.models.capacity import num_embeddings, num_positions, pad_within, reads
from foretune.models.loading import load_base, load_model, save_base

LONG = 30
SIZES = {"vocab_size": 24, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
ENCODER_DECODER = {
    "vocab_size": 24,
    "d_model": 16,
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 1),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 32),
    "max_position_embeddings": 20,
}


def deberta():
    relative = {"relative_attention": True, "position_biased_input": False}
    config = tr.DebertaV2Config(
        **SIZES, intermediate_size=32, max_position_embeddings=20, position_buckets=8, **relative
    )
    return tr.DebertaV2Model(config)


def opt():
    return tr.OPTForCausalLM(
        tr.OPTConfig(**SIZES, ffn_dim=32, max_position_embeddings=20, word_embed_proj_dim=16)
    )


MODELS = {
    "bert": (lambda: tiny_models.bert(max_position_embeddings=20), 20),
    "gpt2": (lambda: tiny_models.gpt2(n_positions=20), 20),
    "roberta counts from the padding id": (
        lambda: tiny_models.roberta(max_position_embeddings=20, pad_token_id=1),
        18,
    ),
    "opt has two rows more": (opt, 20),
    "bart": (lambda: tr.BartForConditionalGeneration(tr.BartConfig(**ENCODER_DECODER)), 20),
    "deberta has relative positions": (deberta, None),
    "t5 has relative positions": (tiny_models.t5, None),
    "mamba has no positions": (tiny_models.mamba2, None),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_limit_is_what_the_model_can_read(name):
    build, limit = MODELS[name]
    model = build().eval()
    assert num_positions(model) == limit
    assert num_embeddings(model) == 24
    assert reads(model, [5] * (limit or LONG))
    if limit is not None:
        assert not reads(model, [5] * (limit + 1))


def test_rotary_positions_end_where_the_model_was_made_to():
    assert num_positions(tiny_models.llama(max_position_embeddings=20)) == 20


def test_the_positions_of_a_vision_tower_do_not_count():
    assert num_positions(tiny_models.clip()) == 64  # the images have five
    assert num_positions(tiny_models.vit()) is None


@pytest.mark.parametrize("load", [lambda f: load_model(f, head="causal-lm"), load_base])
def test_a_padding_token_without_an_embedding_is_replaced(tmp_path, load):
    tokenizer = tiny_models.tokenizer(pad=False)
    tokenizer.add_special_tokens({"pad_token": "[FILL]"})
    save_base(tiny_models.llama(), tokenizer, tmp_path)
    model, loaded = load(tmp_path)
    assert tokenizer.pad_token_id == num_embeddings(model)
    assert loaded.pad_token_id == loaded.eos_token_id


def test_a_padding_token_with_an_embedding_stays():
    tokenizer = tiny_models.tokenizer()
    pad_within(tiny_models.bert(), tokenizer)
    assert tokenizer.pad_token == "[PAD]"


def test_reading_leaves_the_model_in_its_mode():
    model = tiny_models.bert().train()
    with torch.enable_grad():
        reads(model, [5])
    assert model.training
