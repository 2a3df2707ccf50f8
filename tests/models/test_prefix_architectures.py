"""The frozen prefix of many architectures: right, or not cached and said so."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import transformers

import tiny_models
from foretune.adapters.bank import AdapterBank
from foretune.errors import UserError
from foretune.models import frozen_prefix as fp
from foretune.models import prefix_cache
from foretune.models.routing import route
from foretune.models.surgery import block_list, first_moving_block, freeze_lower

SIZES = {**tiny_models.SIZES, "num_hidden_layers": 3, "initializer_range": 0.3}
DECODER = {**SIZES, "num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 2}
RELATIVE = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
SERVED = {  # name → (model, configuration, its fields); their lower blocks are cached
    "bert": ("BertForSequenceClassification", "BertConfig", SIZES),
    "xlm-roberta": ("XLMRobertaForSequenceClassification", "XLMRobertaConfig", SIZES),
    "electra": ("ElectraModel", "ElectraConfig", {**SIZES, "embedding_size": 8}),
    "distilbert": (
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {**SIZES, "dim": 16, "n_layers": 3, "n_heads": 2, "hidden_dim": 32},
    ),
    "modernbert": ("ModernBertModel", "ModernBertConfig", {**SIZES, "local_attention": 4}),
    "gpt-neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", SIZES),
    "gpt-j": (
        "GPTJForCausalLM",
        "GPTJConfig",
        {**SIZES, "n_embd": 16, "n_layer": 3, "n_head": 2, "rotary_dim": 4},
    ),
    "opt": ("OPTForCausalLM", "OPTConfig", {**SIZES, "ffn_dim": 32, "word_embed_proj_dim": 16}),
    "bloom": ("BloomForCausalLM", "BloomConfig", {**SIZES, "n_layer": 3, "n_head": 2}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", DECODER),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**DECODER, "head_dim": 8}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**DECODER, "head_dim": 8}),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", DECODER),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**DECODER, "head_dim": 8}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**DECODER, "num_local_experts": 4}),
    "esm": ("EsmModel", "EsmConfig", {**SIZES, "mask_token_id": 3}),
}
TRAINED_BY_ALL = {  # a weight that all blocks read is registered after them, and is trained
    "mpnet": ("MPNetForSequenceClassification", "MPNetConfig", SIZES),
    "deberta": (
        "DebertaForSequenceClassification",
        "DebertaConfig",
        {**SIZES, **RELATIVE, "max_relative_positions": 16},
    ),
    "deberta-v2": (
        "DebertaV2ForSequenceClassification",
        "DebertaV2Config",
        {
            **{**SIZES, **RELATIVE, "position_biased_input": False},
            **{"position_buckets": 16, "max_relative_positions": -1},
        },
    ),
}
OTHERS = {  # blocks pass on more than hidden states, share weights, or are no blocks of tokens
    "xlnet": (
        "XLNetModel",
        "XLNetConfig",
        {"vocab_size": 24, "d_model": 16, "n_layer": 3, "n_head": 2, "d_inner": 32},
    ),
    "albert": ("AlbertModel", "AlbertConfig", {**SIZES, "embedding_size": 8}),
    "t5 encoder": (
        "T5EncoderModel",
        "T5Config",
        {**SIZES, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 3, "num_heads": 2},
    ),
    "mamba": ("MambaForCausalLM", "MambaConfig", {**SIZES, "state_size": 4}),
    "fnet": ("FNetModel", "FNetConfig", SIZES),
    "funnel": (
        "FunnelBaseModel",
        "FunnelConfig",
        {"vocab_size": 24, "block_sizes": [2, 1], "d_model": 16, "n_head": 2, "d_inner": 32},
    ),
    "gemma 3n, shared keys": (
        "Gemma3nForCausalLM",
        "Gemma3nTextConfig",
        {
            **{**DECODER, "head_dim": 8, "num_kv_shared_layers": 1, "laurel_rank": 2},
            **{"vocab_size_per_layer_input": 24, "hidden_size_per_layer_input": 4},
            **{"layer_types": ["full_attention"] * 3, "intermediate_size": [32] * 3},
            **{"activation_sparsity_pattern": [0.0] * 3},
        },
    ),
}
ALL = SERVED | TRAINED_BY_ALL | OTHERS


@pytest.fixture(autouse=True)
def _nothing_cached_or_said(monkeypatch):
    monkeypatch.setattr(fp, "_WARNED", set())
    prefix_cache._CACHES.clear()


def built(name):
    model, config, fields = ALL[name]
    made = getattr(transformers, config)(**{**fields, "pad_token_id": 0})
    return tiny_models._seeded(getattr(transformers, model), made, 0)


def freeze(model):
    """All but what is above the last block but one."""
    try:
        freeze_lower(model, 1)
    except UserError:  # other blocks follow
        model.requires_grad_(False)
        block_list(model)[1][-1].requires_grad_(True)


def inputs():
    lengths = torch.tensor([9, 6, 4, 9])
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, tiny_models.VOCABULARY, (4, 9), generator=generator)
    mask = (torch.arange(9)[None] < lengths[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def answer(model):
    output = model(**inputs())
    output = output.logits if "logits" in output else output.last_hidden_state
    if output.shape[:2] == inputs()["input_ids"].shape:
        output = output[inputs()["attention_mask"] > 0]
    return output


@torch.no_grad()
def disturb(parameters):
    generator = torch.Generator().manual_seed(2)
    for p in parameters:
        p.add_(torch.randn(p.shape, generator=generator) * 0.3)


def assert_served_right(model, adapted=()):
    with torch.no_grad():
        plain = answer(model)
        with fp.frozen_prefix(model, adapted):
            for _ in range(2):
                torch.testing.assert_close(answer(model), plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ALL)
def test_whatever_moves_the_states_are_those_of_the_model(name):
    """In training, for a second base in the process, and for one whose every tensor differs."""
    model = built(name)
    if block_list(model) is None:
        return
    freeze(model)
    assert_served_right(model)
    moving = [p for p in model.parameters() if p.requires_grad]
    with fp.frozen_prefix(model, []):
        answer(model)
        disturb(moving)
        with torch.no_grad():
            served = answer(model)
    with torch.no_grad():
        torch.testing.assert_close(served, answer(model), rtol=1e-4, atol=1e-4)
    assert_served_right(copy.deepcopy(model))
    for tensor in [*model.parameters()]:
        other = copy.deepcopy(model)
        position = next(i for i, p in enumerate(model.parameters()) if p is tensor)
        disturb([list(other.parameters())[position]])
        assert_served_right(other.requires_grad_(False))


@pytest.mark.parametrize("name", SERVED)
def test_the_prefix_of_a_common_architecture_is_served(name, caplog):
    model = built(name)
    caplog.clear()  # what transformers says of the tiny config
    freeze_lower(model, 1)
    with fp.frozen_prefix(model, []):
        assert "forward" in vars(block_list(model)[1][0])
    assert not caplog.records


@pytest.mark.parametrize("name", TRAINED_BY_ALL)
def test_a_prefix_that_reads_a_weight_that_is_trained_is_not_cached_and_said_once(name, caplog):
    model = built(name)
    freeze_lower(model, 1)
    with caplog.at_level(logging.WARNING, logger="foretune"):
        for _ in range(2):
            with fp.frozen_prefix(model, []):
                assert "forward" not in vars(block_list(model)[1][0])
    assert len(caplog.records) == 1
    assert "which is trained" in caplog.text


@pytest.mark.parametrize("name", TRAINED_BY_ALL)
def test_blocks_that_return_tuples_are_served_from_the_cache_of_another_model(name):
    """Every state is known when the second model starts."""
    for model in (built(name), built(name)):
        model.requires_grad_(False)
        with torch.no_grad(), fp.FrozenPrefix(model, 2) as prefix:
            assert prefix.obstacle is None
            served = answer(model)
        torch.testing.assert_close(served, answer(model), rtol=1e-4, atol=1e-4)


def test_an_adapter_on_what_the_prefix_calls_is_not_bypassed():
    """It projects the embeddings, and is registered after the blocks."""

    class Late(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bert = tiny_models.bert(num_hidden_layers=3)
            self.config = self.bert.config
            self.projection = torch.nn.Linear(16, 16)

        def forward(self, input_ids, attention_mask):
            embedded = self.projection(self.bert.embeddings.word_embeddings(input_ids))
            return self.bert(inputs_embeds=embedded, attention_mask=attention_mask)

    torch.manual_seed(0)
    model = Late().requires_grad_(False).eval()
    lora = {"r": 2, "target_modules": ["projection", "bert.encoder.layer.2.output.dense"]}
    bank = AdapterBank(model, ["a", "b"], lora=lora)
    disturb(bank.parameters())
    with torch.no_grad(), bank.attached(), route([0, 1, 0, 1]):
        plain = answer(model)
        assert first_moving_block(model, bank.adapted_names) == 2
        with fp.frozen_prefix(model, bank.adapted_names):
            torch.testing.assert_close(answer(model), plain)


def test_states_that_depend_on_what_is_no_parameter_are_computed_anew():
    """A second model is tried on its own, whatever the cache holds."""

    class Scaled(torch.nn.Module):
        def __init__(self, factor):
            super().__init__()
            self.config = transformers.PretrainedConfig(vocab_size=tiny_models.VOCABULARY)
            self.embed = torch.nn.Embedding(tiny_models.VOCABULARY, 8)
            self.blocks = torch.nn.ModuleList([torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)])
            self.factor = factor

        def forward(self, input_ids, attention_mask):
            hidden = self.embed(input_ids) * self.factor
            for block in self.blocks:
                hidden = block(hidden)
            return hidden

    for factor in (1.0, 2.0):
        torch.manual_seed(0)
        model = Scaled(factor).requires_grad_(False)
        tokens = inputs()["attention_mask"] > 0
        plain = model(**inputs())[tokens]
        with fp.FrozenPrefix(model, 1):
            torch.testing.assert_close(model(**inputs())[tokens], plain, rtol=1e-4, atol=1e-4)


def test_blocks_that_are_skipped_at_random_are_not_served(caplog):
    model = built("opt")
    model.model.decoder.layerdrop = 0.5
    model.requires_grad_(False)
    with caplog.at_level(logging.WARNING, logger="foretune"), fp.frozen_prefix(model, []):
        assert "forward" not in vars(model.model.decoder.layers[0])
    assert "layerdrop" in caplog.text
