"""The source-free losses against values computed by hand and their limits."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from foretune.source_free.losses import (
    Aad,
    Banks,
    Mapu,
    Nrc,
    Outputs,
    Shot,
    entropy,
    mask_patches,
    negative_diversity,
    pseudo_labels,
)

# p = (3/4, 1/4) and (1/2, 1/2)
LOGITS = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]])
FEATURES = torch.tensor([[1.0, 0.0], [0.0, 1.0]])


def indices(count):
    return torch.arange(count)


def random_outputs(count=12, classes=3, width=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(count, width, generator=generator)
    logits = torch.randn(count, classes, generator=generator)
    return Outputs(features, logits)


def test_entropy_of_two_rows_by_hand():
    first = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert entropy(LOGITS).item() == pytest.approx((first + math.log(2)) / 2, rel=1e-6)


def test_diversity_is_zero_for_a_collapse_and_minus_log_c_at_a_uniform_mean():
    one_class = torch.tensor([[100.0, 0.0, 0.0]] * 4)
    assert negative_diversity(one_class).item() == pytest.approx(0.0, abs=1e-6)
    each_its_own = 100 * torch.eye(3)
    assert negative_diversity(each_its_own).item() == pytest.approx(-math.log(3), rel=1e-6)
    assert negative_diversity(torch.zeros(5, 3)).item() == pytest.approx(-math.log(3), rel=1e-6)


def test_gradient_of_diversity_is_finite_at_a_collapse():
    z = torch.tensor([[1000.0, 0.0, 0.0]] * 2, requires_grad=True)
    negative_diversity(z).backward()
    assert z.grad.isfinite().all()


def test_shot_of_two_rows_by_hand():
    loss = Shot(entropy=0.5, diversity=0.25, labels=2.0)
    loss.refresh(Outputs(FEATURES, LOGITS))
    # Row 1 is uniform: its argmax is class 0, so class 0 alone is present at first.
    assert loss.pseudo.tolist() == [0, 0]
    mean = (0.625, 0.375)
    diversity = sum(p * math.log(p) for p in mean)
    cross = -(math.log(0.75) + math.log(0.5)) / 2
    expected = 0.5 * entropy(LOGITS).item() + 0.25 * diversity + 2.0 * cross
    value = loss(Outputs(FEATURES, LOGITS), indices(2), 0.0, None)
    assert value.item() == pytest.approx(expected, rel=1e-6)


def test_shot_reads_the_pseudo_labels_of_the_batch_s_own_rows():
    loss = Shot(entropy=0.0, diversity=0.0, labels=1.0)
    loss.pseudo = torch.tensor([0, 1, 1])
    value = loss(Outputs(FEATURES, LOGITS), torch.tensor([2, 0]), 0.0, None)
    assert value.item() == pytest.approx(-(math.log(0.25) + math.log(0.5)) / 2, rel=1e-6)


def test_pseudo_labels_follow_the_clusters_where_one_prediction_errs():
    features = torch.tensor([[1.0, 0.1], [1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 1.0]])
    logits = torch.tensor([[3.0, 0.0], [3.0, 0.0], [0.0, 0.5], [0.0, 3.0], [0.0, 3.0]])
    assert logits.argmax(1).tolist() == [0, 0, 1, 1, 1]
    assert pseudo_labels(features, logits).tolist() == [0, 0, 0, 1, 1]


@pytest.mark.parametrize("scale", [1e-3, 7.0, 1e4])
def test_pseudo_labels_do_not_depend_on_the_features_scale(scale):
    outputs = random_outputs(40)
    expected = pseudo_labels(outputs.features, outputs.logits)
    assert torch.equal(pseudo_labels(outputs.features * scale, outputs.logits), expected)


def test_pseudo_labels_never_name_a_class_that_no_row_predicts():
    outputs = random_outputs(30, classes=4)
    outputs.logits[:, 2] = -50.0
    assert 2 not in pseudo_labels(outputs.features, outputs.logits)


def test_pseudo_labels_of_a_single_row():
    assert pseudo_labels(FEATURES[:1], LOGITS[:1]).tolist() == [0]


def nrc_by_loops(outputs, chosen, k):
    p, features = outputs.logits.softmax(1), F.normalize(outputs.features, dim=1)
    near = [
        sorted(
            (j for j in range(len(p)) if j != i), key=lambda j: -float(features[i] @ features[j])
        )
        for i in range(len(p))
    ]
    near = [neighbours[:k] for neighbours in near]
    total = 0.0
    for i in chosen:
        total += float(p[i] @ p[i])
        for j in near[i]:
            total += (1.0 if i in near[j] else 0.1) * float(p[j] @ p[i])
            total += sum(0.1 * float(p[m] @ p[i]) for m in near[j])
    mean = p[chosen].mean(0)
    return float((mean * mean.log()).sum()) - total / len(chosen)


@pytest.mark.parametrize("chosen", [[0, 3, 5], [7]])
def test_nrc_equals_its_statement_by_loops(chosen):
    target = random_outputs()
    loss = Nrc(neighbours=3)
    loss.refresh(target)
    batch = Outputs(target.features[chosen], target.logits[chosen])
    value = loss(batch, torch.tensor(chosen), 0.0, None)
    assert value.item() == pytest.approx(nrc_by_loops(target, chosen, 3), rel=1e-5)


def test_aad_equals_its_statement_by_loops():
    target, chosen, k = random_outputs(), [1, 4, 9], 2
    p, features = target.logits.softmax(1), F.normalize(target.features, dim=1)
    lam = (1 + 10 * 0.3) ** -2.0
    total = 0.0
    for i in chosen:
        others = [j for j in range(len(p)) if j != i]
        near = sorted(others, key=lambda j: -float(features[i] @ features[j]))[:k]
        total -= sum(float(p[i] @ p[j]) for j in near)
        total += lam * sum(float(p[i] @ p[m]) for m in chosen if m != i)
    loss = Aad(neighbours=k, decay=2.0)
    loss.refresh(target)
    batch = Outputs(target.features[chosen], target.logits[chosen])
    value = loss(batch, torch.tensor(chosen), 0.3, None)
    assert value.item() == pytest.approx(total / len(chosen), rel=1e-5)


def test_aad_s_dispersion_falls_from_one():
    loss = Aad(neighbours=2, decay=5.0)
    values = [loss.dispersion_weight(progress) for progress in (0.0, 0.1, 0.5, 1.0)]
    assert values[0] == 1.0 and values == sorted(values, reverse=True)
    assert values[-1] == pytest.approx(11**-5.0)


def test_banks_hold_the_newest_outputs_of_the_rows_of_the_batch_and_no_gradient():
    banks = Banks(random_outputs())
    before = banks.scores.clone()
    new = random_outputs(2, seed=9)
    banks.update(Outputs(new.features.requires_grad_(), new.logits), torch.tensor([5, 0]))
    assert torch.equal(banks.scores[[5, 0]], new.logits.softmax(1))
    unchanged = [i for i in range(12) if i not in (0, 5)]
    assert torch.equal(banks.scores[unchanged], before[unchanged])
    assert not banks.features.requires_grad
    torch.testing.assert_close(banks.features.norm(dim=1), torch.ones(12))


def test_a_row_is_no_neighbour_of_itself_and_few_rows_have_fewer():
    banks = Banks(random_outputs(4))
    near = banks.nearest(indices(4), 9)
    assert near.shape == (4, 3)
    assert all(i not in near[i] for i in range(4))


@pytest.mark.parametrize("loss", [Nrc(neighbours=5), Aad(neighbours=5, decay=1.0)])
def test_a_single_row_has_no_neighbours_and_a_finite_loss(loss):
    single = random_outputs(1)
    loss.refresh(single)
    assert loss(single, indices(1), 0.0, None).isfinite()


def test_mapu_of_two_rows_by_hand():
    sequence, imputed = torch.zeros(2, 3, 4), torch.full((2, 3, 4), 0.5)
    loss = Mapu(entropy=0.5, diversity=0.25, imputation=2.0)
    value = loss(Outputs(FEATURES, LOGITS, sequence), indices(2), 0.0, imputed)
    expected = 0.5 * entropy(LOGITS) + 0.25 * negative_diversity(LOGITS) + 2.0 * 0.25
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize(("length", "hidden"), [(128, {16}), (20, {2, 3}), (5, {1})])
def test_one_stretch_of_eight_is_masked_in_all_channels(length, hidden):
    torch.manual_seed(0)
    x = torch.ones(50, 3, length)
    masked = mask_patches(x)
    gone = masked == 0
    assert torch.equal(gone, gone[:, :1].expand_as(gone))
    assert {int(n) for n in gone[:, 0].sum(1)} <= hidden
    steps = gone[:, 0].int().diff(dim=1).abs().sum(1)
    assert int(steps.max()) <= 2  # one stretch
    assert len({tuple(row.tolist()) for row in gone[:, 0]}) == min(8, length)
    assert torch.equal(x, torch.ones_like(x))
