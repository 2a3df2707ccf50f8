"""Where results may be written: nothing is lost, nothing of others is touched, one process each."""

from __future__ import annotations

import errno
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from foretune import files
from foretune.claims import claim_file, output_folder
from foretune.errors import ForetuneError, UserError
from foretune.files import check_file_name, whole_folder, write_whole
from foretune.manifest import MARKER_FILE


class Stop(Exception):  # noqa: N818
    pass


def make(out: Path, text: str = "old", *, at_once: bool = False, **options: Any) -> Path:
    """A result of one file and one folder."""
    with output_folder(out, "run", at_once=at_once, **options) as folder:
        write_whole(folder / "run.json", "{}")
        if at_once:
            (folder / "result.txt").write_text(text)
        else:
            write_whole(folder / "result.txt", text)
        with whole_folder(folder / "base") as part:
            (part / "weights").write_text(text)
    return out


def contents(folder: Path) -> dict[str, str]:
    """Every file but the marker, by its path; links by where they lead."""
    return {
        path.relative_to(folder).as_posix(): (
            f"-> {path.readlink()}" if path.is_symlink() else path.read_text()
        )
        for path in sorted(folder.rglob("*"))
        if path.name != MARKER_FILE and (path.is_symlink() or path.is_file())
    }


OLD = {"base/weights": "old", "result.txt": "old", "run.json": "{}"}
NEW = {**OLD, "base/weights": "new", "result.txt": "new"}
OPTIONS: tuple[dict[str, Any], ...] = ({}, {"overwrite": True}, {"resume": True})
both = pytest.mark.parametrize("at_once", [False, True])


@both
def test_overwriting_replaces_what_foretune_wrote(tmp_path: Path, at_once: bool) -> None:
    make(tmp_path / "out", at_once=at_once)
    with pytest.raises(UserError, match=r"is not empty: use .*--overwrite to replace it"):
        make(tmp_path / "out", at_once=at_once)
    make(tmp_path / "out", "new", at_once=at_once, overwrite=True)
    assert contents(tmp_path) == {f"out/{name}": text for name, text in NEW.items()}


@both
@pytest.mark.parametrize("place", ["thesis.txt", "base/thesis.txt", "figures/deep/thesis.txt"])
def test_a_file_of_the_users_anywhere_in_the_folder_stops_overwriting(
    tmp_path: Path, place: str, at_once: bool
) -> None:
    file = make(tmp_path / "out", at_once=at_once) / place
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("years of work")
    with pytest.raises(UserError, match=f"did not write.*{place}"):
        make(tmp_path / "out", at_once=at_once, overwrite=True)
    assert contents(tmp_path / "out") == {**OLD, place: "years of work"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@both
@pytest.mark.parametrize("name", ["config.yaml", "inputs.json", "run.json", MARKER_FILE])
@pytest.mark.parametrize("option", ["", "overwrite"])
def test_a_file_of_the_users_with_a_name_of_ours_is_not_ours(
    tmp_path: Path, name: str, option: str, at_once: bool
) -> None:
    (tmp_path / name).write_text("mine")
    (tmp_path / "other.txt").write_text("mine")
    with pytest.raises(UserError):
        make(tmp_path, at_once=at_once, **({option: True} if option else {}))
    assert (tmp_path / name).read_text() == "mine"


@pytest.mark.parametrize("name", ["config.yaml", "inputs.json"])
def test_a_folder_with_a_config_of_the_users_alone_is_in_use(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        make(tmp_path)
    with pytest.raises(UserError, match="did not write"):
        make(tmp_path, overwrite=True)
    assert contents(tmp_path) == {name: "mine"}


@both
@pytest.mark.parametrize("options", OPTIONS)
def test_a_part_of_a_result_is_no_output_folder(
    tmp_path: Path, options: dict[str, Any], at_once: bool
) -> None:
    out = make(tmp_path / "out")
    with pytest.raises(UserError, match="is a part of the result in"):
        make(out / "base", "new", at_once=at_once, **options)
    assert contents(out) == OLD
    assert not (out / "base" / MARKER_FILE).exists()


def test_a_folder_of_the_users_is_not_resumed(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "weights").write_text("mine")
    with pytest.raises(UserError, match="holds no run to resume"):
        make(tmp_path, resume=True)
    assert contents(tmp_path) == {"base/weights": "mine"}


def test_a_resumed_run_replaces_no_file_that_it_did_not_write(tmp_path: Path) -> None:
    make(tmp_path / "out")
    (tmp_path / "out" / "more").mkdir()
    (tmp_path / "out" / "more" / "thesis.txt").write_text("mine")
    with (
        pytest.raises(UserError, match=r"more is in the way.*thesis\.txt"),
        output_folder(tmp_path / "out", "run", resume=True) as folder,
        whole_folder(folder / "more"),
    ):
        pass
    assert contents(tmp_path / "out") == {**OLD, "more/thesis.txt": "mine"}


@both
def test_another_commands_result_is_neither_replaced_nor_continued(
    tmp_path: Path, at_once: bool
) -> None:
    make(tmp_path / "out", at_once=at_once)
    for options in OPTIONS[1:]:
        with (
            pytest.raises(UserError, match=r"the result of another command \(run\)"),
            output_folder(tmp_path / "out", "fuse", at_once=at_once, **options),
        ):
            pass
    assert contents(tmp_path / "out") == OLD


# --- what the command reads ----------------------------------------------------------------------


@both
@pytest.mark.parametrize("read", ["out", "out/base", "out/result.txt", ".", "link", "views"])
def test_overwriting_removes_nothing_that_is_read(tmp_path: Path, read: str, at_once: bool) -> None:
    make(tmp_path / "out", at_once=at_once)
    (tmp_path / "link").symlink_to(tmp_path / "out" / "base")
    (tmp_path / "views").mkdir()
    (tmp_path / "views" / "weights").symlink_to("../out/base/weights")
    with pytest.raises(UserError, match=r"would replace .*, which the command reads"):
        make(tmp_path / "out", "new", at_once=at_once, overwrite=True, reads=[tmp_path / read])
    assert contents(tmp_path / "out") == OLD


def test_inputs_elsewhere_and_names_on_the_hub_are_no_obstacle(tmp_path: Path) -> None:
    make(tmp_path / "out")
    (tmp_path / "rows.jsonl").write_text("{}")
    reads = [tmp_path / "rows.jsonl", "owner/model:config", "\0", "x" * 5000]
    make(tmp_path / "out", "new", overwrite=True, reads=reads)
    assert contents(tmp_path / "out") == NEW


# --- links ---------------------------------------------------------------------------------------


@both
def test_a_link_as_output_is_written_through_but_nothing_is_removed_through_it(
    tmp_path: Path, at_once: bool
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to("real")
    make(tmp_path / "out", at_once=at_once)
    assert (tmp_path / "out").is_symlink() and contents(tmp_path / "real") == OLD
    with pytest.raises(UserError, match="out is a symbolic link: --overwrite does not remove"):
        make(tmp_path / "out", "new", at_once=at_once, overwrite=True)
    assert contents(tmp_path / "real") == OLD


@both
@pytest.mark.parametrize("target", ["nothing", "out"])
def test_a_link_that_leads_nowhere_is_one_line(tmp_path: Path, target: str, at_once: bool) -> None:
    (tmp_path / "out").symlink_to(target)
    for options in OPTIONS:
        with pytest.raises(UserError, match="out is a symbolic link to nothing"):
            make(tmp_path / "out", at_once=at_once, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["base", ".unfinished-base", "result.txt", ".replaced-base"])
def test_links_inside_the_folder_are_not_written_through(tmp_path: Path, name: str) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "weights").write_text("mine")
    with pytest.raises(Stop), output_folder(tmp_path / "out", "run") as folder:
        write_whole(folder / "first.txt", "")
        raise Stop
    (tmp_path / "out" / name).symlink_to("../mine")
    with pytest.raises(UserError, match=f"{name} is a symbolic link"):
        make(tmp_path / "out", resume=True)
    assert contents(tmp_path / "mine") == {"weights": "mine"}
    with pytest.raises(UserError, match="did not write"):
        make(tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / name).is_symlink()


# --- interrupted ---------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("error", [UserError("bad"), ForetuneError("nan"), KeyboardInterrupt()])
def test_an_error_before_the_first_result_leaves_nothing(
    tmp_path: Path, error: BaseException, at_once: bool
) -> None:
    out = tmp_path / "runs" / "deep" / "out"
    with pytest.raises(type(error)), output_folder(out, "run", at_once=at_once) as folder:
        write_whole(folder / "config.yaml", "x")
        write_whole(folder / "bases" / "a" / "run.json", "x")
        raise error
    assert not list(tmp_path.iterdir())
    out.mkdir(parents=True)
    with pytest.raises(type(error)), output_folder(out, "run", at_once=at_once):
        raise error
    assert not list(out.iterdir())


def test_a_kill_before_the_first_result_does_not_make_the_folder_used(tmp_path: Path) -> None:
    def begin() -> None:
        with output_folder(tmp_path / "out", "run") as folder:
            write_whole(folder / "config.yaml", "x")
            write_whole(folder / "bases" / "a" / "run.json", "x")
            os.kill(os.getpid(), signal.SIGKILL)

    in_a_fork(begin)
    assert (tmp_path / "out" / "config.yaml").is_file()
    make(tmp_path / "out")
    assert contents(tmp_path / "out") == OLD


def test_interrupted_overwriting_leaves_the_old_result_and_is_resumed(tmp_path: Path) -> None:
    out = make(tmp_path / "out")
    with pytest.raises(Stop), output_folder(out, "run", overwrite=True) as folder:
        write_whole(folder / "result.txt", "new")
        raise Stop
    assert contents(out) == OLD
    with pytest.raises(UserError, match="is not empty: use --resume"):
        make(out)
    with output_folder(out, "run", resume=True) as folder:
        assert contents(folder) == {"result.txt": "new"}
        write_whole(folder / "run.json", "{}")
        with whole_folder(folder / "base") as part:
            (part / "weights").write_text("new")
        assert contents(out) == OLD
    assert contents(tmp_path) == {f"out/{name}": text for name, text in NEW.items()}


def test_overwriting_killed_before_its_first_result_is_what_resume_continues(
    tmp_path: Path,
) -> None:
    out = make(tmp_path / "out")

    def begin() -> None:
        with output_folder(out, "run", overwrite=True) as folder:
            write_whole(folder / "config.yaml", "x")
            os.kill(os.getpid(), signal.SIGKILL)

    in_a_fork(begin)
    assert contents(out) == OLD
    with output_folder(out, "run", resume=True) as folder:
        assert contents(folder) == {"config.yaml": "x"}  # not the older result


@both
def test_overwriting_again_after_an_interruption_starts_over(tmp_path: Path, at_once: bool) -> None:
    out = make(tmp_path / "out", at_once=at_once)

    def killed() -> None:
        with output_folder(out, "run", overwrite=True, at_once=at_once) as folder:
            write_whole(folder / "half.txt", "new")
            os.kill(os.getpid(), signal.SIGKILL)

    in_a_fork(killed)
    assert contents(out) == OLD
    make(out, "new", at_once=at_once, overwrite=True)
    assert contents(tmp_path) == {f"out/{name}": text for name, text in NEW.items()}


@both
@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_kill_while_the_new_result_takes_its_place_loses_neither(
    tmp_path: Path, number: int, at_once: bool
) -> None:
    out = make(tmp_path / "out", at_once=at_once)

    def killed() -> None:
        calls = []
        rename, remove = Path.rename, files.shutil.rmtree

        def die(call: object, path: Path, *args: object, **options: object) -> object:
            if "out" in Path(path).name:
                calls.append(path)
                if len(calls) == number:
                    os.kill(os.getpid(), signal.SIGKILL)
            return call(path, *args, **options)  # type: ignore[operator]

        Path.rename = lambda *args: die(rename, *args)  # type: ignore[method-assign]
        files.shutil.rmtree = lambda *args: die(remove, *args)
        make(out, "new", at_once=at_once, overwrite=True)

    in_a_fork(killed)
    if number < 3:
        everything = contents(tmp_path)
        assert {text for name, text in everything.items() if "weights" in name} == {"old", "new"}
    else:
        assert contents(out) == NEW
    make(out, "newer", at_once=at_once, overwrite=True)
    assert contents(out)["result.txt"] == "newer"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_was_added_while_a_run_overwrote_is_not_removed(tmp_path: Path) -> None:
    out = make(tmp_path / "out")
    with (
        pytest.raises(UserError, match=r"notes\.txt.*The new result is in .*unfinished-out"),
        output_folder(out, "run", overwrite=True) as folder,
    ):
        write_whole(folder / "result.txt", "new")
        (out / "notes.txt").write_text("mine")
    assert contents(out) == {**OLD, "notes.txt": "mine"}
    (out / "notes.txt").rename(tmp_path / "notes.txt")
    with output_folder(out, "run", resume=True):
        pass
    assert contents(out) == {"result.txt": "new"}


def test_a_full_disk_at_any_write_leaves_the_old_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, calls = make(tmp_path / "out"), 0
    opened, limit = Path.open, 0

    def full(path: Path, mode: str = "r", *args: object, **options: object) -> object:
        nonlocal calls
        if "r" not in mode:
            calls += 1
            if calls == limit:
                raise OSError(errno.ENOSPC, "No space left on device")
        return opened(path, mode, *args, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", full)
    for limit in range(1, 30):  # noqa: B007
        calls = 0
        try:
            make(out, "new", overwrite=True)
        except ForetuneError as error:
            assert "the disk is full" in str(error)
            assert contents(out) == OLD
        except OSError as error:  # the text of a file of this test itself
            assert error.errno == errno.ENOSPC
        else:
            break
    assert contents(out) == NEW and limit > 5


# --- one process per folder ----------------------------------------------------------------------


HOLD = """
import sys, time
from pathlib import Path
from typing import Any
from foretune.claims import output_folder
from foretune.files import write_whole
with output_folder(Path(sys.argv[1]), "run", resume=True) as folder:
    write_whole(folder / "run.json", "{}")
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", HOLD, str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
        process.kill()


@pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite": True}])
def test_a_second_process_is_refused_until_the_first_ends_however_it_ends(
    tmp_path: Path, holder: subprocess.Popen[str], options: dict[str, Any]
) -> None:
    owner = f"is in use by process {holder.pid} on {platform.node()}"
    with pytest.raises(UserError, match=owner):
        make(tmp_path / "out", **options)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    make(tmp_path / "out", "new", **options)
    assert contents(tmp_path / "out") == NEW


def test_a_file_system_without_locks_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("foretune.manifest.fcntl.flock", flock)
    with pytest.warns(UserWarning, match=r"cannot be locked \(No locks available\)"):
        make(tmp_path / "out")


# --- places --------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "file", "file/x", "/proc/x", "/dev/null"])
def test_a_place_that_cannot_be_written_is_one_line(
    tmp_path: Path, name: str, at_once: bool
) -> None:
    (tmp_path / "file").write_text("mine")
    for options in OPTIONS:
        with pytest.raises(UserError) as caught:
            make(tmp_path / name, at_once=at_once, **options)
        assert "\n" not in str(caught.value)
        with pytest.raises(UserError):
            claim_file(tmp_path / name, overwrite="overwrite" in options)
            write_whole(tmp_path / name, "text")
    assert contents(tmp_path) == {"file": "mine"}


@pytest.mark.parametrize("name", [".", "", "../here", "/"])
def test_the_current_folder_is_written_but_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    if name != "/":
        make(Path(name))
        assert contents(tmp_path / "here") == OLD
    with pytest.raises(UserError):
        make(Path(name), overwrite=True)


@pytest.mark.parametrize("name", ["", ".", "..", ".x", " x", "x.", "a/b", "a\\b", "a\0b", "a\x1bb"])
def test_names_that_are_no_folders_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="cannot be the name of a folder"):
        check_file_name("base", name)


@pytest.mark.parametrize("name", ["x" * 300, "ä" * 60, "CON", "nul.txt", "a\ud800"])
def test_names_that_some_file_systems_refuse_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="cannot be the name of a folder"):
        check_file_name("base", name)


def in_a_fork(work: object) -> None:
    """Runs `work` in a child, which it kills."""
    pid = os.fork()
    if pid == 0:
        try:
            work()  # type: ignore[operator]
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
