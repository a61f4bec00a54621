"""What the soak takes for a failure: each rule finds what it is there for, and lets what is sound pass."""

import asyncio
import contextlib
import json
import random
from types import SimpleNamespace

import pytest
from chaos import outcomes
from chaos.clients import CLIENTS, WEIGHTS
from chaos.faults import HICCUP, KILL, LOADING_KILL, LOADING_STOP, STOP, plan_faults
from chaos.judge import SoakRun, find_failures
from chaos.load import judged
from chaos.memory import MIB, api_slope, worker_slopes
from chaos.outcomes import Answer, ContractError, Kind, Outcome, StreamError
from chaos.server_process import Sample
from chaos.world import Served, World, check_same, new_client

ROLE = {"delta": {"role": "assistant", "content": ""}, "finish_reason": None}
TEXT = {"delta": {"content": "Hello"}, "finish_reason": None}
STOPPED = {"delta": {}, "finish_reason": "stop"}
USAGE = {"id": "x", "choices": [], "usage": {"completion_tokens": 1}}
LOST = {
    "error": {"message": "The worker died.", "type": "server_error", "param": None, "code": "worker_lost"}
}


def chunks(*choices):
    return [json.dumps({"id": "x", "choices": [choice]}) for choice in choices]


def error_body(**changes):
    return json.dumps({"error": LOST["error"] | changes}).encode()


def test_streams_in_openai_s_order():
    whole = chunks(ROLE, TEXT, STOPPED)
    assert outcomes.read_stream([*whole, "[DONE]"], with_usage=False) == Answer("Hello", "stop", None)
    with_usage = [*whole, json.dumps(USAGE), "[DONE]"]
    assert outcomes.read_stream(with_usage, with_usage=True) == Answer("Hello", "stop", 1)
    lost = [*chunks(ROLE, TEXT), json.dumps(LOST), "[DONE]"]
    assert outcomes.read_stream(lost, with_usage=True) == StreamError("worker_lost")


@pytest.mark.parametrize(
    "payloads",
    [
        [],
        ["[DONE]"],
        chunks(ROLE, TEXT, STOPPED),
        [*chunks(ROLE, TEXT), "[DONE]"],
        [*chunks(ROLE, STOPPED, TEXT), "[DONE]"],
        [*chunks(TEXT, STOPPED), "[DONE]"],
        [*chunks(ROLE, TEXT, STOPPED), "[DONE]", "[DONE]"],
        [*chunks(ROLE), json.dumps(LOST), *chunks(STOPPED), "[DONE]"],
        [*chunks(ROLE, TEXT, STOPPED)[:2], chunks(STOPPED)[0].replace('"x"', '"y"'), "[DONE]"],
        ["{", "[DONE]"],
    ],
    ids=range(10),
)
def test_broken_streams(payloads):
    with pytest.raises(ContractError):
        outcomes.read_stream(payloads, with_usage=False)


@pytest.mark.parametrize(
    "body",
    [
        b"Internal Server Error",
        b"[]",
        b'{"detail": "Not Found"}',
        b'{"error": "busy"}',
        b'{"error": {"message": "busy", "type": "x", "param": null}}',
        error_body(code=500),
        error_body(message=""),
        error_body(message="cannot open /home/me/model"),
        error_body(message='Traceback (most recent call last): File "server.py"'),
        error_body()[:-1] + b', "extra": 1}',
    ],
    ids=range(10),
)
def test_errors_that_are_not_openai_s(body):
    with pytest.raises(ContractError):
        outcomes.read_error(body)


def test_refusals_are_those_allowed():
    full = error_body(code="rate_limit_exceeded")
    assert outcomes.judge_response(429, {"retry-after": "1"}, full).kind is Kind.REFUSED
    assert outcomes.judge_response(500, {}, error_body()).kind is Kind.ERROR
    for status, headers, code in (
        (429, {}, "rate_limit_exceeded"),
        (500, {}, "generation_failed"),
        (400, {}, "rate_limit_exceeded"),
    ):
        with pytest.raises(ContractError):
            outcomes.judge_response(status, headers, error_body(code=code))


def ask_a_fake(response, name, patience=5.0):
    """How one client of a class fares with a server that answers anything with these bytes."""

    async def answer(reader, writer):
        with contextlib.closing(writer):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(response)
            await writer.drain()
            if not response:
                await reader.read()  # until the client has gone
        answered.set()

    answered = asyncio.Event()

    async def ask():
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        served = Served(model="m", context=99, slots=1, queue_limit=1, filler_tokens=(1, 2))
        async with server, new_client(port) as http:
            world = World(
                port=port,
                served=served,
                http=http,
                chance=random.Random(0),
                patience=patience,
                send_timeout=0.0,
                body_limit=10,
            )
            [outcome] = await judged(name, CLIENTS[name], world)
        await answered.wait()
        return outcome

    return asyncio.run(ask())


def sse(*payloads):
    body = "".join(f"data: {payload}\n\n" for payload in payloads).encode()
    return b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n" + body


def test_a_stream_without_done_has_failed():
    whole = ask_a_fake(sse(*chunks(ROLE, TEXT, STOPPED), json.dumps(USAGE), "[DONE]"), "stream")
    assert whole.kind is Kind.COMPLETED
    assert whole.first_token is not None
    cut = ask_a_fake(sse(*chunks(ROLE, TEXT, STOPPED), json.dumps(USAGE)), "stream")
    assert cut.kind is Kind.FAILED
    assert "without [DONE]" in cut.detail


def test_silence_and_closed_connections_have_failed():
    silent = ask_a_fake(b"", "plain", patience=0.3)
    assert (silent.kind, silent.detail) == (Kind.FAILED, "no end within 0.3 s")
    closed = ask_a_fake(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n{", "plain")
    assert closed.kind is Kind.FAILED
    assert "connection failed" in closed.detail
    plain_text = b"HTTP/1.1 500 Oops\r\ncontent-length: 4\r\nconnection: close\r\n\r\nOops"
    assert "not JSON" in ask_a_fake(plain_text, "plain").detail


def test_the_same_seed_must_give_the_same_text():
    world = SimpleNamespace(references={})
    check_same(world, ("a",), Answer("one two", "stop", 2), 60)
    check_same(world, ("b",), Answer("other", "stop", 2), 60)
    check_same(world, ("a",), Answer("one", "length", 1), 60)  # the request timeout cut it short
    with pytest.raises(ContractError, match="answered before"):
        check_same(world, ("a",), Answer("one", "stop", 1), 60)


def samples_of(slope, seconds=600, worker_life=600, noise=3.0):
    """Both processes grow by `slope` MiB a minute, noisily, with a spike at every fiftieth second."""
    chance = random.Random(3)

    def rss(second):
        spike = 80.0 if second % 50 == 0 else 0.0
        return round((100.0 + slope * second / 60.0 + chance.uniform(-noise, noise) + spike) * MIB)

    return [
        Sample(float(at), rss(at), 10, 5, 0, {1000 + at // worker_life: rss(at)}) for at in range(seconds)
    ]


@pytest.mark.parametrize("slope", [0.0, 0.5, 1.5, 4.0])
def test_slopes_see_through_noise_and_spikes(slope):
    samples = samples_of(slope)
    found = api_slope(samples, warm_up=60.0)
    assert found.value == pytest.approx(slope, abs=0.2)
    assert found.low < found.value < found.high
    assert found.minutes == pytest.approx(9.0, abs=0.1)
    [worker] = worker_slopes(samples, warm_up=30.0, least_seconds=90.0).values()
    assert worker.value == pytest.approx(slope, abs=0.2)
    assert not worker_slopes(samples_of(slope, worker_life=60), warm_up=30.0, least_seconds=90.0)
    assert api_slope(samples[:10], warm_up=0.0) is None


def sound_run(slope=0.0):
    run = SoakRun(
        samples=samples_of(slope), metrics={"medusa_worker_restarts_total": 1.0, "medusa_ready": 1.0}
    )
    for name in WEIGHTS:
        run.tally.add(name, Outcome(kind=Kind.COMPLETED, detail="stop"))
    run.faults.done[KILL] = 1
    return run


def test_the_verdict():
    assert find_failures(sound_run(), slots=2, health_limit=3.0) == []
    [*leaks] = find_failures(sound_run(slope=2.0), slots=2, health_limit=3.0)
    assert len(leaks) == 2
    assert "the API process grew by" in leaks[0]
    assert "a worker grew by" in leaks[1]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda run: run.tally.add("plain", Outcome(kind=Kind.FAILED, detail="x")), "1 requests failed"),
        (lambda run: run.tally.ends.pop("burst"), "no client of class burst"),
        (
            lambda run: [
                run.tally.add("stream", Outcome(kind=Kind.ERROR, detail="event worker_lost"))
                for _ in range(3)
            ],
            "3 requests lost their worker",
        ),
        (
            lambda run: run.metrics.update(medusa_worker_restarts_total=2.0),
            "2 worker restarts after 1 faults",
        ),
        (lambda run: run.metrics.update(medusa_ready=0.0), "not ready at the end"),
        (lambda run: setattr(run, "log", "ERROR\nTraceback (most recent call last)"), "a traceback"),
        (lambda run: run.left.append("2 zombies"), "2 zombies"),
        (lambda run: run.health_seconds.append(3.5), "GET /health took 3.5 s"),
        (lambda run: run.faults.failures.append("no worker within 90 s"), "no worker within"),
    ],
    ids=range(9),
)
def test_what_spoils_a_run(spoil, said):
    run = sound_run()
    spoil(run)
    [failure] = find_failures(run, slots=2, health_limit=3.0)
    assert said in failure


def test_faults_are_planned_by_the_seed():
    plan = plan_faults(random.Random(5), seconds=1200.0, interval=60.0)
    assert plan == plan_faults(random.Random(5), 1200.0, 60.0) != plan_faults(random.Random(6), 1200.0, 60.0)
    kinds = [fault.kind for fault in plan]
    assert sum(kinds.count(kind) for kind in (KILL, LOADING_KILL, LOADING_STOP)) == 20
    assert kinds.count(HICCUP) == 20
    assert kinds.count(LOADING_KILL) == 5
    assert kinds.count(LOADING_STOP) == 4
    assert kinds.count(STOP) == 10
    assert [fault.due for fault in plan] == sorted(fault.due for fault in plan)
    assert plan[-1].due <= 1200.0
