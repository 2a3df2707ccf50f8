"""Programs in forks of one process that has imported torch, transformers and PEFT.

That takes seconds of each new process. A fork has its own folder, arguments, output and exit code,
and nothing of the forks before it. What is about imports, signals or start-up takes a new process.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path


class Warm:
    """The process that forks; see `warm`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def run(self, args: Sequence[str], folder: Path) -> subprocess.CompletedProcess[str]:
        """What `python ARGS` does in a folder.

        Args:
            args: A script, or `-m` and a module, and what follows.
            folder: The folder that it runs in.
        """
        requests, answers = self._process.stdin, self._process.stdout
        assert requests is not None and answers is not None
        with tempfile.TemporaryDirectory() as texts:
            outputs = [str(Path(texts) / name) for name in ("stdout", "stderr")]
            requests.write(json.dumps([list(args), str(folder), outputs]) + "\n")
            requests.flush()
            code = int(answers.readline())
            stdout, stderr = (Path(file).read_text("utf-8") for file in outputs)
        return subprocess.CompletedProcess(args, code, stdout, stderr)


@contextlib.contextmanager
def warm(environment: Mapping[str, str]) -> Iterator[Warm]:
    """A process that has imported what takes long, for as long as the block runs.

    Args:
        environment: Its variables, and those of its forks.
    """
    command = [sys.executable, str(Path(__file__))]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env={**environment}, text=True, **pipes) as process:
        yield Warm(process)


def serve() -> None:
    """Forks for each line of stdin, and prints each exit code."""
    import peft  # noqa: F401  # with torch and transformers

    sys.path.pop(0)  # this folder
    answers = os.dup(1)
    for line in sys.stdin:
        args, folder, outputs = json.loads(line)
        child = os.fork()
        if child == 0:
            become(args, folder, outputs)
        status = os.waitpid(child, 0)[1]
        os.write(answers, f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)  # freeing what was imported takes long, too


def become(args: Sequence[str], folder: str, outputs: Sequence[str]) -> None:
    """Runs the program in this process, which it ends."""
    import atexit
    import runpy
    import traceback

    os.chdir(folder)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for stream, file in enumerate(outputs, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT, 0o600), stream)
    code: object = 0
    try:
        if args[0] == "-m":
            sys.argv = [args[1], *args[2:]]
            sys.path.insert(0, folder)
            runpy.run_module(args[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = [*args]
            sys.path.insert(0, str(Path(args[0]).resolve().parent))
            runpy.run_path(args[0], run_name="__main__")
    except SystemExit as end:
        code = end.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


if __name__ == "__main__":
    serve()
