"""Live servers on free loopback ports: uvicorn in a thread, the worker in its own process as always."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.app import create_app
from server.http.sockets import bind
from server.runtime import Runtime
from server.serve import build_server
from server.settings import Settings
from server.workers.process import WorkerProcess

START_SECONDS = 120.0
WAIT_SECONDS = 30.0
CONTEXT = 8192
NEVER_GENERATED = (0, 4)  # the tiny tokenizer's end-of-sequence ids


def eventually(condition: Callable[[], Any], timeout: float = WAIT_SECONDS) -> Any:
    """The condition's first true value; fails the test if there is none in time."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < deadline, "timed out waiting"
        time.sleep(0.02)
    return value


class LiveServer:
    """A server in a thread. `runtime` may be read from tests; its loop's thread alone changes it."""

    def __init__(self, settings: Settings) -> None:
        self.listener: socket.socket = bind("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        app = create_app(settings)
        self.runtime: Runtime = app.state.runtime
        self.model = self.runtime.model_name
        self.server = build_server(app)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listener]})
        self.thread.start()

    @property
    def worker_pid(self) -> int:
        assert self.worker is not None
        assert self.worker.pid is not None
        return self.worker.pid

    @property
    def worker(self) -> WorkerProcess | None:
        """The process that the first worker is at the moment."""
        return self.runtime.pool.supervisors[0].worker

    def wait_ready(self) -> None:
        eventually(
            lambda: self.runtime.why_not_ready() is None or self.runtime.start_error is not None,
            START_SECONDS,
        )
        assert self.runtime.start_error is None, self.runtime.start_error

    def kill_worker(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.worker_pid, number)

    def body(self, **changes: Any) -> dict[str, Any]:
        """A greedy request; None values are left out."""
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": "I need a restaurant"}],
            "max_tokens": 24,
            "temperature": 0.0,
        } | changes
        return {name: value for name, value in body.items() if value is not None}

    def post(self, timeout: float = WAIT_SECONDS, **changes: Any) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/chat/completions", json=self.body(**changes), timeout=timeout)

    def text(self, **changes: Any) -> str:
        answer = self.post(**changes)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["message"]["content"]

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=WAIT_SECONDS)

    def stream(self, **changes: Any) -> list[str]:
        """Payloads of all events of a stream, `[DONE]` included."""
        with httpx.stream(
            "POST",
            f"{self.url}/v1/chat/completions",
            json=self.body(stream=True, **changes),
            timeout=WAIT_SECONDS,
        ) as answer:
            assert answer.status_code == 200, answer.read()
            return [line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: ")]

    def metric(self, name: str, **labels: str) -> float:
        value = self.runtime.metrics.registry.get_sample_value(name, labels | {"model": self.model})
        assert value is not None, f"no metric {name} {labels}"
        return value

    def wait_idle(self) -> None:
        """Until no request is left, in the API process and on the worker."""
        scheduler = self.runtime.scheduler
        eventually(lambda: scheduler.num_running == 0 and scheduler.num_waiting == 0)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(START_SECONDS)
        assert not self.thread.is_alive()
        self.listener.close()


@pytest.fixture(scope="session")
def endless_model_dir(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    """The tiny model with a long context that greedily never ends, with untrained Medusa heads beside it."""
    from safetensors.torch import load_file, save_file

    from medusa_core.checkpoints.writing import save_heads
    from medusa_core.draft.medusa import MedusaHeads

    path = tmp_path_factory.mktemp("endless") / "endless"
    shutil.copytree(tiny_model_dir, path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": CONTEXT}))
    weights = load_file(path / "model.safetensors")
    for token_id in NEVER_GENERATED:  # a logit of 0 among 318 random ones never is the greatest
        weights["lm_head.weight"][token_id] = 0.0
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    lm_head = weights["lm_head.weight"]
    heads = MedusaHeads.new(
        hidden_size=lm_head.shape[1],
        vocab_size=lm_head.shape[0],
        num_heads=3,
        num_layers=1,
        lm_head_weight=lm_head,
    )
    save_heads(heads, path / "medusa-1", base_model=str(path))
    (path / "tree.json").write_text(json.dumps([[0], [1], [0, 0], [0, 0, 0]]))
    return path


@pytest.fixture(scope="session")
def start_server(endless_model_dir: Path) -> Callable[..., LiveServer]:
    """Start a server on the endless model, or another; the caller stops it."""

    def start(**settings: Any) -> LiveServer:
        defaults: dict[str, Any] = {
            "model": str(endless_model_dir),
            "dtype": "float32",
            "max_length": CONTEXT,
            "measure": False,
            "log_level": "warning",
        }
        server = LiveServer(Settings(**(defaults | settings)))
        try:
            server.wait_ready()
        except BaseException:
            server.stop()
            raise
        return server

    return start


@pytest.fixture(scope="session")
def shared_server(start_server: Callable[..., LiveServer], endless_model_dir: Path) -> Iterator[LiveServer]:
    """One slot, a queue of 16, frequent keep-alives, a static tree. Tests leave it as they find it."""
    tree = str(endless_model_dir / "tree.json")
    server = start_server(queue_limit=16, keepalive=0.2, measure=True, static_tree=tree)
    yield server
    server.stop()


@pytest.fixture
def live(shared_server: LiveServer) -> Iterator[LiveServer]:
    """The shared server, idle before and after."""
    shared_server.wait_idle()
    yield shared_server
    shared_server.wait_idle()


@pytest.fixture(scope="session")
def wait_until() -> Callable[..., Any]:
    return eventually


@pytest.fixture
def open_request() -> Iterator[Callable[..., socket.socket]]:
    """Send a request on a raw connection, which is closed after the test if not before."""
    with contextlib.ExitStack() as connections:

        def send(server: LiveServer, **changes: Any) -> socket.socket:
            address = server.listener.getsockname()
            content = json.dumps(server.body(**changes)).encode()
            connection = connections.enter_context(socket.create_connection(address))
            head = "POST /v1/chat/completions HTTP/1.1\r\nhost: test\r\ncontent-type: application/json\r\n"
            connection.sendall(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
            return connection

        yield send


@pytest.fixture
def run_async() -> Callable[[Any], Any]:
    """Run a coroutine with a time limit."""

    def run(coroutine: Any) -> Any:
        async def limited() -> Any:
            async with asyncio.timeout(START_SECONDS):
                return await coroutine

        return asyncio.run(limited())

    return run


def _medusa(flags: tuple[str, ...], environment: dict[str, str]) -> subprocess.Popen[str]:
    """`medusa serve` with standard error and output in one pipe."""
    return subprocess.Popen(
        [sys.executable, "-c", "from server.cli import main; main()", "serve", *flags],
        env={name: value for name, value in os.environ.items() if not name.startswith("MEDUSA_")}
        | {"MEDUSA_COMPILE": "off"}
        | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture
def run_medusa() -> Callable[..., tuple[int, str]]:
    """Run `medusa serve` to an end of its own; its exit code and output."""

    def run(*flags: str, **environment: str) -> tuple[int, str]:
        with _medusa(flags, environment) as process:
            try:
                output, _ = process.communicate(timeout=START_SECONDS)
            finally:
                process.kill()
        return process.returncode, output

    return run


@pytest.fixture
def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    return port


def _start_medusa() -> Iterator[Callable[..., tuple[subprocess.Popen[str], str]]]:
    """Start `medusa serve` on a free port and wait until it is ready; killed after the test if need be."""
    started: list[subprocess.Popen[str]] = []

    def start(*flags: str, **environment: str) -> tuple[subprocess.Popen[str], str]:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        process = _medusa(("--port", str(port), *flags), environment)
        started.append(process)
        url = f"http://127.0.0.1:{port}"

        def is_ready() -> bool:
            assert process.poll() is None, process.communicate()
            time.sleep(0.25)  # each answer is a line of log in a pipe that nobody reads yet, of 64 KiB
            try:
                return httpx.get(f"{url}/ready", timeout=5).status_code == 200
            except httpx.TransportError:
                return False

        eventually(is_ready, START_SECONDS)
        return process, url

    yield start
    for process in started:
        with process:
            process.kill()
            if process.stdout is not None and not process.stdout.closed:
                print(process.stdout.read())  # noqa: T201 - pytest shows it for a test that failed


start_medusa = pytest.fixture(_start_medusa, name="start_medusa")
start_medusa_for_module = pytest.fixture(scope="module", name="start_medusa_for_module")(_start_medusa)
