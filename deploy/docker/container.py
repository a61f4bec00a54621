"""Runs what was built as a container would be, and says whether it behaves. For rehearse.py."""

import http.client
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Protocol

NAMESPACES = ("--net", "--pid", "--fork", "--kill-child", "--mount")
START_SECONDS, STOP_SECONDS = 300, 60


class Image(Protocol):
    """What running needs to know."""

    root: Path
    env: dict[str, str]
    workdir: str
    user: str
    entrypoint: list[str]
    command: list[str]
    healthcheck: list[str]


def run_container(image: Image, *, hidden: Path, scratch: Path) -> None:
    """Start, wait until healthy, ask something, stop. `hidden`: the checkout, which must not be needed."""
    models = scratch / "models"
    models.mkdir()
    uid, gid = map(int, image.user.split(":"))
    os.chown(models, uid, gid)
    process = subprocess.Popen(["unshare", *NAMESPACES, *_enter(image, hidden, models)])
    try:
        server = _only_child(process.pid)
        _check_is_confined(server, uid)
        print(f"healthy after {_wait_until_healthy(image, server):.0f} s: {' '.join(image.healthcheck)}")
        print("POST /v1/chat/completions:", _inside(server, image, [sys.executable, __file__]).strip())
        os.kill(server, signal.SIGTERM)
        status = process.wait(STOP_SECONDS)
        if status != 0:
            raise SystemExit(f"SIGTERM: exit status {status}, not 0")
        print("SIGTERM: exit status 0")
        print(
            "left in the volume:",
            sorted(str(path.relative_to(models)) for path in models.rglob("*")) or "nothing",
        )
    finally:
        process.kill()  # its namespace goes with it


def _enter(image: Image, hidden: Path, models: Path) -> list[str]:
    """In the new namespaces: loopback, a read-only root, /tmp and the volume; the entry point as PID 1."""
    root = image.root
    prepare = [
        f"mount --bind {models} {root}/models",
        f"mount -t tmpfs -o size=256m,mode=1777 tmpfs {root}/tmp",
        f"mount -t tmpfs -o size=1m,mode=000 tmpfs {root}{hidden}",
        f"mount -t proc proc {root}/proc",
        f"mount -o remount,bind,ro {root} || mount -o remount,ro {root}",
        "ip link set lo up",
    ]
    return [
        "/bin/sh",
        "-ec",
        "\n".join([*prepare, 'exec "$@"']),
        "sh",
        *_confined(image, _whole_command(image)),
    ]


def _whole_command(image: Image) -> list[str]:
    return [*image.entrypoint, *image.command]


def _confined(image: Image, command: list[str]) -> list[str]:
    """cap_drop: ALL, no-new-privileges, the image's user and nothing but its environment."""
    uid, gid = image.user.split(":")
    drop = ["--reuid", uid, "--regid", gid, "--clear-groups", "--no-new-privs", "--bounding-set=-all"]
    settings = [f"{key}={value}" for key, value in image.env.items()]
    inside = ["env", "--ignore-environment", f"--chdir={image.workdir}", *settings, *command]
    return ["chroot", str(image.root), "setpriv", *drop, "--inh-caps=-all", *inside]


def _inside(server: int, image: Image, command: list[str]) -> str:
    """Output of a command in the server's network; the health check in all of its namespaces."""
    done = subprocess.run(
        ["nsenter", f"--target={server}", "--net", *command], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise SystemExit(f"{command}: {done.stdout}{done.stderr}")
    return done.stdout


def _wait_until_healthy(image: Image, server: int) -> float:
    started = time.monotonic()
    check = [
        "nsenter",
        f"--target={server}",
        "--net",
        "--pid",
        "--mount",
        *_confined(image, image.healthcheck),
    ]
    while True:
        done = subprocess.run(check, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return time.monotonic() - started
        if time.monotonic() - started > START_SECONDS or not Path(f"/proc/{server}").exists():
            raise SystemExit(f"not healthy: {done.stdout}{done.stderr}")
        print("not healthy yet:", done.stdout.strip()[:100], flush=True)
        time.sleep(2)


def _only_child(parent: int) -> int:
    children = Path(f"/proc/{parent}/task/{parent}/children")
    for _ in range(100):
        if found := children.read_text().split():
            return int(found[0])
        time.sleep(0.05)
    raise SystemExit("the container did not start")


def _check_is_confined(server: int, uid: int) -> None:
    """That the server itself is PID 1, of the image's user and without any capability."""
    for _ in range(200):
        status = dict(
            line.split(":\t", 1) for line in Path(f"/proc/{server}/status").read_text().splitlines()
        )
        if status["Uid"].split()[0] == str(uid) and status["Name"].startswith(("medusa", "python")):
            break
        time.sleep(0.05)
    else:
        raise SystemExit(f"the server does not run as {uid}: {status}")
    found = {name: status[name].strip() for name in ("Uid", "NSpid", "CapEff", "CapBnd", "NoNewPrivs")}
    print("the server's process:", found)
    if status["NSpid"].split()[-1] != "1" or int(status["CapEff"], 16) or int(status["CapBnd"], 16):
        raise SystemExit("it is not PID 1 without capabilities")
    mounts = Path(f"/proc/{server}/mountinfo").read_text().splitlines()
    root = [line.split()[5] for line in mounts if line.split()[4] == "/"]
    print("its root is mounted", root[-1] if root else "?")


def ask() -> int:
    """In the server's network: one request to the demo model."""
    connection = http.client.HTTPConnection("127.0.0.1", 8000, timeout=60)
    messages = [{"role": "user", "content": "I need a cheap restaurant in the centre"}]
    body = json.dumps({"model": "medusa-demo", "messages": messages, "temperature": 0})
    connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    answer = response.read()
    sys.stdout.write(f"{response.status} {json.loads(answer)['choices'][0]['message']['content']}\n")
    return 0 if response.status == http.HTTPStatus.OK else 1


if __name__ == "__main__":
    sys.exit(ask())
