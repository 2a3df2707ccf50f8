"""No telemetry, and no network unless a hub id is named: docs/privacy.md."""

from __future__ import annotations

import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tiny_models
from chat_templates import CHATML
from network_guard import run_guarded

WORDS = tiny_models.WORDS
PICKLE, SAFETENSORS = "pytorch_model.bin", "model.safetensors"
RECIPE = """
name: chats
model: {name: tiny, chat_template: chat.jinja}
tasks: {source: chats, unseen: 2}
objective: {kind: causal-lm}
retrain: {methods: [none, standard, peft-ml], steps: 2, learning_rate: 1e-3, tasks_per_step: 2}
adapt: {method: lora, steps: 2, learning_rate: 1e-3, shots: [4]}
answers: 1
forgetting: {source: general.jsonl}
spectrum: null
seeds: 1
"""
CARD = """---
configs:
- config_name: default
  data_files: rows.jsonl
---
"""
BASE = "runs/chats/bases/peft-ml/seed-0/base"
COMMANDS = [
    "plan chats.yaml",
    "run chats.yaml",
    f"adapt {BASE} --tasks chats.jsonl method=lora steps=2 learning_rate=0.1 --out adapters",
    f"check {BASE} adapters --rows chats.jsonl",
    "generate adapters/t0 --chat 'the cat' --max-new-tokens 2",
    f"predict {BASE} adapters chats.jsonl --max-new-tokens 2 --out predicted.jsonl",
    f"export {BASE} adapters/t0 --out merged",
]


def chat(task: int, i: int) -> dict[str, Any]:
    places = (task, 13, 3, 16, 7)
    asked, answered = (" ".join(WORDS[(k + i + shift) % 20] for k in places) for shift in (0, 9))
    said = [("user", asked), ("assistant", answered)]
    return {"task": f"t{task}", "messages": [{"role": r, "content": text} for r, text in said]}


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    """A folder with a tiny decoder and conversations."""
    folder = tmp_path / "chats"
    tiny_models.llama(seed=1, max_position_embeddings=128).save_pretrained(folder / "tiny")
    tiny_models.tokenizer().save_pretrained(folder / "tiny")
    (folder / "chat.jinja").write_text(CHATML)
    rows = [chat(task, i) for task in range(6) for i in range(10)]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "chats").mkdir()  # as on the hub, which `datasets` reads
    (folder / "chats" / "rows.jsonl").symlink_to(folder / "chats.jsonl")
    (folder / "chats" / "README.md").write_text(CARD)
    (folder / "general.jsonl").write_text('{"text": "the cat sat on the mat"}\n' * 8)
    (folder / "chats.yaml").write_text(RECIPE)
    return folder


@pytest.mark.slow
def test_no_command_on_local_files_uses_the_network(chats: Path) -> None:
    done, attempts = run_guarded([*COMMANDS, "doctor"], chats)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (chats / "merged").is_dir() and (chats / "predicted.jsonl").is_file()
    assert attempts == ["doctor huggingface.co"]  # which also shows that the guard works
    # Nor does a run write rows down, but for the answers that the recipe asks for.
    rows = map(json.loads, (chats / "chats.jsonl").read_text().splitlines())
    texts = {turn["content"] for row in rows for turn in row["messages"]}
    files = [path for path in (chats / "runs").rglob("*") if path.is_file()]
    holding = {p.name for p in files if any(text.encode() in p.read_bytes() for text in texts)}
    assert "answers.json" in holding <= {"answers.json", "report.html"}


class Hub(http.server.BaseHTTPRequestHandler):
    """The hub, as far as loading a model needs it."""

    files: dict[str, bytes]
    requests: list[str]
    agents: set[str]

    def do_GET(self) -> None:
        self.requests.append(self.path)
        self.agents.add(self.headers.get("User-Agent", ""))
        body = self.files.get(self.path.replace("/resolve/main/", "/"))
        self.send_response(404 if body is None else 200)
        if body is None:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("ETag", f'"{hashlib.sha256(body or b"").hexdigest()}"')
        self.send_header("Content-Length", str(len(body or b"")))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body or b"")

    do_HEAD = do_POST = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[http.server.ThreadingHTTPServer]:
    """A hub with a sound repository, me/tiny, and one of pickled weights, me/pickled."""
    tiny_models.llama(seed=1).save_pretrained(tmp_path / "tiny")
    tiny_models.tokenizer().save_pretrained(tmp_path / "tiny")
    Hub.files, Hub.requests, Hub.agents = {}, [], set()
    for path in (tmp_path / "tiny").iterdir():
        pickled = path.name.replace(SAFETENSORS, PICKLE)
        Hub.files[f"/me/tiny/{path.name}"] = Hub.files[f"/me/pickled/{pickled}"] = path.read_bytes()
    Hub.files["/api/models/me/pickled"] = json.dumps({"id": "me/pickled"}).encode()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_a_hub_id_asks_the_hub_and_nobody_else(hub: Any, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    generate = ["generate me/tiny 'the cat' --max-new-tokens 2", "generate me/pickled 'the cat'"]
    hub_here = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}"}
    done, attempts = run_guarded(generate, folder, hub_here)
    assert attempts == []
    assert f"/me/tiny/resolve/main/{SAFETENSORS}" in Hub.requests
    # Nobody is asked to convert the pickled weights, and they are not fetched.
    assert done.returncode == 2, done.stdout + done.stderr
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: me/pickled has no safetensors file: pickled weights can run")
    assert not [path for path in Hub.requests if PICKLE in path or "/commits" in path]
    [agent] = [agent for agent in Hub.agents if "session_id" in agent]
    assert agent.endswith("telemetry/off")
