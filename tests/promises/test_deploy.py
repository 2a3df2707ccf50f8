"""Files for clusters and containers: they parse, and what they name exists."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType

from promises.pages import ROOT

DEPLOY = ROOT / "deploy"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
DOCKERFILE = (ROOT / "Dockerfile").read_text("utf-8")
LINES = [
    line
    for line in re.sub(r"\\\n\s*", "", DOCKERFILE).splitlines()
    if line and not line.startswith("#")
]


def launched(arguments: list[str]) -> tuple[str, list[str], list[str]]:
    """Module, its arguments and the launcher's own, of a call of `accelerate launch`."""
    parsed = launch_command_parser().parse_args(arguments)
    assert parsed.module
    own = arguments[: len(arguments) - len(parsed.training_script_args) - 1]
    return parsed.training_script, parsed.training_script_args, own


def test_every_file_is_linked_from_the_page_on_scale() -> None:
    page = (ROOT / "docs/scale.md").read_text("utf-8")
    for file in (*DEPLOY.iterdir(), ROOT / "Dockerfile"):
        assert f"](../{file.relative_to(ROOT)})" in page, file.name


@pytest.mark.parametrize(
    ("name", "kind", "processes"),
    [("one-gpu", DistributedType.NO, 1), ("fsdp2", DistributedType.FSDP, 2)],
)
def test_accelerate_reads_its_configs(name: str, kind: DistributedType, processes: int) -> None:
    config = load_config_from_file(str(DEPLOY / f"accelerate-{name}.yaml"))
    assert isinstance(config, ClusterConfig)
    assert (config.distributed_type, config.num_processes) == (kind, processes)


def test_the_config_for_fsdp_asks_for_what_foretune_shards_by(tmp_path: Path) -> None:
    script = tmp_path / "asked.py"
    script.write_text("from foretune.processes import base_is_sharded; print(base_is_sharded())")
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(DEPLOY / "accelerate-fsdp2.yaml"), str(script)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["True", "True"]


def slurm_call(tmp_path: Path, config: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the script as Slurm does on the first of two nodes, with stand-ins of its commands."""
    stand_ins = {
        "scontrol": 'printf "node7\\nnode8\\n"',
        "srun": 'shift; SLURM_NODEID=1 exec "$@"',
        "accelerate": 'for word in "$@"; do echo "$word"; done',
    }
    for program, body in stand_ins.items():
        file = tmp_path / program
        file.write_text(f"#!/bin/sh\n{body}\n")
        file.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CONFIG": config}
    environment |= {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_NUM_NODES": "2"}
    environment |= {"SLURM_GPUS_ON_NODE": "4"}
    command = ["bash", str(DEPLOY / "slurm.sbatch"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("config", ["", "deploy/accelerate-fsdp2.yaml"])
def test_slurm_starts_one_process_per_gpu_of_all_nodes(config: str, tmp_path: Path) -> None:
    done = slurm_call(tmp_path, config, "my.yaml", "retrain.steps=5")
    launch, *words = done.stdout.splitlines()
    module, arguments, own = launched(words)
    assert (done.returncode, launch, module) == (0, "launch", "foretune.cli")
    assert arguments == ["run", "my.yaml", "retrain.steps=5", "--resume"]
    given = " ".join(own)
    assert "--machine_rank 1" in given and "--num_machines 2 --num_processes 8" in given
    assert "--main_process_ip node7" in given
    assert (f"--config_file {config}" if config else "--multi_gpu") in given


def test_slurm_without_a_recipe_says_how(tmp_path: Path) -> None:
    done = slurm_call(tmp_path, "")
    assert done.returncode == 2 and done.stderr.startswith("usage: sbatch")


def test_skypilot_file_is_complete() -> None:
    task = yaml.safe_load((DEPLOY / "skypilot.yaml").read_text("utf-8"))
    assert task.keys() == {"name", "resources", "workdir", "envs", "setup", "run"}
    for script in (task["setup"], task["run"]):
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    run = task["run"].replace('"$SKYPILOT_NUM_GPUS_PER_NODE"', "4").replace("\\\n", " ")
    _, launch, *words = shlex.split(run)
    module, arguments, _ = launched(words)
    assert (launch, module, arguments) == ("launch", "foretune.cli", ["run", "$RECIPE", "--resume"])
    assert f'"{PROJECT["name"]}[quickstart]"' in task["setup"]


def test_dockerfile_has_two_stages_on_one_pinned_image() -> None:
    images = [line.split()[1:] for line in LINES if line.startswith("FROM")]
    assert [image[-1] for image in images] == ["base", "cpu", "cuda"]
    assert re.fullmatch(r"python:3\.11\.\d+-slim-\w+", images[0][0])
    assert [image[0] for image in images[1:]] == ["base", "base"]


def test_dockerfile_names_what_exists() -> None:
    copied = [words[1:-1] for words in map(str.split, LINES) if words[0] == "COPY"]
    context = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    for path in (path for paths in copied for path in paths):
        assert (ROOT / path).exists() and f"!{path.removeprefix('./')}" in context
    assert {PROJECT["readme"], *PROJECT["license-files"]} <= {p for paths in copied for p in paths}
    extras = {
        e for line in LINES for found in re.findall(r"EXTRAS=(\S+)", line) for e in found.split(",")
    }
    assert extras and extras <= PROJECT["optional-dependencies"].keys()
    assert LINES.count('ENTRYPOINT ["foretune"]') == 2 and "foretune" in PROJECT["scripts"]


def test_images_run_as_a_user_without_rights() -> None:
    assert LINES.count("USER foretune") == 2 and "USER root" not in LINES
    assert any(re.search(r"useradd .*\bforetune\b", line) for line in LINES)
