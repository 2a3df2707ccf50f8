"""A stand-in for the Hugging Face Hub on this machine: what its HTTP API is asked, and answers."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from huggingface_hub import ModelCard

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = (".safetensors", ".model")


class Hub:
    """What was uploaded, by repository and name, and what was asked.

    Tokens: "writer" may do all, "reader" is refused with 403, all others with 401.
    """

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.large: dict[str, bytes] = {}
        self.bodies: list[bytes] = []
        self.commits: list[str] = []
        self.broken = False  # whether commits fail
        self.url = ""

    def environment(self, home: Path, token: str | None = "writer") -> dict[str, str]:
        """The environment of a child process that talks to this hub."""
        env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING_FACE_"))}
        env |= {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        env |= {"HF_HUB_DISABLE_TELEMETRY": "1"}
        return env if token is None else {**env, "HF_TOKEN": token}


@contextlib.contextmanager
def running_hub() -> Iterator[Hub]:
    hub = Hub()

    class Handler(_Handler):
        stand_in = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    stand_in: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, content: Any, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        for name, value in {"Content-Type": kind, **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.stand_in.bodies.append(body)
        return body

    def is_allowed(self) -> bool:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token == "writer":
            return True
        status = 403 if token == "reader" else 401
        self.answer({"error": "you may not"}, status)
        return False

    def do_POST(self) -> None:
        hub, path, body = self.stand_in, unquote(urlsplit(self.path).path), self.body()
        if not self.is_allowed():
            return
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            there = name in hub.files
            if not there:
                hub.files[name] = {}
                hub.private[name] = asked.get("visibility") == "private" or bool(
                    asked.get("private")
                )
            answer = {"url": f"{hub.url}/{name}"}
            self.answer(
                {"error": "it exists", **answer} if there else answer, 409 if there else 200
            )
        elif path == "/api/validate-yaml":
            ModelCard(json.loads(body)["content"])
            self.answer({"errors": [], "warnings": []})
        elif match := re.fullmatch(r"/api/models/(.+)/preupload/main", path):
            files = json.loads(body)["files"]
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                    "shouldIgnore": False,
                }
                for file in files
            ]
            self.answer({"files": modes})
        elif match := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
            objects = [
                {**wanted, "actions": {"upload": {"href": f"{hub.url}/large/{wanted['oid']}"}}}
                for wanted in json.loads(body)["objects"]
            ]
            self.answer({"transfer": "basic", "objects": objects})
        elif match := re.fullmatch(r"/api/models/(.+)/commit/main", path):
            if hub.broken:
                self.answer({"error": "out of order"}, 400)
                return
            for line in body.splitlines():
                self.take(match[1], json.loads(line))
            url = f"{hub.url}/{match[1]}/commit/{COMMIT}"
            self.answer({"commitUrl": url, "commitOid": COMMIT, "success": True})
        else:
            self.answer({"error": path}, 404)

    def take(self, repository: str, line: dict[str, Any]) -> None:
        """One line of a commit."""
        files, value = self.stand_in.files[repository], line["value"]
        if line["key"] == "header":
            self.stand_in.commits.append(value["summary"])
        elif line["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        else:
            files[value["path"]] = self.stand_in.large[value["oid"]]

    def do_PUT(self) -> None:
        body = self.body()
        oid = self.path.rpartition("/")[2]
        assert hashlib.sha256(body).hexdigest() == oid
        self.stand_in.large[oid] = body
        self.answer({})

    def do_GET(self) -> None:
        hub, path = self.stand_in, unquote(urlsplit(self.path).path)
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            content = hub.files.get(match[1], {}).get(match[2])
            headers = {"X_Repo_Commit": COMMIT}
            if content is None:
                self.answer(b"", 404, **headers, X_Error_Code="EntryNotFound")
            else:
                digest = hashlib.sha256(content).hexdigest()
                self.answer(content, **headers, ETag=f'"{digest}"', Accept_Ranges="bytes")
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/[^/]+)?", path):
            names = hub.files.get(match[1])
            if names is None:
                self.answer({"error": "no such repository"}, 404, X_Error_Code="RepoNotFound")
                return
            siblings = [{"rfilename": name} for name in names]
            private = hub.private[match[1]]
            self.answer({"id": match[1], "sha": COMMIT, "private": private, "siblings": siblings})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/[^/]+(/.*)?", path):
            place = (match[2] or "/")[1:]
            entries = [
                {"type": "file", "path": name, "size": len(content), "oid": COMMIT}
                for name, content in hub.files.get(match[1], {}).items()
                if name.startswith(f"{place}/" if place else "")
            ]
            if place and not entries:
                self.answer({"error": path}, 404, X_Error_Code="EntryNotFound")
            else:
                self.answer(entries)
        else:
            self.answer({"error": path}, 404)

    do_HEAD = do_GET  # noqa: N815
