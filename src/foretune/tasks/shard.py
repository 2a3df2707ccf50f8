"""`Shard`: every N-th task, for one of N jobs that do not know of each other."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from foretune.errors import UserError


class Shard(NamedTuple):
    """The K-th of N equal parts of the tasks, sorted by name; K counts from 1.

    The shard of a task depends on which tasks there are, not on their order in a file.
    """

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """The shard that a text such as "2/8" names.

        Raises:
            UserError: The text is not K/N with 1 ≤ K ≤ N.

        >>> Shard.parse("2/8")
        Shard(number=2, of=8)
        """
        match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
        if match is None:
            raise UserError(f"a shard is K/N, such as 2/8; got {text!r:.60}")
        return cls(int(match[1]), int(match[2])).checked()

    def checked(self) -> Shard:
        """The shard itself.

        Raises:
            UserError: K is not between 1 and N.
        """
        if not 1 <= self.number <= self.of:
            raise UserError(f"shard {self}: K of K/N must be between 1 and N")
        return self

    def names(self, names: Iterable[str]) -> list[str]:
        """The names of its tasks, of those of all tasks.

        >>> Shard(2, 2).names(["d", "c", "b", "a"])
        ['b', 'd']
        """
        return sorted(names)[self.number - 1 :: self.of]

    def folder(self, out: Path) -> Path:
        """Its output folder, beside `out`.

        Raises:
            UserError: `out` has no name.

        >>> Shard(2, 8).folder(Path("runs/adapters")).name
        'adapters-2-of-8'
        """
        if out.name in ("", ".."):
            raise UserError(f"--out {out}: a shard needs a name, such as adapters")
        return out.with_name(f"{out.name}-{self.number}-of-{self.of}")

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"


def digest_of_names(names: Iterable[str]) -> str:
    """16 hexadecimal digits, equal for equal names in any order."""
    text = "\0".join(sorted(names)).encode(errors="surrogatepass")
    return hashlib.blake2b(text, digest_size=8).hexdigest()
