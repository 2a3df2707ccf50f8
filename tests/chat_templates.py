"""Chat templates of model families, written after their documented forms, with small tokenizers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHATML = """{%- for m in messages -%}
{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""
CHATML_MARKED = """{%- for m in messages -%}
{{ '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' -%}
{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}
{%- else -%}{{ m.content + '<|im_end|>\\n' }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""
THINKING = """{%- set ns = namespace(last=0) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for m in messages -%}
{%- if m.role == 'assistant' and loop.index0 > ns.last -%}
{{ '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' + m.content + '<|im_end|>\\n' }}
{%- else -%}
{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""
LLAMA_3 = """{{- bos_token -}}
{%- for m in messages -%}
{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif -%}"""
LLAMA_2 = """{%- if messages[0].role == 'system' -%}
{%- set system = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' -%}
{%- set turns = messages[1:] -%}
{%- else -%}{%- set system = '' -%}{%- set turns = messages -%}{%- endif -%}
{%- for m in turns -%}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{%- endif -%}
{%- if m.role == 'user' -%}
{{ bos_token + '[INST] ' + (system if loop.first else '') + m.content | trim + ' [/INST]' }}
{%- else -%}{{ ' ' + m.content | trim + ' ' + eos_token }}{%- endif -%}
{%- endfor -%}"""
MISTRAL = """{{- bos_token -}}
{%- for m in messages -%}
{%- if m.role == 'system' -%}{{ raise_exception('Only user and assistant roles are supported!') }}
{%- elif m.role == 'user' -%}{{ '[INST] ' + m.content + ' [/INST]' }}
{%- else -%}{{ ' ' + m.content + eos_token }}{%- endif -%}
{%- endfor -%}"""
GEMMA = """{{- bos_token -}}
{%- if messages[0].role == 'system' -%}
{{ raise_exception('System role not supported') }}
{%- endif -%}
{%- for m in messages -%}
{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + m.content | trim }}
{{- '<end_of_turn>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}"""
PHI_3 = """{%- for m in messages -%}
{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>\\n' }}{%- else -%}{{ eos_token }}{%- endif -%}"""
ZEPHYR = """{%- for m in messages -%}
{{ '<|' + m.role + '|>\\n' + m.content + eos_token + '\\n' }}
{%- if loop.last and add_generation_prompt -%}{{ '<|assistant|>\\n' }}{%- endif -%}
{%- endfor -%}"""
VICUNA = """{%- for m in messages -%}
{%- if m.role == 'system' -%}{{ m.content + ' ' }}
{%- elif m.role == 'user' -%}{{ 'USER: ' + m.content + ' ' }}
{%- else -%}{{ 'ASSISTANT: ' + m.content + eos_token }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}"""
COMMAND_R = """{{- bos_token -}}
{%- for m in messages -%}
{%- set name = {'system': 'SYSTEM', 'user': 'USER', 'assistant': 'CHATBOT'}[m.role] -%}
{{ '<|START_OF_TURN_TOKEN|><|' + name + '_TOKEN|>' + m.content.strip() + '<|END_OF_TURN_TOKEN|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{%- endif -%}"""
DEEPSEEK = """{{- bos_token -}}
{%- for m in messages -%}
{%- if m.role == 'system' -%}{{ m.content }}
{%- elif m.role == 'user' -%}{{ '<｜User｜>' + m.content }}
{%- else -%}{{ '<｜Assistant｜>' + m.content + '<｜end▁of▁sentence｜>' }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<｜Assistant｜>' }}{%- endif -%}"""
GRANITE = """{%- for m in messages -%}
{{ '<|start_of_role|>' + m.role + '<|end_of_role|>' + m.content + '<|end_of_text|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{%- endif -%}"""
TULU = """{%- for m in messages -%}
{%- if m.role == 'assistant' -%}
{{ '<|assistant|>\\n' + m.content + eos_token + ('' if loop.last else '\\n') }}
{%- else -%}{{ '<|' + m.role + '|>\\n' + m.content + '\\n' }}{%- endif -%}
{%- if loop.last and add_generation_prompt -%}{{ '<|assistant|>\\n' }}{%- endif -%}
{%- endfor -%}"""
FALCON = """{%- for m in messages -%}
{%- if not loop.first -%}{{ '\\n' }}{%- endif -%}
{%- if m.role == 'system' -%}{{ m.content }}
{%- elif m.role == 'user' -%}{{ 'User: ' + m.content }}
{%- else -%}{{ 'Falcon: ' + m.content }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '\\n' + 'Falcon:' }}{%- endif -%}"""
HARMONY = """{%- for m in messages -%}
{%- if m.role == 'assistant' -%}
{{ '<|start|>assistant<|channel|>final<|message|>' + m.content }}
{{- '<|return|>' if loop.last else '<|end|>' -}}
{%- else -%}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|start|>assistant' }}{%- endif -%}"""


@dataclass(frozen=True)
class Family:
    """A chat template and what it needs.

    Args:
        template: Its text.
        special: Special tokens of the template; the last one ends a text.
        end: What the template writes behind the words of a last turn, and is learnt.
        opening: What of a turn lies before its words and is learnt, too.
        has_system: Whether it takes a system turn.
        pieces: Whether the tokenizer marks words by a space before them, like SentencePiece.
    """

    template: str
    special: tuple[str, ...]
    end: str
    opening: str = ""
    has_system: bool = True
    pieces: bool = False


IM = ("<|im_start|>", "<|im_end|>")
LLAMA = ("<s>", "</s>")
FAMILIES = {
    "chatml": Family(CHATML, IM, "<|im_end|>"),
    "chatml with marks": Family(CHATML_MARKED, IM, "<|im_end|>"),
    "thinking": Family(THINKING, IM, "<|im_end|>", opening="<think>\n\n</think>\n\n"),
    "llama-3": Family(
        LLAMA_3,
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|eot_id|>",
    ),
    "llama-2": Family(LLAMA_2, LLAMA, " </s>", pieces=True),
    "mistral": Family(MISTRAL, LLAMA, "</s>", has_system=False, pieces=True),
    "gemma": Family(
        GEMMA,
        ("<bos>", "<start_of_turn>", "<end_of_turn>", "<eos>"),
        "<end_of_turn>",
        has_system=False,
        pieces=True,
    ),
    "phi-3": Family(
        PHI_3, ("<s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|eot|>"), "<|end|>"
    ),
    "zephyr": Family(ZEPHYR, LLAMA, "</s>", pieces=True),
    "vicuna": Family(VICUNA, LLAMA, "</s>", pieces=True),
    "command-r": Family(
        COMMAND_R,
        (
            *("<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>"),
            *("<|CHATBOT_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
        ),
        "<|END_OF_TURN_TOKEN|>",
    ),
    "deepseek": Family(
        DEEPSEEK,
        ("<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"),
        "<｜end▁of▁sentence｜>",
    ),
    "granite": Family(
        GRANITE, ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"), "<|end_of_text|>"
    ),
    "tulu": Family(TULU, ("<|bos|>", "<|endoftext|>"), "<|endoftext|>"),
    "falcon": Family(FALCON, ("<|bos|>", "<|endoftext|>"), "<|endoftext|>"),
    "harmony": Family(
        HARMONY,
        ("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>"),
        "<|return|>",
        opening="<|channel|>final<|message|>",
    ),
}


def tokenizer_of(family: Family) -> Any:
    """A tokenizer of bytes, or of letters with a mark for spaces, with the family's template."""
    if family.pieces:
        letters = ["<unk>", "▁", *map(chr, range(33, 127)), "\n", "é", "日", "本"]
        core = Tokenizer(models.BPE({c: i for i, c in enumerate(letters)}, [], unk_token="<unk>"))
        core.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        core.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    else:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        merges = [("h", "e"), ("he", "l"), ("Ċ", "Ċ")]
        vocabulary = [*alphabet, *("".join(pair) for pair in merges)]
        core = Tokenizer(models.BPE({c: i for i, c in enumerate(vocabulary)}, merges))
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in family.special])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=family.special[0],
        eos_token=family.special[-1],
        pad_token=family.special[-1],
        **({"unk_token": "<unk>"} if family.pieces else {}),
    )
    tokenizer.chat_template = family.template
    return tokenizer
