"""The basis of adapters against dense NumPy statements of the same, and its file."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import foretune
import tiny_models
from foretune import formats
from foretune.adapters.bank import AdapterBank
from foretune.adapters.basis import Basis
from foretune.adapters.basis_bank import coefficients_in, lora_of
from foretune.adapters.basis_file import basis_of, load_basis, save_basis, set_basis
from foretune.adapters.coefficients import Coefficients
from foretune.adapters.task_adapters import BankAdapters
from foretune.errors import UserError
from foretune.methods import make
from foretune.models.loading import load_base
from foretune.run import Run
from format_checks import newer
from linear_tasks import Net, family

LORA = {"r": 2, "lora_alpha": 4}


def random_bank(num_tasks=7, *, lora=LORA, heads=("out",), seed=0, model=None):
    bank = AdapterBank(model or Net(), [f"t{i}" for i in range(num_tasks)], lora=lora, heads=heads)
    generator = torch.Generator().manual_seed(seed)
    for p in bank.parameters():
        p.data = torch.randn(p.shape, generator=generator)
    return bank


def basis_of_random(**options):
    basis = Basis.of(BankAdapters(random_bank(**options)))
    assert basis is not None
    return basis


def changes(bank, layer):
    """(tasks, out, in) s·B A."""
    pairs = [bank.factors(layer, slot) for slot in range(len(bank.keys))]
    return torch.stack([2.0 * b @ a for a, b in pairs]).detach().double().numpy()


def test_directions_of_heads_are_the_principal_components_of_weights_and_biases():
    bank = random_bank(lora=None)
    basis = Basis.of(BankAdapters(bank), max_rank=3)
    states = [bank.head_state("out", slot) for slot in range(7)]
    x = np.stack(
        [torch.cat([s["weight"].flatten(), s["bias"]]).detach().numpy() for s in states]
    ).astype(float)
    mean = x.mean(0)
    singular, rows = np.linalg.svd(x - mean)[1:]
    ours = torch.cat([basis.directions[f"out.{n}"].flatten(1) for n in ("weight", "bias")], 1)
    dense = singular[:3, None] * rows[:3] / np.sqrt(6)
    assert np.abs(np.sum(ours.numpy() * dense, 1)) == pytest.approx(singular[:3] ** 2 / 6, rel=1e-4)
    assert basis.mean["out.bias"].numpy() == pytest.approx(mean[-3:], abs=1e-5)
    assert basis.explained == pytest.approx(singular[:3] ** 2 / np.sum(singular**2), rel=1e-5)
    recovered = torch.cat([basis.mean["out.weight"].flatten(), basis.mean["out.bias"]])
    recovered = recovered + basis.seen @ ours
    assert np.linalg.norm(recovered.numpy() - x) ** 2 == pytest.approx(sum(singular[3:] ** 2))


def test_all_directions_of_all_ranks_describe_the_changes_exactly():
    bank = random_bank()
    basis = Basis.of(BankAdapters(bank), max_lora_rank=64)
    cores = basis.mean["body"] + torch.einsum("tk,kqp->tqp", basis.seen, basis.directions["body"])
    rebuilt = basis.left["body"] @ cores @ basis.right["body"]
    assert rebuilt.numpy() == pytest.approx(changes(bank, "body"), abs=1e-4)


def test_shared_factors_are_the_leading_singular_vectors_of_the_stacked_changes():
    bank = random_bank()
    basis = Basis.of(BankAdapters(bank), max_lora_rank=2)
    dense = changes(bank, "body")
    right = np.linalg.svd(np.concatenate(list(dense)))[2][:2]
    left = np.linalg.svd(np.concatenate(list(dense), 1))[0][:, :2]
    v, u = basis.right["body"].numpy(), basis.left["body"].numpy()
    assert v.T @ v == pytest.approx(right.T @ right, abs=1e-4)
    assert u @ u.T == pytest.approx(left @ left.T, abs=1e-4)


@pytest.mark.parametrize("rank", [2, 12])
def test_spread_and_share_hold_what_the_shared_factors_leave_out(rank):
    bank = random_bank(lora={"r": 2, "lora_alpha": 4, "target_modules": ["body"]}, heads=())
    basis = Basis.of(BankAdapters(bank), max_rank=1, max_lora_rank=rank)
    dense = changes(bank, "body").reshape(7, -1)
    outside = distances = 0.0
    for fold in range(5):
        held = np.arange(7) % 5 == fold
        mean = dense[~held].mean(0)
        direction = np.linalg.svd(dense[~held] - mean)[2][:1]
        x = dense[held] - mean
        outside += np.sum((x - x @ direction.T @ direction) ** 2)
        distances += np.sum(x**2)
    if rank == 12:  # else the direction is that of the cores
        assert basis.spread["body"] ** 2 == pytest.approx(outside / 7, rel=1e-4)
        assert basis.in_span == pytest.approx(1 - outside / distances, rel=1e-4, abs=1e-6)
        explained = np.linalg.svd(dense - dense.mean(0))[1] ** 2
        assert basis.explained == pytest.approx([explained[0] / explained.sum()], rel=1e-4)
    else:
        assert basis.spread["body"] ** 2 > 0.9 * outside / 7


def test_share_in_span_is_one_inside_and_small_outside():
    bank = random_bank()
    basis = Basis.of(BankAdapters(bank), max_lora_rank=64)
    assert basis.share_in_span(BankAdapters(bank)).numpy() == pytest.approx(1, abs=1e-4)
    other = basis.share_in_span(BankAdapters(random_bank(seed=1)))
    assert other.shape == (7,) and 0 < float(other.max()) < 0.7


def test_a_change_of_units_of_the_heads_changes_no_direction():
    bank = random_bank()
    before = Basis.of(BankAdapters(bank), max_rank=2)
    for p in bank.heads.parameters():
        p.data *= 1000
    after = Basis.of(BankAdapters(bank), max_rank=2)
    a, b = before.directions["body"].flatten(1), after.directions["body"].flatten(1)
    assert (a * b).sum(1).abs().numpy() == pytest.approx(a.square().sum(1).numpy(), rel=1e-3)


def test_tasks_of_a_shared_subspace_are_found_in_the_span_of_the_others():
    bank = random_bank(40, lora=None)
    generator = torch.Generator().manual_seed(2)
    weights = torch.randn(40, 2, generator=generator)
    for p in bank.parameters():
        directions = torch.randn(2, p[0].numel(), generator=generator)
        p.data = (weights @ directions).view_as(p) + 0.01 * p
    basis = Basis.of(BankAdapters(bank), max_rank=2)
    assert basis.in_span > 0.99 and sum(basis.explained) > 0.99


def test_heads_of_different_labels_have_a_spread_alone():
    bank = random_bank()
    basis = Basis.of(BankAdapters(bank), labels=None)
    weight = torch.stack([bank.head_state("out", slot)["weight"] for slot in range(7)])
    assert basis.kind == "lora" and "out.weight" not in basis.mean
    size = float(weight.detach().square().mean()) ** 0.5
    assert basis.spread["out.weight"] == pytest.approx(size)


def test_there_is_no_basis_of_one_task_nor_of_equal_adapters():
    assert Basis.of(BankAdapters(random_bank(1))) is None
    assert Basis.of(BankAdapters(AdapterBank(Net(), ["a", "b"], lora=LORA))) is None


@pytest.mark.parametrize("model", [tiny_models.plain, tiny_models.gpt2])
def test_convolutions_and_transposed_layers_are_described(model):
    base = model()
    bank = random_bank(4, model=base, heads=())
    basis = Basis.of(BankAdapters(bank), max_lora_rank=64)
    set_basis(base, basis)
    new = AdapterBank(base, bank.keys, lora=lora_of(basis, free=False))
    coefficients = coefficients_in(basis, new)
    coefficients.z.data = basis.seen.clone()
    coefficients.write(range(4))
    for layer in bank.layer_names:
        for slot in range(4):
            expected = bank.mean_delta(layer, [slot])
            torch.testing.assert_close(
                new.mean_delta(layer, [slot]), expected, rtol=1e-3, atol=1e-3
            )


@pytest.mark.parametrize("slots", [[0, 1, 2], [0, 2], [1]])
@pytest.mark.parametrize("learn_shared", [False, True])
def test_gradients_of_coefficients_are_those_of_autograd(slots, learn_shared):
    bank = random_bank(3)
    generator = torch.Generator().manual_seed(3)
    parameters = dict(bank.named_parameters())
    mean = {n: torch.randn(p.shape[1:], generator=generator) for n, p in parameters.items()}
    directions = {n: torch.randn(4, *mu.shape, generator=generator) for n, mu in mean.items()}
    scales = dict.fromkeys(list(parameters)[:2], 0.5)
    coefficients = Coefficients(bank, mean, directions, scales=scales, learn_shared=learn_shared)
    for p in coefficients.per_slot:
        p.data = torch.randn(p.shape, generator=generator)
    coefficients.write(range(3))
    targets = {n: torch.randn(p.shape, generator=generator) for n, p in parameters.items()}
    # what a backward pass over these slots leaves in the bank
    for name, p in parameters.items():
        p.grad = torch.zeros_like(p)
        p.grad[slots] = targets[name][slots]
    coefficients.pull_back(slots)

    z = coefficients.z.detach().clone().requires_grad_()
    shared = {
        name: (mean[name].requires_grad_(), directions[name].requires_grad_()) for name in mean
    }
    free = {n: coefficients.free.get(n).detach().clone().requires_grad_() for n in scales}
    loss = torch.zeros(())
    for name, (mu, p) in shared.items():
        theta = mu + torch.einsum("tk,k...->t...", z, p)
        theta = theta + scales[name] * free[name] if name in scales else theta
        torch.testing.assert_close(parameters[name].data, theta.detach())
        loss = loss + (theta[slots] * targets[name][slots]).sum()
    loss.backward()
    torch.testing.assert_close(coefficients.z.grad, z.grad)
    for name in scales:
        torch.testing.assert_close(coefficients.free.get(name).grad, free[name].grad)
    for name, (mu, p) in shared.items():
        ours = coefficients.mean.get(name).grad, coefficients.directions.get(name).grad
        if learn_shared:
            torch.testing.assert_close(ours[0], mu.grad)
            torch.testing.assert_close(ours[1], p.grad)
        else:
            assert ours == (None, None)
    assert all(p.grad is None or not p.grad.any() for p in bank.parameters())


def test_free_directions_of_a_layer_have_orthonormal_inputs():
    base = tiny_models.bert()
    basis = basis_of_random(num_tasks=3, model=base, heads=(), lora={"r": 1, "lora_alpha": 1})
    bank = AdapterBank(base, ["new"], lora=lora_of(basis, free=True))
    coefficients = coefficients_in(basis, bank, free=1.0)
    for layer in bank.layer_names:
        a, b = bank.factors(layer, 0)
        assert len(a) == 16
        torch.testing.assert_close(a @ a.T, torch.eye(16), atol=1e-5, rtol=0)
        torch.testing.assert_close(a[: len(basis.right[layer])], basis.right[layer])
        # a draw from the prior is as far from the mean as a seen task is from the others' span
        sigma = coefficients.scales[f"layers.{layer.replace('.', '/')}.b"]
        assert sigma * b.numel() ** 0.5 == pytest.approx(basis.spread[layer], rel=1e-4)


def test_directions_that_are_not_used_widen_the_free_ones():
    basis = basis_of_random(lora=None)
    bank = AdapterBank(Net(), ["new"], heads=["out"])
    name = "heads.out.stacked.weight"
    narrow, wide = (
        coefficients_in(basis, bank, rank=rank, free=1.0).scales[name] ** 2 for rank in (None, 2)
    )
    unused = basis.directions["out.weight"][2:].square().sum(0).mean()
    assert wide - narrow == pytest.approx(float(unused), rel=1e-4)


RUN = Run(steps=4, batch_size=4, device="cpu")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A base of transformers with a basis, and its folder."""
    folder = tmp_path_factory.mktemp("saved")
    return retrained(out=folder / "run"), folder / "run"


def retrained(**changes):
    rows = [{"text": f"the {w} {v}", "label": w} for w in ("red", "blue") for v in "abcdefgh"]
    objective = foretune.Classification(tokenizer=tiny_models.tokenizer())
    tasks = tuple(foretune.Task(f"t{i}", rows[i:], (), rows[:2]) for i in range(4))
    base = tiny_models.bert(num_labels=2, num_hidden_layers=1)
    method = make("peft-ml", learning_rate=0.01, lora={"r": 1, "lora_alpha": 1})
    collection = foretune.TaskCollection(tasks, objective)
    return foretune.retrain(base, collection, method, RUN.replace(**changes))


def tensors_of(basis):
    parts = (basis.mean, basis.directions, basis.left, basis.right, {"seen": basis.seen})
    return [value for part in parts for value in part.values()]


def test_the_basis_lies_beside_the_base_and_comes_back_with_it(saved):
    outcome, folder = saved
    model, _ = load_base(folder / "base")
    loaded = basis_of(model)
    assert loaded is not None and loaded is basis_of(copy.deepcopy(model))
    pairs = zip(tensors_of(outcome.basis), tensors_of(loaded), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert (loaded.spread, loaded.scale) == (outcome.basis.spread, outcome.basis.scale)
    assert not any("basis" in name for name in model.state_dict())


def test_resuming_a_finished_retraining_returns_its_basis(saved):
    outcome, folder = saved
    again = retrained(out=folder, resume=True)
    assert torch.equal(again.basis.seen, outcome.basis.seen)
    assert basis_of(again.model) is again.basis


def test_transformers_does_not_see_the_file(saved):
    import transformers

    folder = saved[1] / "base"
    assert [path.name for path in folder.glob("*.safetensors")] == ["model.safetensors"]
    stock = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    state = saved[0].model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in stock.state_dict().items())


def damaged(change):
    def write(file):
        with safe_open(file, "pt") as stored:
            metadata = stored.metadata()
        tensors = load_file(file)
        about = json.loads(metadata["about"])
        change(tensors, about, metadata)
        save_file(
            tensors,
            file,
            {"about": json.dumps(about), **{k: v for k, v in metadata.items() if k != "about"}},
        )

    return write


LAYER = "bert.encoder.layer.0.output.dense"
DAMAGE = {
    "not a readable safetensors file": lambda file: file.write_bytes(file.read_bytes()[:-9]),
    "holds NaN": damaged(lambda t, a, m: t["seen"].fill_(float("nan"))),
    "seen is missing": damaged(lambda t, a, m: t.pop("seen")),
    "extra is not needed": damaged(lambda t, a, m: t.update(extra=torch.zeros(1))),
    "do not fit one another": damaged(
        lambda t, a, m: t.update({f"left:{LAYER}": torch.zeros(16, 9)})
    ),
    "its format is None": damaged(lambda t, a, m: m.pop("format")),
    "written by a newer foretune": damaged(lambda t, a, m: m.update(format=newer(formats.BASIS))),
    "is damaged: heads": damaged(lambda t, a, m: a.update(heads=3)),
    "belongs to another base": damaged(lambda t, a, m: a.update(base="0" * 40)),
    "does not fit the base beside it: BertForSequenceClassification has no": damaged(
        lambda t, a, m: t.update({f"left:{LAYER}": torch.zeros(17, t[f"left:{LAYER}"].shape[1])})
    ),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_a_damaged_basis_is_refused_in_one_line(saved, tmp_path, message):
    import shutil

    folder = shutil.copytree(saved[1] / "base", tmp_path / "base")
    DAMAGE[message](folder / "foretune_basis" / "basis.safetensors")
    with pytest.raises(UserError, match=message) as error:
        load_base(folder)
    assert "\n" not in str(error.value) and "basis.safetensors" in str(error.value)


def test_a_basis_can_be_put_beside_a_base_later(tmp_path):
    folder = tmp_path / "out"
    tasks, run = family(4), Run(steps=4, device="cpu")
    outcome = foretune.retrain(Net(), tasks, make("standard"), run.replace(out=folder))
    assert outcome.basis is None and load_basis(folder / "base") is None
    basis = foretune.fit_basis(outcome.model, tasks, make("lora"), run)
    save_basis(basis, folder / "base")
    loaded = load_basis(folder / "base")
    assert loaded is not None and torch.equal(loaded.seen, basis.seen)
    save_basis(basis, folder / "base")  # what is there may be replaced
