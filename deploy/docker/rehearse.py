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
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

from container import run_container
from dockerfile import Instruction, Stage, expand, in_context, read_dockerfile, read_patterns

ROOT = Path(__file__).resolve().parents[2]
INSIDE = "MEDUSA_REHEARSAL_NAMESPACE"
BASE_PATH = "/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(slots=True)
class Built:
    """A stage on disk at `root`, and what its ENV and such say."""

    root: Path
    env: dict[str, str]
    workdir: str = "/"
    user: str = "0:0"
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    healthcheck: list[str] = field(default_factory=list)


class Builder:
    """Carries out stages as they are needed, each once."""

    def __init__(self, scratch: Path, python: Path, arguments: dict[str, str]) -> None:
        self._scratch, self._python, self._arguments = scratch, python, arguments
        self._stages = read_dockerfile(ROOT / "Dockerfile")
        self._built: dict[str, Built] = {}
        self._context = self._copy_context()

    def build(self, name: str) -> Built:
        if name not in self._built:
            stage = self._stages[name]
            self._built[name] = self._start(stage)
            for instruction in stage.instructions:
                self._carry_out(instruction, self._built[name], name)
        return self._built[name]

    def _start(self, stage: Stage) -> Built:
        below = self.build(stage.base) if stage.base in self._stages else None
        folders = [self._scratch / f"{stage.name}.{part}" for part in ("upper", "work", "root")]
        for folder in folders:
            folder.mkdir(parents=True)
        upper, work, root = folders
        # On the stage below as it is mounted: overlays of overlays go two deep, which is all there are.
        lower = below.root if below else "/"
        options = f"lowerdir={lower},upperdir={upper},workdir={work}"
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, root], check=True)
        subprocess.run(["mount", "--rbind", "/dev", root / "dev"], check=True)
        subprocess.run(["mount", "-t", "proc", "proc", root / "proc"], check=True)
        subprocess.run(["mount", "--bind", "-o", "ro", self._python, root / "usr/local"], check=True)
        if below is None:
            print(f"{stage.name}: {stage.base} is this machine with {self._python} at /usr/local", flush=True)
            subprocess.run(["chroot", root, "ldconfig"], check=True)
            return Built(root, {"PATH": BASE_PATH})
        return replace(below, root=root, env=dict(below.env))

    def _carry_out(self, instruction: Instruction, built: Built, name: str) -> None:
        print(f"{name}: {instruction.word} {instruction.text[:90]}", flush=True)
        match instruction.word:
            case "ENV":
                built.env |= {k: expand(v, built.env) for k, v in instruction.pairs.items()}
            case "ARG":
                given = {k: self._arguments.get(k, v) for k, v in instruction.pairs.items()}
                built.env |= given  # later stages get it too, unlike Docker's: none has one of the same name
            case "WORKDIR":
                built.workdir = instruction.text
                (built.root / instruction.text.lstrip("/")).mkdir(parents=True, exist_ok=True)
            case "COPY":
                self._copy(instruction, built)
            case "RUN":
                run_in(built, instruction.command)
            case _:
                note(instruction, built)

    def _copy(self, instruction: Instruction, built: Built) -> None:
        origin = self.build(instruction.flags["from"]).root if "from" in instruction.flags else self._context
        *sources, target = instruction.text.split()
        folder = built.root / built.workdir.lstrip("/")
        place = built.root / target.lstrip("/") if target.startswith("/") else folder / target
        for source in sources:
            path = origin / source.lstrip("/")
            if path.is_dir():
                shutil.copytree(path, place, symlinks=True, dirs_exist_ok=True)
            else:
                into = place / path.name if target.endswith("/") else place
                into.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, into)

    def _copy_context(self) -> Path:
        """The files that .dockerignore lets in, of those that are there: not only what git knows."""
        patterns = read_patterns(ROOT / ".dockerignore")
        context = self._scratch / "context"
        tops = {pattern.removeprefix("!").split("/")[0] for pattern in patterns if pattern.startswith("!")}
        files = [path for top in tops for path in (ROOT / top, *(ROOT / top).rglob("*")) if path.is_file()]
        for path in files:
            name = path.relative_to(ROOT).as_posix()
            if in_context(name, patterns):
                (context / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, context / name)
        return context


def note(instruction: Instruction, built: Built) -> None:
    """What only says how the image is run."""
    match instruction.word:
        case "USER":
            built.user = instruction.text
        case "HEALTHCHECK":
            built.healthcheck = instruction.command
        case "ENTRYPOINT":
            built.entrypoint = instruction.command
        case "CMD":
            built.command = instruction.command
        case "LABEL" | "VOLUME" | "EXPOSE" | "STOPSIGNAL":
            pass  # nothing to carry out
        case word:
            raise SystemExit(f"the Dockerfile has a {word}, which this script does not know how to rehearse")


def run_in(built: Built, command: list[str]) -> None:
    """As Docker's RUN, knowing nothing but the image's ENV and this machine's way to a package index."""
    index = {key: value for key, value in os.environ.items() if key.startswith("PIP_")}
    settings = [f"{key}={value}" for key, value in (index | {"HOME": "/root"} | built.env).items()]
    inside = ["env", "--ignore-environment", f"--chdir={built.workdir}", *settings, *command]
    subprocess.run(["chroot", f"--userspec={built.user}", built.root, *inside], check=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", default="cpu", help="the stage to build and run")
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument(
        "--python", type=Path, default=Path(sys.base_prefix), help="prefix of a Python to use"
    )
    parser.add_argument("--scratch", type=Path, help="where to build; takes some gigabytes")
    parser.add_argument("--no-run", action="store_true", help="only build")
    return parser.parse_args()


def main() -> int:
    options = parse_arguments()
    if INSIDE not in os.environ:
        # Everything is mounted in a namespace that ends with the child: where files are removed, nothing is.
        with tempfile.TemporaryDirectory(prefix="rehearsal-", dir=options.scratch) as folder:
            again = ["unshare", "--mount", "--propagation", "private", sys.executable, *sys.argv]
            return subprocess.run(again, env=os.environ | {INSIDE: folder}, check=False).returncode
    scratch = Path(os.environ[INSIDE])
    arguments = dict(item.split("=", 1) for item in options.build_arg)
    built = Builder(scratch, options.python, arguments).build(options.target)
    if not options.no_run:
        run_container(built, hidden=ROOT, scratch=scratch)
    print("rehearsed: every step passed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
