"""The server on Ray Serve: a killed replica and its replacement, and a config that fits the server."""

import asyncio
import importlib
import json
import os
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from medusa_core.errors import ConfigError
from server.settings import PREFIX, Settings

pytest.importorskip("ray", reason="Ray is not installed; `make setup-dev` brings it along")

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "ray"
FOREIGN_SETTINGS = {"OMP_NUM_THREADS"}
RUN_SECONDS = 900


@pytest.fixture(scope="module")
def serve_app() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Ray's own, when it is imported
        return importlib.import_module("serve_app")


@pytest.fixture(params=["config.yaml", "config.cpu.yaml"])
def config(request: pytest.FixtureRequest) -> dict[str, Any]:
    return yaml.safe_load((FOLDER / request.param).read_text(encoding="utf-8"))


def deployment_of(config: dict[str, Any]) -> dict[str, Any]:
    [application] = config["applications"]
    [deployment] = application["deployments"]
    return deployment


def test_ray_accepts_the_config_and_it_names_the_application(config, serve_app):
    from ray.serve.schema import ServeDeploySchema  # after `serve_app`, which quiets the import

    ServeDeploySchema.model_validate(config)
    module, _, name = config["applications"][0]["import_path"].partition(":")
    assert module == serve_app.__name__
    assert deployment_of(config)["name"] == serve_app.Medusa.name
    assert hasattr(serve_app, name)
    assert config["http_options"]["host"] == "127.0.0.1"


def test_limits_of_the_config_leave_decisions_to_the_server(config, monkeypatch):
    deployment = deployment_of(config)
    variables = deployment["ray_actor_options"]["runtime_env"]["env_vars"]
    assert set(variables) - FOREIGN_SETTINGS <= {PREFIX + name.upper() for name in Settings.model_fields}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    settings = Settings()
    assert deployment["max_ongoing_requests"] > 2 * (settings.slots + settings.queue_limit)
    assert config["http_options"]["request_timeout_s"] > settings.request_timeout
    assert deployment["graceful_shutdown_timeout_s"] > settings.request_timeout
    scaling = deployment.get("autoscaling_config")
    if scaling is not None:
        assert settings.slots < scaling["target_ongoing_requests"] < settings.queue_limit


def test_scraped_ports_begin_where_the_replicas_do(serve_app):
    scrape = yaml.safe_load((FOLDER / "prometheus.yml").read_text(encoding="utf-8"))["scrape_configs"]
    [targets] = scrape[0]["static_configs"]
    ports = [int(target.rpartition(":")[2]) for target in targets["targets"]]
    config = yaml.safe_load((FOLDER / "config.yaml").read_text(encoding="utf-8"))
    first = deployment_of(config)["ray_actor_options"]["runtime_env"]["env_vars"]["MEDUSA_METRICS_PORT"]
    assert ports == list(range(int(first), int(first) + len(ports)))
    assert len(ports) <= serve_app.PORTS


def test_prometheus_takes_the_scrape_config(promtool):
    result = subprocess.run(
        [str(promtool), "check", "config", str(FOLDER / "prometheus.yml")], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


def test_an_operations_port_is_one_that_nobody_has(serve_app):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        first = port - 1
        assert serve_app.free_port("127.0.0.1", first, 1) != port
        assert first <= serve_app.free_port("127.0.0.1", first, 1) < first + serve_app.PORTS


def test_no_operations_port_left_is_an_error_that_names_the_range(serve_app, monkeypatch):
    monkeypatch.setattr(serve_app, "PORTS", 1)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"from {port} to {port}"):
            serve_app.free_port("127.0.0.1", port, 0)


def test_a_replica_that_cannot_load_is_unhealthy_and_says_why(serve_app, tmp_path):
    replica = serve_app.Replica.__new__(serve_app.Replica)  # its constructor asks Ray for the replica's rank
    replica._settings = Settings(model=str(tmp_path / "nothing"), device="cpu")
    replica._has_loaded = False
    app = replica.__serve_build_asgi_app__()

    async def check() -> None:
        async with app.router.lifespan_context(app):
            await replica.check_health()

    with pytest.raises(RuntimeError, match="not ready: .*nothing"):
        asyncio.run(check())


@pytest.mark.slow
@pytest.mark.e2e
def test_a_killed_replica_ends_its_own_streams_alone(tmp_path):
    """The benchmark in small; it compares every finished text with plain serving."""
    path = tmp_path / "report.json"
    options = ["--requests", "24", "--concurrency", "8", "--max-tokens", "48", "--no-update", "--no-measure"]
    # Nothing of the settings, and no coverage, which would start in a dozen processes of Ray's.
    kept = [name for name in os.environ if not name.startswith(("MEDUSA_", "RAY_", "COV"))]
    environment = {name: os.environ[name] for name in kept}
    result = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "ray_streams.py"), *options, "--json", str(path)],
        capture_output=True,
        text=True,
        timeout=RUN_SECONDS,
        env=environment,
    )
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    report = json.loads(path.read_text(encoding="utf-8"))
    ends = report["kill"]["ends"]
    assert sum(ends.values()) == 24
    assert set(ends) <= {"finished", "cut", "error event"}
    assert 1 <= 24 - ends["finished"] <= report["kill"]["open_at_kill"]
    assert report["after"]["replacement_served"] is True
