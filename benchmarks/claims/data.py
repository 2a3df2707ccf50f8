"""Collections of the claims, from public files to the rows that foretune reads.

    python benchmarks/claims/data.py SHARED_FOLDER OUT_FOLDER

    written               from SHARED_FOLDER                                 tasks
    mnist-pairs.npz       images/mnist.npz                                   5 pairs of digits
    omniglot-pairs.npz    images/omniglot_images_background_small{1,2}.zip   60 pairs of characters
    har.npz               har/har_subjects.npz                               19 subjects

The same files give the same bytes: draws have a fixed seed, and none of them depends on another.
`clinc150/clinc150.jsonl.gz`, `shakespeare/speakers.jsonl.gz` and `convai2/valid.jsonl.gz` are rows
already, so their recipes read them as they are.

Sources:
    MNIST: LeCun, Cortes, Burges, 1998, as Keras packs it (x_train, y_train, x_test, y_test). The
        pairs are the protocol of Block et al. (arXiv:2410.22264) on CIFAR-10.
    Omniglot: Lake, Salakhutdinov, Tenenbaum, "Human-level concept learning through probabilistic
        program induction", Science 2015; 20 drawings a character, 105 x 105.
    UCI HAR: Anguita et al., "A public domain dataset for human activity recognition using
        smartphones", ESANN 2013, split as in AdaTime (Ragab et al., TKDD 2023, arXiv:2203.08321).
"""

from __future__ import annotations

import argparse
import io
import random
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

SEED = 0
PAIRS_SEED = 1  # of Omniglot: the pairs of seed 0 were looked at while the variants were made
SIDE = 28  # pixels of an image's side, in both collections of images
DIGIT_PAIRS = ((0, 1), (2, 3), (4, 5), (6, 7), (8, 9))
NUM_DRAWINGS = 20  # of each Omniglot character
# Channels of a window: body acceleration x y z (g), angular velocity x y z (rad/s), total
# acceleration x y z (g). A quarter of g and half a radian a second become 1: units that are known
# before any subject is measured, so that nothing is learnt from unseen subjects.
HAR_UNITS = np.array([0.25] * 3 + [0.5] * 3 + [0.25] * 3, dtype=np.float32)

Columns = dict[str, np.ndarray]


class DataError(Exception):
    """The shared folder lacks a file, or a file is not what it should be."""


def mnist_pairs(shared: Path, rows: Sequence[int] = (1000, 200, 500)) -> Columns:
    """Five tasks, "0-1" to "8-9": which digit of the pair; the label is the digit modulo 2.

    Args:
        shared: Folder that holds `images/mnist.npz`.
        rows: Train, validation and test rows of a task, half of each digit. The first two are
            drawn without overlap from the 60,000 training images, the last from the 10,000 others.

    Returns:
        x (n, 28, 28) float16 in 0..1, y (n,) 0 or 1, task and split (n,).
    """
    with np.load(_there(shared / "images" / "mnist.npz")) as stored:
        arrays = {name: stored[name] for name in ("x_train", "y_train", "x_test", "y_test")}
    train, validation, test = (count // 2 for count in rows)
    table = _Table()
    for pair in DIGIT_PAIRS:
        name = f"{pair[0]}-{pair[1]}"
        for digit in pair:
            rng = np.random.default_rng([SEED, digit])
            known = rng.permutation(np.flatnonzero(arrays["y_train"] == digit))
            exam = rng.permutation(np.flatnonzero(arrays["y_test"] == digit))
            for split, side, places in (
                ("train", "x_train", known[:train]),
                ("validation", "x_train", known[train : train + validation]),
                ("test", "x_test", exam[:test]),
            ):
                table.add(name, split, arrays[side][places] / 255, digit % 2)
    return table.columns(shuffled=True)


def omniglot_pairs(shared: Path, pairs: int = 60, drawings: Sequence[int] = (10, 3, 7)) -> Columns:
    """Tasks of two characters of one alphabet: which of the two is drawn; no character is in two.

    Which of the pair is 1 is a coin flip, so a new pair's labels mean nothing to a shared head.

    Args:
        shared: Folder that holds `images/omniglot_images_background_small{1,2}.zip`.
        pairs: How many, drawn over all alphabets.
        drawings: Train, validation and test drawings of each character, 20 in all at most.

    Returns:
        x (n, 28, 28) float16 in 0..1, the share of ink under each pixel, y (n,) 0 or 1, task and
        split (n,). Tasks are called like "Greek-03-17".
    """
    archives = [f"omniglot_images_background_small{i}.zip" for i in (1, 2)]
    characters = _drawings([_there(shared / "images" / name) for name in archives])
    rng = random.Random(PAIRS_SEED)
    found = []
    for alphabet in sorted({alphabet for alphabet, _ in characters}):
        own = sorted(number for name, number in characters if name == alphabet)
        rng.shuffle(own)
        found += [(alphabet, a, b) for a, b in zip(own[::2], own[1::2], strict=False)]
    if len(found) < pairs:
        raise DataError(f"{pairs} pairs of characters wanted, but there are {len(found)}")
    table = _Table()
    for alphabet, a, b in sorted(rng.sample(found, pairs)):
        name = f"{alphabet}-{a[-2:]}-{b[-2:]}"
        for label, number in enumerate((a, b)):  # `own` was shuffled, so this is the coin flip
            images = np.stack([_small(png) for png in characters[alphabet, number]])
            start = 0
            for split, count in zip(("train", "validation", "test"), drawings, strict=True):
                table.add(name, split, images[start : start + count], label)
                start += count
    return table.columns(shuffled=True)


def har(shared: Path, subjects: int | None = None) -> Columns:
    """A task a subject: which of 6 activities a window shows.

    Windows are in fixed physical units (`HAR_UNITS`) instead of being standardised: statistics of
    all windows would tell of unseen subjects, and a subject's own would need more windows than the
    shots that an unseen one is given. Neighbouring windows overlap by half in UCI HAR and AdaTime
    splits them at random, so absolute scores flatter every base alike.

    Args:
        shared: Folder that holds `har/har_subjects.npz`.
        subjects: Keep the first so many; None for all.

    Returns:
        x (n, 9, 128) float16, y (n,) 0 to 5, task ("subject-02") and split (n,) train or test.
    """
    table = _Table()
    with np.load(_there(shared / "har" / "har_subjects.npz")) as stored:
        numbers = sorted(int(n.split("_")[-1]) for n in stored.files if n.startswith("x_train_"))
        for number in numbers[:subjects]:
            for split in ("train", "test"):
                x = stored[f"x_{split}_{number}"].astype(np.float32) / HAR_UNITS[:, None]
                table.add(f"subject-{number:02d}", split, x, stored[f"y_{split}_{number}"])
    return table.columns()


COLLECTIONS: dict[str, Callable[[Path], Columns]] = {
    "mnist-pairs": mnist_pairs,
    "omniglot-pairs": omniglot_pairs,
    "har": har,
}


class _Table:
    """Rows of several tasks, column by column."""

    def __init__(self) -> None:
        self.parts: list[tuple[str, str, np.ndarray, np.ndarray]] = []

    def add(self, task: str, split: str, x: np.ndarray, y: int | np.ndarray) -> None:
        """Some rows of one split; `y` is one label for all of them, or (n,)."""
        if len(x):
            self.parts.append((task, split, x, np.broadcast_to(y, len(x))))

    def columns(self, *, shuffled: bool = False) -> Columns:
        """All rows; shuffled where they came class by class, for `eval_rows` takes the first."""
        counts = [len(x) for _, _, x, _ in self.parts]
        columns = {
            "task": np.repeat([task for task, *_ in self.parts], counts),
            "split": np.repeat([split for _, split, *_ in self.parts], counts),
            "x": np.concatenate([x for *_, x, _ in self.parts]).astype(np.float16),
            "y": np.concatenate([y for *_, y in self.parts]).astype(np.int64),
        }
        order = np.arange(sum(counts))
        if shuffled:
            order = np.random.default_rng(SEED).permutation(order)
        return {name: column[order] for name, column in columns.items()}


def _there(path: Path) -> Path:
    if not path.is_file():
        raise DataError(f"no file {path}: SHARED_FOLDER must hold {path.parent.name}/{path.name}")
    return path


def _drawings(archives: Sequence[Path]) -> dict[tuple[str, str], list[bytes]]:
    """(alphabet, character) -> its 20 drawings; an alphabet that two archives hold counts once."""
    found: dict[tuple[str, str], dict[str, bytes]] = {}
    for path in archives:
        with zipfile.ZipFile(path) as archive:
            for member in sorted(archive.namelist()):
                if member.endswith(".png"):
                    _, alphabet, character, file = member.split("/")
                    found.setdefault((alphabet, character), {})[file] = archive.read(member)
    for (alphabet, character), files in found.items():
        if len(files) != NUM_DRAWINGS:
            raise DataError(
                f"{character} of {alphabet} has {len(files)} drawings instead of {NUM_DRAWINGS}"
            )
    return {key: [files[name] for name in sorted(files)] for key, files in found.items()}


def _small(png: bytes) -> np.ndarray:
    """(28, 28) share of ink, from a drawing of black strokes on white."""
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError("reading PNG files needs Pillow: pip install pillow") from error
    image = Image.open(io.BytesIO(png)).convert("L")
    resized = image.resize((SIDE, SIDE), Image.Resampling.BOX)
    return 1 - np.asarray(resized, dtype=np.float32) / 255


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("shared", type=Path, help="folder with images/ and har/")
    parser.add_argument("out", type=Path, help="where the .npz files go")
    parser.add_argument("--only", choices=COLLECTIONS, action="append", help="make this one only")
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    for name in given.only or COLLECTIONS:
        try:
            columns = COLLECTIONS[name](given.shared)
        except DataError as error:
            print(f"data.py: {error}", file=sys.stderr)
            return 2
        path = given.out / f"{name}.npz"
        np.savez_compressed(path, **columns)  # type: ignore[arg-type]
        print(f"{path}: {len(set(columns['task']))} tasks, {len(columns['y'])} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
