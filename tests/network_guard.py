"""Commands in a process that may not use the network, and what it tried."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

# Python runs a module of this name before anything else, in the processes that it starts, too.
GUARD = """
import os, socket, sys

ASKS = ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr")
SENDS = ("socket.connect", "socket.sendto", "socket.sendmsg")

def guard(event, args):
    if event in ASKS:
        place = args[0]
    elif event in SENDS and args[0].family != socket.AF_UNIX:
        place = args[-1][0] if args[-1] else "its peer"
    else:
        return
    if place in ("127.0.0.1", "localhost"):
        return
    with open(os.environ["NETWORK_ATTEMPTS"], "a") as file:
        file.write(f"{(sys.argv + ['', ''])[1]} {place}\\n")
    raise OSError(f"the network is forbidden here: {event} {place}")

sys.addaudithook(guard)
"""
COMMANDS = """
import shlex, sys
from foretune.cli import main

for line in sys.argv[1:]:
    sys.argv = ["foretune", *shlex.split(line)]
    try:
        main()
    except SystemExit as end:
        if end.code:
            print(f"exit {end.code}: {line}", file=sys.stderr)
            raise
"""
# What would keep it offline, or lead it elsewhere.
UNSET = (
    *("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "HF_ENDPOINT", "HF_TOKEN"),
    *("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"),
)


def run_guarded(
    commands: list[str], folder: Path, environment: Mapping[str, str] | None = None
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Runs command lines of foretune one after the other, until one fails, in one process.

    It is not told to stay offline, has an empty cache of the hub, and any use of a socket beyond
    this machine is an error.

    Args:
        commands: What stands after `foretune`.
        folder: The folder that they run in.
        environment: Variables beside the usual ones.

    Returns:
        (the finished process, "COMMAND HOST" of each use of the network that it tried)
    """
    beside = folder.parent / f"{folder.name}-guard"
    beside.mkdir()
    (beside / "sitecustomize.py").write_text(GUARD)
    attempts = beside / "attempts.txt"
    usual = {name: value for name, value in os.environ.items() if name.upper() not in UNSET}
    usual |= {
        "PYTHONPATH": os.pathsep.join([str(beside), *filter(None, sys.path)]),
        "NETWORK_ATTEMPTS": str(attempts),
        "HF_HOME": str(beside / "hub"),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, *commands],
        cwd=folder,
        env={**usual, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=600,
    )
    return done, attempts.read_text().splitlines() if attempts.exists() else []
