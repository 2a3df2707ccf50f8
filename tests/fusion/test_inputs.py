"""All that a fine-tuned model holds is fused, reported or refused.

The static methods and SMILE of full rank, given one model, must return that model.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import foretune
import tiny_models
from foretune import SMILE, TIES, Average, TaskArithmetic, UserError
from foretune.fusion.finetuned import Finetuned, check_all_used
from fusion.fused_models import (
    adapted,
    ids,
    image_input,
    linears,
    nudged,
    output,
    saved,
    text_input,
)

IDENTITIES = [
    Average(),
    TaskArithmetic(scale=1.0),
    TIES(density=1.0),
    SMILE(k=None, rest="average", routing="task"),
]


def assert_returns(base: Any, source: Any, expected: Any, answer: Callable[[Any], Tensor]) -> None:
    """Each method, given the one model `source` over a base, answers as `expected` does."""
    with torch.no_grad():
        want = answer(expected)
        assert not torch.allclose(answer(copy.deepcopy(base)), want, atol=1e-3)
        for method in IDENTITIES:
            fused = foretune.fuse(base, {"a": source}, method, allow_unverified=True)
            got = answer(fused.set_task("a").model)
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4, msg=method.name)
            assert fused.report["left_out"] == [] or method.name == "smile"


class Convolutions(nn.Module):
    """Convolutions of one and two dimensions, a batch norm and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.over_time = nn.Conv1d(3, 4, 3, stride=2, padding=1)
        self.over_plane = nn.Conv2d(1, 4, (3, 2), padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.answer = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        plane = torch.relu(self.over_time(x)).unsqueeze(1)
        return self.answer(self.norm(self.over_plane(plane)).mean((2, 3)))


def convolutions() -> Convolutions:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Convolutions().eval()


def texts(model: Any) -> Tensor:
    return output(model, text_input())


def signals(model: Any) -> Tensor:
    return model(torch.randn(5, 3, 10, generator=torch.Generator().manual_seed(1)))


ADAPTERS: dict[
    str, tuple[Callable[[], Any], list[str], dict[str, Any], Callable[[Any], Tensor]]
] = {
    "convolutions": (convolutions, ["over_time", "over_plane", "answer"], {}, signals),
    "embeddings": (tiny_models.bert, ["word_embeddings", "query"], {}, texts),
    "tied embeddings": (
        lambda: tiny_models.llama(tie_word_embeddings=True),
        ["embed_tokens", "q_proj"],
        {},
        texts,
    ),
    "lm_head": (tiny_models.llama, ["lm_head", "q_proj"], {"task_type": "CAUSAL_LM"}, texts),
    "tied lm_head": (
        lambda: tiny_models.llama(tie_word_embeddings=True),
        ["lm_head", "q_proj"],
        {"task_type": "CAUSAL_LM"},
        texts,
    ),
    "copy of a tied lm_head": (
        lambda: tiny_models.llama(tie_word_embeddings=True),
        ["q_proj"],
        {"modules_to_save": ["lm_head"]},
        texts,
    ),
    "copies of embeddings and lm_head": (
        tiny_models.llama,
        ["q_proj"],
        {"modules_to_save": ["lm_head", "embed_tokens"]},
        texts,
    ),
    "copy of a norm": (tiny_models.bert, ["query"], {"modules_to_save": ["LayerNorm"]}, texts),
    "classifier": (
        lambda: tiny_models.bert(num_labels=3),
        ["query", "classifier"],
        {},
        texts,
    ),
    "last layer of a plain module": (
        convolutions,
        ["over_plane"],
        {"modules_to_save": ["answer"]},
        signals,
    ),
    "copy of a tied lm_head in an encoder-decoder": (
        tiny_models.t5,
        ["q", "wi"],
        {"modules_to_save": ["lm_head"]},
        lambda model: output(model, {**text_input(), "decoder_input_ids": ids(3, 4, 1)}),
    ),
}


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.filterwarnings("ignore")  # PEFT, of tied weights
def test_one_adapter_fused_is_that_adapter(kind: str, tmp_path: Any) -> None:
    build, targets, config, answer = ADAPTERS[kind]
    base = build()
    made = adapted(base, 1, targets, **config)
    folder = saved(made, tmp_path / "a")
    assert_returns(base, folder, made, answer)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [kind for kind in ADAPTERS if "tied" in kind])
def test_weights_untied_by_an_adapter_stay_so_on_disk(kind: str, tmp_path: Any) -> None:
    build, targets, config, answer = ADAPTERS[kind]
    base = build()
    made = adapted(base, 1, targets, **config)
    for method in IDENTITIES:
        fused = foretune.fuse(base, {"a": made}, method)
        loaded = foretune.load_fused(fused.save(tmp_path / method.name)).set_task("a")
        torch.testing.assert_close(answer(loaded.model), answer(made), rtol=1e-4, atol=1e-4)


def test_weights_tied_by_a_plain_module_are_refused_apart() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    module[1].weight = module[0].weight
    with pytest.raises(UserError, match=r"Sequential ties 1\.weight to 0\.weight"):
        foretune.fuse(module, {"a": adapted(module, 1, ["1"])}, Average())


@pytest.mark.parametrize(
    "build", [tiny_models.llama, lambda: tiny_models.llama(tie_word_embeddings=True)]
)
@pytest.mark.parametrize("tied", [True, False])
def test_full_model_tied_otherwise_than_its_base(build: Any, tied: bool, tmp_path: Any) -> None:
    base = build()
    made = nudged(tiny_models.llama(tie_word_embeddings=tied), 1, size=0.1)
    assert_returns(base, saved(made, tmp_path / "a"), made, texts)


def test_batch_statistics_are_fused_too(tmp_path: Any) -> None:
    base = convolutions()
    made = nudged(base, 1)
    made.norm.running_mean += 1.0
    made.norm.num_batches_tracked += 7
    assert_returns(base, made, made, signals)
    (tmp_path / "a").mkdir()
    safetensors.torch.save_model(made, str(tmp_path / "a" / "model.safetensors"))
    assert_returns(base, tmp_path / "a", made, signals)
    fused = foretune.fuse(base, {"a": made, "b": base}, Average()).model
    torch.testing.assert_close(fused.norm.running_mean, torch.full((4,), 0.5))
    smile = foretune.fuse(base, {"a": made}, SMILE())
    assert {"over_time.weight", "norm.running_mean"} <= set(smile.report["left_out"])


def test_smile_says_what_it_leaves_and_refuses_where_that_is_all() -> None:
    base = convolutions()
    both = adapted(base, 1, ["over_time", "answer"])
    fused = foretune.fuse(base, {"a": both}, SMILE())
    assert fused.report["left_out"] == ["over_time.weight"]
    with pytest.raises(UserError, match=r"no linear layer differs .* only over_time\.weight"):
        foretune.fuse(base, {"a": adapted(base, 1, ["over_time"])}, SMILE())


def test_half_precision_is_rounded_once() -> None:
    base = tiny_models.llama().bfloat16()
    made = nudged(tiny_models.llama(), 1, size=0.5).bfloat16()
    for method in IDENTITIES[:3]:
        fused = foretune.fuse(base, {"a": made}, method).model
        for name, parameter in made.named_parameters():
            assert torch.equal(fused.get_parameter(name), parameter), (method.name, name)


# --- refusals -----------------------------------------------------------------------------------


def test_resized_vocabulary_is_named_with_a_way_on(tmp_path: Any) -> None:
    base = tiny_models.llama()
    longer = linears(base, 1)
    longer.resize_token_embeddings(30)
    lora = adapted(longer, 1, ["embed_tokens", "q_proj"])
    way = r"vocabulary of a was resized: model\.embed_tokens.* resize_token_embeddings\(30\)"
    for source in (longer, saved(longer, tmp_path / "full"), saved(lora, tmp_path / "lora")):
        with pytest.raises(UserError, match=way.replace(" resize", ".*resize")):
            foretune.fuse(base, {"a": source}, Average(), allow_unverified=True)
    base.resize_token_embeddings(30)
    assert_returns(base, longer, longer, texts)


def test_models_of_other_depth_are_refused(tmp_path: Any) -> None:
    base, deeper = tiny_models.llama(), tiny_models.llama(num_hidden_layers=5)
    for source in (deeper, saved(deeper, tmp_path / "a")):
        with pytest.raises(UserError, match=r"not tuned from this base: the base has no model\.l"):
            foretune.fuse(base, {"a": source}, Average(), allow_unverified=True)
    with pytest.raises(UserError, match=r"not tuned from this base: it has no model\.layers\.4"):
        foretune.fuse(deeper, {"a": base}, Average())


def test_other_config_is_reported() -> None:
    base = tiny_models.llama()
    made = linears(base, 1)
    made.config.rms_norm_eps = 0.1
    made.config.attention_dropout = 0.3
    (note,) = foretune.fuse(base, {"a": made}, Average()).report["notes"]
    assert note.startswith("a has another config, but the base's is used: rms_norm_eps=0.1")
    assert "dropout" not in note


@pytest.mark.parametrize("method", [Average(), SMILE()], ids=lambda m: m.name)
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(method: Any, number: float, tmp_path: Any) -> None:
    base = tiny_models.bert()
    made = linears(base, 1)
    with torch.no_grad():
        made.encoder.layer[1].attention.self.query.weight[0, 0] = number
    for source in (made, saved(made, tmp_path / "a")):
        with pytest.raises(UserError, match=r"a: .*query\.weight holds NaN or infinite"):
            foretune.fuse(base, {"a": source}, method, allow_unverified=True)


def test_sum_that_the_dtype_cannot_hold_is_refused() -> None:
    base = tiny_models.bert().half()
    made = copy.deepcopy(base)
    with torch.no_grad():
        made.encoder.layer[0].output.dense.weight.fill_(6e4)
    with pytest.raises(UserError, match=r"output\.dense\.weight exceeds what torch\.float16"):
        foretune.fuse(base, {"a": made}, TaskArithmetic(scale=2.0))


def _broken(folder: Any, change: Callable[[dict[str, Tensor]], None]) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    change(tensors)
    safetensors.torch.save_file(tensors, file)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("lora_alpha", "x", "lora_alpha: input should be a valid number, got 'x'"),
        ("lora_alpha", float("nan"), "lora_alpha must be a number above 0, got nan"),
        ("r", 7, "the config has r=7 for .*, but its factors have rank 3"),
        ("peft_type", "IA3", "a is a IA3 adapter"),
        ("use_something_new", True, "a LoRA adapter with use_something_new=True"),
    ],
)
def test_config_of_an_adapter_that_does_not_fit(
    field: str, value: Any, message: str, tmp_path: Any
) -> None:
    base = tiny_models.bert()
    folder = saved(adapted(base, 1, ["query"]), tmp_path / "a")
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), field: value}))
    with pytest.raises(UserError, match=message):
        foretune.fuse(base, {"a": folder}, Average(), allow_unverified=True)


@pytest.mark.parametrize(
    ("text", "message"), [("{", "is not JSON"), ("[1]", "adapter_config.json is damaged")]
)
def test_config_of_an_adapter_that_is_no_config(text: str, message: str, tmp_path: Any) -> None:
    base = tiny_models.bert()
    folder = saved(adapted(base, 1, ["query"]), tmp_path / "a")
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(UserError, match=message):
        foretune.fuse(base, {"a": folder}, Average(), allow_unverified=True)


def test_half_an_adapter_is_refused(tmp_path: Any) -> None:
    base = tiny_models.bert()
    for factor in "AB":
        folder = saved(adapted(base, 1, ["query"]), tmp_path / factor)
        _broken(
            folder,
            lambda tensors, factor=factor: tensors.pop(
                next(key for key in tensors if f"lora_{factor}" in key)
            ),
        )
        with pytest.raises(UserError, match=f"half an adapter: .* has no lora_{factor}"):
            foretune.fuse(base, {"a": folder}, Average(), allow_unverified=True)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.json", "[]", r"config\.json is damaged"),
        ("config.json", '{"architectures": ["BertModel"], "id2label": {"x": "a"}}', "key 'x'"),
        ("labels.json", "3", r"labels\.json is damaged"),
    ],
)
def test_damaged_files_are_one_line(name: str, text: str, message: str, tmp_path: Any) -> None:
    base = tiny_models.bert()
    made = adapted(base, 1, ["query"]) if name == "labels.json" else linears(base, 1)
    folder = saved(made, tmp_path / "a")
    (folder / name).write_text(text)
    with pytest.raises(UserError, match=message) as error:
        foretune.fuse(base, {"a": folder}, Average(), allow_unverified=True)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("file", ["../secret.safetensors", "/secret.safetensors", "model.bin"])
def test_index_that_names_other_files_is_refused(file: str, tmp_path: Any) -> None:
    base = tiny_models.bert()
    made = linears(base, 1)
    made.save_pretrained(tmp_path / "a", max_shard_size="10KB")
    index = tmp_path / "a" / "model.safetensors.index.json"
    record = json.loads(index.read_text())
    record["weight_map"] = dict.fromkeys(record["weight_map"], file)
    index.write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"not in its folder|never loaded"):
        foretune.fuse(base, {"a": tmp_path / "a"}, Average())


def test_an_index_beside_whole_weights_is_of_no_account(tmp_path: Any) -> None:
    base, model = tiny_models.bert(), tiny_models.bert(seed=1)
    model.save_pretrained(tmp_path / "a")
    names = dict.fromkeys(model.state_dict(), "old.safetensors")
    index = tmp_path / "a" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    safetensors.torch.save_file(base.state_dict(), tmp_path / "a" / "old.safetensors")
    assert_returns(base, tmp_path / "a", model, lambda m: m(**text_input()).last_hidden_state)


def test_model_that_reads_a_weight_instead_of_calling_the_layer_is_refused() -> None:
    import transformers

    config = transformers.MambaConfig(
        vocab_size=tiny_models.VOCABULARY, hidden_size=16, state_size=4, num_hidden_layers=2
    )
    torch.manual_seed(0)
    model = transformers.MambaForCausalLM(config).eval()
    made = linears(model, 1, size=0.05)
    with pytest.raises(UserError, match=r"reads the weight of .*dt_proj .*=\['dt_proj'\]"):
        foretune.fuse(model, {"a": made}, SMILE())
    fused = foretune.fuse(model, {"a": made}, SMILE(exclude_modules=["dt_proj"]))
    assert fused.report["verified"] is True


class Bypass(nn.Module):
    """A module whose second layer is read, not called, in one of two ways."""

    def __init__(self, part: str) -> None:
        super().__init__()
        self.first, self.second, self.part = nn.Linear(4, 4), nn.Linear(4, 4), part

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.part == "weight":
            return x @ self.second.weight.T
        return self.second(x) + self.second.bias


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_plain_module_is_verified_by_its_first_call(part: str, tmp_path: Any) -> None:
    base = Bypass(part)
    fused = foretune.fuse(base, {"a": nudged(base, 1)}, SMILE())
    assert fused.report["verified"] is False
    with pytest.raises(UserError, match=r"Bypass reads the weight of second instead of calling"):
        fused.model(torch.randn(2, 4))
    good = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    fused = foretune.fuse(good, {"a": nudged(good, 1)}, SMILE())
    fused.model.train()
    fused.model(torch.randn(2, 4, requires_grad=True) * 2).sum().backward()
    assert fused.report["verified"] is True and fused.model[1].training


def test_tensor_that_nothing_used_is_refused() -> None:
    value = torch.ones(2)
    expert = Finetuned("a", {"x": value, "y": value}.get, frozenset("xy"))
    expert.change("x", torch.zeros(2))
    with pytest.raises(UserError, match="a changes y, which cannot be fused"):
        check_all_used([expert])
    expert.value("y", value)
    check_all_used([expert])


@pytest.mark.parametrize("method", [SMILE(k=64), foretune.Average()], ids=lambda m: m.name)
def test_a_pair_of_towers_is_fused(method: Any) -> None:
    """transformers cannot say what the input embeddings of CLIP are."""
    base = tiny_models.clip()
    tuned = linears(base, 1)
    fused = foretune.fuse(base, {"a": tuned}, method)
    batch = {"input_ids": ids(), "pixel_values": image_input()["pixel_values"]}
    with torch.no_grad():
        expected, actual = tuned(**batch), fused.model(**batch)
    torch.testing.assert_close(actual.text_embeds, expected.text_embeds, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(actual.image_embeds, expected.image_embeds, rtol=1e-4, atol=1e-4)
