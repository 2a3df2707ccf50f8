"""faiss's graph beside a store: read where it is of the store's keys, built again where not."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from pathlib import Path

import pytest
import torch

from foretune.decoding import nearest
from foretune.decoding.lookup import Lookup
from foretune.decoding.reference_store import ReferenceStore
from foretune.errors import UserError

faiss = pytest.importorskip("faiss")

LOOKUP = Lookup(neighbours=5)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(nearest, "FLAT", 100)


def saved(folder, seed=0, key_type=torch.float32, heads=1):
    keys = torch.randn(300, 8, generator=torch.Generator().manual_seed(seed)).to(key_type)
    store = ReferenceStore(
        keys, torch.arange(300) % 5, torch.full((300,), -1.0), torch.arange(300),
        lookup=Lookup(neighbours=5, heads=heads),
    )  # fmt: skip
    store.save(folder, overwrite=True)
    return ReferenceStore.load(folder)


def queries():
    return torch.randn(9, 8, generator=torch.Generator().manual_seed(9))


def asked(store, lookup=LOOKUP):
    """Places, and what was warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, places = store.search(queries(), lookup, "faiss")
    return places, " ".join(str(warning.message) for warning in caught)


def recall(store, places, lookup=LOOKUP):
    _, wanted = store.search(queries(), lookup)
    return float((places[..., None] == wanted[..., None, :]).any(-1).float().mean())


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("key_type", [torch.float32, torch.float16, torch.bfloat16])
def test_a_graph_is_built_once_and_answers_alike_when_it_is_read(tmp_path, key_type, heads):
    lookup = Lookup(neighbours=5, heads=heads)
    store = saved(tmp_path / "s", key_type=key_type, heads=heads)
    first, said = asked(store, lookup)
    assert "building the index of 300 entries, once" in said
    assert recall(store, first, lookup) > 0.9
    folder = tmp_path / "s" / f"faiss-{heads}"
    assert json.loads((folder / "index.json").read_text())["format"] == "foretune-index-1"
    again, said = asked(ReferenceStore.load(tmp_path / "s"), lookup)
    assert torch.equal(again, first) and said == ""
    half = "SQ" if key_type != torch.float32 else "Flat"
    assert half in type(faiss.read_index(str(folder / "0.faiss"))).__name__


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_graph_is_mapped_from_its_file(tmp_path):
    store = saved(tmp_path / "s")
    asked(store)
    assert str(tmp_path / "s" / "faiss-1" / "0.faiss") in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("damage", ["foreign", "foreign file", "cut", "other heads", "record"])
def test_a_graph_that_is_not_of_these_keys_is_built_again(tmp_path, damage):
    store, other = saved(tmp_path / "s"), saved(tmp_path / "other", seed=1)
    asked(store)
    asked(other)
    mine, foreign = tmp_path / "s" / "faiss-1", tmp_path / "other" / "faiss-1"
    if damage == "foreign":
        for file in foreign.iterdir():
            shutil.copy(file, mine)
    elif damage == "foreign file":
        shutil.copy(foreign / "0.faiss", mine)
        record = json.loads((mine / "index.json").read_text())
        record["bytes"] = [(mine / "0.faiss").stat().st_size]
        (mine / "index.json").write_text(json.dumps(record))
    elif damage == "cut":
        content = (mine / "0.faiss").read_bytes()
        (mine / "0.faiss").unlink()  # the old one is still mapped
        (mine / "0.faiss").write_bytes(content[: len(content) // 2])
    elif damage == "other heads":
        asked(store, Lookup(neighbours=5, heads=2))
        for file in mine.iterdir():
            shutil.copy(file, tmp_path / "s" / "faiss-2")
    else:
        (mine / "index.json").write_text("{}")
    lookup = Lookup(neighbours=5, heads=2 if damage == "other heads" else 1)
    loaded = ReferenceStore.load(tmp_path / "s")
    places, said = asked(loaded, lookup)
    assert "it is built again" in said
    assert recall(loaded, places, lookup) > 0.9
    assert asked(ReferenceStore.load(tmp_path / "s"), lookup)[1] == ""


def test_a_store_that_is_replaced_takes_its_graph_along(tmp_path):
    asked(saved(tmp_path / "s"))
    store = saved(tmp_path / "s", seed=1)  # --overwrite: the graph counts as ours
    assert not (tmp_path / "s" / "faiss-1").exists()
    places, said = asked(store)
    assert "once" in said and recall(store, places) > 0.9


def test_a_graph_that_cannot_be_saved_still_answers(tmp_path):
    store = saved(tmp_path / "s")
    (tmp_path / "s" / "faiss-1").mkdir()
    (tmp_path / "s" / "faiss-1" / "letter.txt").write_text("dear")
    places, said = asked(store)
    assert "the index is not saved" in said and recall(store, places) > 0.9
    assert (tmp_path / "s" / "faiss-1" / "letter.txt").read_text() == "dear"


def test_small_stores_and_stores_without_a_folder_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(nearest, "FLAT", 1000)
    store = saved(tmp_path / "s")
    assert asked(store)[1] == "" and recall(store, asked(store)[0]) == 1.0
    assert not (tmp_path / "s" / "faiss-1").exists()


def test_without_faiss_nothing_is_written(tmp_path, monkeypatch):
    store = saved(tmp_path / "s")
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UserError, match=r'pip install "foretune\[rtd\]"'):
        store.search(queries(), LOOKUP, "faiss")
    assert not (tmp_path / "s" / "faiss-1").exists()
