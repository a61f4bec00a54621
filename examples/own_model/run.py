"""A model of your own made fast with four commands: distill, train, calibrate, serve.

    python examples/own_model/run.py --work runs/own_model

Here "your own model" is the demo backbone without its heads. Every command is shown as it is run, so that it
can be copied. At the end the served model answers held-out prompts; the exit status is 0 only if it decides
more than 1.5 tokens a step by its own metrics and answers as it does without speculation.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from medusa_core.config import EMBEDDED_MODEL

SCRIPTS = Path(__file__).parent
MEDUSA = Path(sys.executable).with_name("medusa")
LEAST_TOKENS_PER_STEP = 1.5
SHOWN = 3
SERVED_NAME = "own-model"
START_SECONDS = 180.0
STOP_SECONDS = 60.0
REQUEST_SECONDS = 120.0
# Timing, which on a busy machine is noise, is left out of what the assertion depends on.
STEADY = ("--measure", "false", "--tree-nodes", "16")
FLOAT32 = ("--dtype", "float32")  # the same text on every machine, with and without speculation


def run(*command: str | Path) -> None:
    """Run a command in the foreground; its failure is this script's."""
    parts = [str(part) for part in command]
    print(f"\n$ {shlex.join(parts)}", flush=True)
    started = time.monotonic()
    environment = own_environment()
    status = subprocess.run(parts, check=False, env=environment).returncode  # noqa: S603 - our own words
    if status != 0:
        raise SystemExit(status)
    print(f"({time.monotonic() - started:.0f} s)", flush=True)


def own_environment() -> dict[str, str]:
    """Without settings that are meant for another server."""
    return {name: value for name, value in os.environ.items() if not name.startswith("MEDUSA_")}


def copy_backbone(target: Path) -> Path:
    """The demo model as somebody's model that has no heads yet."""
    target.mkdir(parents=True, exist_ok=True)
    for file in EMBEDDED_MODEL.iterdir():
        if file.is_file():
            shutil.copyfile(file, target / file.name)
    return target


@contextmanager
def served(model: Path, heads: Path) -> Iterator[str]:
    """`medusa serve` on a free port until the block ends; gives its address."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    where = ("--served-name", SERVED_NAME, "--port", port, "--log-level", "warning")
    command = [MEDUSA, "serve", "--model", model, "--heads", heads, *FLOAT32, *STEADY, *where]
    parts = [str(part) for part in command]
    print(f"\n$ {shlex.join(parts)}", flush=True)
    environment = own_environment()
    with subprocess.Popen(parts, env=environment) as process:  # noqa: S603 - as above
        try:
            wait_until_ready(process, url)
            yield url
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
    if process.returncode != 0:
        raise SystemExit(f"the server ended with status {process.returncode}")


def wait_until_ready(process: "subprocess.Popen[bytes]", url: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise SystemExit(f"the server did not start: status {process.returncode}")
        try:
            if httpx.get(f"{url}/ready", timeout=5).status_code == httpx.codes.OK:
                return
        except httpx.TransportError:
            pass  # not listening yet
        time.sleep(0.2)
    raise SystemExit(f"the server was not ready after {START_SECONDS:.0f} s")


def ask(url: str, prompt: str, mode: str) -> str:
    """A greedy answer over HTTP."""
    body = {
        "model": SERVED_NAME,
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "max_tokens": 64,
        "speculation": {"mode": mode},
    }
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=REQUEST_SECONDS).raise_for_status()
    text: str = answer.json()["choices"][0]["message"]["content"]
    return text


def metric(url: str, name: str) -> float:
    """One figure of the server's own."""
    text = httpx.get(f"{url}/metrics", timeout=REQUEST_SECONDS).raise_for_status().text
    found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
    if found is None:
        raise SystemExit(f"the server exports no {name}")
    return float(found[1])


def first_prompts(path: Path, count: int) -> list[str]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:count]]
    return [row["messages"][0]["content"] for row in rows]


def tokens_per_step(url: str, prompts: list[str]) -> float:
    """Mean acceptance length of the answers, which must be those without speculation."""
    answers = {prompt: ask(url, prompt, "exact") for prompt in prompts}
    for prompt in prompts[:SHOWN]:
        print(f"\n> {prompt}\n  {answers[prompt]}")
    length = metric(url, "medusa_acceptance_length_sum") / metric(url, "medusa_acceptance_length_count")
    differing = [prompt for prompt, text in answers.items() if ask(url, prompt, "off") != text]
    if differing:
        raise SystemExit(f"{len(differing)} answers differ from those without speculation: {differing[0]!r}")
    return length


def write_prompts(path: Path, count: int, seed: int) -> Path:
    script = SCRIPTS / "seed_prompts.py"
    run(sys.executable, script, "--count", str(count), "--seed", str(seed), "--out", path)
    return path


def make_heads(model: Path, work: Path, held_out: Path, args: argparse.Namespace) -> Path:
    """The first three commands."""
    seeds = write_prompts(work / "seeds.jsonl", args.dialogues, seed=0)
    distilled, heads = work / "distilled.jsonl", work / "heads"
    at_most = ("--max-tokens", "64")
    run(MEDUSA, "distill", "--model", model, "--data", seeds, "--out", distilled, *at_most, *FLOAT32)
    schedule = ["--max-steps", str(args.steps), "--learning-rate", "4e-3"]
    if (heads / "checkpoints").exists():  # this script was stopped before
        schedule.append("--resume")
    run(MEDUSA, "train", "--model", model, "--data", distilled, "--out", heads, *schedule, *FLOAT32)
    few = ("--limit", str(args.prompts), "--max-tokens", "48", "--temperatures", "0.7")
    run(MEDUSA, "calibrate", "--model", model, "--heads", heads, "--prompts", held_out, *few, *FLOAT32)
    return heads


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/own_model"), help="folder for everything")
    parser.add_argument("--dialogues", type=int, default=240, help="seed dialogues to distill")
    parser.add_argument("--steps", type=int, default=120, help="training steps")
    parser.add_argument(
        "--prompts", type=int, default=24, help="held-out prompts to calibrate and measure on"
    )
    args = parser.parse_args()
    model = copy_backbone(args.work / "model")
    # Half of them for calibration, the other half for the served model.
    held_out = write_prompts(args.work / "held_out.jsonl", 2 * args.prompts, seed=1)
    heads = make_heads(model, args.work, held_out, args)
    with served(model, heads) as url:
        length = tokens_per_step(url, first_prompts(held_out, 2 * args.prompts)[args.prompts :])
    print(f"\n{length:.2f} tokens a step; every answer as without speculation")
    if length <= LEAST_TOKENS_PER_STEP:
        raise SystemExit(f"that is not more than {LEAST_TOKENS_PER_STEP}")


if __name__ == "__main__":
    main()
