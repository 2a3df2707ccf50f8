"""Tuning: by accuracy where there are labels, and no farther from the start than pays."""

from __future__ import annotations

import pytest
import torch

from foretune.decoding.lookup import untuned_lookup
from foretune.decoding.reference_store import ReferenceStore
from foretune.decoding.tuning import Trial, choose, error_of


def labelled(n=240, num_labels=12, *, own=None, spread=1.0, seed=0):
    """Clusters of labels; the model alone is uniform, or gives the true label `own`."""
    random = torch.Generator().manual_seed(seed)
    values = torch.arange(n) % num_labels
    centres = torch.randn(num_labels, 6, generator=random)
    keys = centres[values] + spread * torch.randn(n, 6, generator=random)
    rest = (1 - (own or 1 / num_labels)) / (num_labels - 1)
    probs = torch.full((n, num_labels), rest)
    probs[torch.arange(n), values] = own or 1 / num_labels
    return ReferenceStore(
        *(keys, values, probs.log(), torch.arange(n)),
        scored=torch.arange(n),
        kind="label",
        labels={f"label {i}": [i] for i in range(num_labels)},
    )


def left_out(store, lookup, temperature):
    """Accuracy of each entry from the others, one at a time."""
    right = []
    for i in range(len(store)):
        others = torch.arange(len(store))[torch.arange(len(store)) != i]
        squared = (store.keys[others] - store.keys[i]).square().sum(-1)
        near = squared.argsort()[: lookup["neighbours"]]
        weights = torch.softmax(-squared[near] / temperature, -1)
        reference = torch.zeros(len(store.labels))
        reference.index_add_(0, store.values[others[near]], weights)
        own = store.model_log_probs[i].exp()
        probs = (1 - lookup["mix"]) * own + lookup["mix"] * reference
        right.append(float(int(probs.argmax()) == int(store.values[i])))
    return sum(right) / len(right)


def test_the_score_is_the_accuracy_of_entries_left_out():
    store = labelled()
    tuned = store.tune()
    assert tuned["metric"] == "accuracy" and tuned["entries"] == 240
    assert tuned["score"] == pytest.approx(left_out(store, tuned, tuned["temperature"]), abs=0.005)
    start = untuned_lookup(240, 12)
    fields = {"neighbours": start.neighbours, "mix": 1.0}
    by_hand = left_out(store, fields, store.temperature(start))
    assert tuned["untuned"] == pytest.approx(by_hand, abs=0.005)
    assert tuned["model_alone"] == pytest.approx(1 / 12)
    assert tuned["best"] >= tuned["score"] >= tuned["untuned"] > 0.4


def test_what_was_not_tuned_is_kept_where_nothing_is_clearly_better():
    store = labelled(spread=0.2)  # everything gets it right
    tuned, start = store.tune(), untuned_lookup(240, 12)
    assert (tuned["neighbours"], tuned["mix"]) == (start.neighbours, start.mix)
    assert tuned["temperature"] == store.temperature(start)


@pytest.mark.parametrize("seed", range(3))
def test_tuning_labels_never_takes_more_neighbours_than_help(seed):
    """Likelihood would: it prefers the broad vote that is rarely sure, and often wrong."""
    store = labelled(n=480, num_labels=24, spread=0.8, seed=seed)
    tuned = store.tune()
    assert tuned["score"] >= tuned["untuned"]
    assert tuned["neighbours"] <= 64


def test_the_model_alone_is_kept_where_the_store_adds_nothing():
    assert labelled(own=0.9).tune()["mix"] == 0


def test_the_simplest_within_one_standard_error_wins():
    lookup, base = untuned_lookup(100, 4), torch.tensor([1.0, 0.0] * 50)
    better, hardly = base.clone(), base.clone()
    better[1::2][:20] = 1.0  # 20 of 100 more are right
    hardly[[1, 3, 5]] = 1.0
    hardly[[0, 2]] = 0.0
    far, near, start = Trial(lookup, 3, better), Trial(lookup, 1, hardly), Trial(lookup, 0, base)
    assert choose([far, near, start])[1] is far
    assert choose([near, start]) == (near, start)
    low = Trial(lookup, -1, torch.full((100,), -torch.inf))
    assert choose([near, start, low])[1] is start
    assert error_of(base) == pytest.approx(0.0502, abs=1e-4)


def test_tuning_again_starts_from_the_same_place():
    store = labelled(spread=0.9)
    first = store.tune()
    assert store.tune() == first
