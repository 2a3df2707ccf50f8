"""Heads, blocks and linear layers of real classes of transformers."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

import tiny_models
from foretune.errors import UserError
from foretune.models import surgery


@pytest.mark.parametrize(
    ("model", "names", "fresh"),
    [
        (tiny_models.bert(num_labels=3), ["classifier"], True),
        (tiny_models.roberta(num_labels=3), ["classifier"], True),
        (tiny_models.gpt2(num_labels=3), ["score"], True),
        (tiny_models.vit(), ["classifier"], True),
        (tiny_models.plain(), ["out"], True),
        (tiny_models.bert(), ["encoder.layer.3.output.dense"], False),
        (tiny_models.gpt2(), ["transformer.h.3.mlp.c_proj"], False),
        (tiny_models.llama(), ["model.layers.3.mlp.down_proj"], False),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else None,
)
def test_head_modules(model, names, fresh):
    assert surgery.head_modules(model) == names
    assert surgery.has_fresh_head(model) is fresh


def test_a_declared_head_that_does_not_exist_is_named():
    model = tiny_models.plain()
    model.head_modules = ["haed"]
    with pytest.raises(UserError, match=r'"haed".*conv, body, out'):
        surgery.head_modules(model)


@pytest.mark.parametrize("build", [tiny_models.bert, tiny_models.roberta, tiny_models.llama])
def test_reset_head_is_seeded_and_resizes(build):
    first, second = build(num_labels=3), build(num_labels=3, seed=1)
    for model in (first, second):
        torch.rand(1)
        before = torch.random.get_rng_state()
        surgery.reset_head(model, 5, seed=7)
        assert torch.equal(torch.random.get_rng_state(), before)
    assert first.config.num_labels == 5
    ids = torch.tensor([[4, 5, 6]])
    assert first(input_ids=ids).logits.shape == (1, 5)
    name = surgery.head_modules(first)[0]
    heads = [m.get_submodule(name).state_dict() for m in (first, second)]
    for key, value in heads[0].items():
        assert torch.equal(value, heads[1][key])


def test_reset_head_replaces_all_layers_of_the_head_and_nothing_else():
    model = tiny_models.roberta(num_labels=3)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    surgery.reset_head(model, 3, seed=1)
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"classifier.dense.weight", "classifier.out_proj.weight"}


def test_reset_head_of_a_plain_module():
    model = tiny_models.plain()
    surgery.reset_head(model, 7, seed=0)
    assert model(torch.zeros(2, 3, 5)).shape == (2, 7)


def test_reset_head_without_a_head_is_the_users_mistake():
    with pytest.raises(UserError, match="BertModel has no task head"):
        surgery.reset_head(tiny_models.bert(), 3, seed=0)


@pytest.mark.parametrize(
    ("model", "name", "blocks", "before"),
    [
        (tiny_models.bert(), "encoder.layer", 4, "embeddings"),
        (tiny_models.gpt2(), "transformer.h", 4, "transformer.w"),
        (tiny_models.qwen2(), "model.layers", 4, "model.embed_tokens"),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else None,
)
def test_freeze_lower_leaves_the_last_blocks(model, name, blocks, before):
    assert surgery.block_list(model)[0] == name
    assert len(surgery.block_list(model)[1]) == blocks
    surgery.freeze_lower(model, 1)
    for key, parameter in model.named_parameters():
        lower = key.startswith(before) or key.startswith(tuple(f"{name}.{i}." for i in range(3)))
        assert parameter.requires_grad is not lower, key


def test_freeze_lower_says_what_is_possible():
    with pytest.raises(UserError, match=r"between 0 and the 4 blocks of BertModel, got 5"):
        surgery.freeze_lower(tiny_models.bert(), 5)
    with pytest.raises(UserError, match="which Plain does not have"):
        surgery.freeze_lower(tiny_models.plain(), 1)


def test_block_list_of_an_encoder_decoder_is_none():
    assert surgery.block_list(tiny_models.t5()) is None


def test_linear_modules_finds_each_kind():
    assert set(surgery.linear_modules(tiny_models.plain())) == {"conv", "body", "out"}
    assert "transformer.h.0.attn.c_attn" in surgery.linear_modules(tiny_models.gpt2())


def gemma3(vision_blocks):
    """A vision-language model of two text blocks."""
    heads = {"num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
    text = {**heads, "vocab_size": 32, "num_hidden_layers": 2, "num_key_value_heads": 1}
    vision = {**heads, "num_hidden_layers": vision_blocks, "image_size": 8, "patch_size": 4}
    config = transformers.Gemma3Config(
        text_config={**text, "head_dim": 8, "pad_token_id": 0},
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_index=20,
    )
    return transformers.Gemma3ForConditionalGeneration(config)


@pytest.mark.parametrize("vision_blocks", [1, 2, 3])
def test_the_blocks_of_a_vision_language_model_are_the_text_decoders(vision_blocks):
    model = gemma3(vision_blocks)
    assert surgery.block_list(model)[0] == "model.language_model.layers"
    surgery.freeze_lower(model, 1)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n in trainable if ".layers." in n} == {
        n for n, _ in model.named_parameters() if "language_model.layers.1." in n
    }


def test_the_blocks_of_an_audio_model_are_not_its_convolutions():
    config = transformers.Wav2Vec2Config(
        **{"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
        intermediate_size=32,
        conv_dim=(8,) * 3,
        conv_stride=(2,) * 3,
        conv_kernel=(3,) * 3,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )
    assert surgery.block_list(transformers.Wav2Vec2Model(config))[0] == "encoder.layers"


class Parallel(nn.Module):
    """Blocks whose parts are in two lists, as in XLM."""

    def __init__(self):
        super().__init__()
        self.attentions = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.feed_forwards = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.heads = nn.ModuleList([nn.Linear(4, 2)])


@pytest.mark.parametrize(
    ("model", "behind"),
    [(tiny_models.clip(), "vision_model.encoder.layers"), (Parallel(), "feed_forwards")],
    ids=["dual encoder", "parallel lists"],
)
def test_trainable_layers_of_two_lists_side_by_side_is_refused(model, behind):
    with pytest.raises(UserError, match=f"ambiguous.* behind it, {behind}"):
        surgery.freeze_lower(model, 1)


def test_a_list_of_heads_behind_the_blocks_is_no_second_list_of_blocks():
    model = Parallel()
    del model.feed_forwards
    model.head_modules = ["heads.0"]
    surgery.freeze_lower(model, 1)
    assert [p.requires_grad for p in model.parameters()] == [False] * 4 + [True] * 4


def test_projections_and_parametrizations_are_no_blocks():
    model = nn.Module()
    model.layers = nn.ModuleList(nn.Sequential(nn.Linear(2, 2)) for _ in range(2))
    model.projections = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
    model.conv = nn.utils.parametrizations.weight_norm(nn.Conv1d(2, 2, 1))
    assert surgery.block_list(model)[0] == "layers"
    surgery.freeze_lower(model, 1)
    assert not model.layers[0][0].weight.requires_grad and model.layers[1][0].weight.requires_grad
    alone = nn.Sequential(nn.ModuleList(nn.Linear(2, 2) for _ in range(3)))
    assert surgery.block_list(alone)[0] == "0"
