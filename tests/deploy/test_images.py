"""Dockerfile, compose files and .env.example: linted, resolved by real tools, in step with the settings."""

import functools
import re
import shutil
import subprocess
import sys
import threading
import tomllib
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from dockerfile import Stage, in_context, lineage, read_dockerfile, read_patterns

from medusa_core import __version__
from server.settings import PREFIX, Settings

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "deploy" / "docker"
GPU, CPU = "docker-compose.yml", "docker-compose.cpu.yml"
TOOLS = ROOT / ".venv" / "tools" / "usr"
ADDRESSES = {"MEDUSA_HOST", "MEDUSA_PORT", "MEDUSA_METRICS_PORT"}
Config = Callable[[str], dict[str, Any]]
ENV_LINE = re.compile(r"^#?([A-Z_]+)=(.*)$", re.MULTILINE)


def program(name: str) -> str:
    return str(Path(sys.executable).parent / name)


def run(*command: str, **kwargs: Any) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **kwargs)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def compose_command() -> list[str] | None:
    """docker-compose from the path, as unpacked by `make tools`, or Docker's own subcommand."""
    if found := shutil.which("docker-compose"):
        return [found]
    script, packages = TOOLS / "bin" / "docker-compose", TOOLS / "lib" / "python3" / "dist-packages"
    if script.is_file() and packages.is_dir() and Path("/usr/bin/python3").exists():
        start = f"import sys; sys.path.insert(0, {str(packages)!r}); sys.argv[0] = 'docker-compose'; "
        return ["/usr/bin/python3", "-S", "-c", start + "from compose.cli.main import main; main()"]
    if (
        shutil.which("docker")
        and not subprocess.run(["docker", "compose", "version"], check=False).returncode
    ):
        return ["docker", "compose"]
    return None


def resolve(file: str, env_file: Path) -> dict[str, Any]:
    """What compose makes of a file, with nothing set but what `env_file` sets."""
    command = compose_command()
    if command is None:
        pytest.skip("needs docker-compose: make tools")
    options = ["--env-file", str(env_file), "-f", file, "config"]
    environment = {"PATH": "/usr/bin:/bin", "HOME": "/nonexistent"}
    return yaml.safe_load(run(*command, *options, cwd=ROOT, env=environment))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Of a compose file, as it is without a .env; each is resolved once."""
    env_file = tmp_path_factory.mktemp("compose") / "empty"
    env_file.touch()
    return functools.cache(lambda file: resolve(file, env_file))


@pytest.fixture(scope="module")
def stages() -> dict[str, Stage]:
    return read_dockerfile(ROOT / "Dockerfile")


def test_the_linter_finds_nothing_in_the_dockerfile() -> None:
    assert run(program("hadolint"), "--failure-threshold", "style", str(ROOT / "Dockerfile")) == ""


def test_compose_files_follow_the_compose_specification() -> None:
    files = [str(ROOT / GPU), str(ROOT / CPU), str(DOCKER / "services.yml")]
    run(program("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", *files)


def test_bases_and_images_are_pinned(stages: dict[str, Stage], config: Config) -> None:
    bases = {stage.base for stage in stages.values()} - stages.keys()
    assert bases
    assert all(re.fullmatch(r"python:3\.11\.\d+-slim-\w+", base) for base in bases)
    for file in (GPU, CPU):
        for name, service in config(file)["services"].items():
            tag = service["image"].partition(":")[2]
            assert re.match(r"v?\d+\.\d+\.\d+", tag), name
            if name == "server":
                assert tag.startswith(f"{__version__}-")


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_an_image_runs_as_nobody_special_and_hears_signals(stages: dict[str, Stage], target: str) -> None:
    built = lineage(stages, target)
    said = {
        word: [found for stage in built if (found := stage.last(word))][-1]
        for word in ("USER", "ENTRYPOINT", "CMD", "STOPSIGNAL", "HEALTHCHECK", "VOLUME", "LABEL")
    }
    assert said["USER"].text == "10001:10001"
    assert all(said[word].is_exec_form for word in ("ENTRYPOINT", "CMD", "HEALTHCHECK"))
    assert said["STOPSIGNAL"].text == "SIGTERM"
    assert said["LABEL"].pairs["org.opencontainers.image.version"] == __version__
    env = {k: v for stage in built for i in stage.instructions if i.word == "ENV" for k, v in i.pairs.items()}
    assert said["VOLUME"].text == f'["{env["HF_HOME"]}"]'
    assert {name: env[name] for name in ADDRESSES} == {
        "MEDUSA_HOST": "0.0.0.0",
        "MEDUSA_PORT": "8000",
        "MEDUSA_METRICS_PORT": "9400",
    }
    runs = [i.text for stage in built for i in stage.instructions if i.word == "RUN"]
    assert not any("pip" in text for text in runs)  # this is the build stages' business
    installed = [text for text in runs if "apt" in text]
    assert len(installed) == (target == "cpu")  # where the step is compiled
    assert all("--no-install-recommends g++ " in text for text in installed)
    assert env["MEDUSA_CACHE_DIR"].startswith(env["HF_HOME"])  # what may be executed, and lasts
    assert Settings.model_fields["host"].default == "127.0.0.1"


def test_the_build_context_holds_what_is_copied_and_nothing_else(
    stages: dict[str, Stage],
) -> None:
    patterns = read_patterns(ROOT / ".dockerignore")
    tracked = run("git", "ls-files", cwd=ROOT).splitlines() if (ROOT / ".git").exists() else []
    inside = {path for path in tracked if in_context(path, patterns)}
    copied = {
        source
        for stage in stages.values()
        for instruction in stage.instructions
        if instruction.word == "COPY" and "from" not in instruction.flags
        for source in instruction.text.split()[:-1]
    }
    files = [path for path in copied if (ROOT / path).is_file()]
    assert [path for path in files if not in_context(path, patterns)] == []
    assert [path for path in inside if not any(f"{path}/".startswith(f"{c}/") for c in copied)] == []
    for path in (
        ".env",
        ".git/config",
        ".venv/bin/python",
        "secrets/hub_token",
        "tests/conftest.py",
        "runs/x",
    ):
        assert not in_context(path, patterns), path
    assert not in_context("server/__pycache__/app.cpython-311.pyc", patterns)


def test_packages_of_the_image_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    printed = run(sys.executable, str(DOCKER / "requirements.py"), str(ROOT / "pyproject.toml"), "otel")
    assert printed.splitlines() == project["dependencies"] + project["optional-dependencies"]["otel"]


@pytest.mark.parametrize("file", [GPU, CPU])
def test_only_loopback_reaches_a_container_and_no_operations_port(config: Config, file: str) -> None:
    published = {}
    for name, service in config(file)["services"].items():
        for port in service.get("ports", ()):
            text = (
                port if isinstance(port, str) else f"{port['host_ip']}:{port['published']}:{port['target']}"
            )
            published[name] = text.removesuffix("/tcp")
    assert published == {
        "server": "127.0.0.1:8000:8000",
        "prometheus": "127.0.0.1:9090:9090",
        "grafana": "127.0.0.1:3000:3000",
    }


@pytest.mark.parametrize("file", [GPU, CPU])
def test_containers_may_do_as_little_as_possible(config: Config, file: str) -> None:
    services = config(file)["services"]
    for name, service in services.items():
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["restart"] == "unless-stopped", name
        assert "max-size" in service["logging"]["options"], name
        assert service.get("read_only", name == "dcgm-exporter"), name
        assert not service.get("privileged"), name
    seconds = re.fullmatch(r"(?:(\d+)m)?(?:(\d+)s)?", services["server"]["stop_grace_period"])
    assert seconds is not None
    grace = 60 * int(seconds[1] or 0) + int(seconds[2] or 0)
    assert grace > Settings.model_fields["drain_timeout"].default


def test_the_gpu_box_reserves_gpus_and_serves_vicuna(config: Config) -> None:
    services = config(GPU)["services"]
    for name in ("server", "dcgm-exporter"):
        (device,) = services[name]["deploy"]["resources"]["reservations"]["devices"]
        assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
    environment = services["server"]["environment"]
    assert environment["MEDUSA_MODEL"] == "lmsys/vicuna-7b-v1.3"
    assert environment["MEDUSA_HEADS"] == "FasterDecoding/medusa-vicuna-7b-v1.3"


def test_the_gpu_exporter_watches_what_the_boards_show_and_nothing_that_needs_privileges(
    config: Config,
) -> None:
    """Its own list has profiling fields: without SYS_ADMIN, one of them makes it refuse all fields."""
    exporter = config(GPU)["services"]["dcgm-exporter"]
    (mount,) = exporter["volumes"]
    source, target = mount.split(":")[:2] if isinstance(mount, str) else (mount["source"], mount["target"])
    listed = Path(exporter["environment"]["DCGM_EXPORTER_COLLECTORS"])
    assert str(listed.parent) == target
    lines = (Path(source) / listed.name).read_text(encoding="utf-8").splitlines()
    counters = [line.split(", ", 2) for line in lines if not line.startswith("#")]
    assert all(kind in ("gauge", "counter") and about for _, kind, about in counters)
    fields = {field for field, _, _ in counters}
    boards = "".join(path.read_text() for path in (ROOT / "deploy/grafana/dashboards").glob("*.json"))
    shown = set(re.findall(r"DCGM_FI_\w+", boards))
    assert shown
    assert shown <= fields
    assert not any(field.startswith("DCGM_FI_PROF_") for field in fields)


@pytest.mark.parametrize("file", [GPU, CPU])
def test_no_proxy_stands_between_neighbors(config: Config, file: str) -> None:
    """Compose gives containers the proxies of Docker's client configuration; busybox knows no no_proxy."""
    for name in ("prometheus", "grafana"):
        environment = config(file)["services"][name]["environment"]
        assert {environment["HTTP_PROXY"], environment["http_proxy"]} == {""}, name


def test_the_laptop_has_all_but_the_gpu(config: Config) -> None:
    gpu, cpu = config(GPU), config(CPU)
    assert cpu["services"].keys() == gpu["services"].keys() - {"dcgm-exporter"}
    assert "nvidia" not in yaml.safe_dump(cpu)
    assert not cpu["services"]["server"]["environment"].get("MEDUSA_MODEL")
    assert cpu["services"]["server"]["build"]["target"] == "cpu"
    assert cpu["volumes"].keys() == gpu["volumes"].keys()
    for name in ("prometheus", "grafana"):
        mine, theirs = dict(cpu["services"][name]), dict(gpu["services"][name])
        mine.pop("depends_on"), theirs.pop("depends_on")
        assert mine == theirs


@pytest.mark.parametrize("file", [GPU, CPU])
def test_what_is_mounted_is_there_and_starts_are_ordered_by_health(config: Config, file: str) -> None:
    resolved = config(file)
    mounts = [m for service in resolved["services"].values() for m in service.get("volumes", ())]
    sources = [m.split(":")[0] if isinstance(m, str) else m["source"] for m in mounts]
    folders = [Path(source) for source in sources if source.startswith("/")]
    assert folders
    assert all(folder.is_dir() and any(folder.iterdir()) for folder in folders)
    assert {source for source in sources if not source.startswith("/")} == {"models", "prometheus", "grafana"}
    assert all(Path(secret["file"]).is_file() for secret in resolved["secrets"].values())
    wanted = resolved["services"]["grafana"]["depends_on"]["prometheus"]["condition"]
    assert wanted == "service_healthy"
    assert "healthcheck" in resolved["services"]["prometheus"]


def env_example() -> dict[str, str]:
    text = (ROOT / ".env.example").read_text(encoding="utf-8")
    found = ENV_LINE.findall(text)
    assert len(found) == len({name for name, _ in found}), "a name is there twice"
    return dict(found)


def test_the_example_names_every_setting_and_every_variable_of_compose() -> None:
    settings = {PREFIX + name.upper() for name in Settings.model_fields}
    files = [ROOT / GPU, ROOT / CPU, DOCKER / "services.yml"]
    used = {name for file in files for name in re.findall(r"\$\{([A-Z_]+)", file.read_text(encoding="utf-8"))}
    assert set(env_example()) == settings | used


def test_the_example_shows_the_defaults() -> None:
    of_images = {"model", "heads", "host", "metrics_port", "cache_dir"}
    shown = env_example()
    for name, field in Settings.model_fields.items():
        text = shown[PREFIX + name.upper()]
        if name in of_images:
            continue
        expected = "" if field.default is None else str(field.default)
        expected = expected.lower() if isinstance(field.default, bool) else expected.removesuffix(".0")
        assert text == expected, name
    files = "".join((ROOT / file).read_text() for file in (GPU, CPU, "deploy/docker/services.yml"))
    for name, default in re.findall(r"\$\{([A-Z_]+):-([^}]*)\}", files):
        assert shown[name] == default, name


@pytest.mark.parametrize("file", [GPU, CPU])
def test_every_setting_reaches_the_server(file: str, tmp_path: Path) -> None:
    names = {PREFIX + name.upper() for name in Settings.model_fields} - ADDRESSES
    env_file = tmp_path / "env"
    env_file.write_text("".join(f"{name}=value-of-{name}\n" for name in sorted(names)))
    environment = resolve(file, env_file)["services"]["server"]["environment"]
    assert {name: environment[name] for name in names} == {name: f"value-of-{name}" for name in names}
    assert not ADDRESSES & environment.keys()


def test_the_permissive_alternative_is_named() -> None:
    text = (ROOT / ".env.example").read_text(encoding="utf-8")
    for name in ("MEDUSA_MODEL", "MEDUSA_HEADS"):
        assert f"#   {name}=FasterDecoding/medusa-1.0-zephyr-7b-beta" in text


@pytest.mark.parametrize(("status", "expected"), [(200, 0), (503, 1), (404, 1)])
@pytest.mark.parametrize("variable", ["MEDUSA_METRICS_PORT", "MEDUSA_PORT"])
def test_the_health_check_asks_whether_the_server_is_ready(variable: str, status: int, expected: int) -> None:
    asked = []

    class Probe(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(b'{"reason":"because"}')

        def log_message(self, *args: object) -> None:
            """Quiet."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Probe) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        # A proxy for the Hub must not be asked for what is here.
        env = {variable: str(server.server_port), "http_proxy": "http://127.0.0.1:9"}
        check = [sys.executable, str(DOCKER / "healthcheck.py")]
        done = subprocess.run(check, env=env, capture_output=True, text=True, check=False)
        server.shutdown()
        thread.join()
    assert (done.returncode, asked) == (expected, ["/ready"])
    assert done.stdout.strip() == '{"reason":"because"}'


def test_the_health_check_fails_where_nobody_answers() -> None:
    check = [sys.executable, str(DOCKER / "healthcheck.py")]
    env = {"MEDUSA_PORT": "9"}
    done = subprocess.run(check, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "no answer on port 9" in done.stdout
