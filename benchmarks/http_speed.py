"""Cost of HTTP: tokens/s of whole answers through `medusa serve` and by the engine, interleaved.

    python benchmarks/http_speed.py --prompts held_out.jsonl --limit 30 --json http.json

Starts a server on a free loopback port, streams with httpx at concurrency 1, and runs the same prompts,
greedy, on an engine in this process. Answers are timed whole, prefill included: the server sends tokens in
groups, so a clock that starts at the first one would miss those sent with it.
"""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Annotated

import httpx
import typer
from streamed import stream

from medusa_core.benchmark.bench import engine_facts, fitting_prompts
from medusa_core.benchmark.runs import Run, engine_runner
from medusa_core.config import EMBEDDED_MODEL, EngineConfig
from medusa_core.engine.engine import Engine
from medusa_core.machine import machine_facts
from medusa_core.sampling_params import SamplingParams
from medusa_core.text.prompts import DEFAULT_PROMPTS, Prompt, load_prompts

START_SECONDS = 180.0
STOP_SECONDS = 20.0
SERVE = "from server.cli import main; main()"


def main(
    prompts: Annotated[Path, typer.Option(help="JSONL of objects with `messages`.")] = DEFAULT_PROMPTS,
    limit: Annotated[int | None, typer.Option(min=1)] = None,
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    max_tokens: Annotated[int, typer.Option(min=2)] = 128,
    model: str = str(EMBEDDED_MODEL),
    heads: str | None = None,
    dtype: str = "auto",
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Print and write the ratio of rates."""
    engine = Engine.from_pretrained(model, heads=heads, config=EngineConfig(dtype=dtype))
    chosen = load_prompts(prompts, limit)
    fitting_prompts(engine, chosen, max_tokens, warn=_refuse)
    with running_server(model, heads, dtype) as url:
        own, streamed = measure(engine, url, chosen, max_tokens, repeats)
    report = {
        "engine_tokens_per_second": _median_rate(own),
        "http_tokens_per_second": _median_rate(streamed),
        "ratio": _median_rate(streamed) / _median_rate(own),
        "engine_first_token_seconds": median(run.prefill_seconds for run in own),
        "http_first_token_seconds": median(run.prefill_seconds for run in streamed),
        "prompts": len(chosen),
        "repeats": repeats,
        "max_tokens": max_tokens,
        "config": engine_facts(engine) | machine_facts(),
    }
    print(json.dumps(report, indent=2))
    if json_file is not None:
        json_file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def measure(
    engine: Engine, url: str, prompts: Sequence[Prompt], max_tokens: int, repeats: int
) -> tuple[list[Run], list[Run]]:
    """The engine's runs and the streamed ones, prompt by prompt in alternating order."""
    own: list[Run] = []
    streamed: list[Run] = []
    run = engine_runner(engine)
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    with httpx.Client(base_url=url, timeout=600.0) as client:
        name = client.get("/v1/models").raise_for_status().json()["data"][0]["id"]
        answer(client, name, prompts[0], max_tokens)  # warm-up, uncounted
        run(engine.chat_tokenizer.render(prompts[0].messages), params)
        turn = 0
        for prompt in prompts:
            for _ in range(repeats):
                if turn % 2:
                    streamed.append(answer(client, name, prompt, max_tokens))
                own.append(run(engine.chat_tokenizer.render(prompt.messages), params))
                if not turn % 2:
                    streamed.append(answer(client, name, prompt, max_tokens))
                turn += 1
    return own, streamed


def answer(client: httpx.Client, model: str, prompt: Prompt, max_tokens: int) -> Run:
    """One streamed answer. Token ids are zeros, since only their number is known; a stop token counts too."""
    body = {
        "model": model,
        "messages": list(prompt.messages),
        "max_tokens": max_tokens,
        "temperature": 0,
    }
    streamed = stream(client, body)
    count = streamed.tokens + streamed.stopped
    return Run((0,) * count, streamed.first_seconds, streamed.seconds - streamed.first_seconds)


@contextmanager
def running_server(model: str, heads: str | None, dtype: str) -> Iterator[str]:
    """A server on a free loopback port, stopped by its process id when done."""
    port = _free_port()
    command = [sys.executable, "-c", SERVE, "serve", "--port", str(port), "--log-level", "warning"]
    command += ["--model", model, "--dtype", dtype]
    command += ["--heads", heads] if heads else []
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MEDUSA_")}
    server = subprocess.Popen(command, env=environment)
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_until_ready(server, url)
        yield url
    finally:
        server.terminate()
        try:
            server.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _wait_until_ready(server: "subprocess.Popen[bytes]", url: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise SystemExit(f"the server ended with exit code {server.returncode}")
        try:
            if httpx.get(f"{url}/ready", timeout=5.0).status_code == httpx.codes.OK:
                return
        except httpx.TransportError:
            pass  # not listening yet
        time.sleep(0.2)
    raise SystemExit(f"the server was not ready after {START_SECONDS:g} s")


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _median_rate(runs: Sequence[Run]) -> float:
    return median(len(run.token_ids) / (run.prefill_seconds + run.decode_seconds) for run in runs)


def _refuse(problem: str) -> None:
    raise SystemExit(problem)


if __name__ == "__main__":
    typer.run(main)
