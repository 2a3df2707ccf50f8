"""`SplitNames`: which split a name in the data stands for: a file's, a folder's or a row's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from foretune.errors import UserError, did_you_mean
from foretune.printable import in_one_line
from foretune.tasks.example import SPLITS

SPELLINGS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}
TWO_MEANINGS = ("eval", "evaluation")  # validation to some tools, test to others
LEFT_OUT = "left out"  # of a name whose rows are not to be read
SHARD = re.compile(r"[-_.](\d+)[-_]of[-_](\d+)(-[0-9a-f]+)?$")
NUMBER = re.compile(r"[-_. ]?\d+$")
FILLERS = {"", "part", "shard", "split", "set", "data", "file", "rows"}  # beside a split's name


class SplitNames:
    """Which of `SPLITS` a name in the data stands for.

    Args:
        renames: The user's own names: name in the data → split, or None to leave its rows out.
        option: How messages refer to `renames`; None where the user cannot set them.
    """

    def __init__(
        self, renames: Mapping[str, str | None] | None = None, option: str | None = None
    ) -> None:
        self.renames = renames or {}
        self.option = option
        self.names: set[str] = set()  # that were looked up

    def lookup(self, name: str) -> str | None:
        """One of `SPLITS`, or `LEFT_OUT`; None for a name that stands for no split."""
        self.names.add(name)
        if name in self.renames:
            return self.renames[name] or LEFT_OUT
        return SPELLINGS.get(name.casefold().strip())

    def split_of(self, name: Any, place: str) -> str:
        """One of `SPLITS`, or `LEFT_OUT`.

        Args:
            name: What the data has as the name of a split.
            place: Where it stands, for the message.

        Raises:
            UserError: The name stands for no split.
        """
        split = self.lookup(name) if isinstance(name, str) else None
        if split is None:
            name = in_one_line(str(name))[:60]
            two_meanings = name.casefold() in TWO_MEANINGS
            reason = " (validation to some tools, test to others)" if two_meanings else ""
            raise UserError(
                f"{place}: split must be train, validation (or valid, val, dev) or test; "
                f'got "{name}"{reason}: {self.way_on(name)}'
            )
        return split

    def split_in(self, name: str, place: str) -> str | None:
        """The split that the name of a file or folder names, if any.

        "train", "Test", "dev-00000-of-00002", "test_3", "shop_train" and "train-part-0" name one.

        Args:
            name: The name, without the suffix of a data file.
            place: The file or folder, for the message.

        Raises:
            UserError: The name has a split's name in it, but may not mean it: "train_sft", "eval".
        """
        stem = NUMBER.sub("", SHARD.sub("", name))
        for candidate in (name, SHARD.sub("", name), stem):
            if (split := self.lookup(candidate)) is not None:
                return split
        words = [w for w in re.split(r"[\W\d_]+", stem.casefold()) if w not in FILLERS]
        naming = [word for word in words if word in SPELLINGS or word in TWO_MEANINGS]
        if not naming:
            return None
        if len(naming) == 1 and words[-1] in SPELLINGS:
            return SPELLINGS[words[-1]]
        raise UserError(
            f'{place}: which split is "{stem}"? It is none of train, validation (or valid, val, '
            f"dev) and test: {self.way_on(stem)}"
        )

    def way_on(self, name: str) -> str:
        """What a user may do about a name that stands for no split, for a message."""
        if self.option is None:
            return "rename it"
        is_key = re.fullmatch(r"[\w-]+", name) is not None
        setting = f".{name}=train" if is_key else f'={{"{name}": train}}'
        return (
            f"rename it, or set {self.option}{setting} (or validation or test, or null to leave "
            "its rows out)"
        )

    def check_used(self, source: str) -> None:
        """Check that each of the user's own names is in the data.

        Raises:
            UserError: One is not.
        """
        for name in self.renames:
            if name not in self.names:
                names = sorted(self.names)
                has = f"it names {', '.join(names[:8])}" if names else "it names no splits"
                raise UserError(
                    f'splits renames "{name}", which {source} does not have; {has}.'
                    f"{did_you_mean(name, names)}"
                )


def check_renames(renames: Any) -> None:
    """Check that each value is one of `SPLITS`, or None.

    Raises:
        UserError: It is not.
    """
    if not isinstance(renames, dict) or not all(isinstance(name, str) for name in renames):
        raise UserError(f"splits must map names in the source to splits, got {renames!r}")
    for name, split in renames.items():
        if split is not None and split not in SPLITS:
            raise UserError(
                f'splits: "{name}" must be one of {", ".join(SPLITS)}, or null to leave its rows '
                f"out; got {split!r}"
            )
