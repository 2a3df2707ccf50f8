"""What `foretune push` uploads of a folder, and what it leaves out."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from markupsafe import escape

from foretune.errors import UserError
from foretune.evaluation.report.advice import best_base
from foretune.files import (
    ADAPTER_CONFIG_FILE,
    BASE_FILE,
    CARD_FILE,
    COMPARISON_FILE,
    CONFIG_FILE,
    MODULE_FILE,
    RECIPE,
    REPORT_FILE,
    SCORES_FILE,
    SPARSE_FILE,
    TRAINED_ON_FILE,
)
from foretune.formats import COMPARISON, read_json, stamped
from foretune.manifest import MARKER_FILE, all_files, read_manifest
from foretune.recipes.folder import is_finished
from foretune.recipes.yaml_io import dump_yaml, parse_yaml

# What a model folder, or that of an adapter, may hold of transformers, PEFT, tokenizers and
# foretune. Anything else that lies there, rows or the state of a training, is not uploaded, nor is
# Python code that the config does not name.
UPLOADED = re.compile(
    r"(config|generation_config|preprocessor_config|processor_config|tokenizer|tokenizer_config"
    r"|special_tokens_map|added_tokens|vocab|chat_template|adapter_config|base_fingerprint|labels"
    r"|trained_on|foretune|foretune_module|experts|modules|sentence_bert_config"
    r"|config_sentence_transformers"
    r"|model\.safetensors\.index)\.json"
    r"|(model|diffusion_pytorch_model|adapter_model|sparse_delta|foretune_experts)"
    r"(-\d+-of-\d+)?\.safetensors"
    r"|foretune_basis/basis\.safetensors|1_Pooling/config\.json"
    r"|[\w.-]+\.(py|model|jinja)|additional_chat_templates/[\w.-]+\.jinja"
    r"|(vocab|merges)\.txt|(LICENSE|NOTICE)(-[A-Z]+)?(\.(md|txt))?"
)
# Keys of such files whose values may be paths on this machine.
PATHS = (
    *("_name_or_path", "name_or_path", "base_model_name_or_path", "file"),
    *("tokenizer_file", "vocab_file", "merges_file", "special_tokens_map_file"),
)
OF_A_TASK = (ADAPTER_CONFIG_FILE, SPARSE_FILE, TRAINED_ON_FILE)


@dataclass
class Upload:
    """What is to be uploaded.

    Args:
        kind: "run", "base", "adapters" or "adapter".
        files: Name in the repository → the file, or its text.
        left_out: Files of the folder that are not uploaded, and folders, which end in a slash.
        place: The folder of the base, or of the adapters.
    """

    kind: str
    place: Path
    files: dict[str, Path | str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    def add_model(self, folder: Path, prefix: str = "") -> None:
        """Adds the files of a model or an adapter, their paths on this machine taken out.

        A link to what lies outside the folder is left out: it may lead to anything.

        Args:
            folder: Its folder.
            prefix: Where in the repository they are to be, with a slash at its end.
        """
        config = folder / CONFIG_FILE
        has_code = config.is_file() and bool(read_json(config, dict[str, Any]).get("auto_map"))
        for file in sorted(all_files(folder)):
            name = file.relative_to(folder).as_posix()
            is_uploaded = UPLOADED.fullmatch(name) and (has_code or file.suffix != ".py")
            if is_uploaded and is_part(file, folder):
                self.files[prefix + name] = _without_paths(file) if name[-5:] == ".json" else file
            elif name not in (CARD_FILE, MARKER_FILE):
                self.left_out.append(prefix + name)

    def leave_out(self, folder: Path, uploaded: Sequence[str]) -> None:
        """Lists what else there is in a folder than what is uploaded, model cards and our marks."""
        for path in sorted(folder.iterdir()):
            if path.name not in (*uploaded, CARD_FILE, MARKER_FILE):
                self.left_out.append(f"{path.name}/" if path.is_dir() else path.name)


def is_part(file: Path, folder: Path) -> bool:
    """Whether this is a file, and no link to what lies outside the folder."""
    if not file.is_file():  # nor where a link leads to itself
        return False
    return not file.is_symlink() or file.resolve().is_relative_to(folder.resolve())


def files_of(folder: Path) -> Upload:
    """What is to be uploaded of a run, a base or adapters, without the model cards.

    Raises:
        UserError: It is none of these, or has not finished.
    """
    if not folder.is_dir():
        raise UserError(f"no such folder: {folder}")
    if (folder / COMPARISON_FILE).is_file() or _kind(folder) == "run":
        return _run(folder)
    place = folder / "base" if (folder / "base").is_dir() else folder
    is_adapter = any((folder / name).is_file() for name in OF_A_TASK)
    if not is_adapter and any((place / n).is_file() for n in (CONFIG_FILE, MODULE_FILE)):
        _check_finished(place.parent)
        upload = Upload("base", place)
        upload.add_model(place)
        if place != folder:
            upload.leave_out(folder, (place.name,))
        return _checked(upload)
    if _kind(folder) == "retrain":
        raise UserError(_unfinished(folder))
    if is_adapter:
        upload = Upload("adapter", folder)
        upload.add_model(folder)
        return _checked(upload)
    return _adapters(folder)


def task_folders(folder: Path) -> list[Path]:
    """The folders of adapters, and of tasks' own models, in a folder."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_dir()
        and not path.name.startswith(".")
        and any((path / file).is_file() for file in (*OF_A_TASK, CONFIG_FILE))
    )


def _adapters(folder: Path) -> Upload:
    folders = task_folders(folder)
    if not folders:
        raise UserError(
            f"{folder} is neither a finished run, nor a base (it has no {CONFIG_FILE}), nor a "
            "folder of adapters: name one of these"
        )
    upload = Upload("adapters", folder)
    for path in folders:
        upload.add_model(path, f"{path.name}/")
    if (folder / SCORES_FILE).is_file():  # which task is in which folder
        upload.files[SCORES_FILE] = folder / SCORES_FILE
    upload.leave_out(folder, (SCORES_FILE, *(path.name for path in folders)))
    return _checked(upload)


def _run(folder: Path) -> Upload:
    """The best base of a run, with what the run says of it.

    Raises:
        UserError: The run has not finished, or its bases are elsewhere.
    """
    if not (folder / COMPARISON_FILE).is_file() or not is_finished(folder):
        raise UserError(_unfinished(folder))
    comparison = comparison_of(folder)
    base = best_base(comparison)
    place = folder / str(base.get("path"))
    if not (folder / RECIPE).is_file() or not (place / BASE_FILE).is_file():
        raise UserError(
            f"{folder} holds a comparison, but not the base {base['name']}: push the folder of "
            "that base"
        )
    upload = Upload("run", place)
    upload.add_model(place)
    cleaned = _cleaned_recipe(comparison.get("recipe") or "")
    config = (folder / RECIPE).read_text("utf-8")
    upload.files[RECIPE] = _cleaned_recipe(config)
    record = stamped({**comparison, "recipe": cleaned}, COMPARISON)
    paths = {str(folder.absolute()), str(folder.resolve())}
    paths |= {*_absolute_paths(parse_yaml(config, str(folder / RECIPE)))}
    text = json.dumps(record, indent=1, ensure_ascii=False)
    upload.files[COMPARISON_FILE] = _replaced(text, paths)
    if (folder / REPORT_FILE).is_file():
        report = (folder / REPORT_FILE).read_text("utf-8")
        report = report.replace(str(escape(comparison.get("recipe") or "")), str(escape(cleaned)))
        upload.files[REPORT_FILE] = _replaced(report, paths)
    upload.leave_out(folder, (RECIPE, COMPARISON_FILE, REPORT_FILE))
    return _checked(upload)


def comparison_of(folder: Path) -> dict[str, Any]:
    """The content of a run's comparison.json.

    Raises:
        UserError: It is damaged.
    """
    return read_json(folder / COMPARISON_FILE, dict[str, Any], COMPARISON)


def _checked(upload: Upload) -> Upload:
    """The upload, which must have weights in it.

    Raises:
        UserError: It has none.
    """
    if not any(name.endswith(".safetensors") for name in upload.files):
        raise UserError(
            f"{upload.place} has no weights as safetensors, and no others are uploaded: save it "
            "again with save_pretrained"
        )
    return upload


def _kind(folder: Path) -> str | None:
    manifest = read_manifest(folder)
    return None if manifest is None else manifest.kind


def _check_finished(folder: Path) -> None:
    """Checks that the retraining in a folder, if there was any, has finished.

    Raises:
        UserError: It has not.
    """
    if _kind(folder) == "retrain" and not is_finished(folder):
        raise UserError(_unfinished(folder))


def _unfinished(folder: Path) -> str:
    return f"{folder} has not finished: continue it with --resume, and push it then"


def _without_paths(file: Path) -> Path | str:
    """The file, or its text where it names a path on this machine, of which the name is left.

    Raises:
        UserError: It is not JSON.
    """
    if file.stat().st_size > 2**20:  # a vocabulary
        return file
    content = read_json(file, Any)
    cleaned = _cleaned(content, PATHS)
    if cleaned == content:
        return file
    return json.dumps(cleaned, indent=2, ensure_ascii=False) + "\n"


def _cleaned_recipe(text: str) -> str:
    """A recipe without absolute paths."""
    content = parse_yaml(text, RECIPE)
    cleaned = _cleaned(content, None)
    return text if cleaned == content else dump_yaml(cleaned)


def _cleaned(value: Any, keys: Sequence[str] | None, key: str | None = None) -> Any:
    """The value with the last part of each absolute path, under these keys; None for all."""
    if isinstance(value, dict):
        return {name: _cleaned(inner, keys, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [_cleaned(inner, keys, key) for inner in value]
    if isinstance(value, str) and (keys is None or key in keys) and _is_absolute(value):
        return _last_part(value)
    return value


def _absolute_paths(value: Any) -> Iterator[str]:
    """The absolute paths in a value."""
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _absolute_paths(inner)
    elif isinstance(value, str) and _is_absolute(value):
        yield value


def _replaced(text: str, paths: Iterable[str]) -> str:
    """The text with the last part of these paths, as they are and as HTML and JSON write them.

    >>> _replaced("<div>/d, /d/x</div>", ["/d"])
    '<div>d, d/x</div>'
    """
    for path in sorted(paths, key=len, reverse=True):
        for form in (str, escape, lambda path: json.dumps(path, ensure_ascii=False)[1:-1]):
            name = str(form(_last_part(path)))
            pattern = rf"(?<![\w.<]){re.escape(str(form(path)))}(?![\w-])"
            text = re.sub(pattern, lambda _, name=name: name, text)  # type: ignore[misc]
    return text


def _is_absolute(text: str) -> bool:
    if "\n" in text or len(text) > 4096:
        return False
    paths = (PurePosixPath(text), PureWindowsPath(text))
    return len(text) > 1 and (text[0] == "~" or any(path.is_absolute() for path in paths))


def _last_part(path: str) -> str:
    return PureWindowsPath(path).name or "path"
