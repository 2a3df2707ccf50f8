"""What a fresh installation can do: `make release` runs this with the Python that has the wheel.

Everything is typed in an empty folder, far from the sources.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

BASE = "runs/quickstart/bases/peft-ml/seed-0/base"
SHORT = "tasks.max_tasks=30 tasks.unseen=8 retrain.steps=12 retrain.eval_every=6 adapt.steps=4"
COMMANDS = {
    "--version": f"foretune {importlib.metadata.version('foretune')}\n",
    "doctor": "hub",
    "ls": "peft-ml",
    "init votes.yaml --data votes.jsonl": "votes.yaml",
    "plan votes.yaml": "unseen",
    f"run quickstart {SHORT} adapt.shots=[4] seeds=1": "report.html",
    f"adapt {BASE} --tasks votes.jsonl --out adapters": "adapters",
    f"predict {BASE} adapters votes.jsonl --out predicted.csv": "predicted.csv",
}
"""What stands after `foretune`, and a part of what it prints."""
WRITTEN = ("votes.yaml", "runs/quickstart/report.html", "adapters/scores.json", "predicted.csv")


def main() -> None:
    program = Path(sys.executable).with_name("foretune")
    # What a developer has set must not lead to the sources.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            {"task": f"n{task}", "text": f"The Land Bank should {verb} {what}.", "label": label}
            for task in range(8)
            for verb, label in (("buy", "agree"), ("sell", "disagree"))
            for what in ("farms", "beaches", "roads", "shops", "woods", "hills")
        ]
        (Path(folder) / "votes.jsonl").write_text("\n".join(map(json.dumps, rows)))
        for line, part in COMMANDS.items():
            print(f"foretune {line}", flush=True)
            done = subprocess.run(
                [program, *shlex.split(line)],
                cwd=folder,
                env=environment,
                capture_output=True,
                text=True,
                timeout=900,
            )
            if done.returncode or part not in done.stdout or "Traceback" in done.stderr:
                sys.exit(f"exit {done.returncode}\n{done.stdout}\n{done.stderr}")
        missing = [name for name in WRITTEN if not (Path(folder) / name).is_file()]
        if missing:
            sys.exit(f"not written: {', '.join(missing)}")


if __name__ == "__main__":
    main()
