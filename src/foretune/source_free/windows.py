"""Reading sensor windows: one domain of a file of arrays, or of a folder in AdaTime's format.

A file is any that `read_rows` reads, with an array `x` (channels, length) in each row, a label `y`
if it is labelled, and the domain's name as `task`. AdaTime's format is a folder with
`train_<domain>.pt` and `test_<domain>.pt`, each a dict of `samples` and `labels`.
"""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

from foretune.errors import UserError, did_you_mean
from foretune.printable import in_one_line
from foretune.tasks.example import SPLITS
from foretune.tasks.readers import Row, read_rows
from foretune.tasks.rows import example_of, split_of
from foretune.tasks.task import Task

NAME = re.compile(r"(train|val|valid|test)_(.+)\.pt")


def read_windows(source: str, domain: str | None = None, *, labelled: bool = False) -> Task:
    """The windows of one domain.

    Args:
        source: A file of rows, or a folder in AdaTime's format.
        domain: The domain's name; may be None if the source has only one.
        labelled: Whether every window needs a label.

    Raises:
        UserError: Nothing to read, no such domain, several domains and none chosen, or a bad row.
    """
    folder = Path(source).expanduser()
    if folder.is_dir() and any(NAME.fullmatch(p.name) for p in folder.iterdir()):
        rows, name = _rows_of_adatime(folder, domain)
    else:
        rows, name = _rows_of_file(source, domain)
    splits: dict[str, list[Any]] = {split: [] for split in SPLITS}
    shape: tuple[int, ...] | None = None
    for row in rows:
        example = example_of(row, "classification" if labelled else "unlabelled", ("task", "split"))
        if "x" not in example or example["x"].ndim < 2:
            content = "text" if "x" not in example else f"x of shape {example['x'].shape}"
            raise UserError(
                f"{row.place}: a window must be an array x (channels, length), got {content}"
            )
        shape = shape or example["x"].shape
        if example["x"].shape != shape:
            raise UserError(
                f"{row.place}: x has shape {example['x'].shape}, but the first row's is {shape}; "
                "all windows must have the same shape"
            )
        splits[split_of(row)].append(example)
    return Task(name, **splits)


def _rows_of_file(source: str, domain: str | None) -> tuple[list[Row], str]:
    rows = list(read_rows(source))
    names = list(dict.fromkeys(str(row.fields["task"]) for row in rows if "task" in row.fields))
    _check_choice(source, domain, names)
    if domain is not None and domain not in names:
        raise UserError(_no_domain(source, domain, names))
    name = domain or (names[0] if names else "target")
    return [row for row in rows if str(row.fields.get("task", name)) == name], name


def _rows_of_adatime(folder: Path, domain: str | None) -> tuple[list[Row], str]:
    files = {p: match for p in sorted(folder.iterdir()) if (match := NAME.fullmatch(p.name))}
    names = list(dict.fromkeys(match[2] for match in files.values()))
    _check_choice(str(folder), domain, names)
    name = domain or names[0]
    if name not in names:
        raise UserError(_no_domain(str(folder), name, names))
    rows = [row for p, match in files.items() if match[2] == name for row in _read_pt(p, match[1])]
    return rows, name


def _check_choice(source: str, domain: str | None, names: list[str]) -> None:
    if domain is None and len(names) > 1:
        raise UserError(
            f"{source} has {len(names)} domains ({', '.join(names[:6])}"
            f"{' …' if len(names) > 6 else ''}): choose one with --domain"
        )


def _no_domain(source: str, domain: str, names: list[str]) -> str:
    choices = f"it has {', '.join(names[:10])}" if names else "its rows name no task"
    return f'{source} has no domain "{domain}"; {choices}.{did_you_mean(domain, names)}'


def _read_pt(path: Path, split: str) -> list[Row]:
    """The rows of one of AdaTime's files; its pickle may hold tensors but no code.

    Raises:
        UserError: The file is not readable, or its tensors do not have the right shapes.
    """
    import torch

    if not path.is_file():
        raise UserError(f"{path} is a pipe, a device or a folder, which cannot be read")
    try:
        stored = torch.load(path, weights_only=True, map_location="cpu")
        samples, labels = torch.as_tensor(stored["samples"]), torch.as_tensor(stored["labels"])
    except (
        *(RuntimeError, EOFError, OSError, KeyError, TypeError, ValueError, IndexError),
        pickle.UnpicklingError,
    ) as error:
        reason = in_one_line(str(error))[:160]
        raise UserError(
            f"{path} is not a dict of tensors samples and labels: {type(error).__name__}: {reason}"
        ) from error
    if samples.dim() == 2:  # one channel
        samples = samples[:, None]
    if samples.dim() != 3 or labels.dim() != 1 or len(samples) != len(labels):
        raise UserError(
            f"{path}: samples must be (windows, channels, length) with one label per window, got "
            f"samples {tuple(samples.shape)}, labels {tuple(labels.shape)}"
        )
    if samples.shape[1] > samples.shape[2]:  # AdaTime: the shorter side holds the channels
        samples = samples.transpose(1, 2)
    split = {"train": "train", "test": "test"}.get(split, "validation")
    return [
        Row(str(path), "window", i + 1, {"x": x, "y": int(y), "split": split})
        for i, (x, y) in enumerate(zip(samples.float().numpy(), labels.tolist(), strict=True))
    ]
