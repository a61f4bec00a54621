"""Streamed requests for `ray_streams.py`, each with how it ended."""

import asyncio
import json
import time
from dataclasses import dataclass
from itertools import count, takewhile
from typing import Any

import httpx

SILENCE_SECONDS = 60.0  # without a byte; keep-alive comments come every 10 s
TOTAL_SECONDS = 400.0
MODEL = "medusa-demo"
QUESTIONS = (
    "I need a cheap restaurant in the centre",
    "Find me a train to Cambridge on Friday",
    "Is there a hotel with free parking in the north?",
    "Book a taxi for me, please",
)
NUM_VARIANTS = 2 * len(QUESTIONS)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one request ended: finished, error event, cut (closed early), http error or hang."""

    request_id: str
    variant: int
    end: str
    detail: str
    text: str
    started: float


def body(variant: int, max_tokens: int) -> dict[str, Any]:
    """Half of the variants are greedy and short; the others wander at a high temperature to the limit."""
    question = QUESTIONS[variant // 2]
    return {
        "model": MODEL,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": max_tokens,
        "temperature": 2.0 if variant % 2 else 0.0,
        "top_p": 1.0,
        "seed": variant,
        "stream": True,
    }


async def stream(client: httpx.AsyncClient, request_id: str, variant: int, max_tokens: int) -> Outcome:
    """One streamed request; never raises for what a server can do."""
    started = time.monotonic()
    pieces: list[str] = []
    end, detail = "cut", "the body ended without [DONE]"
    try:
        async with (
            asyncio.timeout(TOTAL_SECONDS),
            client.stream(
                "POST",
                "/v1/chat/completions",
                json=body(variant, max_tokens),
                headers={"x-request-id": request_id},
            ) as response,
        ):
            if response.status_code != httpx.codes.OK:
                end, detail = "http error", f"{response.status_code} {(await response.aread())[:200]!r}"
            else:
                async for line in response.aiter_lines():
                    if line == "data: [DONE]" and end == "cut":
                        end, detail = "finished", ""
                    elif line.startswith("data: {"):
                        event = json.loads(line.removeprefix("data: "))
                        if "error" in event:
                            end, detail = "error event", str(event["error"].get("code"))
                        else:
                            pieces += [choice["delta"].get("content") or "" for choice in event["choices"]]
    except (TimeoutError, httpx.TimeoutException) as error:
        end, detail = "hang", type(error).__name__
    except httpx.TransportError as error:
        end, detail = "cut", f"{type(error).__name__}: {error}"
    return Outcome(request_id, variant, end, detail, "".join(pieces), started)


class Load:
    """Streams `total` requests, at most `concurrency` at once; more of them as long as `goes_on`."""

    def __init__(self, url: str, name: str, total: int, concurrency: int, max_tokens: int) -> None:
        self.total = total
        self.goes_on = False
        self.outcomes: list[Outcome] = []
        self._url, self._name = url, name
        self._concurrency, self._max_tokens = concurrency, max_tokens

    @property
    def num_open(self) -> int:
        return min(self._concurrency, self.total - len(self.outcomes))

    async def run(self) -> list[Outcome]:
        numbers = takewhile(lambda number: number < self.total or self.goes_on, count())
        limits = httpx.Limits(max_connections=self._concurrency)
        async with httpx.AsyncClient(base_url=self._url, timeout=SILENCE_SECONDS, limits=limits) as client:

            async def one_client() -> None:
                for number in numbers:
                    request_id = f"{self._name}-{number}"
                    self.outcomes.append(
                        await stream(client, request_id, number % NUM_VARIANTS, self._max_tokens)
                    )

            await asyncio.gather(*(one_client() for _ in range(self._concurrency)))
        return self.outcomes

    async def wait_until_done(self, number: int) -> None:
        while len(self.outcomes) < number:  # noqa: ASYNC110 - it only counts
            await asyncio.sleep(0.02)
