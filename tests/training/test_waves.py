"""Many tasks are adapted in waves: memory grows with a wave, not with the number of tasks."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

import foretune
import tiny_models
from foretune import files
from foretune.adapters.bank import AdapterBank
from foretune.models.prefix_cache import PrefixCache
from foretune.run import Run
from foretune.tasks.task import Task, TaskCollection
from foretune.training import adapting
from foretune.training.outcome import SavedTensors
from linear_tasks import Net, equal_bits, family

RUN = Run(steps=2, batch_size=4, device="cpu", eval_every=0)
LORA = foretune.LoRA(lora={"r": 2})


def live_slots(monkeypatch) -> list[int]:
    """Fills with the slots that are alive, in all banks, each time that a bank is made."""
    banks, alive = weakref.WeakSet(), []
    real = AdapterBank.__init__

    def counted(self, model, keys, **options):
        gc.collect()
        real(self, model, keys, **options)
        banks.add(self)
        alive.append(sum(len(bank.keys) for bank in banks))

    monkeypatch.setattr(AdapterBank, "__init__", counted)
    return alive


def test_the_parameters_of_a_saved_wave_are_freed_without_a_search_for_cycles(
    tmp_path, monkeypatch
):
    parameters, real = weakref.WeakSet(), AdapterBank.__init__

    def watched(self, model, keys, **options):
        assert not parameters  # those of the waves before
        real(self, model, keys, **options)
        parameters.update(self.parameters())

    monkeypatch.setattr(AdapterBank, "__init__", watched)
    gc.collect()
    gc.disable()
    try:
        foretune.adapt(Net(), family(4), LORA, RUN.replace(tasks_per_wave=2, out=tmp_path / "out"))
        assert not parameters
    finally:
        gc.enable()


def test_no_more_slots_are_alive_than_a_wave_has_and_adapters_are_read_from_disk(
    tmp_path, monkeypatch
):
    tasks = family(7)
    whole = foretune.adapt(Net(), tasks, LORA, RUN)
    alive = live_slots(monkeypatch)
    run = RUN.replace(tasks_per_wave=2, out=tmp_path / "out")
    adapted = foretune.adapt(Net(), tasks, LORA, run)
    assert alive == [2, 2, 2, 1]
    assert adapted.scores == pytest.approx(whole.scores)
    for key, tensors in adapted.tensors.items():
        assert isinstance(tensors, SavedTensors)
        assert tensors.keys() == whole.tensors[key].keys() and len(tensors) == len(list(tensors))
        for name, value in tensors.items():
            torch.testing.assert_close(value, whole.tensors[key][name], rtol=1e-4, atol=1e-6)
        with pytest.raises(KeyError, match="lora_C"):
            tensors["lora_C"]
    again = adapted.save(tmp_path / "again")
    for task in tasks.names:
        weights = f"{task}/adapter_model.safetensors"
        assert (again / weights).read_bytes() == (tmp_path / "out" / weights).read_bytes()


def test_adapters_are_read_where_the_folder_is_once_it_has_its_name(tmp_path):
    first = foretune.adapt(Net(), family(), LORA, RUN.replace(out=tmp_path / "out"))
    before = {key: dict(tensors) for key, tensors in first.tensors.items()}
    run = RUN.replace(out=tmp_path / "out", overwrite=True, seed=1)
    second = foretune.adapt(Net(), family(), LORA, run)
    for key, tensors in second.tensors.items():
        assert tensors.keys() == before[key].keys() and not equal_bits(dict(tensors), before[key])


def test_a_wave_has_a_largest_size_where_none_is_set(monkeypatch):
    monkeypatch.setattr(adapting, "MOST_PER_WAVE", 3)
    alive = live_slots(monkeypatch)
    foretune.adapt(Net(), family(4), LORA, RUN)
    assert max(alive) <= 3 + 1  # the next bank's size is found out by one slot


def texts(first: int, number: int) -> TaskCollection:
    """Tasks with texts of their own."""
    words = ("red", "blue", "green", "cat", "dog", "the")
    tasks = []
    for t in range(first, first + number):
        pairs = [f"{words[t % 6]} {words[t // 6 % 6]} {word}" for word in words[:4]]
        rows = [{"text": text, "label": str(i % 2)} for i, text in enumerate(pairs)]
        tasks.append(Task(f"t{t}", rows, (), rows))
    objective = foretune.Classification(tokenizer=tiny_models.tokenizer())
    return TaskCollection(tuple(tasks), objective)


def test_the_states_of_a_wave_make_room_for_those_of_the_next(monkeypatch):
    from foretune.models import prefix_cache

    sizes = []
    real = PrefixCache.renew

    def renew(self):
        sizes.append(len(self))
        real(self)

    monkeypatch.setattr(PrefixCache, "renew", renew)
    prefix_cache._CACHES.clear()
    model = tiny_models.bert(num_labels=2)
    lora = {"r": 2, "layers_to_transform": [2], "layers_pattern": "layer"}
    method = foretune.LoRA(lora={**lora, "target_modules": ["query"]})
    foretune.adapt(model, texts(0, 12), method, RUN.replace(tasks_per_wave=2))
    assert len(sizes) == 5 and max(sizes) <= 2 * max(sizes[0], 1) + 3
    assert sizes[0] > 0 and sizes[-1] < 12 * 4


def test_a_prefix_cache_drops_what_a_wave_has_not_used():
    states = torch.zeros(1, 4)  # 16 bytes
    cache = PrefixCache(max_bytes=16 * 3)
    for key in (b"a", b"b", b"c"):
        cache.put(key, states)
    cache.put(b"d", states)  # it is full, and all of it is in use
    assert cache.get(b"d") is None and len(cache) == 3
    cache.renew()
    assert cache.get(b"a") is not None
    cache.put(b"d", states)  # takes the place of one that is not used any more
    assert cache.get(b"d") is not None and cache.get(b"a") is not None
    assert len(cache) == 3 and cache.num_bytes == 16 * 3
    cache.renew()
    assert len(cache) == 2 and cache.num_bytes == 16 * 2  # c was not used by that wave
    cache.renew()
    assert len(cache) == cache.num_bytes == 0


def test_many_folders_appear_together_or_not_at_all(tmp_path):
    places = [tmp_path / str(i) for i in range(40)]
    with files.whole_folders(places) as parts:
        for part in parts:
            (part / "file").write_text("old")
        assert not any(place.exists() for place in places)
    with pytest.raises(ValueError, match="stop"), files.whole_folders(places) as parts:
        (parts[0] / "file").write_text("new")
        raise ValueError("stop")
    assert {(place / "file").read_text() for place in places} == {"old"}
    assert {path.name for path in tmp_path.iterdir()} == {place.name for place in places}


def test_a_file_that_cannot_be_flushed_is_told(tmp_path, monkeypatch):
    def broken(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "_flush", broken)
    places = [tmp_path / str(i) for i in range(40)]
    with (
        pytest.raises(foretune.errors.ForetuneError, match="the disk is full"),
        files.whole_folders(places) as parts,
    ):
        for part in parts:
            (part / "file").write_text("x")
    assert not list(tmp_path.iterdir())
