"""The pocket experiments: their data, their models, the converted decoder, their recipes."""

from __future__ import annotations

import importlib.util
import itertools
import os
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from foretune.adapters.bank import AdapterBank
from foretune.models.loading import load_model, load_module
from foretune.models.routing import route
from foretune.models.surgery import head_modules, match_head
from foretune.recipes.schema import load_recipe
from foretune.tasks.sources import Source, load_tasks

ROOT = Path(__file__).parents[2]
CLAIMS = ROOT / "benchmarks" / "claims"
SHARED = Path(os.environ.get("FORETUNE_DATA", ROOT.parent / "shared" / "data"))
MODELS = [("mixer", {"depth": 2}, (28, 28), 2), ("patch_transformer", {}, (9, 128), 6)]


def needs(folder: str) -> pytest.MarkDecorator:
    there = (SHARED / folder).is_dir()
    return pytest.mark.skipif(not there, reason=f"shared data is not at hand: {folder}")


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"claims_{name}", CLAIMS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def counts(columns: dict[str, np.ndarray]) -> set[tuple[int, int, int]]:
    """The (train, validation, test) rows that tasks have."""
    tasks, splits = columns["task"], columns["split"]
    names = ("train", "validation", "test")
    return {
        tuple(int(((tasks == task) & (splits == split)).sum()) for split in names)
        for task in set(tasks)
    }


@needs("images")
def test_digit_pairs_are_balanced_and_in_unit_range() -> None:
    columns = script("data").mnist_pairs(SHARED, (20, 4, 10))
    assert sorted(set(columns["task"])) == ["0-1", "2-3", "4-5", "6-7", "8-9"]
    assert counts(columns) == {(20, 4, 10)}
    assert columns["x"].shape == (170, 28, 28)
    assert (columns["x"].min(), columns["x"].max()) == (0, 1)
    assert columns["y"].mean() == 0.5


@needs("images")
def test_character_pairs_share_no_character_and_come_out_the_same_twice() -> None:
    data = script("data")
    columns = data.omniglot_pairs(SHARED)
    assert len(set(columns["task"])) == 60
    assert counts(columns) == {(20, 6, 14)}
    characters = [
        (alphabet, character)
        for task in set(columns["task"])
        for alphabet, *two in [task.rsplit("-", 2)]
        for character in two
    ]
    assert len(set(characters)) == 120
    again = data.omniglot_pairs(SHARED)
    assert all(np.array_equal(columns[name], again[name]) for name in columns)


@needs("har")
def test_windows_of_subjects_make_tasks(tmp_path: Path) -> None:
    columns = script("data").har(SHARED, subjects=3)
    assert columns["x"].shape[1:] == (9, 128)
    assert set(columns["y"]) == set(range(6))
    np.savez(tmp_path / "har.npz", **columns)
    source = Source(source=str(tmp_path / "har.npz"), unseen=1, validation=0.15)
    seen, unseen = load_tasks(source, "classification")
    assert unseen is not None
    assert (len(seen), len(unseen)) == (2, 1)
    assert all(task.train and task.validation and task.test for task in (*seen, *unseen))


def test_a_folder_without_data_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert script("data").main([str(tmp_path), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "images/mnist.npz" in error


@pytest.mark.parametrize(("factory", "args", "shape", "outputs"), MODELS)
def test_lora_adapts_every_layer_and_biases_stay(factory, args, shape, outputs) -> None:
    model = load_module(CLAIMS / "models.py", factory, **args)
    x = torch.randn(3, *shape)
    plain = model(x)
    assert plain.shape == (3, outputs)
    linear = [name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    assert all(model.get_submodule(name).bias is not None for name in linear)
    bank = AdapterBank(model, ["a", "b"], lora={"r": 1, "lora_alpha": 1}, heads=[], seed=0)
    assert sorted(bank.adapted_names) == sorted(linear)
    with bank.attached(), route([0, 0, 1]):
        fresh = model(x)
    # A fresh adapter adds nothing, so the biases of the layers that it wraps are still there.
    torch.testing.assert_close(fresh, plain)


@pytest.mark.parametrize(("factory", "args", "shape", "outputs"), MODELS)
def test_a_head_can_be_drawn_anew(factory, args, shape, outputs) -> None:
    model = load_module(CLAIMS / "models.py", factory, **args)
    assert head_modules(model) == ["head"]
    match_head(model, outputs + 1, seed=0)
    assert model(torch.randn(2, *shape)).shape == (2, outputs + 1)


def test_the_papers_mixer_has_the_papers_size() -> None:
    recipe = load_recipe(CLAIMS / "cifar10-pairs-paper.yaml", ["tasks.source=data.npz"])
    model = load_module(CLAIMS / "models.py", recipe.model.factory, **recipe.model.args)
    assert sum(p.numel() for p in model.parameters()) == 325_186
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 2)


def test_images_move_in_training_only() -> None:
    models = script("models")
    model = models.mixer(shift=2)
    x = torch.rand(4, 28, 28)
    torch.testing.assert_close(model.eval()(x), model.eval()(x))
    moved = models.shifted(x[:, None], 2)
    assert moved.shape == (4, 1, 28, 28)
    for image, whole in zip(moved[:, :, 4:24, 4:24], x[:, None], strict=True):
        views = [whole[:, i : i + 20, j : j + 20] for i in range(2, 7) for j in range(2, 7)]
        assert any(torch.equal(image, view) for view in views)


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stories260k")
    script("stories260k").convert(SHARED / "stories260k", folder)
    return folder


@needs("stories260k")
def test_the_converted_decoder_tells_its_story(stories: Path) -> None:
    model, tokenizer = load_model(stories, head="causal-lm")
    assert sum(p.numel() for p in model.parameters()) == 260_032
    begin = torch.tensor([[tokenizer.bos_token_id]])
    told = model.generate(begin, max_new_tokens=30, do_sample=False)[0]
    text = tokenizer.decode(told, skip_special_tokens=True)
    assert text.startswith("Once upon a time, there was a little girl named Lily.")


@needs("stories260k")
@pytest.mark.parametrize(
    "text",
    ["Once upon a time", "", "a", " two  spaces\nand a line", "héllo ☃ 東", "...!!!", "aaaa"],
)
def test_texts_are_cut_as_llama2_c_cuts_them(stories: Path, text: str) -> None:
    _, tokenizer = load_model(stories, head="causal-lm")
    content = (SHARED / "stories260k" / "tok512.bin").read_bytes()
    tokens, scores = script("stories260k").read_tokens(content, 512)
    assert tokenizer(text)["input_ids"] == [1, *greedy(text, tokens, scores)]
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def greedy(text: str, tokens: list[str], scores: list[float]) -> list[int]:
    """The loop of llama2.c's `encode`: merge the best-scored neighbours until there are none."""
    known = {token: i for i, token in enumerate(tokens)}
    ids: list[int] = []
    for character in f" {text}" if text else "":
        byte_ids = [3 + byte for byte in character.encode()]
        ids += [known[character]] if character in known else byte_ids
    while True:
        unions = [known.get(tokens[a] + tokens[b]) for a, b in itertools.pairwise(ids)]
        places = [i for i, union in enumerate(unions) if union is not None]
        if not places:
            return ids
        best = max(places, key=lambda i: scores[unions[i]])  # type: ignore[index]
        ids[best : best + 2] = [unions[best]]  # type: ignore[list-item]


def test_a_broken_model_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "stories260K.bin").write_bytes(bytes(100))
    assert script("stories260k").main([str(tmp_path), str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("stories260k.py: stories260K.bin")


@pytest.mark.parametrize("path", sorted(CLAIMS.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipe_parses(path: Path) -> None:
    recipe = load_recipe(path, ["tasks.source=data.npz"])
    assert recipe.name.endswith(path.stem)
    assert recipe.adapt.learning_rate is not None  # one for every base
    assert {"none", "standard", "peft-ml"} <= {entry.name for entry in recipe.entries}
    if recipe.model.file is not None:
        assert (ROOT / recipe.model.file).is_file()


def test_scripts_do_nothing_when_imported(capsys: pytest.CaptureFixture) -> None:
    before = set(sys.modules)
    for name in ("data", "models", "stories260k"):
        script(name)
    assert capsys.readouterr() == ("", "")
    assert not {name for name in set(sys.modules) - before if name.startswith("PIL")}
