"""A run that is killed at any moment, while searching, training, adapting or reporting, resumes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_a_run_killed_at_random_moments_resumes_to_the_same_bits(tmp_path: Path) -> None:
    """Where it replaces an older result, that stays whole until the new one is."""
    driver = Path(__file__).with_name("killed_recipe.py")
    done = subprocess.run(
        [sys.executable, str(driver), str(tmp_path), "20"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    kills = json.loads(done.stdout)["kills"]
    # On a busy machine the moments are not where they were meant to be.
    assert len(kills) == 20 and sum(kill["killed"] for kill in kills) >= 10
    assert len({tuple(kill["left"]) for kill in kills}) > 1
    for kill in kills:
        assert kill["kept"] and kill["same"] and kill["clean"], (kill, done.stderr)
