"""Microscopic models of many architectures of transformers, with random weights, and their inputs.

A model is described by its classes and the fields of its configuration; sizes that most
configurations share are in `COMMON`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

import tiny_models

COMMON: dict[str, Any] = {
    "vocab_size": tiny_models.VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
GROUPED = {"num_key_value_heads": 1}
HEADS_OF_8 = {**GROUPED, "head_dim": 8}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
TWO_TOWERS = {
    "d_model": 16,
    **{f"{tower}_{name}": 2 for tower in ("encoder", "decoder") for name in ("layers",)},
    **{f"{tower}_attention_heads": 2 for tower in ("encoder", "decoder")},
    **{f"{tower}_ffn_dim": 32 for tower in ("encoder", "decoder")},
    "decoder_start_token_id": 1,
}
RELATIVE = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
SPEECH = {
    "conv_dim": (8, 8),
    "conv_stride": (4, 4),
    "conv_kernel": (4, 4),
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "num_feat_extract_layers": 2,
}
IMAGE = {"image_size": 16, "patch_size": 4}
MIXTURE = {**GROUPED, "moe_intermediate_size": 24, "num_experts_per_tok": 2}
DEEPSEEK = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": None,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "num_key_value_heads": 2,
    "moe_intermediate_size": 24,
    "num_experts_per_tok": 2,
}
TOWER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT_TOWER = {**TOWER, "intermediate_size": 32, "vocab_size": tiny_models.VOCABULARY}
VISION_TOWER = {**TOWER, "intermediate_size": 32, "image_size": 16, "patch_size": 8}


@dataclass(frozen=True)
class Architecture:
    """A model and how it is called.

    Args:
        group: Where it stands in the table.
        model: Name of its class in transformers.
        config: Name of its configuration's class.
        fields: The configuration, besides `COMMON`; None in it leaves a common field out.
        reads: "tokens", "pairs" (an encoder's and a decoder's tokens), "images", "sound",
            "spectra", or "texts and images".
        bare: Whether the configuration has none of the common fields.
    """

    group: str
    model: str
    config: str
    fields: Mapping[str, Any]
    reads: str = "tokens"
    bare: bool = False

    def build(self, seed: int = 0) -> Any:
        """The model, with the same weights for the same seed."""
        common = {} if self.bare else COMMON
        fields = {k: v for k, v in {**common, **self.fields}.items() if v is not ...}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            config = getattr(transformers, self.config)(**fields)
            model = getattr(transformers, self.model)(config).eval()
            for p in model.parameters():  # biases and the like, which start at zero or one
                if p.dim() < 2:
                    p.data.add_(torch.randn(p.shape) * 0.1)
        return model

    def inputs(self, rows: int = 4) -> dict[str, Tensor]:
        """Arguments of a call for this many rows, texts of unlike lengths padded on the right."""
        generator = torch.Generator().manual_seed(1)
        images = torch.randn(rows, 3, 16, 16, generator=generator)
        if self.reads == "images":
            return {"pixel_values": images}
        if self.reads == "sound":
            return {"input_values": torch.randn(rows, 320, generator=generator)}
        if self.reads == "spectra":
            return {"input_values": torch.randn(rows, 24, 16, generator=generator)}
        lengths = torch.tensor([9, 5, 7, 9, 3, 8, 4, 6])[:rows]
        ids = torch.randint(4, tiny_models.VOCABULARY, (rows, 9), generator=generator)
        mask = (torch.arange(9)[None] < lengths[:, None]).long()
        inputs = {"input_ids": ids * mask, "attention_mask": mask}
        if self.reads == "pairs":
            inputs["decoder_input_ids"] = ids.flip(0)[:, :5]
        if self.reads == "texts and images":
            inputs["pixel_values"] = images
        return inputs


def _of(group: str, reads: str = "tokens", *, bare: bool = False) -> Any:
    def entry(model: str, config: str, **fields: Any) -> Architecture:
        return Architecture(group, model, config, fields, reads, bare)

    return entry


_encoder = _of("encoders")
_decoder = _of("decoders")
_mixture = _of("mixtures of experts")
_state = _of("state spaces")
_pair = _of("encoder-decoders", "pairs")
_vision = _of("vision", "images", bare=True)
_sound = _of("audio", "sound")
_both = _of("text and images", "texts and images", bare=True)

ARCHITECTURES: dict[str, Architecture] = {
    "BERT": _encoder("BertForSequenceClassification", "BertConfig"),
    "RoBERTa": _encoder("RobertaForSequenceClassification", "RobertaConfig"),
    "XLM-RoBERTa": _encoder("XLMRobertaForSequenceClassification", "XLMRobertaConfig"),
    "CamemBERT": _encoder("CamembertForSequenceClassification", "CamembertConfig"),
    "ELECTRA": _encoder("ElectraForSequenceClassification", "ElectraConfig", embedding_size=8),
    "DistilBERT": _encoder(
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        **{"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32},
    ),
    "ALBERT": _encoder("AlbertForSequenceClassification", "AlbertConfig", embedding_size=8),
    "MPNet": _encoder("MPNetForSequenceClassification", "MPNetConfig"),
    "DeBERTa": _encoder(
        "DebertaForSequenceClassification",
        "DebertaConfig",
        **RELATIVE,
        max_relative_positions=16,
    ),
    "DeBERTa-v3": _encoder(
        "DebertaV2ForSequenceClassification",
        "DebertaV2Config",
        **{**RELATIVE, "position_biased_input": False, "position_buckets": 8},
        **{"max_relative_positions": -1, "share_att_key": True, "norm_rel_ebd": "layer_norm"},
    ),
    "ModernBERT": _encoder(
        "ModernBertForSequenceClassification", "ModernBertConfig", local_attention=4
    ),
    "XLNet": _encoder(
        "XLNetForSequenceClassification",
        "XLNetConfig",
        **{"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32, "max_position_embeddings": ...},
    ),
    "Funnel": _encoder(
        "FunnelForSequenceClassification",
        "FunnelConfig",
        **{"block_sizes": [1, 1], "d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 32},
        num_hidden_layers=...,
    ),
    "MobileBERT": _encoder(
        "MobileBertForSequenceClassification",
        "MobileBertConfig",
        **{"embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16},
    ),
    "SqueezeBERT": _encoder(
        "SqueezeBertForSequenceClassification",
        "SqueezeBertConfig",
        embedding_size=16,
        **{f"{part}_groups": 2 for part in ("q", "k", "v", "post_attention", "intermediate")},
        output_groups=2,
    ),
    "RoFormer": _encoder("RoFormerForSequenceClassification", "RoFormerConfig", embedding_size=16),
    "BigBird": _encoder(
        "BigBirdForSequenceClassification", "BigBirdConfig", attention_type="original_full"
    ),
    "Longformer": _encoder(
        "LongformerForSequenceClassification", "LongformerConfig", attention_window=4
    ),
    "Nyströmformer": _encoder(
        "NystromformerForSequenceClassification",
        "NystromformerConfig",
        **{"num_landmarks": 9, "segment_means_seq_len": 9},  # as many as the inputs have
    ),
    "FNet": _encoder("FNetForSequenceClassification", "FNetConfig"),
    "ConvBERT": _encoder(
        "ConvBertForSequenceClassification",
        "ConvBertConfig",
        **{"embedding_size": 16, "head_ratio": 1, "conv_kernel_size": 3},
    ),
    "ESM": _encoder(
        "EsmForSequenceClassification",
        "EsmConfig",
        **{"mask_token_id": 3, "position_embedding_type": "rotary"},
    ),
    "T5 encoder": _encoder("T5EncoderModel", "T5Config", **T5),
    "GPT-2": _decoder(
        "GPT2LMHeadModel", "GPT2Config", n_embd=16, n_layer=2, n_head=2, n_positions=64
    ),
    "GPT-Neo": _decoder(
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        **{"num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]},
    ),
    "GPT-J": _decoder(
        "GPTJForCausalLM", "GPTJConfig", n_embd=16, n_layer=2, n_head=2, rotary_dim=4
    ),
    "GPT-NeoX": _decoder("GPTNeoXForCausalLM", "GPTNeoXConfig"),
    "OPT": _decoder("OPTForCausalLM", "OPTConfig", ffn_dim=32, word_embed_proj_dim=16),
    "BLOOM": _decoder("BloomForCausalLM", "BloomConfig", n_layer=2, n_head=2),
    "Falcon": _decoder("FalconForCausalLM", "FalconConfig"),
    "MPT": _decoder("MptForCausalLM", "MptConfig", d_model=16, n_heads=2, n_layers=2),
    "CodeGen": _decoder(
        "CodeGenForCausalLM",
        "CodeGenConfig",
        **{"n_embd": 16, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "num_attention_heads": 4},
    ),
    "Llama": _decoder("LlamaForCausalLM", "LlamaConfig", **GROUPED),
    "Mistral": _decoder("MistralForCausalLM", "MistralConfig", **GROUPED, sliding_window=4),
    "Qwen2": _decoder("Qwen2ForCausalLM", "Qwen2Config", **GROUPED),
    "Qwen3": _decoder("Qwen3ForCausalLM", "Qwen3Config", **HEADS_OF_8),
    "Gemma": _decoder("GemmaForCausalLM", "GemmaConfig", **HEADS_OF_8),
    "Gemma 2": _decoder("Gemma2ForCausalLM", "Gemma2Config", **HEADS_OF_8, sliding_window=4),
    "Gemma 3": _decoder("Gemma3ForCausalLM", "Gemma3TextConfig", **HEADS_OF_8, sliding_window=4),
    "Gemma 3n": _decoder(
        "Gemma3nForCausalLM",
        "Gemma3nTextConfig",
        **{**HEADS_OF_8, "num_kv_shared_layers": 1, "laurel_rank": 2, "num_hidden_layers": 3},
        **{"vocab_size_per_layer_input": 24, "hidden_size_per_layer_input": 4},
        **{"layer_types": ["full_attention"] * 3, "intermediate_size": [32] * 3},
        activation_sparsity_pattern=[0.0] * 3,
    ),
    "Phi": _decoder("PhiForCausalLM", "PhiConfig"),
    "Phi-3": _decoder("Phi3ForCausalLM", "Phi3Config", **GROUPED),
    "StableLM": _decoder("StableLmForCausalLM", "StableLmConfig", **GROUPED),
    "StarCoder2": _decoder("Starcoder2ForCausalLM", "Starcoder2Config", **GROUPED),
    "OLMo 2": _decoder("Olmo2ForCausalLM", "Olmo2Config", **GROUPED),
    "Granite": _decoder("GraniteForCausalLM", "GraniteConfig", **GROUPED),
    "Cohere": _decoder("CohereForCausalLM", "CohereConfig", **GROUPED),
    "GLM": _decoder("GlmForCausalLM", "GlmConfig", **HEADS_OF_8),
    "SmolLM3": _decoder("SmolLM3ForCausalLM", "SmolLM3Config", **GROUPED),
    "BioGPT": _decoder("BioGptForCausalLM", "BioGptConfig"),
    "XGLM": _decoder(
        "XGLMForCausalLM", "XGLMConfig", d_model=16, ffn_dim=32, num_layers=2, attention_heads=2
    ),
    "Mixtral": _mixture("MixtralForCausalLM", "MixtralConfig", **GROUPED, num_local_experts=4),
    "Qwen2-MoE": _mixture(
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        **MIXTURE,
        num_experts=4,
        shared_expert_intermediate_size=8,
    ),
    "Qwen3-MoE": _mixture(
        "Qwen3MoeForCausalLM", "Qwen3MoeConfig", **MIXTURE, num_experts=4, head_dim=8
    ),
    "OLMoE": _mixture("OlmoeForCausalLM", "OlmoeConfig", num_experts=4, num_experts_per_tok=2),
    "PhiMoE": _mixture("PhimoeForCausalLM", "PhimoeConfig", **GROUPED, num_local_experts=4),
    "GPT-OSS": _mixture(
        "GptOssForCausalLM",
        "GptOssConfig",
        **{**HEADS_OF_8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4},
    ),
    "Llama 4": _mixture(
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        **HEADS_OF_8,
        num_local_experts=4,
        intermediate_size_mlp=32,
    ),
    "DeepSeek-V3": _mixture("DeepseekV3ForCausalLM", "DeepseekV3Config", **DEEPSEEK),
    "GraniteMoE": _mixture(
        "GraniteMoeForCausalLM",
        "GraniteMoeConfig",
        **{**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "GLM-4-MoE": _mixture(
        "Glm4MoeForCausalLM",
        "Glm4MoeConfig",
        **{**MIXTURE, "n_routed_experts": 4, "n_shared_experts": 1, "head_dim": 8},
        **{"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    ),
    "JetMoE": _mixture(
        "JetMoeForCausalLM",
        "JetMoeConfig",
        **{"num_key_value_heads": 2, "kv_channels": 8, "num_local_experts": 4},
        **{"num_experts_per_tok": 1, "num_attention_heads": ...},
    ),
    "Switch": Architecture(
        "mixtures of experts",
        "SwitchTransformersForConditionalGeneration",
        "SwitchTransformersConfig",
        {
            **T5,
            **{"num_experts": 4, "num_decoder_layers": 2, "decoder_start_token_id": 0},
            **{"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
            "expert_capacity": 64,
        },
        "pairs",
    ),
    "Mamba": _state("MambaForCausalLM", "MambaConfig", state_size=4),
    "Mamba-2": _state(
        "Mamba2ForCausalLM", "Mamba2Config", state_size=4, num_heads=4, head_dim=8, n_groups=1
    ),
    "Falcon-Mamba": _state("FalconMambaForCausalLM", "FalconMambaConfig", state_size=4),
    "RWKV": _state("RwkvForCausalLM", "RwkvConfig", attention_hidden_size=16, use_cache=False),
    "Jamba": _state(
        "JambaForCausalLM",
        "JambaConfig",
        **{
            **GROUPED,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "use_mamba_kernels": False,
            "mamba_d_state": 4,
        },
        **{"mamba_dt_rank": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
        **{"expert_layer_period": 2, "expert_layer_offset": 1},
    ),
    "Bamba": _state(
        "BambaForCausalLM",
        "BambaConfig",
        **{**GROUPED, "attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 8},
        **{"mamba_d_state": 4, "mamba_n_groups": 1},
    ),
    "RecurrentGemma": _state(
        "RecurrentGemmaForCausalLM",
        "RecurrentGemmaConfig",
        **{**GROUPED, "lru_width": 16, "attention_window_size": 8, "num_hidden_layers": 3},
    ),
    "T5": _pair("T5ForConditionalGeneration", "T5Config", **T5, decoder_start_token_id=0),
    "mT5": _pair("MT5ForConditionalGeneration", "MT5Config", **T5, decoder_start_token_id=0),
    "BART": _pair("BartForConditionalGeneration", "BartConfig", **TWO_TOWERS),
    "mBART": _pair("MBartForConditionalGeneration", "MBartConfig", **TWO_TOWERS),
    "Pegasus": _pair("PegasusForConditionalGeneration", "PegasusConfig", **TWO_TOWERS),
    "Marian": _pair("MarianMTModel", "MarianConfig", **TWO_TOWERS),
    "Blenderbot": _pair("BlenderbotForConditionalGeneration", "BlenderbotConfig", **TWO_TOWERS),
    "M2M100": _pair("M2M100ForConditionalGeneration", "M2M100Config", **TWO_TOWERS),
    "ViT": _vision("ViTForImageClassification", "ViTConfig", **TOWER, **IMAGE),
    "DeiT": _vision("DeiTForImageClassification", "DeiTConfig", **TOWER, **IMAGE),
    "BEiT": _vision("BeitForImageClassification", "BeitConfig", **TOWER, **IMAGE),
    "DINOv2": _vision("Dinov2ForImageClassification", "Dinov2Config", **TOWER, **IMAGE),
    "Swin": _vision(
        "SwinForImageClassification",
        "SwinConfig",
        **{"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1, 1]},
        **{"num_heads": [2, 2], "window_size": 4},
    ),
    "ConvNeXt": _vision(
        "ConvNextForImageClassification",
        "ConvNextConfig",
        **{"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "image_size": 16},
    ),
    "ResNet": _vision(
        "ResNetForImageClassification",
        "ResNetConfig",
        **{"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
    ),
    "wav2vec 2.0": _sound("Wav2Vec2ForSequenceClassification", "Wav2Vec2Config", **SPEECH),
    "HuBERT": _sound("HubertForSequenceClassification", "HubertConfig", **SPEECH),
    "WavLM": _sound("WavLMForSequenceClassification", "WavLMConfig", **SPEECH),
    "AST": Architecture(
        "audio",
        "ASTForAudioClassification",
        "ASTConfig",
        {**TOWER, **{"max_length": 24, "num_mel_bins": 16, "patch_size": 8}},
        "spectra",
        bare=True,
    ),
    "CLIP": _both(
        "CLIPModel",
        "CLIPConfig",
        **{"text_config": {**TEXT_TOWER, "eos_token_id": 2}, "vision_config": VISION_TOWER},
        projection_dim=12,
    ),
    "SigLIP": _both(
        "SiglipModel", "SiglipConfig", text_config=TEXT_TOWER, vision_config=VISION_TOWER
    ),
    "ViLT": Architecture(
        "text and images",
        "ViltForImagesAndTextClassification",
        "ViltConfig",
        {**IMAGE, "num_images": 1},
        "texts and images",
    ),
}
