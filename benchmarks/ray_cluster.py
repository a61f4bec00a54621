"""Ray on this machine alone, with the CPU config that is shipped: for `ray_streams.py` and its test."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import psutil
import ray
import yaml

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "deploy" / "ray" / "config.cpu.yaml"
REPLICA_TITLE = "ray::ServeReplica"
LOG_NAME = "replica_medusa_Medusa_"  # and the replica's id, in Ray's logs
START_SECONDS = 300.0  # Ray starts a dozen processes, each of which imports torch
LOG_TAIL = 2_000  # characters
OBJECT_STORE_BYTES = 80 * 2**20


@dataclass(frozen=True, slots=True)
class Replica:
    """A replica's process, as the operating system shows it."""

    pid: int
    name: str  # Ray's id of it
    port: int  # its operations port
    workers: tuple[int, ...]  # processes of ours below it

    def metric(self, name: str) -> float:
        """Sum of the metric's series; 0 if there is none."""
        text = httpx.get(f"http://127.0.0.1:{self.port}/metrics", timeout=10.0).raise_for_status().text
        rows = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
        return sum(float(value) for series, value in rows if series.partition("{")[0] == name)


class Cluster:
    """A running Ray with the application on it; `url` is where Ray's proxy listens."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self._folder = folder
        self._environment = dict(environment)
        self._ports = free_ports(20)
        context = ray.init(
            num_cpus=4,
            num_gpus=0,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=OBJECT_STORE_BYTES,
            _node_ip_address="127.0.0.1",
        )
        self._address = str(context.address_info["gcs_address"])
        self._logs = Path(context.address_info["session_dir"]) / "logs" / "serve"
        self.url = f"http://127.0.0.1:{self._ports[0]}"

    def deploy(self, **environment: str) -> None:
        """Deploy as a user would, with `serve run`. Again, with other variables, it is a rolling update."""
        self._environment |= environment
        config = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
        config["http_options"]["port"] = self._ports[0]
        deployment = config["applications"][0]["deployments"][0]
        variables = deployment["ray_actor_options"]["runtime_env"]["env_vars"]
        variables |= {"MEDUSA_METRICS_PORT": str(self._ports[1])} | self._environment
        path = self._folder / "config.yaml"
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
        command = [sys.executable, "-m", "ray.serve.scripts", "run", "--non-blocking"]
        result = subprocess.run(
            [*command, "--address", self._address, str(path)],
            cwd=self._folder,
            capture_output=True,
            text=True,
            timeout=START_SECONDS,
        )
        if result.returncode != 0:
            raise SystemExit(f"serve run failed:\n{result.stdout}\n{result.stderr}")

    def replicas(self) -> list[Replica]:
        """Those whose operations port is open, which they open before they load."""
        found = []
        for process in psutil.Process().children(recursive=True):
            try:
                if process.cmdline()[0].startswith(REPLICA_TITLE):
                    found.append(self._inspect(process))
            except (psutil.NoSuchProcess, IndexError):
                continue  # it ended meanwhile
        return [replica for replica in found if replica is not None]

    def ready_replicas(self) -> list[Replica]:
        return [replica for replica in self.replicas() if _is_ready(replica)]

    def wait_for(self, what: str, condition: Callable[[list[Replica]], bool]) -> list[Replica]:
        """The ready replicas once they meet the condition; ends the program if they do not in time."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            replicas = self.ready_replicas()
            if condition(replicas):
                return replicas
            time.sleep(0.2)
        problem = f"no {what} after {START_SECONDS:g} s; Ray's logs are in {self._logs}"
        raise SystemExit(f"{problem}\n{self._tails()}")

    def _tails(self) -> str:
        """The end of each replica's log."""
        logs = sorted(self._logs.glob(f"{LOG_NAME}*.log"))
        return "\n".join(f"{path.name}: {path.read_text(encoding='utf-8')[-LOG_TAIL:]}" for path in logs)

    def served_by(self) -> dict[str, str]:
        """Which replica each finished request was on, by request id: from the replicas' own access logs."""
        served = {}
        for path in self._logs.glob(f"{LOG_NAME}*.log"):
            for line in path.read_text(encoding="utf-8").splitlines():
                head, separator, _ = line.partition(" -- POST /")
                if separator:
                    served[head.rsplit(" ", 1)[1]] = path.stem.removeprefix(LOG_NAME)
        return served

    def _inspect(self, process: psutil.Process) -> Replica | None:
        logs = [Path(file.path).stem for file in process.open_files() if LOG_NAME in file.path]
        ports = [
            connection.laddr.port
            for connection in process.net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port in self._ports[1:]
        ]
        workers = tuple(
            child.pid for child in process.children() if any("spawn_main" in part for part in child.cmdline())
        )
        if not logs or not ports:
            return None
        return Replica(process.pid, logs[0].removeprefix(LOG_NAME), ports[0], workers)


@contextmanager
def local_cluster(**environment: str) -> Iterator[Cluster]:
    """Two replicas that are ready, on free loopback ports; all of it ends with the context."""
    # Read by every process that Ray starts.
    os.environ |= {
        "PYTHONPATH": os.pathsep.join([str(CONFIG.parent), str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1",  # each access is in the log at once
    }
    with TemporaryDirectory() as folder:
        try:
            cluster = Cluster(Path(folder), environment)
            cluster.deploy()
            cluster.wait_for("two ready replicas", lambda replicas: len(replicas) == 2)
            yield cluster
        finally:
            ray.shutdown()  # every process of Ray's, and the replicas' workers follow


def free_ports(count: int) -> list[int]:
    """Consecutive ones: the proxy's, then those of the operations ports."""
    for first in range(20_000, 30_000, count):
        sockets: list[Any] = []
        try:
            for port in range(first, first + count):
                sockets.append(socket.create_server(("127.0.0.1", port)))
            return list(range(first, first + count))
        except OSError:
            continue
        finally:
            for listener in sockets:
                listener.close()
    raise SystemExit(f"no {count} consecutive free ports")


def _is_ready(replica: Replica) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{replica.port}/ready", timeout=5.0).is_success
    except httpx.HTTPError:
        return False
