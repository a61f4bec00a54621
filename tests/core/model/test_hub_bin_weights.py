"""A model of `.bin` weights alone, as vicuna-7b-v1.3 is, from a Hub on loopback."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from medusa_core.config import EMBEDDED_MODEL

NAME = "somebody/model"
COMMIT = "0" * 40
LOAD = f"""
import torch
from medusa_core.model.backbone import load_backbone
backbone = load_backbone("{NAME}", dtype=torch.float32, device=torch.device("cpu"))
print(sum(parameter.numel() for parameter in backbone.model.parameters()))
"""


class Hub(BaseHTTPRequestHandler):
    """Serves the files of one repository, and notes everything that was asked for."""

    server: "Server"

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_POST(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        self.server.asked.append(f"{self.command} {self.path}")
        body = self._body()
        self.send_response(404 if body is None else 200)
        if body is None:
            self.send_header("X-Error-Code", "EntryNotFound")
        else:
            self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
        body = body or b"{}"
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def _body(self) -> bytes | None:
        files = {file.name: file for file in self.server.folder.iterdir()}
        if self.path.partition("?")[0] == f"/api/models/{NAME}":
            siblings = [{"rfilename": name} for name in files]
            return json.dumps({"id": NAME, "sha": COMMIT, "private": False, "siblings": siblings}).encode()
        _, found, filename = self.path.partition("/resolve/")
        file = files.get(filename.rpartition("/")[2])
        return file.read_bytes() if found and file is not None else None

    def log_message(self, *args: object) -> None:
        """Quiet."""


class Server(ThreadingHTTPServer):
    """The Hub, with what it serves and what it was asked."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Hub)
        self.folder = folder
        self.asked: list[str] = []


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Server]:
    folder = tmp_path / "repository"
    folder.mkdir()
    shutil.copy(EMBEDDED_MODEL / "config.json", folder)
    torch.save(load_file(EMBEDDED_MODEL / "model.safetensors"), folder / "pytorch_model.bin")
    with Server(folder) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.slow
def test_weights_without_safetensors_are_loaded_and_nobody_is_asked_to_convert_them(
    hub: Server, tmp_path: Path
) -> None:
    unset = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "DISABLE_SAFETENSORS_CONVERSION", "http_proxy")
    environment = {key: value for key, value in os.environ.items() if key not in unset}
    environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", LOAD], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    config = json.loads((EMBEDDED_MODEL / "config.json").read_text(encoding="utf-8"))
    assert int(done.stdout) > config["vocab_size"] * config["hidden_size"]
    files = [path for path in hub.asked if path.startswith("GET") and path.endswith("pytorch_model.bin")]
    assert len(files) == 1
    # Transformers would look for a pull request of safetensors, at the commits first, and have one made.
    assert [path for path in hub.asked if "/resolve/" not in path and f"{NAME}/" in path] == []
