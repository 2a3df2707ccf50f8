"""The digest of rows: the same for the same rows, another one for any change."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from foretune.tasks.digest import row_digests
from foretune.tasks.row_store import RowStore
from foretune.tasks.task import Task

ARRAY = np.arange(6, dtype=np.float32).reshape(2, 3)
ROWS = [{"text": "a", "label": 0}, {"text": "b", "label": 1}]


def digest(*splits):
    return row_digests([Task("t", *splits)])["t"]


def test_equal_rows_have_one_digest_wherever_they_lie():
    store = RowStore()
    for row in ROWS:
        store.add(row)
    assert digest(ROWS) == digest(tuple(dict(reversed(row.items())) for row in ROWS))
    assert digest(ROWS) == digest(store.rows([0, 1]))
    assert digest([{"x": ARRAY}]) == digest([{"x": np.asfortranarray(ARRAY)}])
    assert digest([{"x": ARRAY}]) == digest([{"x": torch.from_numpy(ARRAY)}])


@pytest.mark.parametrize(
    "splits",
    [
        (ROWS[::-1],),
        (ROWS[:1], ROWS[1:]),
        ((), ROWS),
        ([ROWS[0], {"text": "b", "label": "1"}],),
        ([*ROWS, ROWS[0]],),
    ],
)
def test_any_change_of_rows_shows(splits):
    assert digest(*splits) != digest(ROWS)


@pytest.mark.parametrize("other", [ARRAY + 1, ARRAY.T, ARRAY.astype("f8"), ARRAY.reshape(3, 2)])
def test_any_change_of_an_array_shows(other):
    assert digest([{"x": other}]) != digest([{"x": ARRAY}])


def test_an_object_without_values_counts_by_its_class():
    assert digest([{"x": object()}]) == digest([{"x": object()}])
