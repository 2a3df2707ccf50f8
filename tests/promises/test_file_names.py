"""Each file name on disk is one constant: who writes a file and who reads it cannot disagree.

Names that several modules of the core use stand in `foretune.files`, the names of a wing in it.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

from foretune.files import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, CONFIG_FILE, WEIGHTS_FILE
from foretune.models.pretrained import LOADERS
from foretune.pruning import PLAN_FILE

SRC = Path(__file__).parents[2] / "src/foretune"
FILE_NAME = re.compile(r"[\w.-]+\.(json|jsonl|safetensors|yaml|html|npz|md)")
IN_TWO_MODULES = {
    # The core imports no wing: its table of loaders names the wing's marker file itself.
    "experts.json": ["models/pretrained.py", "pruning/__init__.py"],
    # A data set on disk, in the format of the library datasets; a checkpoint of a training.
    "state.json": ["tasks/data_folder.py", "training/checkpoint.py"],
}


def literals(file: Path) -> list[str]:
    """The strings of a module that are a file name and nothing else."""
    nodes = ast.walk(ast.parse(file.read_text("utf-8")))
    texts = [n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    return [text for text in texts if FILE_NAME.fullmatch(text)]


def test_file_name_is_written_once() -> None:
    modules: dict[str, list[str]] = defaultdict(list)
    for file in sorted(SRC.rglob("*.py")):
        for name in literals(file):
            modules[name].append(str(file.relative_to(SRC)))
    assert len(modules) > 30  # the scan sees them
    assert {name: files for name, files in modules.items() if len(files) > 1} == IN_TWO_MODULES


def test_loaders_name_the_marker_of_the_wing() -> None:
    assert list(LOADERS) == [PLAN_FILE]


def test_names_of_other_libraries_are_theirs() -> None:
    import peft.utils
    import transformers.utils

    assert CONFIG_FILE == transformers.utils.CONFIG_NAME
    assert WEIGHTS_FILE == transformers.utils.SAFE_WEIGHTS_NAME
    assert f"{WEIGHTS_FILE}.index.json" == transformers.utils.SAFE_WEIGHTS_INDEX_NAME
    assert ADAPTER_CONFIG_FILE == peft.utils.CONFIG_NAME
    assert ADAPTER_WEIGHTS_FILE == peft.utils.SAFETENSORS_WEIGHTS_NAME
