"""One streamed chat answer of an OpenAI-compatible server, timed by its client."""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx


@dataclass(frozen=True, slots=True)
class Answer:
    """`tokens`: as the server counts them. `seconds` last from the request to the last event of the choice,
    `first_seconds` to the first text, of `first_text` characters: servers send tokens in groups."""

    text: str
    tokens: int
    stopped: bool
    first_text: int
    first_seconds: float
    seconds: float


def stream(client: httpx.Client, body: Mapping[str, Any]) -> Answer:
    """Send the chat request as a stream. Raises `SystemExit` if the server answers with an error."""
    options = {"stream": True, "stream_options": {"include_usage": True}}
    pieces: list[str] = []
    first = last = 0.0
    tokens, stopped = 0, False
    start = time.perf_counter()
    with client.stream("POST", "/v1/chat/completions", json={**body, **options}) as response:
        if response.is_error:
            raise SystemExit(f"{client.base_url}: {response.status_code} {response.read().decode()}")
        for line in response.iter_lines():
            now = time.perf_counter()
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise SystemExit(f"{client.base_url}: {event['error']}")
            for choice in event["choices"]:
                if content := choice["delta"].get("content"):
                    pieces.append(content)
                    first = first or now
                last = now
                stopped = stopped or choice["finish_reason"] == "stop"
            tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
    return Answer(
        text="".join(pieces),
        tokens=tokens,
        stopped=stopped,
        first_text=len(pieces[0]) if pieces else 0,
        first_seconds=(first or last) - start,
        seconds=last - start,
    )
