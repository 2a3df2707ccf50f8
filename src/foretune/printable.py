"""Text from files and models as it may be shown: no character that drives a terminal or a page."""

from __future__ import annotations

import re

# C0 and C1 controls but tab and newline, lone surrogates, marks that reorder text, and the two
# characters that XML forbids.
_UNSAFE = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069\ufffe\uffff]"
)


def printable(text: str) -> str:
    r"""The text with its control characters written as escapes.

    >>> printable("red\x1b[2J")
    'red\\x1b[2J'
    """
    return _UNSAFE.sub(_escape, text)


def printable_json(text: str) -> str:
    r"""A JSON text with the control characters inside its strings written as JSON escapes.

    >>> printable_json('"a\x9b"')
    '"a\\u009b"'
    """
    return _UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def in_one_line(text: str) -> str:
    r"""The text with each stretch of white space as one blank, for a message or a cell of a table.

    >>> in_one_line("two\nlines")
    'two lines'
    """
    return printable(" ".join(text.split()))


def markdown(text: str) -> str:
    r"""The text as one line of Markdown that shows it as it is, also in a cell of a table.

    >>> markdown("a|b <script>")
    'a\\|b &lt;script>'
    """
    line = in_one_line(text)
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", line.replace("&", "&amp;").replace("<", "&lt;"))


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
