"""foretune doctor: is an installed version one that was tested?"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import pytest
from packaging.requirements import Requirement

from command_line import call
from foretune.cli import doctor

NEEDED = Requirement("transformers>=5.18")
OPTIONAL = Requirement('faiss-cpu>=1.12; extra == "rtd"')


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """Name → version that this test pretends is installed; None for none."""
    pretended: dict[str, str | None] = {}
    real = importlib.metadata.version

    def version(name: str) -> str:
        shown = pretended.get(name, "")
        if shown is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return shown or real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(doctor, "reachable", lambda: False)
    return pretended


@pytest.mark.parametrize("version", ["5.18.0", "5.24.0", "5.24.0+local", "5.20.1"])
def test_a_version_between_the_bounds_needs_no_advice(
    installed: dict[str, str | None], version: str
) -> None:
    installed["transformers"] = version
    assert doctor._library(NEEDED, "5.24.0") == doctor.Check("transformers", version)


def test_a_version_below_the_lower_bound_is_to_be_fixed(installed: dict[str, str | None]) -> None:
    installed["transformers"] = "5.2.0"
    result = call("doctor")
    assert result.exit_code == 1
    assert "transformers: older than tested: pip install 'transformers>=" in result.stdout


def test_a_version_newer_than_tested_is_noted(installed: dict[str, str | None]) -> None:
    installed["transformers"] = "99.0.dev0"
    result = call("doctor")
    assert result.exit_code == 0
    advice = "transformers: newer than tested; if something fails: pip install transformers=="
    assert advice in result.stdout


def test_a_missing_library_is_to_be_fixed_and_one_of_an_extra_is_not(
    installed: dict[str, str | None],
) -> None:
    installed.update({"transformers": None, "faiss-cpu": None})
    missing = doctor._library(NEEDED, "5.24.0")
    assert missing is not None and (missing.found, missing.state) == ("missing", "fix")
    assert doctor._library(OPTIONAL, "1.15.1") is None


@pytest.mark.parametrize(
    ("version", "state"), [((3, 10), "fix"), ((3, 11), "ok"), ((3, 14), "note")]
)
def test_python_is_looked_at_too(version: tuple[int, int], state: str) -> None:
    assert doctor._python(version).state == state


def test_every_library_that_foretune_needs_is_looked_at() -> None:
    looked_at = {check.name for check in doctor._libraries()}
    required = map(Requirement, importlib.metadata.requires("foretune") or ())
    assert {one.name for one in required if one.marker is None} <= looked_at


def test_versions_are_told_without_importing_torch() -> None:
    code = "import foretune.cli.doctor as d, sys; d._versions(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
