"""OpenAI-compatible servers side by side: the same prompts, streamed over HTTP to one client at a time.

    python benchmarks/side_by_side.py --server ours=http://127.0.0.1:8000 \\
        --server other=http://127.0.0.1:8001,its-model --prompts held_out.jsonl --json side_by_side.json

The servers must run already. Each answers a prompt before any gets the next one, in an order that rotates.
Seconds are medians of a prompt's repeats; rates are all tokens by all seconds: end to end, and decoding, from
the first text on (without the tokens that came with it, by its share of the characters).
"""

import json
import os
import platform
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import httpx
import typer
from streamed import Answer, stream

from medusa_core.text.prompts import DEFAULT_PROMPTS, Prompt, load_prompts

TIMEOUT = 600.0
SEED = 1


@dataclass(frozen=True, slots=True)
class Server:
    name: str
    client: httpx.Client
    model: str


Answers = dict[str, list[list[Answer]]]  # by server: the repeats of each prompt


def main(
    server: Annotated[list[str], typer.Option(help="NAME=URL or NAME=URL,MODEL; the first is the base.")],
    prompts: Annotated[Path, typer.Option(help="JSONL of objects with `messages`.")] = DEFAULT_PROMPTS,
    limit: Annotated[int | None, typer.Option(min=1)] = None,
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    max_tokens: Annotated[int, typer.Option(min=2)] = 128,
    temperature: Annotated[list[float], typer.Option(min=0.0)] = [0.0],  # noqa: B006 - typer copies it
    pause: Annotated[float, typer.Option(min=0.0, help="Seconds before each request.")] = 0.0,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Print a table, and write it as JSON. Pause where a server keeps a core busy after an answer."""
    chosen = load_prompts(prompts, limit)
    settings = {"prompts": len(chosen), "repeats": repeats, "max_tokens": max_tokens, "pause": pause}
    machine = {"cpus": os.cpu_count(), "platform": platform.platform()}
    report: dict[str, Any] = {"machine": machine, "settings": settings, "temperatures": {}}
    with ExitStack() as connections:
        servers = [_server(text, connections) for text in server]
        for warmth in temperature:
            body = {"max_tokens": max_tokens, "temperature": warmth, "seed": SEED}
            results = compare(measure(servers, chosen, body, repeats, pause))
            print(f"temperature {warmth:g}\n{table(results)}\n")
            report["temperatures"][f"{warmth:g}"] = results
    if json_file is not None:
        json_file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def measure(
    servers: Sequence[Server], prompts: Sequence[Prompt], body: Mapping[str, Any], repeats: int, pause: float
) -> Answers:
    """Every server's answers to every prompt, after one that is not counted."""
    answers: Answers = defaultdict(list)
    for server in servers:
        stream(server.client, _request(server, prompts[0], body))
    for number, prompt in enumerate(prompts):
        for server in servers:
            answers[server.name].append([])
        for repeat in range(repeats):
            turn = (number + repeat) % len(servers)
            for server in (*servers[turn:], *servers[:turn]):
                time.sleep(pause)
                answers[server.name][-1].append(stream(server.client, _request(server, prompt, body)))
    return answers


def compare(answers: Answers) -> dict[str, dict[str, float]]:
    """Rates in tokens a second and seconds to the first text by server; `same_texts`: share of the prompts
    that the first server answered alike."""
    uncounted = _uncounted_stop_tokens(answers)
    results = {name: _rates(prompts, uncounted[name]) for name, prompts in answers.items()}
    first = next(iter(answers))
    for name, result in results.items():
        pairs = zip(answers[name], answers[first], strict=True)
        same = [own[0].text == other[0].text for own, other in pairs]
        result["same_texts"] = sum(same) / len(same)
        for rate in ("tokens_per_second", "decode_tokens_per_second"):
            result[f"{rate}_ratio"] = result[rate] / results[first][rate]
    return results


def table(results: Mapping[str, Mapping[str, float]]) -> str:
    """For people."""
    width = max(map(len, results))
    lines = [f"{'server':{width}}  tokens/s  ratio  decoding  ratio  first text  same text"]
    for name, result in results.items():
        lines.append(
            f"{name:{width}}  {result['tokens_per_second']:8.1f}  {result['tokens_per_second_ratio']:5.2f}"
            f"  {result['decode_tokens_per_second']:8.1f}  {result['decode_tokens_per_second_ratio']:5.2f}"
            f"  {1000 * result['first_text_seconds']:7.1f} ms  {result['same_texts']:9.0%}"
        )
    return "\n".join(lines)


def _rates(prompts: Sequence[Sequence[Answer]], uncounted: int) -> dict[str, float]:
    tokens = decoded = seconds = decode_seconds = 0.0
    for repeats in prompts:
        count = median(answer.tokens + uncounted * answer.stopped for answer in repeats)
        tokens += count
        decoded += count * median(1 - answer.first_text / max(len(answer.text), 1) for answer in repeats)
        seconds += median(answer.seconds for answer in repeats)
        decode_seconds += median(answer.seconds - answer.first_seconds for answer in repeats)
    return {
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "decode_tokens_per_second": decoded / max(decode_seconds, 1e-9),
        "first_text_seconds": median(answer.first_seconds for repeats in prompts for answer in repeats),
    }


def _uncounted_stop_tokens(answers: Answers) -> dict[str, int]:
    """1 for a server whose usage leaves out the stop token that another's counts, seen by the same texts."""
    counts: dict[str, dict[str, int]] = defaultdict(dict)
    for name, prompts in answers.items():
        for answer in (answer for repeats in prompts for answer in repeats if answer.stopped):
            counts[answer.text][name] = answer.tokens
    shared = [counted for counted in counts.values() if len(counted) > 1]
    missing = {
        name: [max(counted.values()) - counted[name] for counted in shared if name in counted]
        for name in answers
    }
    return {name: min(1, round(median(gaps))) if gaps else 0 for name, gaps in missing.items()}


def _server(text: str, connections: ExitStack) -> Server:
    name, _, place = text.partition("=")
    url, _, model = place.partition(",")
    if not url.startswith("http"):
        raise typer.BadParameter(f"{text!r} is not NAME=URL or NAME=URL,MODEL", param_hint="--server")
    client = connections.enter_context(httpx.Client(base_url=url, timeout=TIMEOUT))
    return Server(name, client, model or client.get("/v1/models").raise_for_status().json()["data"][0]["id"])


def _request(server: Server, prompt: Prompt, body: Mapping[str, Any]) -> dict[str, Any]:
    return {"model": server.model, "messages": list(prompt.messages), **body}


if __name__ == "__main__":
    typer.run(main)
