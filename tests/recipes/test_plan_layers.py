"""`foretune plan --layers`: what a step takes by its shapes is what a real one takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, T5Config

import tiny_models
from command_line import call, the_error, the_json
from foretune.adapters.bank import AdapterBank
from foretune.models.routing import route
from foretune.recipes.traced_step import FORMULAS, MB, blocks_of, to_fake, trace
from foretune.tasks.objectives.causal_lm import CausalLM
from foretune.training.data import SlotRows, TaskData
from foretune.training.learners.joint import Learner

NUMBER, LENGTH, RANK = 6, 12, 2
SIZES = {**tiny_models.DECODER, "hidden_size": 32, "intermediate_size": 48}


def learner_on(device: str, *, frozen: bool = False, slots: int = 1) -> Learner:
    """A tiny Llama with LoRA on all linear layers."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES))
    bank = AdapterBank(model, [str(i) for i in range(slots)], lora={"r": RANK})
    objective = CausalLM(tiny_models.tokenizer())
    return Learner(model, objective, bank=bank, learning_rate=None if frozen else 1e-3)


def traced(*, frozen: bool = False, precision: str = "fp32") -> Any:
    learner = learner_on("meta", frozen=frozen)
    to_fake(learner)
    return trace(learner, NUMBER, LENGTH, precision, predicts_tokens=True)


@pytest.mark.parametrize("frozen", [False, True])
def test_operations_are_those_that_a_real_step_multiplies(frozen: bool) -> None:
    learner = learner_on("cpu", frozen=frozen, slots=3)
    text = {"text": " ".join(tiny_models.WORDS[: LENGTH - 2])}
    slots = [SlotRows(str(i), [text] * (NUMBER // 3)) for i in range(3)]
    picks = [(slot, row) for slot in range(3) for row in range(NUMBER // 3)]
    step = TaskData(slots, learner.objective).step(picks, "train", train=True, seed=[0])
    assert step.num_tokens == NUMBER * LENGTH
    counter = FlopCounterMode(display=False, custom_mapping=FORMULAS)
    with learner.ready():
        learner.backward(step)  # the first one also tries out whether tasks can share a call
        with counter:
            learner.backward(step)
    counts = counter.get_flop_counts()
    planned = traced(frozen=frozen).flops
    for name in blocks_of(learner.model):
        real = sum(counts[f"LlamaForCausalLM.{name}"].values())
        assert planned[name] == pytest.approx(real, rel=1e-6), name


def test_operations_are_six_per_weight_and_token_and_those_of_attention() -> None:
    learner = learner_on("cpu")
    (name, block), *_ = blocks_of(learner.model).items()
    tokens, width = NUMBER * LENGTH, SIZES["hidden_size"]
    weights = sum(p.numel() for p in block.parameters() if p.dim() == 2)
    adapters = learner.bank.parameters_per_slot // SIZES["num_hidden_layers"]
    attention = (4 + 10) * NUMBER * LENGTH**2 * width
    assert traced().flops[name] == 6 * tokens * (weights + adapters) + attention


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_kept_is_what_a_real_pass_keeps(precision: str) -> None:
    learner = learner_on("cpu")
    owned = [*learner.model.parameters(), *learner.bank.parameters()]
    weights = {p.untyped_storage().data_ptr() for p in owned}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.zeros(NUMBER, LENGTH, dtype=torch.long)
    with (
        learner.bank.attached(),
        route((0,) * NUMBER),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        logits = learner.model(input_ids=ids).logits
        torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids.flatten())
    real = sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / MB
    planned = traced(precision=precision).kept_mb
    assert sum(planned.values()) == pytest.approx(real, rel=0.01)
    layers = [mb for name, mb in planned.items() if name]
    assert max(layers[1:]) == pytest.approx(min(layers[1:]), rel=0.02)


RECIPE = """\
name: large
model: {name: llama}
tasks: {source: rows.jsonl, unseen: 3}
objective: {kind: causal-lm}
retrain: {methods: [none, standard, peft-ml, reptile], steps: 4, learning_rate: 1e-4}
adapt: {method: lora, learning_rate: 1e-3, steps: 2, shots: [all]}
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder with the shapes of a decoder, its tokenizer, and no weights."""
    monkeypatch.chdir(tmp_path)
    LlamaConfig(**SIZES, architectures=["LlamaForCausalLM"]).save_pretrained("llama")
    tiny_models.tokenizer().save_pretrained("llama")
    words = tiny_models.WORDS
    rows = [
        {"task": f"t{t}", "text": " ".join(words[(t + i) % 9 : (t + i) % 9 + 8])}
        for t in range(8)
        for i in range(9)
    ]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    Path("large.yaml").write_text(RECIPE)
    return "large.yaml"


def test_a_model_without_weights_is_planned_layer_by_layer(recipe: str) -> None:
    assert "llama" in call("plan", recipe).stderr.splitlines()[-1]  # which lacks the weights
    planned = the_json("plan", recipe, "--layers", "--processes", "2")
    size = sum(p.numel() for p in learner_on("meta").model.parameters())
    none, standard, peft_ml, reptile = planned["retrain"]
    assert none["layers"] is None and none["seconds"] == 0
    for cost in (standard, peft_ml, reptile):
        base = [part for part in cost["layers"]["parts"] if "adapters" not in part["name"]]
        assert [part["name"] for part in base] == [
            "embedding", "4 LlamaDecoderLayer", "norms and the like", "head and loss"
        ]  # fmt: skip
        assert sum(part["parameters"] for part in base) == size
        assert sum(part["weights_mb"] for part in base) == pytest.approx(size * 4 / MB)
        state = 24 if cost is reptile else 12
        assert sum(part["training_mb"] for part in base) == pytest.approx(size * state / MB)
        assert 0 < cost["layers"]["share"]["memory_mb"] < cost["peak_memory_mb"]
    adapters = peft_ml["layers"]["parts"][-1]
    assert adapters["name"] == "adapters of 5 tasks"
    assert adapters["parameters"] == 5 * peft_ml["parameters"]["adapter"]
    adapting = planned["adapt"]["layers"]["parts"]
    assert [part["training_mb"] for part in adapting[:-1]] == [0.0] * 4
    assert adapting[1]["name"] == "4 LlamaDecoderLayer, frozen"
    assert 0 < adapting[1]["flops"] < peft_ml["layers"]["parts"][1]["flops"]


def test_layers_are_shown_in_eighty_columns(recipe: str) -> None:
    shown = call("plan", recipe, "--layers", "--processes", "4")
    assert shown.exit_code == 0, shown.output
    assert "Does retraining with adapters pay? The model that measures it is not" in shown.stdout
    for part in shown.stdout.split("\n\n"):
        if "layer by layer" in part or part.startswith("Total"):
            assert max(map(len, part.splitlines())) <= 80
    assert shown.stdout.count("layer by layer (GB)") == 4
    assert "In each of 4 processes (FSDP2): " in shown.stdout
    assert "planned from shapes" in shown.stdout


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--processes", "2"], "--processes plans a sharded base, layer by layer: add --layers"),
        (["--layers", "model.name=null", "model.file=my.py"], "--layers plans a model of texts by"),
        (["--layers", "--processes", "1"], "should be greater than or equal to 2"),
    ],
)
def test_what_cannot_be_planned_by_layers_is_refused(
    recipe: str, changes: list[str], message: str
) -> None:
    assert message in the_error("plan", recipe, *changes)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MixtralConfig(**SIZES, num_local_experts=2), "cannot be planned without its weights"),
        (T5Config(vocab_size=24, d_model=16, num_layers=2), "has no single list of layers"),
    ],
)
def test_architectures_that_cannot_be_planned_are_one_line(
    recipe: str, config: Any, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    config.save_pretrained("llama")
    refused = call("plan", recipe, "--layers")
    assert refused.exit_code == 2 and message in refused.stderr.splitlines()[-1]
    assert "Traceback" not in refused.stderr + capfd.readouterr().err


def test_recomputed_layers_keep_less_and_take_longer(recipe: str) -> None:
    plain, recomputed = (
        the_json("plan", recipe, "--layers", f"retrain.gradient_checkpointing={on}")["retrain"][2]
        for on in ("false", "true")
    )
    layers = [cost["layers"]["parts"][1] for cost in (plain, recomputed)]
    assert layers[1]["flops"] == pytest.approx(4 / 3 * layers[0]["flops"])
    assert layers[1]["kept_mb"] < 0.5 * layers[0]["kept_mb"]
