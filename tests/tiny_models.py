"""Microscopic models with random weights, and a tokenizer made in memory."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn

from foretune.models.seeding import seed_generators

WORDS = (
    *("a", "b", "c", "d", "e", "f", "g", "h", "the", "cat", "dog", "sat", "on", "mat"),
    *("red", "blue", "green", "one", "two", "three"),
)
SPECIAL = ("[PAD]", "[CLS]", "[SEP]", "[UNK]")
VOCABULARY = len(WORDS) + len(SPECIAL)
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
DECODER: dict[str, Any] = {**SIZES, "num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 2}


def tokenizer(*, pad: bool = True, special: bool = True, unknown: bool = True) -> Any:
    """One id a word, split at blanks.

    Args:
        pad: Whether it has a pad token.
        special: Whether it puts [CLS] and [SEP] around texts.
        unknown: Whether a word that it does not know becomes [UNK]; else it is left out.
    """
    made = Tokenizer(
        models.WordLevel(
            {w: i for i, w in enumerate((*SPECIAL, *WORDS))}, unk_token="[UNK]" if unknown else None
        )
    )
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if special:
        made.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="[PAD]" if pad else None,
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        eos_token="[SEP]",
    )


def _seeded(build: Any, config: Any, seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        seed_generators(seed)
        return build(config).eval()


def bert(*, num_labels: int | None = None, seed: int = 0, **changes: Any) -> Any:
    """BertModel, or BertForSequenceClassification with so many labels."""
    config = transformers.BertConfig(**{**SIZES, **changes}, num_labels=num_labels or 2)
    cls = transformers.BertForSequenceClassification if num_labels else transformers.BertModel
    return _seeded(cls, config, seed)


def roberta(*, num_labels: int | None = None, seed: int = 0, **changes: Any) -> Any:
    """RobertaModel, or RobertaForSequenceClassification with so many labels."""
    config = transformers.RobertaConfig(**{**SIZES, **changes}, num_labels=num_labels or 2)
    cls = transformers.RobertaForSequenceClassification if num_labels else transformers.RobertaModel
    return _seeded(cls, config, seed)


def gpt2(*, num_labels: int | None = None, seed: int = 0, **changes: Any) -> Any:
    """GPT2LMHeadModel, or GPT2ForSequenceClassification with so many labels."""
    config = transformers.GPT2Config(
        **{
            "vocab_size": VOCABULARY,
            "n_embd": 16,
            "n_layer": 4,
            "n_head": 2,
            "n_positions": 64,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            **changes,
        },
        num_labels=num_labels or 2,
    )
    cls = transformers.GPT2ForSequenceClassification if num_labels else transformers.GPT2LMHeadModel
    return _seeded(cls, config, seed)


def llama(*, num_labels: int | None = None, seed: int = 0, **changes: Any) -> Any:
    """LlamaForCausalLM, or LlamaForSequenceClassification with so many labels."""
    config = transformers.LlamaConfig(**{**DECODER, **changes}, num_labels=num_labels or 2)
    cls = (
        transformers.LlamaForSequenceClassification if num_labels else transformers.LlamaForCausalLM
    )
    return _seeded(cls, config, seed)


def qwen2(*, seed: int = 0, **changes: Any) -> Any:
    """Qwen2ForCausalLM."""
    return _seeded(
        transformers.Qwen2ForCausalLM, transformers.Qwen2Config(**{**DECODER, **changes}), seed
    )


def mamba2(*, seed: int = 0) -> Any:
    config = transformers.Mamba2Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        state_size=4,
        num_heads=4,
        head_dim=8,
        n_groups=1,
        num_hidden_layers=2,
        initializer_range=0.3,
        pad_token_id=0,
    )
    return _seeded(transformers.Mamba2ForCausalLM, config, seed)


def t5(*, seed: int = 0, **changes: Any) -> Any:
    """T5ForConditionalGeneration."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 32,
        "num_layers": 2,
        "num_heads": 2,
        "pad_token_id": 0,
        "eos_token_id": 2,
        "decoder_start_token_id": 0,
    }
    config = transformers.T5Config(**{**sizes, **changes})
    return _seeded(transformers.T5ForConditionalGeneration, config, seed)


def vit(*, num_labels: int = 3, seed: int = 0, **changes: Any) -> Any:
    """ViTForImageClassification for images of 3 × 8 × 8."""
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "image_size": 8,
        "patch_size": 4,
    }
    config = transformers.ViTConfig(**{**sizes, **changes}, num_labels=num_labels)
    return _seeded(transformers.ViTForImageClassification, config, seed)


def clip(*, seed: int = 0, dropout: float = 0.0, **changes: Any) -> Any:
    """CLIPModel for images of 3 × 8 × 8 and the words of `tokenizer`."""
    tower = {k: v for k, v in SIZES.items() if k != "pad_token_id"} | {"num_hidden_layers": 2}
    text = {**tower, "bos_token_id": 1, "eos_token_id": 2, "attention_dropout": dropout}
    config = transformers.CLIPConfig(
        text_config={**text, **changes},
        vision_config={
            **{k: v for k, v in tower.items() if k not in ("vocab_size",)},
            **{"image_size": 8, "patch_size": 4, "attention_dropout": dropout, **changes},
        },
        projection_dim=12,
    )
    return _seeded(transformers.CLIPModel, config, seed)


def siglip(*, seed: int = 0) -> Any:
    """SiglipModel for images of 3 × 8 × 8 and the words of `tokenizer`."""
    tower = {k: v for k, v in SIZES.items() if k != "pad_token_id"} | {"num_hidden_layers": 2}
    vision = {k: v for k, v in tower.items() if k not in ("vocab_size", "max_position_embeddings")}
    config = transformers.SiglipConfig(
        text_config=tower, vision_config={**vision, "image_size": 8, "patch_size": 4}
    )
    return _seeded(transformers.SiglipModel, config, seed)


class Plain(nn.Module):
    """A convolution over time and a linear head: (n, channels, time) → (n, outputs)."""

    def __init__(self, channels: int = 3, outputs: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv1d(channels, 8, kernel_size=3, padding=1)
        self.body = nn.Linear(8, 8)
        self.out = nn.Linear(8, outputs)
        self.head_modules = ["out"]

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.body(torch.relu(self.conv(x)).mean(-1))))


def plain(*, channels: int = 3, outputs: int = 4, seed: int = 0) -> Plain:
    """A plain nn.Module with Linear and Conv1d."""
    with torch.random.fork_rng(devices=[]):
        seed_generators(seed)
        return Plain(channels, outputs).eval()
