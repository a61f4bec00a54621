"""The worker's loop over real pipes, with an engine that follows a script instead of a model."""

import multiprocessing
import select
import threading
from dataclasses import replace

import pytest

from medusa_core.engine.outputs import FinishReason, StepOutput
from medusa_core.errors import RequestError, TreeError
from medusa_core.request import Request
from medusa_core.sampling_params import SamplingParams, SpeculationParams
from server.workers.frames import FrameReader, FrameWriter
from server.workers.messages import (
    Abort,
    Rejected,
    Shutdown,
    Step,
    Submit,
    decode_event,
    encode,
)
from server.workers.worker import WorkerLoop

PARAMS = SamplingParams(max_tokens=3)


def submit(request_id, prompt_ids, params, client_id=""):
    request = Request(request_id=request_id, prompt_ids=prompt_ids, params=params, client_id=client_id)
    return Submit(request)


class ScriptedEngine:
    """Gives each request the tokens 0, 1, 2 … up to its max_tokens, one a step, in turns."""

    def __init__(self, failing_step=None):
        self.active = {}
        self.num_steps = 0
        self._failing_step = failing_step

    is_compiling = False

    @property
    def has_work(self):
        return bool(self.active)

    def upkeep(self):
        """Nothing to take over."""

    def add(self, request):
        if not request.prompt_ids:
            raise RequestError("the prompt\nis empty")
        if request.params.speculation.tree != "dynamic":
            raise TreeError("no such tree")
        self.active[request.request_id] = [0, request.params.max_tokens]

    def abort(self, request_id):
        return self.active.pop(request_id, None) is not None

    def step(self):
        self.num_steps += 1
        if self.num_steps == self._failing_step:
            raise RuntimeError("the device is lost")
        request_id = next(iter(self.active))
        count, limit = self.active.pop(request_id)
        if count == limit:
            return []
        if request_id == "bad":
            error = "x" * 9000
            return [StepOutput(request_id="bad", token_ids=(), finish_reason=FinishReason.ERROR, error=error)]
        is_last = count + 1 == limit
        if not is_last:
            self.active[request_id] = [count + 1, limit]
        return [
            StepOutput(
                request_id=request_id,
                token_ids=(count,),
                finish_reason=FinishReason.LENGTH if is_last else None,
            )
        ]


class Harness:
    """A loop in a thread, and the API process's ends of its pipes."""

    def __init__(self, engine):
        commands, self.commands = multiprocessing.Pipe(duplex=False)
        self.events, events = multiprocessing.Pipe(duplex=False)
        self._ends = (commands, events)
        self.outbox = FrameWriter(events)
        self.client_ids = {}
        self.loop = WorkerLoop(engine, commands, self.outbox, self.client_ids)
        self.error = None
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self):
        try:
            self.loop.run()
        except (EOFError, OSError, RuntimeError) as error:
            self.error = error

    def send(self, *commands):
        for command in commands:
            self.commands.send_bytes(encode(command))

    def receive(self, timeout=10):
        assert self.events.poll(timeout), "no event"
        return decode_event(self.events.recv_bytes())

    def join(self):
        self.thread.join(10)
        assert not self.thread.is_alive()
        return self.error

    def close(self):
        self.commands.close()
        self.join()
        for end in (self.events, *self._ends):
            end.close()


@pytest.fixture
def start():
    harnesses = []

    def start(engine):
        harnesses.append(Harness(engine))
        return harnesses[-1]

    yield start
    for harness in harnesses:
        harness.close()


def test_tokens_then_an_end(start):
    harness = start(ScriptedEngine())
    harness.send(submit("a", [1], PARAMS))
    outputs = [harness.receive() for _ in range(3)]
    assert [event.output.token_ids for event in outputs] == [(0,), (1,), (2,)]
    assert [event.output.finish_reason for event in outputs] == [None, None, FinishReason.LENGTH]
    harness.send(Shutdown())
    assert harness.join() is None


def test_the_log_knows_requests_by_their_clients_ids_while_they_are_here(start):
    seen = {}

    class Engine(ScriptedEngine):
        def step(self):
            seen.update(harness.client_ids)
            return super().step()

    harness = start(Engine())
    harness.send(submit("a", [1], PARAMS, "req-a"), submit("bad", [1], PARAMS, "req-bad"))
    harness.send(submit("refused", [], PARAMS, "req-refused"))
    ends = []
    while len(ends) < 3:
        event = harness.receive()
        ends += [event] if isinstance(event, Rejected) or event.output.finish_reason else []
    harness.send(Shutdown())
    assert harness.join() is None
    assert {"a": "req-a", "bad": "req-bad"}.items() <= seen.items()
    assert harness.client_ids == {}


def test_a_step_without_output_is_a_sign_of_life(start):
    engine = ScriptedEngine()
    engine.active["idle"] = [0, 0]
    harness = start(engine)
    harness.send(submit("a", [1], SamplingParams(max_tokens=1)))
    assert harness.receive() == Step(None)


def test_refused_requests_fail_alone(start):
    harness = start(ScriptedEngine())
    wrong_tree = SamplingParams(max_tokens=1, speculation=SpeculationParams(tree="oak"))
    harness.send(submit("empty", [], PARAMS), submit("oak", [1], wrong_tree), submit("bad", [1], PARAMS))
    assert harness.receive() == Rejected("empty", "the prompt is empty", "messages")
    assert harness.receive() == Rejected("oak", "no such tree", "speculation.tree")
    failed = harness.receive().output
    assert failed.finish_reason is FinishReason.ERROR
    assert len(failed.error) < 2000
    harness.send(submit("good", [1], PARAMS))
    assert harness.receive().output.request_id == "good"


def test_abort_ends_output(start):
    engine = ScriptedEngine()
    harness = start(engine)
    harness.send(submit("long", [1], SamplingParams(max_tokens=10**9)))
    harness.receive()
    harness.send(Abort("long"), Abort("never there"), submit("next", [1], SamplingParams(max_tokens=1)))
    while (output := harness.receive().output).request_id != "next":
        assert output.request_id == "long"
    assert not engine.has_work


def test_slow_reader_never_blocks_decoding(start):
    """The pipe holds 64 KiB; twenty times that waits in the worker, in order, and decoding goes on."""
    engine = ScriptedEngine()
    harness = start(engine)
    count = 20_000
    harness.send(submit("a", [1], SamplingParams(max_tokens=count)))
    for _ in range(2000):
        if not engine.has_work and engine.num_steps:
            break
        threading.Event().wait(0.01)
    assert engine.num_steps == count, "the loop got stuck on a full pipe"
    assert harness.outbox.has_backlog
    tokens = [harness.receive().output.token_ids for _ in range(count)]
    assert tokens == [(number,) for number in range(count)]


def test_an_event_of_five_megabytes_crosses_while_the_reader_is_slow(start):
    """The loop goes on with other requests while it leaves; the reader never waits for the rest of it."""
    count = 1_250_000
    large = tuple(range(10**6, 10**6 + count))

    class Engine(ScriptedEngine):
        def step(self):
            outputs = super().step()
            return [replace(o, token_ids=large) if o.request_id == "large" else o for o in outputs]

    engine = Engine()
    harness = start(engine)
    reader = FrameReader(harness.events)
    harness.send(submit("large", [1], SamplingParams(max_tokens=1)))
    harness.send(submit("small", [1], SamplingParams(max_tokens=50)))
    for _ in range(1000):
        if engine.num_steps == 51:
            break
        threading.Event().wait(0.01)
    assert engine.num_steps == 51, "the loop got stuck on the large event"
    frames = []
    while len(frames) < 51:
        select.select([harness.events], [], [], 10)
        assert reader.fill()
        frames += reader.frames()
    assert len(frames[0]) > 5_000_000
    outputs = [decode_event(frame).output for frame in frames]
    assert outputs[0].token_ids == large
    assert [output.token_ids for output in outputs[1:]] == [(number,) for number in range(50)]


def test_lost_api_process_ends_the_loop_at_work_and_at_rest(start):
    resting = start(ScriptedEngine())
    resting.commands.close()
    assert isinstance(resting.join(), EOFError)
    working = start(ScriptedEngine())
    working.send(submit("a", [1], SamplingParams(max_tokens=10**9)))
    working.receive()
    working.events.close()
    assert isinstance(working.join(), BrokenPipeError)


def test_a_failure_of_the_engine_itself_ends_the_loop(start):
    harness = start(ScriptedEngine(failing_step=2))
    harness.send(submit("a", [1], PARAMS))
    harness.receive()
    assert isinstance(harness.join(), RuntimeError)
