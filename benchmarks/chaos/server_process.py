"""A real `medusa serve` as a child: its ports, its workers, its figures, its end."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

from chaos.wire import HOST

START_SECONDS = 180.0
SERVE = "from server.cli import main; main()"
WORKER_MARK = "spawn_main"  # in a worker's command line; multiprocessing's resource tracker has another


@dataclass(frozen=True, slots=True)
class Sample:
    """The API process and its workers at one moment. `at`: seconds since the server was started."""

    at: float
    rss: int
    fds: int
    threads: int
    zombies: int
    workers: Mapping[int, int]  # process id -> RSS


class ServerProcess:
    """Starts with `with`, which ends it by its process id whatever happens.

    Settings go in by flags; threads of the arithmetic libraries are the caller's environment.
    """

    def __init__(self, flags: Mapping[str, object]) -> None:
        self.port, self.operations_port = _free_ports()
        ports = {"host": HOST, "port": self.port, "metrics_port": self.operations_port}
        self._flags = [
            part
            for name, value in (ports | dict(flags)).items()
            for part in (f"--{name.replace('_', '-')}", str(value))
        ]
        self.url = f"http://{HOST}:{self.port}"
        self.started = 0.0

    def __enter__(self) -> Self:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MEDUSA_")}
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        self.started = time.monotonic()
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVE, "serve", *self._flags],
            env=environment,
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        self._watched = psutil.Process(self._process.pid)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        children = self._children()
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        for child in children:  # a stopped worker cannot notice that the server has gone
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        self._log.close()

    def wait_ready(self) -> None:
        """Raises `SystemExit` with the log if the server ends instead."""
        deadline = time.monotonic() + START_SECONDS
        while not self.is_ready():
            if self._process.poll() is not None:
                raise SystemExit(f"the server ended with exit code {self._process.returncode}:\n{self.log()}")
            if time.monotonic() > deadline:
                raise SystemExit(f"the server was not ready after {START_SECONDS:g} s")
            time.sleep(0.2)

    def is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/ready", timeout=5.0).status_code == httpx.codes.OK
        except httpx.TransportError:
            return False

    def workers(self) -> list[int]:
        """Process ids of living workers, loading ones included."""
        return [child.pid for child in self._children() if _is_worker(child)]

    def sample(self) -> Sample:
        children = self._children()
        with self._watched.oneshot():
            return Sample(
                at=time.monotonic() - self.started,
                rss=self._watched.memory_info().rss,
                fds=self._watched.num_fds(),
                threads=self._watched.num_threads(),
                zombies=sum(_is_zombie(child) for child in children),
                workers=dict(_worker_memory(children)),
            )

    def metrics(self) -> dict[str, float]:
        """Sums over all labels, by sample name."""
        text = (
            httpx.get(f"http://{HOST}:{self.operations_port}/metrics", timeout=10.0).raise_for_status().text
        )
        sums: dict[str, float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
        return sums

    def terminate(self) -> None:
        self._process.send_signal(signal.SIGTERM)

    def wait_exit(self, seconds: float) -> int | None:
        """The exit code; None if it still runs."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def log(self) -> str:
        self._log.seek(0)
        return self._log.read()

    def _children(self) -> list[psutil.Process]:
        try:
            return self._watched.children()
        except psutil.NoSuchProcess:
            return []


def _is_worker(process: psutil.Process) -> bool:
    try:
        return any(WORKER_MARK in part for part in process.cmdline()) and not _is_zombie(process)
    except psutil.Error:
        return False


def _is_zombie(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _worker_memory(children: list[psutil.Process]) -> Iterator[tuple[int, int]]:
    for child in children:
        with contextlib.suppress(psutil.Error):
            if _is_worker(child):
                yield child.pid, child.memory_info().rss


def _free_ports() -> tuple[int, int]:
    with socket.create_server((HOST, 0)) as first, socket.create_server((HOST, 0)) as second:
        return first.getsockname()[1], second.getsockname()[1]


def open_children(pids: list[int]) -> list[int]:
    """Which of these processes still exist."""
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]
