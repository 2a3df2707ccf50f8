"""Adapter folders in stock PEFT: the same outputs, and no tensor missing or left over."""

from __future__ import annotations

import copy
import json
import warnings

import peft
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from torch import nn

import foretune
import tiny_models
from foretune.adapters.bank import AdapterBank
from foretune.adapters.fingerprint import base_record
from foretune.adapters.peft_format import peft_config, peft_tensors, write_adapter
from foretune.adapters.stored_adapter import read_adapter
from foretune.models.routing import route
from foretune.run import Run
from foretune.tasks.objectives.classification import Classification
from foretune.tasks.task import Task, TaskCollection
from linear_tasks import Net

SIZES = {
    **{"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"intermediate_size": 32, "max_position_embeddings": 64},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
DECODER = {**SIZES, "num_key_value_heads": 1, "head_dim": 8}
MOE = {**DECODER, "moe_intermediate_size": 16, "num_experts_per_tok": 2}
GROUPS = {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1}
GROUPS |= {"n_group": 1, "topk_group": 1}
LATENT = {k: v for k, v in {**MOE, **GROUPS}.items() if k != "head_dim"} | {
    **{"num_key_value_heads": 2, "kv_lora_rank": 8, "q_lora_rank": 8},
    **{"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8},
}
STATE = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}
LINEAR_ATTENTION = {
    **{"linear_num_value_heads": 2, "linear_num_key_heads": 2},
    **{"linear_key_head_dim": 8, "linear_value_head_dim": 8},
    "layer_types": ["linear_attention", "full_attention"],
}

MODELS = {
    # dense and shared layers beside experts in one tensor
    "DeepseekV2": (LATENT, "CausalLM"),
    "DeepseekV3": (LATENT, "CausalLM"),
    "Glm4Moe": ({**MOE, **GROUPS}, "CausalLM"),
    "Dots1": ({**MOE, **GROUPS}, "CausalLM"),
    "Ernie4_5_Moe": (
        {
            **{k: v for k, v in MOE.items() if k not in ("head_dim", "num_experts_per_tok")},
            **{"moe_num_experts": 4, "moe_num_shared_experts": 1, "moe_k": 2},
            "moe_layer_start_index": 1,
        },
        "CausalLM",
    ),
    "Qwen3Moe": ({**MOE, "num_experts": 4, "mlp_only_layers": [0]}, "CausalLM"),
    "Qwen2Moe": (
        {
            **{k: v for k, v in MOE.items() if k != "head_dim"},
            **{"num_experts": 4, "mlp_only_layers": [0], "shared_expert_intermediate_size": 16},
        },
        "CausalLM",
    ),
    "Qwen3Next": (
        {**MOE, **LINEAR_ATTENTION, "num_experts": 4, "shared_expert_intermediate_size": 16},
        "CausalLM",
    ),
    "HunYuanMoEV1": ({**DECODER, "num_experts": 4, "moe_topk": 2}, "CausalLM"),
    "Mixtral": ({**DECODER, "num_local_experts": 4}, "CausalLM"),
    "GptOss": ({**DECODER, "num_local_experts": 4, "num_experts_per_tok": 2}, "CausalLM"),
    # routers that return a pair
    "Phimoe": ({**DECODER, "num_local_experts": 4}, "CausalLM"),
    "Llama4Text": (
        {
            **{**DECODER, "intermediate_size_mlp": 32, "num_local_experts": 4},
            **{"num_experts_per_tok": 1, "interleave_moe_layer_step": 2, "attention_chunk_size": 8},
        },
        "CausalLM",
    ),
    # grouped convolutions
    "Mamba": (STATE, "CausalLM"),
    "Mamba2": ({**STATE, "num_heads": 4, "head_dim": 8, "n_groups": 2}, "CausalLM"),
    "FalconMamba": (STATE, "CausalLM"),
    "Lfm2": (
        {
            **{k: v for k, v in DECODER.items() if k != "head_dim"},
            **{"block_ff_dim": 32, "conv_L_cache": 3, "layer_types": ["conv", "full_attention"]},
        },
        "CausalLM",
    ),
    "RecurrentGemma": (
        {
            **{
                k: v for k, v in DECODER.items() if k not in ("head_dim", "max_position_embeddings")
            },
            **{"lru_width": 16, "attention_window_size": 8},
            "block_types": ["recurrent", "attention"],
        },
        "CausalLM",
    ),
    "ConvBert": (
        {**SIZES, "num_attention_heads": 4, "embedding_size": 16, "conv_kernel_size": 3},
        "",
    ),
    # plain ones
    "Llama": (DECODER, "CausalLM"),
    "GPT2": ({"vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}, "CausalLM"),
    "Falcon": ({k: v for k, v in SIZES.items() if k != "intermediate_size"}, "CausalLM"),
    "Bert": (SIZES, ""),
    "BertClassifier": (SIZES, "classifier"),
    "DistilBert": (
        {"vocab_size": 32, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32},
        "classifier",
    ),
}
TASK_TYPES = {"CausalLM": "CAUSAL_LM", "": None, "classifier": None}


def build(name):
    sizes, head = MODELS[name]
    stem = name.removesuffix("Classifier")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = getattr(tf, f"{stem}Config")(**sizes)
        suffix = {"CausalLM": "ForCausalLM", "classifier": "ForSequenceClassification"}.get(head)
        if name == "GPT2":
            suffix = "LMHeadModel"
        cls = getattr(tf, f"{stem.removesuffix('Text')}{suffix or 'Model'}")
        return cls(config).float().eval()


def written(model, folder, base=None, heads=(), **lora):
    """A bank whose second adapter is random and lies in `folder`."""
    bank = AdapterBank(model, ["a", "b"], lora={"r": 2, "lora_alpha": 5, **lora}, heads=heads)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in bank.parameters():
            p.normal_(std=0.3)
    config = peft_config(bank, model, base)
    write_adapter(folder, config, peft_tensors(bank, 1), base_record(model, bank.head_names))
    return bank


def assert_same(model, bank, stock, inputs):
    """The stock model gives what the bank's second adapter gives, which is not what the base gives.

    Where an adapted parameter is one tensor, PEFT adds to the weight what the bank adds to the
    output, so rounding differs.
    """
    with torch.no_grad():
        plain = model(**inputs)
        with bank.attached(), route([1] * len(next(iter(inputs.values())))):
            expected = model(**inputs)
        output = stock(**inputs)
    first = (lambda out: out) if isinstance(plain, torch.Tensor) else (lambda out: out[0])
    torch.testing.assert_close(first(output), first(expected), rtol=1e-3, atol=1e-4)
    assert (first(plain) - first(expected)).abs().max() > 1e-2


@pytest.mark.parametrize("name", MODELS)
def test_stock_peft_reads_every_tensor(name, tmp_path):
    model = build(name)
    bank = written(model, tmp_path)
    assert bank.layer_names
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # "Found missing adapter keys …"
        stock = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()
    assert_same(model, bank, stock, {"input_ids": torch.randint(3, 32, (2, 8))})
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert fields["task_type"] == TASK_TYPES[MODELS[name][1]]
    assert (fields["auto_mapping"] is None) == (fields["task_type"] is not None)


@pytest.mark.parametrize("targets", [["gate_proj"], ["down_proj", "q_proj"], r".*\.(up|v)_proj"])
def test_part_of_the_dense_layers_of_a_mixture_is_read(targets, tmp_path):
    model = build("Qwen3Moe")
    bank = written(model, tmp_path, target_modules=targets)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        stock = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()
    assert_same(model, bank, stock, {"input_ids": torch.randint(3, 32, (2, 8))})


@pytest.mark.parametrize(
    ("name", "heads", "auto"),
    [
        ("Llama", (), peft.AutoPeftModelForCausalLM),
        ("Qwen3Moe", (), peft.AutoPeftModelForCausalLM),
        ("Bert", (), peft.AutoPeftModel),
        ("Bert", (), peft.AutoPeftModelForFeatureExtraction),
        ("BertClassifier", (), peft.AutoPeftModel),
        ("BertClassifier", ("classifier",), peft.AutoPeftModelForSequenceClassification),
        (
            "DistilBert",
            ("pre_classifier", "classifier"),
            peft.AutoPeftModelForSequenceClassification,
        ),
    ],
)
def test_auto_classes_of_peft_choose_the_class_of_the_base(name, heads, auto, tmp_path):
    model = build(name)
    model.save_pretrained(tmp_path / "base")
    bank = written(model, tmp_path / "adapter", str(tmp_path / "base"), heads)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*")
        stock = auto.from_pretrained(tmp_path / "adapter").eval()
    assert_same(model, bank, stock, {"input_ids": torch.randint(3, 32, (2, 8))})


def test_a_sequence_to_sequence_model_is_read_as_one(tmp_path):
    model = tiny_models.t5()
    model.save_pretrained(tmp_path / "base")
    bank = written(model, tmp_path / "adapter", str(tmp_path / "base"))
    stock = peft.AutoPeftModelForSeq2SeqLM.from_pretrained(tmp_path / "adapter").eval()
    ids = torch.randint(3, tiny_models.VOCABULARY, (2, 8))
    assert_same(model, bank, stock, {"input_ids": ids, "decoder_input_ids": ids})


class Nested(nn.Module):
    """A layer whose name is the end of another's."""

    def __init__(self):
        super().__init__()
        self.part = nn.Linear(4, 4)
        self.inner = nn.ModuleDict({"part": nn.Linear(4, 4)})

    def forward(self, x):
        return self.part(torch.tanh(self.inner["part"](x)))


def test_a_name_that_ends_others_adapts_only_its_own_module(tmp_path):
    model = Nested()
    bank = written(model, tmp_path, exclude_modules=["inner.part"])
    assert bank.layer_names == ["part"]
    stock = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
    assert not isinstance(stock.base_model.model.inner["part"], peft.tuners.lora.LoraLayer)
    assert_same(model, bank, stock, {"x": torch.randn(3, 4)})


def test_a_head_named_like_a_part_of_peft_is_read(tmp_path):
    model = Net().float()  # its head is "out", with which PEFT's own "lora_dropout" ends
    bank = written(model, tmp_path, heads=["out"])
    stock = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
    assert_same(model, bank, stock, {"x": torch.randn(3, 4)})


def test_what_mambas_kernels_do_not_call_is_left_out():
    names = AdapterBank(tiny_models.mamba2(), ["a"], lora={"r": 2}).layer_names
    assert {name.rsplit(".", 1)[-1] for name in names} == {"in_proj"}


def test_dense_layers_of_a_mixture_are_listed_as_modules_again(tmp_path):
    model = build("Qwen3Moe")
    written(model, tmp_path)
    stored = read_adapter(tmp_path, model)
    assert "model.layers.0.mlp.up_proj" in stored.config["target_modules"]
    assert not stored.config["target_parameters"]
    pytest.importorskip("foretune.fusion")
    fused = foretune.fuse(model, {"a": tmp_path}, foretune.Average()).model
    assert not fused.model.layers[0].mlp.up_proj.weight.equal(
        model.model.layers[0].mlp.up_proj.weight
    )


@pytest.mark.parametrize("kind", ("llama", "gpt2"))
def test_the_head_of_a_decoder_is_one_module_as_wide_as_the_bases(kind, tmp_path):
    """What servers read: a full weight named score, and LoRA of one rank for all else."""
    base = getattr(tiny_models, kind)(num_labels=3)
    rows = [{"text": "the cat", "label": "x"}, {"text": "a dog", "label": "y"}]
    tasks = TaskCollection(
        (Task("t", rows, rows, rows),), Classification(tokenizer=tiny_models.tokenizer())
    )
    foretune.adapt(base, tasks, foretune.LoRA(), Run(steps=1, out=tmp_path / "adapters"))
    folder = tmp_path / "adapters" / "t"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["score"] and config["task_type"] == "SEQ_CLS"
    assert not config["rank_pattern"] and not config["alpha_pattern"]
    tensors = load_file(folder / "adapter_model.safetensors")
    heads = {name for name in tensors if ".lora_A." not in name and ".lora_B." not in name}
    assert heads == {"base_model.model.score.weight"}
    assert tensors["base_model.model.score.weight"].shape == base.score.weight.shape
    assert {min(t.shape) for name, t in tensors.items() if name not in heads} == {config["r"]}
