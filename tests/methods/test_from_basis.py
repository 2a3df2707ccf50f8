"""Method basis: posterior modes, what they are saved as, and what is refused."""

from __future__ import annotations

import copy

import numpy as np
import peft
import pytest
import scipy.optimize
import torch
from torch import nn

import foretune
import tiny_models
from foretune.adapters.bank import AdapterBank
from foretune.adapters.basis import Basis
from foretune.adapters.basis_file import set_basis
from foretune.adapters.task_adapters import BankAdapters
from foretune.errors import UserError
from foretune.methods import make
from foretune.run import Run
from foretune.tasks.task import Task, TaskCollection
from linear_tasks import Net, family

FULL = Run(steps=300, batch_size=10**6, device="cpu", warmup=0.0)


class Linear(nn.Module):
    """Logits of two classes, linear in x (n, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(5, 2)
        self.head_modules = ["out"]

    def forward(self, x):
        return self.out(x)


def heads(num_tasks, rank=2, seed=0):
    """(tasks, 12) weights and biases of heads in a random plane, not through zero."""
    rng = np.random.default_rng(seed)
    directions, mean = 2 * rng.normal(size=(rank, 12)), rng.normal(size=12)
    return mean + np.random.default_rng([seed, 1]).normal(size=(num_tasks, rank)) @ directions


def base_with(theta, labels=("0", "1")):
    """A base whose seen tasks have had these heads (tasks, 12)."""
    model = Linear()
    bank = AdapterBank(model, [f"seen{i}" for i in range(len(theta))], heads=["out"])
    values = torch.tensor(theta, dtype=torch.float32)
    for slot, value in enumerate(values):
        state = bank.head_state("out", slot)
        state["weight"].data.copy_(value[:10].view(2, 5))
        state["bias"].data.copy_(value[10:])
    set_basis(model, Basis.of(BankAdapters(bank), labels=labels))
    return model


def labelled(theta, num_rows, *, num_test=200, seed=5):
    """Tasks with these heads (tasks, 12)."""
    rng, tasks = np.random.default_rng(seed), []
    for i, value in enumerate(theta):
        x = rng.normal(size=(num_rows + num_test, 5)).astype("f4")
        logits = x @ value[:10].reshape(2, 5).T + value[10:]
        y = (rng.random(len(x)) < 1 / (1 + np.exp(logits[:, 0] - logits[:, 1]))).astype(int)
        y[:2] = 0, 1  # each class has a row
        rows = [{"x": a, "y": int(b)} for a, b in zip(x, y, strict=True)]
        tasks.append(Task(f"new{i}", rows[:num_rows], (), rows[num_rows:]))
    return TaskCollection(tuple(tasks), foretune.Classification())


def adapted_head(adapted, task):
    tensors = adapted.tensors[task, 0]
    return torch.cat([tensors[f"base_model.model.out.{n}"].flatten() for n in ("weight", "bias")])


@pytest.mark.parametrize(("strength", "free"), [(1.0, 0.0), (0.3, 0.0), (2.0, 0.5)])
def test_the_adapter_is_the_posterior_mode(strength, free):
    theta, task = heads(9, rank=4), labelled(heads(1), 30)
    method = make("basis", strength=strength, free=free, rank=2)
    ours = adapted_head(foretune.adapt(base_with(theta), task, method, FULL), "new0")

    mean = theta.mean(0)
    singular, rows = np.linalg.svd(theta - mean, full_matrices=False)[1:]
    directions = singular[:, None] * rows / np.sqrt(8)
    outside = np.sum(directions[2:] ** 2, 0)  # four directions describe these heads exactly
    sigma = np.sqrt(np.repeat([outside[:10].mean(), outside[10:].mean()], [10, 2]))
    x = np.stack([row["x"] for row in task["new0"].train])
    y = np.array([row["y"] for row in task["new0"].train])

    def objective(v):
        value = mean + v[:2] @ directions[:2] + free * sigma * v[2:]
        logits = x @ value[:10].reshape(2, 5).T + value[10:]
        loss = np.logaddexp(0, logits[:, 1 - 0] - logits[:, 0]) - (y == 1) * (
            logits[:, 1] - logits[:, 0]
        )
        return loss.sum() + strength / 2 * np.sum(v**2)

    v = scipy.optimize.minimize(objective, np.zeros(14), method="BFGS").x
    expected = mean + v[:2] @ directions[:2] + free * sigma * v[2:]
    assert ours.numpy() == pytest.approx(expected, abs=2e-3)


def test_few_rows_recover_a_task_of_the_seen_plane_and_a_plain_head_does_not():
    run = FULL.replace(steps=80)
    base, new = base_with(heads(40)[:30]), labelled(heads(40)[30:], 6)
    basis = foretune.adapt(base, new, make("basis"), run)
    head = foretune.adapt(base, new, make("head", learning_rate=0.1), run)
    scores = [np.mean(list(a.scores.values())) for a in (basis, head)]
    assert scores[0] > scores[1] + 0.05


def test_a_task_outside_the_plane_needs_the_free_directions():
    noise = np.random.default_rng(4).normal(size=(20, 12))
    base, new = base_with(heads(20) + 0.1 * noise), labelled(heads(5, rank=8, seed=3), 80)
    run = FULL.replace(steps=100)
    inside, beside = (
        np.mean(list(foretune.adapt(base, new, make("basis", free=f, rank=2), run).scores.values()))
        for f in (0.0, 20.0)
    )
    assert beside > inside + 0.05


def test_the_prior_weighs_the_same_in_batches_of_any_size():
    rows = [{"x": np.ones(5, "f4"), "y": np.array([3, -3], "f4")}] * 32  # any batch is like all
    new = TaskCollection((Task("new0", rows, (), rows),), foretune.Regression())
    base = base_with(heads(9), labels=())
    full, part = (
        adapted_head(foretune.adapt(base, new, make("basis", strength=30.0), run), "new0")
        for run in (FULL, FULL.replace(batch_size=4))
    )
    torch.testing.assert_close(full, part, rtol=1e-3, atol=1e-3)


def test_the_nearest_seen_adapter_is_the_start():
    theta = heads(9)
    base = base_with(theta)
    new = labelled(theta[[3, 7]], 400)
    method = make("basis", start="nearest", learning_rate=1e-9)
    adapted = foretune.adapt(base, new, method, FULL.replace(steps=1))
    for name, slot in (("new0", 3), ("new1", 7)):
        assert adapted_head(adapted, name).numpy() == pytest.approx(theta[slot], abs=1e-3)


def test_without_steps_the_adapter_is_the_mean():
    theta = heads(9)
    method = make("basis", learning_rate=1e-9, free=1.0)
    adapted = foretune.adapt(base_with(theta), labelled(heads(2), 8), method, FULL.replace(steps=1))
    assert adapted_head(adapted, "new1").numpy() == pytest.approx(theta.mean(0), abs=1e-4)
    assert adapted.cost["trainable_parameters"] == 2 + 12


def test_a_thousand_tasks_are_fitted_at_once():
    base, new = base_with(heads(30)), labelled(np.repeat(heads(10), 100, 0), 4, num_test=2)
    run = FULL.replace(steps=20)
    together = foretune.adapt(base, new, make("basis"), run)
    alone = foretune.adapt(base, new.subset(["new123"]), make("basis"), run)
    assert len(together.tensors) == 1000
    torch.testing.assert_close(
        adapted_head(together, "new123"), adapted_head(alone, "new123"), rtol=1e-3, atol=1e-4
    )


def text_tasks(labels, prefix):
    rows = [{"text": f"the {w} {v}", "label": w} for w in labels for v in "abcdef"]
    tasks = tuple(Task(f"{prefix}{i}", rows[i:] + rows[:1], (), rows) for i in range(3))
    return TaskCollection(tasks, foretune.Classification(tokenizer=tiny_models.tokenizer()))


@pytest.mark.parametrize("free", [0.0, 1.0])
@pytest.mark.parametrize("form", ["lora", "last-layer"])
def test_stock_peft_loads_the_adapter_and_gives_the_same_logits(form, free, tmp_path):
    run = Run(steps=4, batch_size=4, device="cpu")
    base = tiny_models.bert(num_labels=2, num_hidden_layers=1)
    retraining = make("peft-ml", form=form, adapter_learning_rate=0.1, lora={"r": 2})
    tasks = text_tasks(("red", "blue"), "seen")
    base = foretune.retrain(base, tasks, retraining, run).model
    new = text_tasks(("red", "blue"), "new")
    method = make("basis", free=free, strength=0.01)
    adapted = foretune.adapt(base, new, method, run)
    adapted.save(tmp_path)
    model = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "new1").eval()
    texts = [row["text"] for row in new["new1"].test]
    batch = tiny_models.tokenizer()(texts, return_tensors="pt", padding=True)
    logits = model(**batch).logits.detach()
    torch.testing.assert_close(logits, merged(base, adapted, "new1")(**batch).logits.detach())
    assert not torch.allclose(logits, base(**batch).logits.detach(), atol=1e-4)
    hits = logits.argmax(1).numpy() == np.array(["blue" not in text for text in texts])
    assert hits.mean() == pytest.approx(adapted.scores["new1", 0])


def merged(base, adapted, task):
    """A copy of the base with a task's changes added and its heads in place."""
    model, tensors = copy.deepcopy(base), adapted.tensors[task, 0]
    with torch.no_grad():
        for name, p in model.named_parameters():
            key = f"base_model.model.{name}".removesuffix(".weight")
            if f"{key}.lora_A.weight" in tensors:
                p += tensors[f"{key}.lora_B.weight"] @ tensors[f"{key}.lora_A.weight"]
            elif f"base_model.model.{name}" in tensors:
                p.copy_(tensors[f"base_model.model.{name}"])
    return model


def test_a_base_without_a_basis_is_refused():
    with pytest.raises(UserError, match="this base has no basis of adapters") as error:
        foretune.adapt(Net(), family(), make("basis"), FULL)
    assert "\n" not in str(error.value)


def test_heads_for_other_labels_are_refused():
    run = Run(steps=2, batch_size=4, device="cpu")
    base = tiny_models.bert(num_labels=2, num_hidden_layers=1)
    retraining = make("peft-ml", form="last-layer", adapter_learning_rate=0.1)
    base = foretune.retrain(base, text_tasks(("red", "blue"), "seen"), retraining, run).model
    with pytest.raises(UserError, match="has heads for the labels 'blue', 'red', these tasks have"):
        foretune.adapt(base, text_tasks(("cat", "dog"), "new"), make("basis"), run)


def test_tasks_with_labels_of_their_own_get_heads_of_their_own():
    """The layers' changes lie in the basis; the heads are fitted under a prior of their scale."""
    run = Run(steps=3, batch_size=4, device="cpu")
    base = tiny_models.bert(num_labels=2, num_hidden_layers=1)
    seen = [text_tasks(pair, f"s{i}") for i, pair in enumerate((("red", "blue"), ("a", "b")))]
    seen = TaskCollection(seen[0].tasks + seen[1].tasks, seen[0].objective)
    outcome = foretune.retrain(base, seen, make("peft-ml", adapter_learning_rate=0.1), run)
    assert outcome.basis.kind == "lora" and "classifier.weight" in outcome.basis.spread
    adapted = foretune.adapt(outcome.model, text_tasks(("cat", "dog"), "new"), make("basis"), run)
    names = set(adapted.tensors["new0", 0])
    assert "base_model.model.classifier.weight" in names


def test_whole_models_make_no_basis():
    with pytest.raises(UserError, match="full trains no adapters to make a basis of"):
        foretune.fit_basis(Net(), family(), make("full"), FULL)
    with pytest.raises(UserError, match="adapters of 1 tasks make no basis"):
        foretune.fit_basis(Net(), family(1), make("lora"), FULL.replace(steps=1))


def test_a_retraining_without_adapters_takes_the_basis_off():
    base = Net()
    run = Run(steps=3, device="cpu")
    set_basis(base, foretune.fit_basis(base, family(4), make("head"), run))
    outcome = foretune.retrain(base, family(4), make("standard"), run)
    with pytest.raises(UserError, match="no basis"):
        foretune.adapt(outcome.model, family(2), make("basis"), run)
