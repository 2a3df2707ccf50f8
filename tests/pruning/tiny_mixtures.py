"""Microscopic mixtures of experts of several families, with random weights."""

from __future__ import annotations

from typing import Any

import torch
import transformers

import tiny_models

INNER = 24  # hidden units of an expert; not the hidden size, so that no axis is taken for another
MIXTURE: dict[str, Any] = {
    **tiny_models.DECODER,
    "num_hidden_layers": 2,
    "moe_intermediate_size": INNER,
    "intermediate_size": INNER,
    "num_experts_per_tok": 2,
    "initializer_range": 0.3,  # so that routers prefer some experts
}
DEEPSEEK = {
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": None,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "num_key_value_heads": 2,
}
ATTENTION = ["full_attention"] * 2
AFMOE = {
    "num_experts": 8,
    "num_local_experts": 8,
    "num_shared_experts": 1,
    "num_dense_layers": 0,
    "head_dim": 8,
}
GEMMA4 = {
    "num_experts": 8,
    "top_k_experts": 2,
    "enable_moe_block": True,
    "head_dim": 8,
    "global_head_dim": 8,
    "hidden_size_per_layer_input": 0,
}
NEMOTRON = {
    "n_routed_experts": 8,
    "n_group": 2,
    "topk_group": 2,
    "moe_shared_expert_intermediate_size": 8,
    "layers_block_type": ["attention", "moe"],
    "head_dim": 8,
}
LLAMA4 = {
    "num_local_experts": 8,
    "num_experts_per_tok": 1,
    "head_dim": 8,
    "intermediate_size_mlp": INNER,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"num_local_experts": 8}),
    "qwen2-moe": ("Qwen2Moe", {"num_experts": 8, "shared_expert_intermediate_size": 8}),
    "qwen3-moe": ("Qwen3Moe", {"num_experts": 8, "norm_topk_prob": True, "head_dim": 8}),
    "olmoe": ("Olmoe", {"num_experts": 8}),
    "gpt-oss": ("GptOss", {"num_local_experts": 8, "head_dim": 8}),
    "deepseek-v3": ("DeepseekV3", DEEPSEEK),
    # a bias (1, E) in the router; biases in the block, which the router gets; a router with a
    # layer in it; one that reads other vectors than the experts; experts without a gate
    "ernie": ("Ernie4_5_Moe", {"moe_num_experts": 8, "moe_k": 2, "moe_layer_start_index": 0}),
    "minimax-m2": ("MiniMaxM2", {"num_local_experts": 8, "head_dim": 8}),
    "lfm2-moe": ("Lfm2Moe", {"num_experts": 8, "num_dense_layers": 0, "layer_types": ATTENTION}),
    "afmoe": ("Afmoe", {**AFMOE, "layer_types": ATTENTION}),
    "hunyuan": ("HunYuanMoEV1", {"num_experts": 8, "moe_topk": 2, "head_dim": 8}),
    "gemma4": ("Gemma4", {**GEMMA4, "layer_types": ATTENTION}),
    "nemotron-h": ("NemotronH", NEMOTRON),
    # its weights multiply what the experts read, and its router says so in a pair
    "llama4": ("Llama4", LLAMA4),
}
# The softmax of these runs over all experts, and the weights of those chosen are not scaled up.
OVER_ALL = ("qwen2-moe", "olmoe", "switch")


def mixture(family: str, *, seed: int = 0, **changes: Any) -> Any:
    """A model of that family with 8 experts; each token goes to 2 (Switch, Llama 4: 1)."""
    if family == "switch":
        return switch(seed=seed, **changes)
    name, own = FAMILIES[family]
    fields = {**MIXTURE, **own, **changes}
    if family in ("mixtral", "olmoe", "gpt-oss"):
        fields.pop("moe_intermediate_size")
    if family == "ernie":
        fields.pop("num_experts_per_tok")
    if family in ("minimax-m2", "llama4"):
        fields.pop("moe_intermediate_size")
    config_class = getattr(transformers, f"{name}TextConfig", None)
    config = (config_class or getattr(transformers, f"{name}Config"))(**fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for tensor in (*model.parameters(), *model.buffers()):  # biases too, which start at zero
            if tensor.is_floating_point() and tensor.dim() < 3 and not tensor.any():
                tensor.normal_(0, 0.3)
    return model


def switch(*, seed: int = 0, **changes: Any) -> Any:
    """SwitchTransformersForConditionalGeneration with 8 experts in every layer."""
    fields: dict[str, Any] = {
        "vocab_size": tiny_models.VOCABULARY,
        "d_model": 16,
        "d_kv": 8,
        "d_ff": INNER,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_sparse_encoder_layers": 2,
        "num_sparse_decoder_layers": 2,
        "num_heads": 2,
        "num_experts": 8,
        "pad_token_id": 0,
        "eos_token_id": 2,
        "decoder_start_token_id": 0,
        "router_bias": True,
        "initializer_factor": 1.0,
    }
    config = transformers.SwitchTransformersConfig(**{**fields, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transformers.SwitchTransformersForConditionalGeneration(config).eval()


def rows(family: str = "mixtral", count: int = 12) -> list[dict[str, str]]:
    """Texts of several lengths, or prompts and completions for an encoder-decoder."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for i in range(count):
        ids = torch.randint(len(tiny_models.WORDS), (4 + i % 5,), generator=generator).tolist()
        words = [tiny_models.WORDS[j] for j in ids]
        if family == "switch":
            made.append({"prompt": " ".join(words[:3]), "completion": " ".join(words[3:])})
        else:
            made.append({"text": " ".join(words)})
    return made


def logits(model: Any, *, count: int = 6) -> torch.Tensor:
    """Of some random ids."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(4, tiny_models.VOCABULARY, (count, 9), generator=generator)
    options = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids, **options).logits
    return found


def loaded(cls: Any, folder: Any) -> Any:
    """A model read by transformers, moved to memory of its own.

    What is read lies where the file puts it, and kernels round differently by alignment.
    """
    return realigned(cls.from_pretrained(folder).eval())


def realigned(model: Any) -> Any:
    """The model with every tensor in memory of its own."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model
