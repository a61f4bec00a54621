"""Builds and runs an image's Dockerfile without Docker: sudo python deploy/docker/rehearse.py --target cpu

For Linux machines with root, but no container engine. Every instruction is read from the Dockerfile and
carried out in a stage's own overlay of this machine's root, where a Python is put at /usr/local as in the
official image. The result is run as a container would be: its user without any privilege, a read-only root, a
/tmp of its own, new PID and network namespaces. The health check has to pass, a request to be answered, and
SIGTERM to end it with status 0. What this cannot show: the official base image itself, and the GPU.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from dockerfile import Instruction, Stage, expand, in_context, read_dockerfile, read_patterns

ROOT = Path(__file__).resolve().parents[2]
SCRATCH = "MEDUSA_REHEARSAL"
BASE_PATH = "/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"
START_SECONDS, STOP_SECONDS = 300, 60
ASK = """
import json, urllib.request
body = {"model": "medusa-demo", "messages": [{"role": "user", "content": "I need a cheap hotel"}]}
request = urllib.request.Request("http://127.0.0.1:8000/v1/chat/completions", json.dumps(body).encode())
request.add_header("content-type", "application/json")
print(json.load(urllib.request.urlopen(request, timeout=60))["choices"][0]["message"]["content"])
"""


@dataclass(slots=True)
class Built:
    """A stage on disk at `root`, and what its ENV and such say."""

    root: Path
    env: dict[str, str]
    workdir: str = "/"
    user: str = "0:0"
    said: dict[str, list[str]] = field(default_factory=dict)  # ENTRYPOINT, CMD, HEALTHCHECK


class Builder:
    """Carries out stages as they are needed, each once."""

    def __init__(self, scratch: Path, arguments: dict[str, str]) -> None:
        self._scratch, self._arguments = scratch, arguments
        self._stages = read_dockerfile(ROOT / "Dockerfile")
        self._built: dict[str, Built] = {}
        self._context = copy_context(scratch / "context")

    def build(self, name: str) -> Built:
        if name not in self._built:
            stage = self._stages[name]
            self._built[name] = self._start(stage)
            for instruction in stage.instructions:
                print(f"{name}: {instruction.word} {instruction.text[:90]}", flush=True)
                self._carry_out(instruction, self._built[name])
        return self._built[name]

    def _start(self, stage: Stage) -> Built:
        below = self.build(stage.base) if stage.base in self._stages else None
        upper, work, root = (self._scratch / f"{stage.name}.{part}" for part in ("upper", "work", "root"))
        for folder in (upper, work, root):
            folder.mkdir()
        # On the stage below as it is mounted: overlays of overlays go two deep, which is all there are.
        options = f"lowerdir={below.root if below else '/'},upperdir={upper},workdir={work}"
        for mount in (
            ["-t", "overlay", "overlay", "-o", options, root],
            ["--rbind", "/dev", root / "dev"],
            ["-t", "proc", "proc", root / "proc"],
            ["--bind", "-o", "ro", sys.base_prefix, root / "usr/local"],
        ):
            subprocess.run(["mount", *mount], check=True)
        if below is None:
            subprocess.run(["chroot", root, "ldconfig"], check=True)
            return Built(root, {"PATH": BASE_PATH})
        return replace(below, root=root, env=dict(below.env), said=dict(below.said))

    def _carry_out(self, instruction: Instruction, built: Built) -> None:
        match instruction.word:
            case "ENV":
                built.env |= {k: expand(v, built.env) for k, v in instruction.pairs.items()}
            case "ARG":  # later stages get it too, unlike Docker's: none has one of the same name
                built.env |= {k: self._arguments.get(k, v) for k, v in instruction.pairs.items()}
            case "WORKDIR":
                built.workdir = instruction.text
                (built.root / instruction.text.lstrip("/")).mkdir(parents=True, exist_ok=True)
            case "COPY":
                self._copy(instruction, built)
            case "RUN":  # knows the image's ENV, and this machine's way to a package index
                index = {key: value for key, value in os.environ.items() if key.startswith("PIP_")}
                inside = environment(built, index | {"HOME": "/root"}, instruction.command)
                subprocess.run(["chroot", f"--userspec={built.user}", built.root, *inside], check=True)
            case "USER":
                built.user = instruction.text
            case "HEALTHCHECK" | "ENTRYPOINT" | "CMD":
                built.said[instruction.word] = instruction.command
            case "LABEL" | "VOLUME" | "EXPOSE" | "STOPSIGNAL":
                pass  # nothing to carry out
            case word:
                raise SystemExit(f"the Dockerfile has a {word}, which cannot be rehearsed yet")

    def _copy(self, instruction: Instruction, built: Built) -> None:
        origin = self.build(instruction.flags["from"]).root if "from" in instruction.flags else self._context
        *sources, target = instruction.text.split()
        place = built.root / (Path(built.workdir) / target).relative_to("/")
        for source in sources:
            path = origin / source.lstrip("/")
            if path.is_dir():
                shutil.copytree(path, place, symlinks=True, dirs_exist_ok=True)
            else:
                into = place / path.name if target.endswith("/") else place
                into.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, into)


def copy_context(context: Path) -> Path:
    """The files that .dockerignore lets in, of those that are there: not only what git knows."""
    patterns = read_patterns(ROOT / ".dockerignore")
    tops = {pattern.removeprefix("!").split("/")[0] for pattern in patterns if pattern.startswith("!")}
    for path in (path for top in tops for path in (ROOT / top, *(ROOT / top).rglob("*")) if path.is_file()):
        name = path.relative_to(ROOT).as_posix()
        if in_context(name, patterns):
            (context / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, context / name)
    return context


def environment(built: Built, more: dict[str, str], command: list[str]) -> list[str]:
    """A command with nothing but the image's environment, in its folder."""
    settings = [f"{key}={value}" for key, value in (more | built.env).items()]
    return ["env", "--ignore-environment", f"--chdir={built.workdir}", *settings, *command]


def confined(built: Built, command: list[str]) -> list[str]:
    """cap_drop: ALL, no-new-privileges, the image's user and nothing but its environment."""
    uid, gid = built.user.split(":")
    drop = ["--reuid", uid, "--regid", gid, "--clear-groups", "--no-new-privs", "--bounding-set=-all"]
    return ["chroot", str(built.root), "setpriv", *drop, "--inh-caps=-all", *environment(built, {}, command)]


def run_container(built: Built, models: Path) -> None:
    """Start, wait until healthy, ask something, stop. The checkout is hidden: it must not be needed."""
    models.mkdir()
    os.chown(models, *map(int, built.user.split(":")))
    prepare = [
        f"mount --bind {models} {built.root}/models",
        f"mount -t tmpfs -o size=256m,mode=1777 tmpfs {built.root}/tmp",
        f"! test -e {built.root}{ROOT} || mount -t tmpfs -o size=1m,mode=000 tmpfs {built.root}{ROOT}",
        f"mount -t proc proc {built.root}/proc",
        f"mount -o remount,bind,ro {built.root} || mount -o remount,ro {built.root}",
        "ip link set lo up",
        'exec "$@"',
    ]
    command = confined(built, built.said["ENTRYPOINT"] + built.said["CMD"])
    namespaces = ["--net", "--pid", "--fork", "--kill-child", "--mount"]
    process = subprocess.Popen(["unshare", *namespaces, "/bin/sh", "-ec", "\n".join(prepare), "sh", *command])
    try:
        wait_healthy(process, built)
        server = child_of(process)
        check_confined(server, built.user.split(":")[0])
        inside = ["nsenter", f"--target={server}", "--net", "env", "-i", sys.executable, "-c", ASK]
        print("answered:", subprocess.run(inside, capture_output=True, text=True, check=True).stdout)
        os.kill(int(server), signal.SIGTERM)
        if status := process.wait(STOP_SECONDS):
            raise SystemExit(f"SIGTERM: exit status {status}, not 0")
    finally:
        process.kill()  # its namespace goes with it


def child_of(process: subprocess.Popen[bytes]) -> str:
    return Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().strip()


def wait_healthy(process: subprocess.Popen[bytes], built: Built) -> None:
    """By the image's own check, in the container's namespaces."""
    deadline = time.monotonic() + START_SECONDS
    check = confined(built, built.said["HEALTHCHECK"])
    said = ""
    while process.poll() is None and time.monotonic() < deadline:
        if server := child_of(process):
            inside = ["nsenter", f"--target={server}", "--net", "--pid", "--mount", *check]
            done = subprocess.run(inside, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                return
            said = done.stdout + done.stderr
        time.sleep(2)
    raise SystemExit(f"not healthy: {said or 'the container ended'}")


def check_confined(server: str, uid: str) -> None:
    """That the server itself is PID 1, of the image's user and without any capability."""
    lines = Path(f"/proc/{server}/status").read_text().splitlines()
    status = dict(line.split(":", 1) for line in lines)
    found = {name: status[name].split() for name in ("Uid", "NSpid", "CapEff", "CapBnd", "NoNewPrivs")}
    print("the server's process:", found)
    no_capability = {int(found[name][0], 16) for name in ("CapEff", "CapBnd")} == {0}
    if (found["Uid"][0], found["NSpid"][-1]) != (uid, "1") or not no_capability:
        raise SystemExit(f"it is not PID 1 of user {uid} without capabilities")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--target", default="cpu", help="the stage to build and run")
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE")
    options = parser.parse_args()
    if SCRATCH not in os.environ:
        # Everything is mounted in a namespace that ends with the child: where files are removed, nothing is.
        with tempfile.TemporaryDirectory(prefix="rehearsal-") as folder:
            again = ["unshare", "--mount", "--propagation", "private", sys.executable, *sys.argv]
            return subprocess.run(again, env=os.environ | {SCRATCH: folder}, check=False).returncode
    scratch = Path(os.environ[SCRATCH])
    built = Builder(scratch, dict(item.split("=", 1) for item in options.build_arg)).build(options.target)
    run_container(built, scratch / "models")
    print("rehearsed: every step passed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
