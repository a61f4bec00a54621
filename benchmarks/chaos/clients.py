"""The classes of clients. Each sends one request, or a burst of them, and says how they ended."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import httpx

from chaos.bad_requests import BAD_REQUESTS, VIOLATIONS, BadRequest
from chaos.outcomes import (
    REFUSALS,
    ContractError,
    Kind,
    Outcome,
    judge_answer,
    judge_response,
    read_error,
    read_stream,
)
from chaos.wire import Wire, connect, request_bytes
from chaos.world import FILLER, TEXTS, World, ask, ask_stream, check_same, encode, pause

Client = Callable[[World], Awaitable[Sequence[Outcome]]]

SEEDS = 4
SEEDED_TOKENS = 60
TINY_BUFFER = 1  # the kernel makes it its smallest, about 2 KB
EXTRA_IN_BURST = 6
SLOW_SECONDS = 3.0


async def plain(world: World) -> Sequence[Outcome]:
    outcome, _ = await ask(world, world.body())
    return [outcome]


async def stream(world: World) -> Sequence[Outcome]:
    body = world.body(stream_options={"include_usage": True})
    outcome, answer = await ask_stream(world, body)
    if answer is not None and not 0 <= (answer.tokens or 0) <= body["max_tokens"]:
        raise ContractError(f"{answer.tokens} tokens where {body['max_tokens']} were asked for")
    return [outcome]


async def seeded(world: World) -> Sequence[Outcome]:
    """One of few requests again: streamed or not, with speculation or without, the answer is the same."""
    seed = world.chance.randrange(SEEDS)
    key = (TEXTS[seed % len(TEXTS)], 0.5 * seed, seed)
    body = world.body(
        messages=[{"role": "user", "content": key[0]}],
        temperature=key[1],
        seed=seed,
        max_tokens=SEEDED_TOKENS,
        speculation={"mode": world.chance.choice(("exact", "exact", "off"))},
    )
    if world.chance.random() < 0.5:
        outcome, answer = await ask_stream(world, body | {"stream_options": {"include_usage": True}})
    else:
        outcome, answer = await ask(world, body)
    if answer is not None:
        check_same(world, key, answer, SEEDED_TOKENS)
    return [outcome]


async def abort(world: World) -> Sequence[Outcome]:
    """Goes away while it waits for a whole answer."""
    try:
        async with asyncio.timeout(world.chance.uniform(0.0, 0.8)):
            outcome, _ = await ask(world, world.long_body())
    except TimeoutError:
        return [Outcome(kind=Kind.LEFT, detail="before the answer")]
    return [outcome]


async def abort_stream(world: World) -> Sequence[Outcome]:
    """Goes away at a random moment of a stream: before its first byte, or in the middle."""
    leave_at = world.chance.uniform(0.0, 1.0)
    try:
        async with asyncio.timeout(leave_at + 1.0):
            outcome, _ = await ask_stream(world, world.long_body(), leave_at=leave_at)
    except TimeoutError:
        return [Outcome(kind=Kind.LEFT, detail="before the next event")]
    return [outcome]


async def slow_reader(world: World) -> Sequence[Outcome]:
    """Reads a few bytes now and then, later the rest."""
    async with connect(world.port, receive_buffer=TINY_BUFFER) as wire:
        await wire.send(request_bytes(encode(world.long_body(stream=True))))
        until = time.monotonic() + SLOW_SECONDS
        while time.monotonic() < until and await wire.read_some(world.chance.randint(1, 64)):
            await pause(world, 0.01, 0.2)
        return [await _rest_of_stream(wire)]


async def never_reader(world: World) -> Sequence[Outcome]:
    """Reads nothing until the server must have given up on it or finished; then it sees what is there."""
    async with connect(world.port, receive_buffer=TINY_BUFFER) as wire:
        await wire.send(request_bytes(encode(world.long_body(stream=True))))
        await asyncio.sleep(world.send_timeout * 1.5)
        return [await _rest_of_stream(wire)]


async def bad_request(world: World) -> Sequence[Outcome]:
    """Well-formed HTTP with a body, a path or a size that is refused, in OpenAI's shape."""
    bad = world.chance.choice(BAD_REQUESTS)
    try:
        return [await _send_bad(world, bad)]
    except ContractError as error:
        raise ContractError(f"{bad.name}: {error}") from error


async def violation(world: World) -> Sequence[Outcome]:
    """What is no HTTP, or comes in too slowly: any refusal or the end of the connection will do, but soon."""
    bad = world.chance.choice(VIOLATIONS)
    async with connect(world.port) as wire:
        await wire.send(bad.content(world))
        if not bad.waits:
            wire.end_sending()
        answer = await wire.read_all()
    if answer.status is None:
        return [Outcome(kind=Kind.CUT_OFF, detail=bad.name)]
    if not 400 <= answer.status < 500:
        raise ContractError(f"{bad.name}: answered with {answer.status} {bytes(answer.body[:200])!r}")
    if answer.body:
        read_error(bytes(answer.body))
    return [Outcome(kind=Kind.REFUSED, detail=f"{answer.status} {bad.name}")]


async def huge_prompt(world: World) -> Sequence[Outcome]:
    """Just within the context, just beyond it, or megabytes."""
    context = world.served.context
    words, fits = world.chance.choice(
        (
            (world.served.filler_words(context - 8), True),
            (world.served.filler_words(context * 21 // 20), False),
            (world.body_limit // 2 // len(FILLER), False),
        )
    )
    body = world.body(messages=[{"role": "user", "content": FILLER * words + "?"}])
    response = await world.http.post("/v1/chat/completions", json=body)
    if response.status_code == httpx.codes.BAD_REQUEST and not fits:
        allowed = {400: ("context_length_exceeded",)}
        return [judge_response(response.status_code, response.headers, response.content, allowed)]
    if response.status_code == httpx.codes.OK:
        if not fits:
            raise ContractError(f"a prompt beyond the context was answered: {words} words")
        return [Outcome(kind=Kind.COMPLETED, detail="near the limit")]
    return [judge_response(response.status_code, response.headers, response.content)]


async def burst(world: World) -> Sequence[Outcome]:
    """More at once than slots and queue take."""
    count = world.served.slots + world.served.queue_limit + EXTRA_IN_BURST
    ended = await asyncio.gather(
        *((ask_stream if number % 2 else ask)(world, world.body(max_tokens=40)) for number in range(count)),
        return_exceptions=True,
    )
    return [_outcome_of(result) for result in ended]


CLIENTS: Mapping[str, Client] = {
    client.__name__: client
    for client in (
        plain,
        stream,
        seeded,
        abort,
        abort_stream,
        slow_reader,
        never_reader,
        bad_request,
        violation,
        huge_prompt,
        burst,
    )
}
# How often each is dealt; a deck of these is shuffled again whenever it is empty.
WEIGHTS: Mapping[str, int] = {
    "plain": 6,
    "stream": 9,
    "seeded": 6,
    "abort": 4,
    "abort_stream": 4,
    "slow_reader": 2,
    "never_reader": 1,
    "bad_request": 8,
    "violation": 3,
    "huge_prompt": 2,
    "burst": 1,
}


def _outcome_of(result: Any) -> Outcome:
    if isinstance(result, ContractError | httpx.TransportError):
        return Outcome(kind=Kind.FAILED, detail=f"{type(result).__name__}: {result}")
    if isinstance(result, BaseException):
        raise result
    outcome: Outcome = result[0]
    return outcome


async def _rest_of_stream(wire: Wire) -> Outcome:
    """The stream's own end; or that the server cut it off, which it may do to one that does not read."""
    answer = await wire.read_all()
    if answer.status is None:
        raise ContractError("the connection ended without a response")
    if answer.status != httpx.codes.OK:
        return judge_response(answer.status, answer.headers, bytes(answer.body))
    if not answer.is_whole:
        return Outcome(kind=Kind.CUT_OFF, detail="unread")
    return judge_answer(read_stream(answer.payloads, with_usage=False))


async def _send_bad(world: World, bad: BadRequest) -> Outcome:
    async with connect(world.port) as wire:
        was_sent = await wire.send(bad.content(world))
        if bad.leaves:
            await pause(world, 0.0, 0.3)
            return Outcome(kind=Kind.LEFT, detail=bad.name)
        answer = await wire.read_all()
    if answer.status is None and bad.may_close:
        return Outcome(kind=Kind.CUT_OFF, detail=bad.name)
    if answer.status is None:
        raise ContractError("no response" if was_sent else "the connection ended while the request was sent")
    if not answer.is_whole:
        raise ContractError(f"a cut-off response of status {answer.status}")
    return judge_response(
        answer.status, answer.headers, bytes(answer.body), {**REFUSALS, bad.status: bad.codes}
    )
