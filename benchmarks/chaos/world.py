"""What every client shares: where the server is, what it serves, chance, and answers that must not change."""

import asyncio
import json
import random
import re
import time
from dataclasses import dataclass, field
from typing import Any

import httpx

from chaos.outcomes import (
    Answer,
    ContractError,
    Kind,
    Outcome,
    judge_answer,
    judge_response,
    read_completion,
    read_stream,
)
from chaos.wire import HOST, PATH

TEXTS = (
    "I need a cheap restaurant in the centre.",
    "Is there a train to Cambridge on Friday morning?",
    "Book a table for two at seven, please.",
    "What hotels are in the north, with free parking?",
    "Thank you, that is all.",
)
FILLER = "train "
FILLERS = (100, 1000)
HAS_TEXT = re.compile(r'"content": ?"[^"]')  # in an event, which is parsed only at the end of the stream
RAMBLING = "x" * 300  # answered at length where the temperature is high
JSON_HEADERS = {"content-type": "application/json"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What the server told of its model. `filler_tokens`: of prompts of `FILLERS` filler words."""

    model: str
    context: int
    slots: int
    queue_limit: int
    filler_tokens: tuple[int, int]

    def filler_words(self, tokens: int) -> int:
        """So many filler words make a prompt of at most `tokens` tokens."""
        (few, many), (fewer, more) = FILLERS, self.filler_tokens
        return few + (tokens - fewer) * (many - few) // (more - fewer)


@dataclass(slots=True, kw_only=True)
class World:
    """One load's state. `patience`: seconds after which a request without an end has failed."""

    port: int
    served: Served
    http: httpx.AsyncClient
    chance: random.Random
    patience: float
    send_timeout: float
    body_limit: int
    references: dict[tuple[Any, ...], Answer] = field(default_factory=dict)

    def body(self, **changes: Any) -> dict[str, Any]:
        """A request of ordinary size, by chance."""
        chance = self.chance
        return {
            "model": self.served.model,
            "messages": [{"role": "user", "content": chance.choice(TEXTS)}],
            "max_tokens": chance.randint(1, 120),
            "temperature": chance.choice((0.0, 0.5, 1.0, 2.0)),
            "seed": chance.getrandbits(32),
        } | changes

    def long_body(self, **changes: Any) -> dict[str, Any]:
        """One that is answered with some hundred tokens, mostly."""
        return (
            self.body(
                messages=[{"role": "user", "content": RAMBLING}], max_tokens=800, temperature=2.0, top_p=1.0
            )
            | changes
        )


async def ask(world: World, body: dict[str, Any]) -> tuple[Outcome, Answer | None]:
    """A request that does not stream."""
    response = await world.http.post(PATH, json=body)
    if response.status_code != httpx.codes.OK:
        return judge_response(response.status_code, response.headers, response.content), None
    answer = read_completion(response.content)
    return judge_answer(answer), answer


async def ask_stream(
    world: World, body: dict[str, Any], *, leave_at: float | None = None
) -> tuple[Outcome, Answer | None]:
    """A streamed request. `leave_at`: go away so many seconds after the start, unless it ends before."""
    with_usage = bool(body.get("stream_options"))
    started = time.monotonic()
    payloads: list[str] = []
    first_token: float | None = None
    async with world.http.stream("POST", PATH, json=body | {"stream": True}) as response:
        if response.status_code != httpx.codes.OK:
            return judge_response(response.status_code, response.headers, await response.aread()), None
        async for line in response.aiter_lines():
            now = time.monotonic() - started
            if leave_at is not None and now > leave_at:
                return Outcome(kind=Kind.LEFT, detail="in the stream", first_token=first_token), None
            if not line.startswith("data: "):
                continue
            payloads.append(line.removeprefix("data: "))
            if first_token is None and HAS_TEXT.search(line):
                first_token = now
    answer = read_stream(payloads, with_usage=with_usage)
    outcome = judge_answer(answer, first_token)
    return outcome, answer if isinstance(answer, Answer) else None


def new_client(port: int) -> httpx.AsyncClient:
    """Without time limits of its own: each request has one as a whole."""
    return httpx.AsyncClient(
        base_url=f"http://{HOST}:{port}",
        timeout=None,
        limits=httpx.Limits(max_connections=None, keepalive_expiry=2.0),
    )


async def served_by(http: httpx.AsyncClient, slots: int, queue_limit: int) -> Served:
    """Ask the server what it serves. It must be ready and idle."""
    [model] = (await http.get("/v1/models")).raise_for_status().json()["data"]
    lengths = []
    for words in FILLERS:
        body = {
            "model": model["id"],
            "max_tokens": 1,
            "messages": [{"role": "user", "content": FILLER * words + "?"}],
        }
        answer = (await http.post(PATH, json=body)).raise_for_status().json()
        lengths.append(answer["usage"]["prompt_tokens"])
    return Served(
        model=model["id"],
        context=model["context_length"],
        slots=slots,
        queue_limit=queue_limit,
        filler_tokens=(lengths[0], lengths[1]),
    )


def encode(body: dict[str, Any]) -> bytes:
    return json.dumps(body).encode()


def check_same(world: World, key: tuple[Any, ...], answer: Answer, asked_tokens: int) -> None:
    """Raises if the same request was answered otherwise before: by another worker, streamed or not."""
    reference = world.references.setdefault(key, answer)
    if (answer.text, answer.finish_reason) == (reference.text, reference.finish_reason):
        return
    was_cut = answer.finish_reason == "length" and answer.tokens is not None and answer.tokens < asked_tokens
    if was_cut and reference.text.startswith(answer.text):
        return  # it ran into the request timeout
    raise ContractError(
        f"seed {key}: {answer.text[:120]!r} where {reference.text[:120]!r} was answered before"
    )


async def pause(world: World, least: float, most: float) -> None:
    await asyncio.sleep(world.chance.uniform(least, most))
