"""What several promises need: the wheel, installed once for all of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from promises.wheel import install_wheel


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with foretune as its wheel installs it."""
    return install_wheel(tmp_path_factory.mktemp("wheel"))
