"""From tokens to text: independent of how tokens were grouped, with stop strings, errors and early leave."""

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medusa_core.engine.outputs import FinishReason, StepOutput, StepStats
from medusa_core.request import Request
from medusa_core.sampling_params import SamplingParams, SpeculationMode
from medusa_core.text.assembler import TextAssembler
from medusa_core.text.tokenizer import load_chat_tokenizer
from server.errors import ApiError
from server.observability.metrics import ServerMetrics
from server.pipeline.generation import Generation, TextDelta
from server.pipeline.streaming import DONE, ChatStream, chat_events
from server.schemas.completion import ChatChunk, SpeculationUsage
from server.workers.scheduler import JobState, Scheduler

TEXT = "The table is booked — enjoy your meal! 🍝 Anything else?"


class OneSlot:
    num_free = 1

    def submit(self, request):
        pass

    def abort(self, request_id):
        pass


@pytest.fixture(scope="module")
def chat(tiny_model_dir):
    return load_chat_tokenizer(tiny_model_dir)


class Answer:
    """A job whose tokens the test feeds."""

    def __init__(self, chat, stops=(), assembler=None):
        self.metrics = ServerMetrics()
        self.scheduler = Scheduler(queue_limit=1, request_timeout=60, metrics=self.metrics)
        self.worker = OneSlot()
        self.scheduler.worker_ready(self.worker)
        self.job = self.scheduler.submit(
            Request(request_id="a", prompt_ids=[1, 2, 3], params=SamplingParams())
        )
        assembler = assembler or TextAssembler(chat.tokenizer, stops)
        self.generation = Generation(self.job, self.scheduler, assembler, self.metrics)

    def feed(self, *token_ids, reason=None, stats=None):
        output = StepOutput(request_id="a", token_ids=tuple(token_ids), finish_reason=reason, stats=stats)
        self.scheduler.worker_output(self.worker, output)


def run(coroutine):
    async def limited():
        async with asyncio.timeout(10):
            return await coroutine

    return asyncio.run(limited())


TEMPLATE = ChatChunk(id="c", created=1, model="m", system_fingerprint="f")


def events_of(answer, on_error=lambda error: None):
    return chat_events(answer.generation, TEMPLATE, on_error)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_text_does_not_depend_on_grouping(chat, data):
    ids = chat.encode(TEXT)
    stops = data.draw(st.sampled_from([(), ("meal",), ("zz", "🍝"), ("e",), (TEXT,), ("else?",), ("—",)]))
    cuts = sorted(data.draw(st.sets(st.integers(1, len(ids) - 1))))
    runs = [ids[a:b] for a, b in zip([0, *cuts], [*cuts, len(ids)], strict=True)]

    async def go():
        answer = Answer(chat, stops)
        deltas = []

        async def read():
            async for delta in answer.generation.deltas():
                deltas.append(delta)

        reader = asyncio.create_task(read())
        for group in runs:
            answer.feed(*group)
            if data.draw(st.booleans()):
                await asyncio.sleep(0)
        answer.feed(reason=FinishReason.LENGTH)
        await reader
        text = "".join(delta.text for delta in deltas)
        hits = [TEXT.index(stop) for stop in stops if stop in TEXT]
        assert text == (TEXT[: min(hits)] if hits else TEXT)
        assert [delta.finish_reason for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
        assert deltas[-1].finish_reason == (FinishReason.STOP if hits else FinishReason.LENGTH)
        return answer.generation.usage().completion_tokens

    if not stops:
        assert run(go()) == len(ids)
    else:
        assert run(go()) <= len(ids)


def test_half_a_stop_string_at_the_end_is_text(chat):
    async def go():
        answer = Answer(chat, ["meal tomorrow"])
        answer.feed(*chat.encode("your meal"), reason=FinishReason.STOP)
        assert await answer.generation.collect() == TextDelta("your meal", FinishReason.STOP)

    run(go())


def test_stop_string_completed_by_held_back_bytes(chat):
    """Bytes of a character wait for the rest; when none comes, their replacement may end a stop string."""

    async def go():
        answer = Answer(chat, ["\ufffd"])
        answer.feed(*chat.encode("ab🍝")[:-1], reason=FinishReason.LENGTH)
        assert await answer.generation.collect() == TextDelta("ab", FinishReason.STOP)

    run(go())


def test_errors_come_after_the_text_before_them(chat):
    async def go():
        answer = Answer(chat)
        answer.feed(*chat.encode("half"))
        answer.scheduler.worker_lost(answer.worker)
        with pytest.raises(ApiError, match="worker died"):
            await answer.generation.collect()

    run(go())


def test_leaving_early_ends_the_job(chat):
    async def go():
        answer = Answer(chat)
        answer.feed(*chat.encode("half"))
        deltas = answer.generation.deltas()
        assert (await anext(deltas)).text == "half"
        await deltas.aclose()
        assert answer.job.state is JobState.ENDED

    run(go())


class BrokenAssembler(TextAssembler):
    def push(self, token_ids, *, is_prefill=False):
        raise ZeroDivisionError


def test_a_bug_while_streaming_is_an_event_too(chat, caplog):
    async def go():
        answer = Answer(chat, assembler=BrokenAssembler(chat.tokenizer))
        told = []
        answer.feed(1)
        frames = [frame async for frame in events_of(answer, told.append)]
        assert b'"error"' in frames[-1]
        assert [error.label for error in told] == ["server_error"]
        assert b"ZeroDivision" not in frames[-1]
        assert frames[-1].endswith(DONE)
        assert "ZeroDivisionError" in caplog.text
        assert answer.job.state is JobState.ENDED

    run(go())


DECODE = StepStats(mode=SpeculationMode.EXACT, is_prefill=False, seconds=0.1, drafted=(1,), accepted=(1,))
PREFILL = StepStats(mode=SpeculationMode.EXACT, is_prefill=True, seconds=0.1, prompt_tokens=3)


def lengths(answer):
    sample = answer.metrics.registry.get_sample_value
    return sample("medusa_acceptance_length_count"), sample("medusa_acceptance_length_sum")


def test_acceptance_length_leaves_out_the_end_of_sequence(chat):
    """Two decode steps gave three tokens; a third decided the end alone, which the client never sees."""

    async def go():
        answer = Answer(chat)
        first, second, third, fourth = chat.encode("your meal")[:4]
        answer.feed(first, stats=PREFILL)
        answer.feed(second, third, stats=DECODE)
        answer.feed(fourth, stats=DECODE)
        answer.feed(stats=DECODE, reason=FinishReason.STOP)
        await answer.generation.collect()
        usage = answer.generation.usage()
        assert usage.completion_tokens == 4
        assert usage.speculation == SpeculationUsage(steps=2, acceptance_length=1.5)
        assert lengths(answer) == (2, 3)

    run(go())


def test_acceptance_length_leaves_out_what_is_behind_a_stop_string(chat):
    """Neither the rest of the step with the stop string counts, nor steps that arrived after it."""

    async def go():
        ids = chat.encode("a stop and more of it")
        answer = Answer(chat, ["stop"])
        stop_at = next(n for n in range(1, len(ids)) if "stop" in chat.tokenizer.decode(ids[:n]))
        answer.feed(ids[0], stats=PREFILL)
        answer.feed(*ids[1 : stop_at + 2], stats=DECODE)
        answer.feed(*ids[stop_at + 2 :], stats=DECODE)
        assert await answer.generation.collect() == TextDelta("a ", FinishReason.STOP)
        usage = answer.generation.usage()
        assert usage.completion_tokens == stop_at
        assert usage.speculation == SpeculationUsage(steps=1, acceptance_length=stop_at - 1)
        assert lengths(answer) == (1, stop_at - 1)

    run(go())


def test_a_stream_that_never_starts_ends_its_job(chat):
    """A client may be gone before the response is: then the iterator's own clean-up never runs."""

    async def go():
        answer = Answer(chat)
        stream = ChatStream(
            events_of(answer),
            on_close=lambda: answer.scheduler.cancel(answer.job),
            keepalive=0,
            send_timeout=1,
        )

        async def receive():
            return {"type": "http.disconnect"}

        async def send(message):
            await asyncio.Event().wait()

        await stream({"type": "http", "method": "POST"}, receive, send)
        assert answer.job.state is JobState.ENDED

    run(go())
