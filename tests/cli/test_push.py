"""`foretune push` as typed, to a stand-in of the Hub on this machine."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import ModelCard

import foretune
import tiny_models
from adapted_folders import texts
from cli.hub_stand_in import Hub, running_hub
from command_line import call, the_error, the_json
from foretune import formats
from foretune.models.loading import save_base
from foretune.recipes.schema import load_recipe
from foretune.tasks.example import ReadExample
from foretune.tasks.task import Task, TaskCollection
from foretune.training.trained_on import read_trained_on
from format_checks import assert_versions

RECIPE = """
name: votes
model: {{name: {folder}/model}}
objective: {{kind: classification}}
tasks: {{source: {folder}/rows.jsonl, unseen: 2}}
retrain: {{methods: [none, standard], steps: 2, learning_rate: 1e-3, batch_size: 4}}
adapt: {{method: lora, learning_rate: 1e-2, steps: 2, shots: [2]}}
"""
ROWS = [
    {"task": f"resident-{i % 4}", "text": text, "label": "yn"[i % 2], "email": f"m{i}@example.org"}
    for i, text in enumerate(texts(64))
]
STATE = ("run.json", "inputs.json", "repeats", "checkpoint", ".foretune", "metrics", "stage.json")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run, `runs/votes`, and the adapters of a base, `adapters`."""
    folder = tmp_path_factory.mktemp("push")
    save_base(
        tiny_models.bert(num_labels=2, num_hidden_layers=1),
        tiny_models.tokenizer(),
        folder / "model",
    )
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (folder / "my.yaml").write_text(RECIPE.format(folder=folder))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        base = folder / "runs/votes/bases/standard/seed-0/base"
        for command in (
            ("run", "my.yaml"),
            ("adapt", base, "--tasks", "rows.jsonl", "method=lora", "steps=2"),
        ):
            result = call(*command)
            assert result.exit_code == 0, result.output
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that this process talks to."""
    with running_hub() as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "writer")
        yield hub


def card_of(files: dict[str, bytes], name: str = "README.md") -> ModelCard:
    return ModelCard(files[name].decode())


def assert_nothing_private(hub: Hub, place: Path) -> None:
    uploaded = b"".join([*hub.bodies, *(c for files in hub.files.values() for c in files.values())])
    assert str(place).encode() not in uploaded
    for row in ROWS:
        assert row["email"].encode() not in uploaded
        assert len(row["text"].split()) < 3 or row["text"].encode() not in uploaded
    names = [name for files in hub.files.values() for name in files]
    assert not [name for name in names if any(part in name for part in STATE)]


def test_a_run_is_pushed_as_its_best_base_with_report_and_recipe(
    place: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "foretune", "push", "runs/votes", "--repo", "org/votes"]
    with running_hub() as hub:
        env = hub.environment(tmp_path)
        done = subprocess.run(
            command, env=env, cwd=place, capture_output=True, text=True, check=False
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"{hub.url}/org/votes\n")
    assert "Left out: adapters/, bases/" in done.stdout
    files = hub.files["org/votes"]
    extras = {"README.md", "report.html", "comparison.json", "config.yaml"}
    comparison = json.loads(files["comparison.json"])
    [best] = [b for b in comparison["bases"] if f"base of {b['label']}" in str(card_of(files))]
    assert comparison["verdict"]["best"] in (best["name"], None)
    base = place / "runs/votes" / best["path"]
    local = {p.relative_to(base).as_posix(): p for p in base.rglob("*") if p.is_file()}
    assert {*files} == {*local} | extras
    assert all(files[name] == path.read_bytes() for name, path in local.items())
    assert b"source: rows.jsonl" in files["config.yaml"] and b"rows.jsonl" in files["report.html"]
    data = card_of(files).data
    assert data.library_name == "transformers" and data.base_model is data.datasets is None
    means = [row["mean"] for row in comparison["means"] if row["base"] == best["name"]]
    assert [r.metric_value for r in data.eval_results] == [round(mean, 4) for mean in means]
    assert_nothing_private(hub, place)
    assert hub.commits == [f"Upload run with foretune {foretune.__version__}"]


def test_adapters_are_pushed_in_a_folder_each_with_a_card_of_its_own(place: Path, hub: Hub) -> None:
    settings = ("--base-model", "org/base", "--license", "mit", "--private")
    result = the_json("push", place / "adapters", "--repo", "org/adapters", *settings)
    assert result["url"] == f"{hub.url}/org/adapters" and hub.private["org/adapters"]
    assert result["left_out"] == ["run.json"] and result["notes"] == []
    files = hub.files["org/adapters"]
    assert result["files"] == {name: len(content) for name, content in files.items()}
    rewritten = ("README.md", "adapter_config.json", "trained_on.json")
    for path in sorted((place / "adapters").glob("*/*")):
        name = path.relative_to(place / "adapters").as_posix()
        assert path.name in rewritten or files[name] == path.read_bytes()
    scores = {row["task"]: row["score"] for row in json.loads(files["scores.json"])}
    for task, score in scores.items():
        data = card_of(files, f"{task}/README.md").data
        assert (data.base_model, data.library_name, data.license) == ("org/base", "peft", "mit")
        assert [r.metric_value for r in data.eval_results] == [round(score, 4)]
        config = json.loads(files[f"{task}/adapter_config.json"])
        assert config["base_model_name_or_path"] == "org/base"
    data = card_of(files).data
    assert data.base_model == "org/base" and "lora" in data.tags
    assert_nothing_private(hub, place)


def test_without_a_base_on_the_hub_none_is_named(place: Path, hub: Hub) -> None:
    one = place / "adapters/resident-1"
    result = the_json("push", one, "--repo", "org/one")
    assert "--base-model" in result["notes"][0]
    files = hub.files["org/one"]
    assert {*files} == {path.name for path in one.iterdir()}
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] is None
    assert card_of(files).data.base_model is None and "```python" not in str(card_of(files))
    assert_nothing_private(hub, place)


def test_the_code_of_the_cards_runs(place: Path, hub: Hub, tmp_path: Path) -> None:
    base = place / "runs/votes/bases/standard/seed-0"
    assert call("push", base, "--repo", "org/base").exit_code == 0
    adapters = ("push", place / "adapters", "--repo", "org/adapters", "--base-model", "org/base")
    assert call(*adapters).exit_code == 0
    whole, each = hub.files["org/adapters"], "resident-2/README.md"
    cards = [hub.files["org/base"]["README.md"], whole["README.md"], whole[each]]
    code = [card.decode().partition("```python\n")[2].partition("```")[0] for card in cards]
    assert all(code)
    program = "\n".join([*code, "print(len(tokenizer), model.peft_config['default'].r)"])
    command = [sys.executable, "-c", program]
    env = hub.environment(tmp_path)
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{len(tiny_models.tokenizer())} 8\n"


def test_the_code_of_an_adapters_own_card_runs_in_its_folder(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("adapters/resident-0", "runs/votes/adapters/standard/*"):
        adapter = sorted(place.glob(folder))[0]
        monkeypatch.chdir(adapter)
        code = Path("README.md").read_text("utf-8").partition("```python\n")[2].partition("```")[0]
        names: dict[str, Any] = {}
        exec(code, names)
        assert names["model"].peft_config["default"].r == 8


def test_a_dry_run_shows_files_and_card_and_asks_nothing(place: Path) -> None:
    result = call("push", place / "runs/votes", "--repo", "org/votes", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "model.safetensors" in result.stdout and "library_name: transformers" in result.stdout
    assert "Would upload" in result.stdout and "run.json" in result.stdout.partition("Left out")[2]


def test_what_is_no_part_of_a_model_is_left_out(place: Path, hub: Hub, tmp_path: Path) -> None:
    base = tmp_path / "base"
    save_base(tiny_models.bert(num_hidden_layers=1), tiny_models.tokenizer(), base)
    (base / "checkpoint-3").mkdir()
    others = ["rows.jsonl", "optimizer.pt", "checkpoint-3/model.safetensors", "mine.py", "a.json"]
    for name in others:
        (base / name).write_text("private")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "_name_or_path": f"{base}/x"}))
    result = the_json("push", base, "--repo", "org/plain", "--license", "mit")
    assert result["left_out"] == sorted(others)
    files = hub.files["org/plain"]
    assert "model.safetensors" in files and b"private" not in b"".join(files.values())
    assert json.loads(files["config.json"])["_name_or_path"] == "x"
    assert card_of(files).data.license == "mit"
    (base / "README.md").write_text("---\ntags: [theirs]\n---\n# Theirs\n")
    assert call("push", base, "--repo", "org/plain", "--license", "mit").exit_code == 0
    assert card_of(files).data.tags == ["theirs"] and card_of(files).data.license == "mit"


def test_a_link_out_of_the_folder_is_left_out(place: Path, hub: Hub, tmp_path: Path) -> None:
    base = tmp_path / "base"
    save_base(tiny_models.bert(num_hidden_layers=1), tiny_models.tokenizer(), base)
    (tmp_path / "id_rsa").write_text("private")
    for name in ("LICENSE", "vocab.json", "README.md"):
        (base / name).symlink_to(tmp_path / "id_rsa")
    (base / "LICENSE-of-alice.csv").write_text("private")
    (base / "NOTICE.txt").symlink_to("config.json")
    (base / "merges.txt").symlink_to("merges.txt")
    result = the_json("push", base, "--repo", "org/links")
    assert result["left_out"] == ["LICENSE", "LICENSE-of-alice.csv", "merges.txt", "vocab.json"]
    assert "NOTICE.txt" in result["files"]
    assert b"private" not in b"".join(hub.files["org/links"].values())


def test_private_does_not_publish_into_a_public_repository(place: Path, hub: Hub) -> None:
    command = ("push", place / "adapters/resident-0", "--repo", "org/open")
    assert call(*command).exit_code == 0
    before = dict(hub.files["org/open"])
    assert "exists and is public" in the_error(*command, "--private")
    assert hub.files["org/open"] == before and len(hub.commits) == 1
    assert call(*command).exit_code == 0  # again: a new revision


def unfinished(folder: Path) -> None:
    (folder / ".foretune").write_text('{"format": "foretune-folder-1", "kind": "run"}')
    (folder / "config.yaml").write_text("name: x")


def without_weights(folder: Path) -> None:
    (folder / "config.json").write_text("{}")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder.rmdir(), "no such folder"),
        (lambda folder: None, "neither a finished run, nor a base"),
        (unfinished, "has not finished: continue it with --resume"),
        (without_weights, "no weights as safetensors"),
    ],
)
def test_other_folders_are_refused(
    make: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    folder = tmp_path / "x"
    folder.mkdir()
    make(folder)
    assert message in the_error("push", folder, "--repo", "org/x", "--dry-run")


@pytest.mark.parametrize("name", ["x", "a/b/c", "org/x--y", "org/-x", "org/a b"])
def test_a_bad_name_is_refused(name: str, place: Path) -> None:
    command = ("push", place / "adapters", "--dry-run")
    assert "--repo" in the_error(*command, "--repo", name)
    assert "--base-model" in the_error(*command, "--repo", "org/x", "--base-model", name)


def test_refusals_of_the_hub_are_one_line(
    place: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("push", place / "adapters/resident-0", "--repo", "org/x")
    for token, message in (("reader", "may not write to org/x (403)"), ("bad", "(401)")):
        monkeypatch.setenv("HF_TOKEN", token)
        assert message in the_error(*command)
    monkeypatch.setenv("HF_TOKEN", "writer")
    hub.broken = True
    result = call(*command)
    assert result.exit_code == 1
    *_, line = result.stderr.splitlines()  # after the progress of the upload
    assert line == f"error: {hub.url} refused the upload: 400, out of order"
    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
        result = call(*command)
    assert result.exit_code == 1 and "cannot upload to http://127.0.0.1:9" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in the_error(*command)


def test_without_a_token_it_says_how_to_log_in(
    place: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    assert "hf auth login" in the_error("push", place / "adapters", "--repo", "org/x")
    assert hub.bodies == []


def test_an_adapter_says_on_which_rows_it_was_trained(place: Path, tmp_path: Path) -> None:
    for folder in (place / "adapters", place / "runs/votes/adapters/none"):
        for path in folder.glob("resident-*"):
            record = read_trained_on(path)
            assert record["foretune"] == foretune.__version__ and record["task"] == path.name
            assert len(record["sha256"]) == 64 and record["num_rows"] > 0
    adapter = tmp_path / "resident-0"
    adapter.mkdir()
    file = adapter / "trained_on.json"
    file.write_bytes((place / "adapters/resident-0/trained_on.json").read_bytes())
    assert_versions(file, formats.TRAINED_ON, lambda: read_trained_on(adapter))


def test_adapters_of_earlier_versions_are_pushed_too(place: Path, hub: Hub, tmp_path: Path) -> None:
    for path in (place / "adapters/resident-0").iterdir():
        if path.name not in ("trained_on.json", "README.md"):
            target = tmp_path / "adapters/resident-0" / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    assert call("push", tmp_path / "adapters", "--repo", "org/old").exit_code == 0
    assert card_of(hub.files["org/old"], "resident-0/README.md").data.library_name == "peft"
    [row] = the_json("ls", "adapters", tmp_path / "adapters")["adapters"]
    assert row["task"] == "resident-0"


def test_cards_name_what_is_on_the_hub_and_nothing_else(place: Path, tmp_path: Path) -> None:
    def origin(*changes: str) -> tuple[str | None, list[str]]:
        recipe = load_recipe(place / "my.yaml", changes)
        return recipe.base_model, recipe.datasets

    assert origin() == (None, [])
    assert origin("model.name=minilm")[0] == "sentence-transformers/all-MiniLM-L6-v2"
    there = ("model.name=org/model", "tasks.source=org/data:en", "tasks.unseen=org/more")
    assert origin(*there) == ("org/model", ["org/data", "org/more"])
    rows = [ReadExample(row, "org/data:en (train) row", i) for i, row in enumerate(ROWS[:20])]
    tasks = TaskCollection((Task("votes", rows[:16], (), rows[16:]),))
    model = tiny_models.bert(num_labels=2, num_hidden_layers=1)
    model.name_or_path = "org/base"
    fitted = tasks.with_objective(foretune.Classification(tokenizer=tiny_models.tokenizer()))
    run = foretune.Run(steps=1, batch_size=4)
    foretune.adapt(model, fitted, foretune.LoRA(), run).save(tmp_path / "adapters")
    data = ModelCard.load(tmp_path / "adapters/votes/README.md").data
    assert (data.base_model, data.datasets) == ("org/base", ["org/data"])
