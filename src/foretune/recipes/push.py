"""`foretune push`: a run's best base, a base or adapters, to the Hugging Face Hub."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import foretune
from foretune.errors import ForetuneError, UserError
from foretune.files import CARD_FILE
from foretune.models.hub_card import REPOSITORY
from foretune.printable import in_one_line
from foretune.recipes.hub_files import Upload, files_of
from foretune.tasks.file_formats import one_line

LOGIN = "log in with hf auth login, or set HF_TOKEN"


def push(
    folder: Path,
    repository: str,
    *,
    private: bool = False,
    license: str | None = None,
    base_model: str | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Uploads a folder as a commit to a repository, which is created if there is none.

    Args:
        folder: A finished run, a base, or a folder of adapters.
        repository: The repository, as owner/name.
        private: Whether a new repository is private; an existing one must be.
        license: The license, as the Hub names it; None states none.
        base_model: Id of the model on the Hub that it was made from; None for the recorded one.
        dry_run: Upload nothing.

    Returns:
        JSON-able: kind, repository, url and commit (None after a dry run), files with their sizes
        in bytes, what is left out, the model card, and notes.

    Raises:
        UserError: The folder is none of these, a name is no repository, there is no token, or it
            does not allow the upload.
        ForetuneError: The Hub cannot be reached, or fails.
    """
    _check_name("--repo", repository)
    if base_model is not None:
        _check_name("--base-model", base_model)
    upload = files_of(folder)
    if not dry_run:
        _check_token()
    from foretune.recipes.hub_cards import add_cards

    add_cards(upload, folder, repository, base_model, license)
    url, commit = (None, None) if dry_run else _upload(upload, repository, private)
    return {
        "kind": upload.kind,
        "repository": repository,
        "url": url,
        "commit": commit,
        "files": {name: _size(content) for name, content in sorted(upload.files.items())},
        "left_out": sorted(upload.left_out),
        "card": upload.files[CARD_FILE],
        "notes": _notes(upload, base_model),
    }


def _check_name(option: str, name: str) -> None:
    """Checks that a name is that of a repository, with its owner.

    Raises:
        UserError: It is not.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"{option}: {one_line(error)}") from error
    if not REPOSITORY.fullmatch(name):
        raise UserError(f"{option}: a repository is named OWNER/NAME, got {name}")


def _check_token() -> None:
    """Checks that the Hub may be asked, as somebody.

    Raises:
        UserError: There is no token, or the Hub is switched off.
    """
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise UserError("HF_HUB_OFFLINE is set, so nothing can be uploaded: unset it")
    if get_token() is None:
        raise UserError(f"the Hub takes uploads from those it knows: {LOGIN}")


def _upload(upload: Upload, repository: str, private: bool) -> tuple[str, str]:
    """Creates the repository if there is none, and commits the files; returns url and commit.

    Raises:
        UserError: The token does not allow it, or a public repository was to be private.
        ForetuneError: The Hub cannot be reached, or fails.
    """
    from huggingface_hub import HfApi

    api = HfApi(library_name="foretune", library_version=foretune.__version__)
    with _hub_errors(repository, api.endpoint):
        url = api.create_repo(repository, private=private or None, exist_ok=True)
        if private and not api.model_info(repository).private:
            raise UserError(
                f"{repository} exists and is public, which --private does not change: make it "
                "private in its settings, or choose another name"
            )
        with tempfile.TemporaryDirectory(prefix="foretune-push-") as place:
            _lay_out(upload, Path(place))
            commit = api.upload_folder(
                repo_id=repository,
                folder_path=place,
                commit_message=f"Upload {upload.kind} with foretune {foretune.__version__}",
            )
    return str(url), commit.oid


def _lay_out(upload: Upload, place: Path) -> None:
    """Makes a folder as the repository will be: texts, and links to files."""
    for name, content in upload.files.items():
        target = place / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            target.write_text(content, encoding="utf-8")
        else:
            target.symlink_to(content.resolve())


@contextlib.contextmanager
def _hub_errors(repository: str, endpoint: str) -> Iterator[None]:
    """Turns what the Hub or its library raises into one line.

    Raises:
        UserError: The token is not accepted, or does not allow the upload.
        ForetuneError: Anything else.
    """
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except ForetuneError:
        raise
    except Exception as error:  # of any of the libraries below
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, HfHubHTTPError):
            cause = cause.__cause__
        status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
        if status == 401:
            raise UserError(f"{endpoint} does not accept the token (401): {LOGIN}") from error
        if status == 403:
            raise UserError(
                f"the token may not write to {repository} (403): it needs the right to write, and "
                "you must be a member of its owner"
            ) from error
        if status == 404:
            raise UserError(
                f"{endpoint} knows no {repository} that this token may see (404): check its name"
            ) from error
        if isinstance(cause, HfHubHTTPError):
            reason = in_one_line(str(cause.server_message or ""))
            answer = f"{status}, {reason}" if reason else str(status)
            raise ForetuneError(f"{endpoint} refused the upload: {answer}") from error
        raise ForetuneError(
            f"cannot upload to {endpoint}: {one_line(error)}; push again when it can be reached"
        ) from error


def _size(content: Path | str) -> int:
    return len(content.encode()) if isinstance(content, str) else content.stat().st_size


def _notes(upload: Upload, base_model: str | None) -> list[str]:
    """What the user should know."""
    if not upload.kind.startswith("adapter") or base_model is not None:
        return []
    card = upload.files[CARD_FILE]
    if isinstance(card, str) and "\nbase_model: " in card:
        return []
    return [
        "the base of these adapters is not known to be on the Hub: push it, and name it with "
        "--base-model, so that the adapters load"
    ]
