"""`foretune sfda prepare`, `adapt` and `eval` as a user types them."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from command_line import call, the_error, the_json
from foretune.source_free import core_state, tucker_format
from foretune.source_free.sampling import stretched
from format_checks import assert_versions_by_command
from fuzzing import check_command, copied, damaged

LABELS = np.array(["sit", "walk", "run"])


def arrays(shift=0.0, count=36, seed=0):
    rng = np.random.default_rng(seed)
    y = np.arange(count) % 3
    wave = np.sin(np.arange(24) * (0.4 + 0.5 * y[:, None]) + rng.uniform(0, 6, (count, 1)))
    x = np.stack([wave, shift + 0.5 * wave, np.roll(wave, 3, 1)], 1)
    return (x + 0.3 * rng.normal(size=x.shape)).astype("f4"), y


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with rows of two domains, AdaTime's files, a prepared model and an adapted state."""
    folder = tmp_path_factory.mktemp("sfda")
    split = np.array(["train"] * 24 + ["test"] * 12)
    (x, y), (tx, ty) = arrays(), arrays(0.7, seed=1)
    np.savez(folder / "source.npz", x=x, y=LABELS[y], split=split)
    np.savez(folder / "target.npz", x=tx, y=LABELS[ty], split=split)
    np.savez(folder / "bare.npz", x=tx[:24])
    np.savez(
        folder / "both.npz",
        x=np.concatenate([x, tx]),
        y=LABELS[np.concatenate([y, ty])],
        split=np.tile(split, 2),
        task=np.repeat(["ann", "bob"], 36),
    )
    (folder / "ada").mkdir()
    for name, (a, b) in {"1": (x, y), "2": (tx, ty)}.items():
        for part, chosen in {"train": slice(24), "test": slice(24, 36)}.items():
            saved = {"samples": torch.from_numpy(a[chosen]), "labels": torch.from_numpy(b[chosen])}
            torch.save(saved, folder / "ada" / f"{part}_{name}.pt")
    prepared = the_json(
        *("sfda", "prepare", "new", "--rows", folder / "source.npz"),
        *("--out", folder / "prepared", "--steps", 8, "--batch-size", 12),
        *("--rank-factor", 8, "--imputer"),
    )
    assert prepared["labels"] == ["run", "sit", "walk"]
    assert prepared["core"] < prepared["parameters"][1]
    assert prepared["macs"][1] < 0.2 * prepared["macs"][0]
    assert prepared["accuracy"][1] > 0.3
    adapted = the_json(
        *("sfda", "adapt", folder / "prepared", "steps=3", "batch_size=8"),
        *("--rows", folder / "bare.npz", "--out", folder / "adapted"),
    )
    assert adapted["rows"] == 24 and adapted["tuned"] == prepared["core"]
    return folder


def test_adapted_folder_is_small_and_says_what_it_is(place):
    files = {p.name: p.stat().st_size for p in (place / "adapted").iterdir()}
    assert set(files) == {"core.safetensors", "core.json", "README.md", ".foretune"}
    assert sum(files.values()) < 0.5 * (place / "prepared" / "model.safetensors").stat().st_size
    assert "foretune" in (place / "adapted" / "README.md").read_text()


def test_eval_shows_every_class_before_and_after(place):
    result = call("sfda", "eval", place / "adapted", "--rows", place / "target.npz")
    assert result.exit_code == 0, result.output
    head, *lines = result.stdout.splitlines()
    assert head.split() == ["class", "rows", "F1", "before", "F1", "after", "difference"]
    names = [line.split()[0] for line in lines]
    assert names == ["run", "sit", "walk", "macro-F1", "accuracy"]


def test_eval_agrees_with_the_python_api(place):
    scores = the_json("sfda", "eval", place / "adapted", "--rows", place / "target.npz")
    from foretune.source_free.core_state import load_core
    from foretune.source_free.tucker_format import load_tucker

    base, metadata = load_tucker(place / "prepared")
    (x, y) = arrays(0.7, seed=1)
    for model, key in ((base, "before"), (load_core(base, place / "adapted"), "after")):
        with torch.no_grad():
            predicted = model(torch.from_numpy(x[24:])).argmax(1).tolist()
        pairs = zip(predicted, y[24:], strict=True)
        right = [metadata["labels"][p] == LABELS[t] for p, t in pairs]
        assert scores[key]["accuracy"] == pytest.approx(sum(right) / 12)
        assert sum(c["rows"] for c in scores[key]["classes"]) == scores[key]["rows"] == 12


@pytest.mark.parametrize(
    ("file", "format_of"), [("core.json", core_state), ("sfda.json", tucker_format)]
)
def test_folders_of_a_newer_version_are_refused(place, file, format_of):
    [path] = place.glob(f"*/{file}")
    command = ("sfda", "eval", place / "adapted", "--rows", place / "target.npz")
    assert_versions_by_command(path, format_of.FORMAT, *command)


def test_report_is_one_page_with_a_picture(place, tmp_path):
    page = tmp_path / "shift.html"
    args = ("sfda", "eval", place / "adapted", "--rows", place / "target.npz", "--report", page)
    assert call(*args).exit_code == 0
    text = page.read_text()
    assert (
        "<svg" in text
        and "macro-F1" in text
        and "walk" in text
        and "http" not in text.replace("http://www.w3.org", "")
    )
    assert "exists: use --overwrite to replace it" in the_error(*args)
    assert call(*args, "--overwrite").exit_code == 0


@pytest.mark.parametrize("source", ["both", "ada"])
def test_domains_of_one_source_are_chosen_by_name(place, tmp_path, source):
    rows = place / ("both.npz" if source == "both" else "ada")
    first, second = ("ann", "bob") if source == "both" else ("1", "2")
    prepared = the_json(
        *("sfda", "prepare", "new", "--rows", rows, "--domain", first, "--steps", 1),
        *("--out", tmp_path / "p", "--epochs", 1, "--batch-size", 24),
    )
    assert prepared["domain"] == first
    adapted = the_json(
        *("sfda", "adapt", tmp_path / "p", "steps=1", "loss=nrc", "--rows", rows),
        *("--domain", second, "--out", tmp_path / "a", "--max-rows", 5),
    )
    assert (adapted["domain"], adapted["rows"]) == (second, 5)
    scored = the_json("sfda", "eval", tmp_path / "a", "--rows", rows, "--domain", second)
    assert scored["after"]["rows"] == 12
    assert "domains" in the_error("sfda", "eval", tmp_path / "a", "--rows", rows)
    assert "has no domain" in the_error(
        "sfda", "eval", tmp_path / "a", "--rows", rows, "--domain", "zoe"
    )


def test_adatime_and_arrays_give_the_same_windows(place):
    from foretune.source_free.windows import read_windows

    ada, npz = read_windows(str(place / "ada"), "2"), read_windows(str(place / "target.npz"))
    assert len(ada.train) == len(npz.train) == 24 and len(ada.test) == 12
    for a, b in zip(ada.train, npz.train, strict=True):
        assert np.array_equal(a["x"], b["x"]) and LABELS[a["y"]] == b["y"]


def test_every_loss_and_form_runs(place, tmp_path):
    for i, changes in enumerate(
        [["loss=aad"], ["loss=mapu", "bn=affine"], ["tuned=all"], ["tuned=batch-norm"]]
    ):
        adapted = the_json(
            *("sfda", "adapt", place / "prepared", "steps=1", *changes),
            *("--rows", place / "bare.npz", "--out", tmp_path / str(i)),
        )
        assert adapted["tuned"] > 0


def test_same_seed_writes_the_same_bytes(place, tmp_path):
    for name in ("a", "b"):
        the_json(
            *("sfda", "adapt", place / "prepared", "steps=3", "batch_size=8"),
            *("--rows", place / "bare.npz", "--out", tmp_path / name),
        )
    first, second = ((tmp_path / n / "core.safetensors").read_bytes() for n in ("a", "b"))
    assert first == second == (place / "adapted" / "core.safetensors").read_bytes()


def test_a_base_of_the_user_s_own_file_is_prepared(place, tmp_path):
    from foretune.models.loading import load_module, save_base

    (tmp_path / "net.py").write_text(
        "import torch\n\n\ndef build():\n    return torch.nn.Sequential(torch.nn.Conv1d(3, 8, 3), "
        "torch.nn.ReLU(), torch.nn.AdaptiveAvgPool1d(1), torch.nn.Flatten(), "
        "torch.nn.Linear(8, 3))\n"
    )
    save_base(load_module(tmp_path / "net.py"), None, tmp_path / "base")
    prepared = the_json(
        *("sfda", "prepare", tmp_path / "base", "--rows", place / "source.npz"),
        *("--out", tmp_path / "p", "--epochs", 1, "--rank-factor", 2),
    )
    assert prepared["ranks"] == {"0": [4, 3]}
    adapted = the_json(
        *("sfda", "adapt", tmp_path / "p", "steps=1", "--rows", place / "bare.npz"),
        *("--out", tmp_path / "a"),
    )
    assert adapted["tuned"] == 4 * 3 * 3


# --- mistakes -------------------------------------------------------------------------------------


def test_a_used_folder_is_not_written_over_without_being_told(place, tmp_path):
    args = ("sfda", "adapt", place / "prepared", "steps=1", "--rows", place / "bare.npz", "--out")
    assert "is not empty: use --overwrite to replace it" in the_error(*args, place / "adapted")
    assert "another command (sfda-prepare)" in the_error(*args, place / "prepared", "--overwrite")
    (tmp_path / "file").write_text("x")
    assert "is a file" in the_error(*args, tmp_path / "file")
    prepare = ("sfda", "prepare", "new", "--rows", place / "source.npz", "--out")
    assert "is not empty" in the_error(*prepare, place / "prepared")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["step=3"], 'no setting "step"; subspace-sfda has .* Did you mean "steps"?'),
        (["loss=tent"], "loss must be one of shot, nrc, aad, mapu; got 'tent'"),
        (["steps=0"], "steps must be a whole number not below 1, got 0"),
        (["steps"], "must read KEY=VALUE"),
    ],
)
def test_bad_settings_are_named(place, tmp_path, changes, message):
    line = the_error(
        *("sfda", "adapt", place / "prepared", *changes, "--rows", place / "bare.npz"),
        *("--out", tmp_path / "a"),
    )
    import re

    assert re.search(message, line), line
    assert not (tmp_path / "a").exists()


def test_bad_rows_are_named_and_leave_nothing_behind(place, tmp_path):
    def refused(name, **columns):
        np.savez(tmp_path / name, **columns)
        line = the_error(
            *("sfda", "adapt", place / "prepared", "steps=1", "--rows", tmp_path / name),
            *("--out", tmp_path / "a"),
        )
        assert not (tmp_path / "a").exists()
        return line

    x, _ = arrays()
    assert "no such file" in the_error(
        *("sfda", "adapt", place / "prepared", "--rows", "none.npz", "--out", tmp_path / "a")
    )
    assert "row 1: x missing" in refused("1.npz", z=x)
    assert "a window must be an array x (channels, length), got x of shape (24,)" in refused(
        "2.npz", x=x[:, 0]
    )
    assert "windows of 2 channels, but the source's have 3" in refused("3.npz", x=x[:, :2])
    broken = x.copy()
    broken[3, 0, 0] = np.nan
    assert "row 4: x holds NaN or infinity" in refused("4.npz", x=broken)
    assert "no training windows of target" in refused("5.npz", x=x, split=["test"] * len(x))


def test_a_target_of_another_sampling_rate_is_noticed_and_resampled(place, tmp_path):
    x, y = arrays(0.7, seed=1)
    columns = {"y": LABELS[y], "split": np.array(["train"] * 24 + ["test"] * 12)}
    np.savez(tmp_path / "half.npz", x=x[:, :, ::2], **columns)
    np.savez(tmp_path / "long.npz", x=np.concatenate([x, x], -1), **columns)
    adapt = ("sfda", "adapt", place / "prepared", "steps=1", "--rows", tmp_path / "half.npz")
    assert "windows of 12 steps, but the source's have 24: if both last as long" in the_error(
        *adapt, "--out", tmp_path / "a"
    )
    result = the_json(*adapt, "--resample", "--out", tmp_path / "a")
    assert result["stretched"] == 2.0
    scored = the_json("sfda", "eval", tmp_path / "a", "--rows", tmp_path / "half.npz")
    assert 0 <= scored["after"]["accuracy"] <= 1
    line = call(*adapt, "--resample", "--out", tmp_path / "b").stdout
    assert "24 windows of target, resampled to 2 times as many steps; " in line

    known = ("sfda", "prepare", "new", "--rows", place / "source.npz", "--steps", 1, "--epochs", 1)
    the_json(*known, "--rate", 50, "--out", tmp_path / "at50")
    adapt = ("sfda", "adapt", tmp_path / "at50", "steps=1", "--rows")
    assert "was sampled at 25 Hz, but the source at 50 Hz" in the_error(
        *adapt, tmp_path / "half.npz", "--rate", 25, "--out", tmp_path / "c"
    )
    many = (tmp_path / "half.npz", "--rate", 25, "--resample", "--out", tmp_path / "c")
    assert the_json(*adapt, *many)["stretched"] == 2.0
    same = (tmp_path / "long.npz", "--rate", 50, "--out", tmp_path / "d")
    assert the_json(*adapt, *same)["stretched"] == 1.0
    assert "--rate must be" in the_error(*known, "--rate", 0, "--out", tmp_path / "e")


def test_resampling_keeps_what_both_rates_can_show():
    steps = np.arange(64)
    slow, fast = np.sin(0.2 * steps), np.sin(2.9 * steps)
    down = stretched(np.stack([slow, fast]), 16)
    np.testing.assert_allclose(down[0], np.sin(0.2 * (4 * np.arange(16) + 1.5)), atol=0.05)
    assert np.abs(down[1]).max() < 0.35  # every fourth sample alone has an amplitude of 1
    up = stretched(slow[None], 128)
    np.testing.assert_allclose(
        up[0, 2:-2], np.sin(0.2 * ((np.arange(128) + 0.5) / 2 - 0.5))[2:-2], atol=0.01
    )
    np.testing.assert_array_equal(stretched(slow[None].astype("f4"), 64), slow[None].astype("f4"))


def test_a_new_model_has_the_sizes_that_are_asked_for(place, tmp_path):
    prepare = (
        "sfda",
        "prepare",
        "new",
        "--rows",
        place / "source.npz",
        "--steps",
        1,
        "--epochs",
        1,
    )
    sizes = ("--kernel-size", 9, "--stride", 2, "--width", 16)
    the_json(*prepare, *sizes, "--out", tmp_path / "p")
    model, _ = tucker_format.load_tucker(tmp_path / "p")
    assert {"mid": 16, "kernel_size": 9, "stride": 2}.items() <= model.sizes.items()
    assert "are sizes of a new model" in the_error(
        *("sfda", "prepare", tmp_path, "--rows", place / "source.npz", "--width", 16)
    )


def test_rows_without_or_with_unknown_labels_cannot_be_scored(place, tmp_path):
    assert "y missing" in the_error(
        "sfda", "eval", place / "adapted", "--rows", place / "bare.npz", "--split", "train"
    )
    x, y = arrays()
    np.savez(tmp_path / "odd.npz", x=x, y=np.where(y == 0, "fly", LABELS[y]), split=["test"] * 36)
    line = the_error("sfda", "eval", place / "adapted", "--rows", tmp_path / "odd.npz")
    assert "needs a label of the source" in line and "'fly'" in line
    assert "no validation windows of target" in the_error(
        *("sfda", "eval", place / "adapted", "--rows", place / "target.npz"),
        *("--split", "validation"),
    )
    assert "split must be one of" in the_error(
        "sfda", "eval", place / "adapted", "--rows", place / "target.npz", "--split", "best"
    )


def test_folders_that_are_something_else_are_named(place, tmp_path):
    rows = ("--rows", place / "target.npz")
    assert "no such folder" in the_error("sfda", "adapt", tmp_path / "x", *rows)
    assert "is not a prepared model: it has no sfda.json" in the_error(
        "sfda", "adapt", place / "adapted", *rows, "--out", tmp_path / "a"
    )
    assert "holds no adapted state" in the_error("sfda", "eval", place / "prepared", *rows)
    copied = tmp_path / "broken"
    copied.mkdir()
    (copied / "sfda.json").write_text("{}")
    assert "sfda.json is damaged" in the_error(
        "sfda", "adapt", copied, *rows, "--out", tmp_path / "a"
    )
    (copied / "sfda.json").write_bytes((place / "prepared" / "sfda.json").read_bytes())
    (copied / "model.safetensors").write_bytes(b"x")
    assert "model.safetensors is not a readable" in the_error(
        "sfda", "adapt", copied, *rows, "--out", tmp_path / "a"
    )


def test_a_pickle_that_runs_code_is_refused(place, tmp_path):
    torch.save({"samples": LABELS, "labels": [print]}, tmp_path / "train_1.pt")
    line = the_error("sfda", "prepare", "new", "--rows", tmp_path, "--out", tmp_path / "p")
    assert "is not a dict of tensors samples and labels" in line


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "train_1.pt")
    line = the_error("sfda", "prepare", "new", "--rows", tmp_path, "--out", tmp_path / "p")
    assert "train_1.pt is a pipe" in line


def test_bad_options_are_refused(place, tmp_path):
    prepare = ("sfda", "prepare", "new", "--rows", place / "source.npz", "--out", tmp_path / "p")
    assert "--learning-rate must be a number above 0" in the_error(*prepare, "--learning-rate", 0)
    assert "--layers must be one of" in the_error(*prepare, "--layers", "conv")
    assert "has no layer to factor" in the_error(*prepare, "--layers", "linear", "--steps", 0)
    assert not (tmp_path / "p").exists()


def test_help_does_not_import_torch():
    code = (
        "import sys\nfrom foretune.cli import app\n"
        "try:\n    app(['sfda', 'adapt', '--help'])\nexcept SystemExit:\n    pass\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "file",
    [
        *("prepared/sfda.json", "prepared/model.safetensors"),
        *("adapted/core.json", "adapted/core.safetensors", "target.npz"),
    ],
)
@given(data=st.data())
def test_a_damaged_file_is_read_or_one_line(data, file, place):
    with pytest.MonkeyPatch.context() as patch:
        folder = copied(place, place.with_name("copy"))
        patch.chdir(folder)
        (folder / file).write_bytes(data.draw(damaged(folder / file)))
        command = ("sfda", "eval", "adapted", "--rows", "target.npz", "--base", "prepared")
        check_command(folder, command)
