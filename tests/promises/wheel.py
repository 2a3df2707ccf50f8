"""foretune as its wheel installs it, and what a user types with it in a folder."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from promises.pages import ROOT

# Between what two steps print.
MARK = "\x1e"
# Steps of one process: commands of foretune, scripts, and Python as it stands on a page.
STEPS = f"""
import json, runpy, shlex, sys, traceback
from foretune.cli import main

names = {{"__name__": "__main__"}}
for line, code in json.loads(sys.stdin.read()):
    print({MARK!r}, flush=True)
    program, *sys.argv = shlex.split(line)
    try:
        if code:
            exec(compile(code, line, "exec"), names)
        elif program == "python":
            runpy.run_path(sys.argv[0], run_name="__main__")
        else:
            sys.argv.insert(0, program)
            main()
    except SystemExit as end:
        if end.code:
            sys.exit(f"exit {{end.code}}: {{line}}")
    except BaseException:
        traceback.print_exc()
        sys.exit(f"failed: {{line}}")
"""


def install_wheel(folder: Path) -> Path:
    """Builds the wheel and returns a folder in `folder` with what it installs."""
    source = folder / "source"
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    subprocess.run([*build, str(source)], check=True, capture_output=True)
    [file] = folder.glob("*.whl")
    target = folder / "installed"
    install = [*pip, "install", "--no-deps", "--no-index", "--target", str(target), str(file)]
    subprocess.run(install, check=True, capture_output=True)
    return target


def run_python(
    args: Sequence[str], folder: Path, wheel: Path, text: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Python in a folder, with the wheel before what is installed else.

    Args:
        args: What stands after `python`.
        folder: The folder that it runs in.
        wheel: What `install_wheel` returned.
        text: What it reads on stdin.
    """
    return subprocess.run(
        [sys.executable, *args],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(wheel), "HF_HUB_OFFLINE": "1"},
        input=text,
        capture_output=True,
        text=True,
        timeout=600,
    )


def run_steps(steps: Sequence[tuple[str, str]], folder: Path, wheel: Path) -> list[str]:
    """What each step prints, run one after the other in one process; all must succeed.

    Args:
        steps: (a command line of foretune or python, ""), or (a name, Python code); all code has
            the same variables.
        folder: The folder that they run in.
        wheel: What `install_wheel` returned.
    """
    done = run_python(["-c", STEPS], folder, wheel, json.dumps(steps))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return re.split(f"{MARK}\n", done.stdout)[1:]
