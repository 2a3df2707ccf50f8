"""SaRA: which entries are trained, by which gradient, and what is saved."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import foretune
import linear_tasks
import tiny_models
from foretune import Run, SaRA, Task, TaskCollection, UserError, load_sparse
from foretune.adapters.entries import entries_below, threshold_of
from foretune.adapters.sparse import SparseDelta
from foretune.files import SPARSE_FILE
from foretune.linalg.low_rank import nuclear_gradient
from foretune.tasks.objectives.regression import Regression
from foretune.training.learners.sara import SaRALearner
from linear_tasks import copy_of, equal_bits, family

RUN = Run(steps=8, batch_size=4, device="cpu", weight_decay=0.1, warmup=0.0)


class Mixed(nn.Module):
    """A convolution, a norm with running statistics, a tied pair of linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x):
        h = self.norm(self.conv(x)).mean((2, 3))
        return self.second(torch.tanh(self.first(h)))


def seeded(build, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def text_model():
    return tiny_models.bert(num_hidden_layers=1, initializer_range=0.4)


MODELS = {
    "mixed": (lambda: seeded(Mixed), lambda: torch.linspace(-1, 1, 32).view(2, 1, 4, 4)),
    "bert": (text_model, lambda: torch.arange(4, 12).view(2, 4)),
    "gpt2": (lambda: tiny_models.gpt2(n_layer=1), lambda: torch.arange(4, 12).view(2, 4)),
    "llama": (lambda: tiny_models.llama(num_hidden_layers=1), lambda: torch.arange(4, 12)[None]),
    "qwen2": (lambda: tiny_models.qwen2(num_hidden_layers=1), lambda: torch.arange(4, 12)[None]),
}


def loss_of(model, x):
    out = model(x)
    out = out if isinstance(out, torch.Tensor) else out[0]
    return (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).square().sum()


def delta_of(model, fraction=0.3):
    threshold = threshold_of(model, fraction)
    return SparseDelta(model, entries_below(model, threshold), threshold=threshold)


def outside(model, before, delta):
    """Whether everything but the delta's entries is unchanged, bit for bit."""
    for name, p in model.named_parameters():
        mask = torch.ones(p.numel(), dtype=torch.bool)
        if name in delta.support:
            mask[delta.support[name]] = False
        if not torch.equal(p.detach().view(-1)[mask], before[name].view(-1)[mask]):
            return False
    return True


def trained(method, *, model=None, run=RUN, tasks=None):
    """(the adapted model, the entries that were trained)."""
    model = linear_tasks.Net() if model is None else model
    result = foretune.adapt(model, tasks or family(1), method, run)
    return result.models["task0", 0], result.learners["task0", 0].delta


def adapted(method, **options):
    return trained(method, **options)[0]


# --- the entries ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_entries_are_those_below_the_threshold(name):
    model = MODELS[name][0]()
    indices = entries_below(model, 0.05)
    for key, p in model.named_parameters():
        assert set(indices[key].tolist()) == {i for i, v in enumerate(p.flatten()) if abs(v) < 0.05}
        assert indices[key].dtype == torch.int32


@pytest.mark.parametrize("fraction", [0.01, 0.37, 1.0])
def test_fraction_takes_that_share_of_all_entries(fraction):
    model = seeded(lambda: nn.Sequential(nn.Linear(9, 11), nn.Linear(11, 7)))
    total = sum(p.numel() for p in model.parameters())
    indices = entries_below(model, threshold_of(model, fraction))
    assert sum(map(len, indices.values())) == round(fraction * total)


def test_frozen_parameters_have_no_entries_and_stay_frozen():
    model = linear_tasks.Net()
    model.body.requires_grad_(False)
    result = adapted(SaRA(fraction=1.0, learning_rate=0.1), model=model)
    assert equal_bits(model.body.state_dict(), result.body.state_dict())
    assert not torch.equal(model.out.weight, result.out.weight)


def test_a_quantile_gives_the_bottom_support_of_pefts_super_tuning():
    peft = pytest.importorskip("peft")
    if not hasattr(peft, "SupertuningConfig"):
        pytest.skip("this peft has no Super-Tuning")
    model = seeded(lambda: nn.Sequential(nn.Linear(12, 10, bias=False)))
    ours = entries_below(model, threshold_of(model, 0.25))["0.weight"]
    config = peft.SupertuningConfig(target_modules=["0"], select_top=False, sparsity=0.75)
    layer = peft.get_peft_model(model, config).base_model.model[0]
    theirs = layer.supertuning_indices["default"]
    assert sorted(theirs.flatten().tolist()) == sorted(ours.tolist())


# --- the gradient and the step --------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_gradient_of_the_values_is_the_dense_gradient_at_the_entries(name):
    build, inputs = MODELS[name]
    dense, model = build(), build()
    loss_of(dense, inputs()).backward()
    delta = delta_of(model)
    with delta.attached():
        loss_of(model, inputs()).backward()
        assert all(p.grad is None for p in model.parameters())
    for key, p in dense.named_parameters():
        if key in delta.values and p.grad is not None:
            expected = p.grad.flatten()[delta.indices[key]]
            assert torch.equal(delta.values[key].grad, expected)


def test_two_backward_passes_add_up():
    model = seeded(Mixed).eval()
    delta, x = delta_of(model), MODELS["mixed"][1]()
    with delta.attached():
        loss_of(model, x).backward()
        once = [v.grad.clone() for v in delta.parameters()]
        loss_of(model, x).backward()
    for value, first in zip(delta.parameters(), once, strict=True):
        torch.testing.assert_close(value.grad, 2 * first)


@pytest.mark.parametrize("name", ["mixed", "bert"])
def test_adamw_on_the_entries_is_dense_adamw_with_masked_gradients(name):
    build, inputs = MODELS[name]
    model, dense = build(), build()
    delta = delta_of(model)
    options = {"lr": 0.01, "weight_decay": 0.1}
    ours = delta.write_after(torch.optim.AdamW(delta.parameters(), **options))
    theirs = torch.optim.AdamW(dense.parameters(), **options)
    before = copy_of(model)
    masks = {}
    for key, p in dense.named_parameters():
        masks[key] = torch.zeros(p.numel(), dtype=torch.bool)
        masks[key][delta.support.get(key, torch.zeros(0, dtype=torch.long))] = True
    for _ in range(5):
        with delta.attached():
            loss_of(model, inputs()).backward()
        ours.step()
        ours.zero_grad()
        loss_of(dense, inputs()).backward()
        before_step = {k: p.detach().clone() for k, p in dense.named_parameters()}
        for key, p in dense.named_parameters():
            if p.grad is not None:
                p.grad.view(-1)[~masks[key]] = 0
        theirs.step()
        theirs.zero_grad()
        with torch.no_grad():  # weight decay is for the entries alone
            for key, p in dense.named_parameters():
                p.view(-1)[~masks[key]] = before_step[key].view(-1)[~masks[key]]
    for (key, p), q in zip(model.named_parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6, msg=key)
    assert outside(model, before, delta)
    assert any(not torch.equal(p, before[k]) for k, p in model.named_parameters())


def test_optimizer_state_is_two_numbers_an_entry():
    model = seeded(Mixed)
    delta = delta_of(model)
    optimizer = torch.optim.AdamW(delta.parameters())
    with delta.attached():
        loss_of(model, MODELS["mixed"][1]()).backward()
    optimizer.step()
    held = sum(v.numel() for s in optimizer.state.values() for k, v in s.items() if k != "step")
    assert held == 2 * delta.numel() == 2 * sum(map(len, delta.support.values()))


def test_making_and_writing_a_delta_keeps_every_bit():
    model = seeded(Mixed)
    before = copy_of(model)
    delta = delta_of(model)
    delta.write()
    assert equal_bits(model.state_dict(), before)


@pytest.mark.parametrize("reselect", [None, 0.5])
@pytest.mark.parametrize("nuclear", [0.0, 0.1])
def test_outside_the_entries_adapting_keeps_every_bit(reselect, nuclear):
    base = linear_tasks.Net()
    method = SaRA(fraction=0.4, learning_rate=0.05, reselect=reselect, nuclear=nuclear)
    model, delta = trained(method, model=base)
    assert outside(model, copy_of(base), delta)
    assert not equal_bits(model.state_dict(), base.state_dict())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_adapting_is_the_written_out_loop():
    """The loop's AdamW on the values, against dense AdamW whose other entries are restored."""
    base = linear_tasks.Net()
    run = RUN.replace(schedule="constant", max_grad_norm=None, batch_size=24)
    method = SaRA(fraction=0.5, learning_rate=0.05, nuclear=0.0, reselect=None)
    ours, delta = trained(method, model=base, run=run)
    dense = linear_tasks.Net()
    optimizer = torch.optim.AdamW(dense.parameters(), lr=0.05, weight_decay=0.1)
    masks = {n: (p.detach().abs() < delta.threshold) for n, p in dense.named_parameters()}
    rows = family(1)["task0"].train
    x, y = (torch.stack([torch.from_numpy(row[k]) for row in rows]) for k in ("x", "y"))
    for _ in range(run.steps):
        (dense(x) - y).square().sum(1).mean().backward()
        before_step = copy_of(dense)
        for n, p in dense.named_parameters():
            p.grad[~masks[n]] = 0
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for n, p in dense.named_parameters():
                p[~masks[n]] = before_step[n][~masks[n]]
    for p, q in zip(ours.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


# --- the nuclear term -----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (6, 6)])
def test_nuclear_gradient_is_u_vt(shape):
    a = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, vh = torch.linalg.svd(a, full_matrices=False)
    torch.testing.assert_close(nuclear_gradient(a), u @ vh, rtol=1e-4, atol=1e-5)


def test_nuclear_gradient_leaves_out_zero_singular_values():
    a = torch.outer(torch.tensor([1.0, 2.0, 0.0]), torch.tensor([3.0, 4.0]))
    torch.testing.assert_close(nuclear_gradient(a), a / (5**0.5 * 5))
    assert not nuclear_gradient(torch.zeros(3, 2)).any()


def test_nuclear_term_is_the_gradient_of_the_norm_of_the_masked_matrix():
    model = seeded(lambda: nn.Sequential(nn.Conv2d(2, 6, 3), nn.Flatten(), nn.Linear(6, 5)))
    model.double()
    delta = delta_of(model, 0.6)
    delta.add_nuclear(0.7)
    for name in ("0.weight", "2.weight"):
        p = dict(model.named_parameters())[name]
        positions = delta.indices[name]
        matrix = torch.zeros(p.numel(), dtype=torch.double)
        matrix[positions] = delta.values[name].detach()

        def norm(flat, p=p):
            return torch.linalg.svdvals(flat.view(p.shape[0], -1)).sum().item()

        step = 1e-6
        for i, place in list(enumerate(positions.tolist()))[:10]:
            up, down = matrix.clone(), matrix.clone()
            up[place] += step
            down[place] -= step
            slope = (norm(up) - norm(down)) / (2 * step)
            assert delta.values[name].grad[i].item() == pytest.approx(0.7 * slope, abs=1e-5)
    assert delta.values["0.bias"].grad is None


def test_nuclear_term_changes_what_is_learnt():
    without, with_it = (
        adapted(SaRA(fraction=0.5, learning_rate=0.05, nuclear=nuclear, nuclear_over="all"))
        for nuclear in (0.0, 1.0)
    )
    assert not torch.equal(without.out.weight, with_it.out.weight)


def test_one_large_matrix_in_each_step_has_the_nuclear_term():
    sizes = [(1, 65), (65, 70), (70, 66), (66, 64), (64, 1)]
    model = seeded(lambda: nn.Sequential(*(nn.Linear(*size) for size in sizes)))
    delta = delta_of(model, 0.5)
    assert delta.large_matrices() == ["1.weight", "2.weight"]
    learner = SaRALearner(
        delta, Regression(), learning_rate=1e-3, nuclear=1.0, nuclear_over="one", reselect=None
    )
    drawn = []
    for learner.updates in range(12):
        [name] = learner.one_matrix(seed=0)
        drawn.append(name)
        assert learner.one_matrix(seed=0) == [name]
    assert set(drawn) == {"1.weight", "2.weight"}
    delta.add_nuclear(1.0, ["2.weight"])
    assert [name for name, value in delta.values.items() if value.grad is not None] == ["2.weight"]


def test_small_matrices_have_no_nuclear_term_unless_all_have():
    without, one = (
        adapted(SaRA(fraction=0.5, learning_rate=0.05, nuclear=nuclear)) for nuclear in (0.0, 1.0)
    )
    assert torch.equal(without.out.weight, one.out.weight)


# --- reselection ----------------------------------------------------------------------------------


def test_reselection_goes_on_with_what_is_still_small_and_freezes_the_rest():
    model = seeded(Mixed)
    delta, x = delta_of(model, 0.5), MODELS["mixed"][1]()
    optimizer = delta.write_after(torch.optim.AdamW(delta.parameters(), lr=0.05))

    def step():
        with delta.attached():
            loss_of(model, x).backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(4):
        step()
    moments = {n: optimizer.state[v]["exp_avg"].clone() for n, v in delta.values.items()}
    first, held = dict(delta.indices), copy_of(model)
    before, after = delta.reselect(optimizer)
    assert 0 < after < before == sum(map(len, first.values()))
    parameters = dict(model.named_parameters())
    for name, positions in delta.indices.items():
        small = held[name].view(-1)[first[name]].abs() < delta.threshold
        assert torch.equal(positions, first[name][small])
        assert torch.equal(optimizer.state[delta.values[name]]["exp_avg"], moments[name][small])
    for _ in range(4):
        step()
    moved = 0
    for name, p in parameters.items():
        frozen = torch.ones(p.numel(), dtype=torch.bool)
        frozen[delta.indices.get(name, torch.zeros(0, dtype=torch.long))] = False
        assert torch.equal(p.detach().view(-1)[frozen], held[name].view(-1)[frozen])
        moved += int((p.detach() != held[name]).sum())
    assert moved == after
    assert sum(map(len, delta.support.values())) == before


def test_reselection_leaves_fewer_small_entries():
    left = {}
    for reselect in (None, 0.5):
        method = SaRA(fraction=0.5, learning_rate=0.02, nuclear=0.0, reselect=reselect)
        model, delta = trained(method, run=RUN.replace(steps=40, schedule="constant"))
        parameters = dict(model.named_parameters())
        parts = [parameters[n].detach().view(-1)[i].abs() for n, i in delta.support.items()]
        left[reselect] = int((torch.cat(parts) < delta.threshold).sum())
    assert left[0.5] <= left[None]


# --- files ----------------------------------------------------------------------------------------


def saved(tmp_path, model, fraction=0.4, steps=3, build=None, inputs=None):
    """(adapted copy, folder): a few real steps on one of the models."""
    adapted_model, folder = build(), tmp_path / "task"
    folder.mkdir(exist_ok=True)
    delta = delta_of(adapted_model, fraction)
    optimizer = delta.write_after(torch.optim.SGD(delta.parameters(), lr=0.01))
    adapted_model.train()
    for _ in range(steps):
        with delta.attached():
            loss_of(adapted_model, inputs()).backward()
        optimizer.step()
    delta.save(folder)
    return adapted_model.eval(), folder


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_change_loads_bit_by_bit(name, tmp_path):
    build, inputs = MODELS[name]
    adapted_model, folder = saved(tmp_path, name, build=build, inputs=inputs)
    base = build()
    before = copy_of(base)
    loaded = load_sparse(base, folder)
    assert equal_bits(loaded.state_dict(), adapted_model.state_dict())
    assert equal_bits(base.state_dict(), before)
    assert not equal_bits(adapted_model.state_dict(), before)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float64])
def test_other_types_load_bit_by_bit(kind, tmp_path):
    adapted_model, folder = saved(
        tmp_path,
        "x",
        build=lambda: seeded(lambda: nn.Linear(6, 6).to(kind)),
        inputs=lambda: torch.ones(2, 6, dtype=kind),
    )
    loaded = load_sparse(seeded(lambda: nn.Linear(6, 6).to(kind)), folder)
    assert equal_bits(loaded.state_dict(), adapted_model.state_dict())


def two_changes(tmp_path):
    base = seeded(lambda: nn.Linear(8, 8))
    folders = []
    for i in range(2):
        model = seeded(lambda: nn.Linear(8, 8))
        delta = delta_of(model, 0.5)
        folders.append(tmp_path / str(i))
        folders[-1].mkdir()
        with torch.no_grad():
            for v in delta.parameters():
                v.add_(torch.randn(v.shape, generator=torch.Generator().manual_seed(i)))
        delta.write()
        delta.save(folders[-1])
    return base, folders


def test_alpha_zero_is_the_base_and_alpha_is_linear(tmp_path):
    base, [folder, _] = two_changes(tmp_path)
    assert equal_bits(load_sparse(base, folder, 0).state_dict(), base.state_dict())
    full = load_sparse(base, folder).weight - base.weight
    for alpha in (0.5, 2.0):
        part = load_sparse(base, folder, alpha).weight - base.weight
        torch.testing.assert_close(part, alpha * full, rtol=1e-4, atol=1e-6)


def test_two_changes_add_up(tmp_path):
    base, folders = two_changes(tmp_path)
    both = load_sparse(base, folders, [0.6, 0.3]).weight - base.weight
    parts = [load_sparse(base, f).weight - base.weight for f in folders]
    torch.testing.assert_close(both, 0.6 * parts[0] + 0.3 * parts[1], rtol=1e-4, atol=1e-6)
    same = load_sparse(base, folders, 0.6).weight - base.weight
    torch.testing.assert_close(same, 0.6 * (parts[0] + parts[1]), rtol=1e-4, atol=1e-6)


def test_another_base_is_refused(tmp_path):
    base, [folder, _] = two_changes(tmp_path)
    with torch.no_grad():
        base.weight[0, 0] += 1e-3
    with pytest.raises(UserError, match=r"made for another base: weight differs in this Linear"):
        load_sparse(base, folder)
    with pytest.raises(UserError, match="weight differs"):
        load_sparse(seeded(lambda: nn.Linear(8, 8)).to(torch.float16), folder)
    with pytest.raises(UserError, match="weight is missing in this Sequential"):
        load_sparse(nn.Sequential(nn.Linear(8, 8)), folder)


def test_bad_files_and_alphas_are_refused(tmp_path):
    base, folders = two_changes(tmp_path)
    with pytest.raises(UserError, match=r"no sparse change in .*nowhere"):
        load_sparse(base, tmp_path / "nowhere" / SPARSE_FILE)
    with pytest.raises(UserError, match="2 folders need as many alphas, got 1"):
        load_sparse(base, folders, [0.5])
    (folders[0] / SPARSE_FILE).write_bytes(b"no tensors")
    with pytest.raises(UserError, match="is not a complete safetensors file"):
        load_sparse(base, folders[0])
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, str(folders[0] / SPARSE_FILE))
    with pytest.raises(UserError, match="its format is None"):
        load_sparse(base, folders[0])


def test_a_head_of_the_task_is_trained_in_full_and_saved_in_the_file(tmp_path):
    rows = [{"text": f"the {w}", "label": w} for w in ("red", "blue", "green")] * 2
    objective = foretune.Classification(tokenizer=tiny_models.tokenizer())
    tasks = TaskCollection((Task("task0", rows, (), rows),), objective)
    base = tiny_models.bert(num_labels=2, num_hidden_layers=1)
    result = foretune.adapt(base, tasks, SaRA(learning_rate=0.01), RUN.replace(steps=3))
    result.save(tmp_path)
    model = result.models["task0", 0]
    positions = result.learners["task0", 0].delta.support["classifier.weight"]
    assert len(positions) == model.classifier.weight.numel() == 3 * 16
    loaded = load_sparse(base, tmp_path / "task0")
    assert equal_bits(loaded.state_dict(), model.state_dict())
    with pytest.raises(UserError, match="both contain classifier"):
        load_sparse(base, [tmp_path / "task0"] * 2, 0.5)


def test_early_stopping_puts_the_entries_back_too():
    tasks = family(1)
    run = RUN.replace(steps=12, eval_every=2, patience=1, schedule="constant")
    result = foretune.adapt(linear_tasks.Net(), tasks, SaRA(fraction=0.5, learning_rate=3.0), run)
    model = result.models["task0", 0]
    assert result.stopped
    parameters = dict(model.named_parameters())
    delta = result.learners["task0", 0].delta
    for name, value in delta.values.items():
        positions = delta.indices[name]
        assert torch.equal(parameters[name].detach().view(-1)[positions], value.detach())


# --- the record -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("threshold", "rate"), [(2e-3, 4.9659e-4), (8e-4, 7.5578e-4), (2e-4, 9.3239e-4)]
)
def test_learning_rate_follows_equation_12(threshold, rate):
    assert SaRA().rate(threshold) == pytest.approx(rate, rel=1e-4)
    assert SaRA(learning_rate=0.1).rate(threshold) == 0.1


def test_learning_rate_stays_where_the_fit_of_equation_12_ends():
    assert SaRA().rate(0.05) == SaRA().rate(2e-3) == pytest.approx(1e-3 * math.exp(-0.7))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"threshold": 0}, "threshold must be a number above 0, got 0"),
        ({"threshold": None}, "threshold must be a number above 0, got None"),
        ({"fraction": 0}, "fraction must be a number above 0 and at most 1, or None; got 0"),
        ({"fraction": 1.5}, "fraction must be .* got 1.5"),
        ({"fraction": True}, "fraction must be .* got True"),
        ({"nuclear": -1}, "nuclear must be a number not below 0, got -1"),
        ({"nuclear": None}, "nuclear must be a number not below 0, got None"),
        ({"nuclear": math.nan}, "nuclear must be a number not below 0, got nan"),
        ({"nuclear": math.inf}, "nuclear must be .* got inf"),
        ({"nuclear_over": "some"}, "nuclear_over must be one of"),
        ({"reselect": 1}, "reselect must be a number above 0 and below 1, or None; got 1"),
        ({"reselect": "half"}, "reselect must be .* got 'half'"),
    ],
)
def test_bad_fields_are_refused_by_name(fields, message):
    with pytest.raises(UserError, match=message):
        SaRA(**fields)


def test_a_threshold_below_every_entry_is_refused():
    model = linear_tasks.Net()
    with pytest.raises(
        UserError, match=r"no trainable parameter of Net .* raise threshold, or set fraction"
    ):
        adapted(SaRA(threshold=1e-9), model=model)
