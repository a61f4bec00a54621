"""From tokens to text: independent of how tokens were grouped, with stop strings, errors and early leave."""

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medusa_core.engine.outputs import FinishReason, StepOutput
from medusa_core.sampling_params import SamplingParams
from medusa_core.text.tokenizer import load_chat_tokenizer
from server.errors import ApiError
from server.observability.metrics import ServerMetrics
from server.pipeline.generation import Generation, TextDelta
from server.pipeline.streaming import DONE, ChatStream, ChunkEncoder, chat_events
from server.workers.scheduler import JobState, Scheduler

TEXT = "The table is booked — enjoy your meal! 🍝 Anything else?"


class OneSlot:
    num_free = 1

    def submit(self, request_id, prompt_ids, params, client_id=""):
        pass

    def abort(self, request_id):
        pass


@pytest.fixture(scope="module")
def chat(tiny_model_dir):
    return load_chat_tokenizer(tiny_model_dir)


class Answer:
    """A job whose tokens the test feeds."""

    def __init__(self, chat, stops=()):
        self.scheduler = Scheduler(queue_limit=1, request_timeout=60, metrics=ServerMetrics())
        self.worker = OneSlot()
        self.scheduler.worker_ready(self.worker)
        self.job = self.scheduler.submit("a", [1, 2, 3], SamplingParams())
        self.generation = Generation(self.job, self.scheduler, chat, stops)

    def feed(self, *token_ids, reason=None):
        output = StepOutput(request_id="a", token_ids=tuple(token_ids), finish_reason=reason)
        self.scheduler.worker_output(self.worker, output)


def run(coroutine):
    async def limited():
        async with asyncio.timeout(10):
            return await coroutine

    return asyncio.run(limited())


def encoder():
    return ChunkEncoder(completion_id="c", created=1, model="m", fingerprint="f", include_usage=False)


def events_of(answer, on_error=lambda error: None):
    return chat_events(answer.generation, encoder(), include_usage=False, on_error=on_error)


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


def test_a_bug_while_streaming_is_an_event_too(chat, caplog, monkeypatch):
    async def go():
        answer = Answer(chat)
        told = []
        monkeypatch.setattr(answer.generation, "_push", lambda ids: 1 / 0)
        answer.feed(1)
        frames = [frame async for frame in events_of(answer, told.append)]
        assert b'"error"' in frames[-1]
        assert [error.label for error in told] == ["server_error"]
        assert b"ZeroDivision" not in frames[-1]
        assert frames[-1].endswith(DONE)
        assert "ZeroDivisionError" in caplog.text
        assert answer.job.state is JobState.ENDED

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
