"""The worker's loop over real pipes, with an engine that follows a script instead of a model."""

import multiprocessing
import threading

import pytest

from medusa_core.engine.outputs import FinishReason, StepOutput
from medusa_core.errors import RequestError, TreeError
from medusa_core.sampling_params import SamplingParams
from server.workers.messages import (
    Abort,
    Rejected,
    Shutdown,
    Step,
    Submit,
    decode_event,
    encode_command,
)
from server.workers.worker import Outbox, WorkerLoop

PARAMS = SamplingParams(max_tokens=3)


class ScriptedEngine:
    """Gives each request the tokens 0, 1, 2 … up to its max_tokens, one a step, in turns."""

    def __init__(self, failing_step=None):
        self.active = {}
        self.num_steps = 0
        self._failing_step = failing_step

    @property
    def has_work(self):
        return bool(self.active)

    def add(self, request_id, prompt_ids, params):
        if not prompt_ids:
            raise RequestError("the prompt\nis empty")
        if params.speculation.tree != "dynamic":
            raise TreeError("no such tree")
        self.active[request_id] = [0, params.max_tokens]

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
        self.outbox = Outbox(events)
        self.client_ids = {}
        self.loop = WorkerLoop(engine, 7, commands, self.outbox, self.client_ids)
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
            self.commands.send_bytes(encode_command(command))

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
    harness.send(Submit(7, "a", [1], PARAMS))
    outputs = [harness.receive() for _ in range(3)]
    assert [event.generation for event in outputs] == [7, 7, 7]
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
    harness.send(Submit(7, "a", [1], PARAMS, "req-a"), Submit(7, "bad", [1], PARAMS, "req-bad"))
    harness.send(Submit(7, "refused", [], PARAMS, "req-refused"))
    ends = []
    while len(ends) < 3:
        event = harness.receive()
        ends += [event] if isinstance(event, Rejected) or event.output.finish_reason else []
    harness.send(Shutdown())
    assert harness.join() is None
    assert {"a": "req-a", "bad": "req-bad"}.items() <= seen.items()
    assert harness.client_ids == {}


def test_a_step_without_output_is_a_sign_of_life(start):
    harness = start(ScriptedEngine())
    engine_step = harness.loop._engine
    engine_step.active["idle"] = [0, 0]
    harness.send(Submit(7, "a", [1], SamplingParams(max_tokens=1)))
    assert harness.receive() == Step(7, None)


def test_refused_requests_fail_alone(start):
    from medusa_core.sampling_params import SpeculationParams

    harness = start(ScriptedEngine())
    wrong_tree = SamplingParams(max_tokens=1, speculation=SpeculationParams(tree="oak"))
    harness.send(
        Submit(7, "empty", [], PARAMS), Submit(7, "oak", [1], wrong_tree), Submit(7, "bad", [1], PARAMS)
    )
    assert harness.receive() == Rejected(7, "empty", "the prompt is empty", "messages")
    assert harness.receive() == Rejected(7, "oak", "no such tree", "speculation.tree")
    failed = harness.receive().output
    assert failed.finish_reason is FinishReason.ERROR
    assert len(failed.error) < 2000
    harness.send(Submit(7, "good", [1], PARAMS))
    assert harness.receive().output.request_id == "good"


def test_abort_ends_output(start):
    engine = ScriptedEngine()
    harness = start(engine)
    harness.send(Submit(7, "long", [1], SamplingParams(max_tokens=10**9)))
    harness.receive()
    harness.send(
        Abort(7, "long"), Abort(7, "never there"), Submit(7, "next", [1], SamplingParams(max_tokens=1))
    )
    while (output := harness.receive().output).request_id != "next":
        assert output.request_id == "long"
    assert not engine.has_work


def test_requests_of_another_generation_are_not_run(start):
    harness = start(ScriptedEngine())
    harness.send(Submit(6, "old", [1], PARAMS), Submit(7, "new", [1], SamplingParams(max_tokens=1)))
    assert harness.receive().output.request_id == "new"
    assert not harness.events.poll(0.05)


def test_slow_reader_never_blocks_decoding(start):
    """The pipe holds 64 KiB; twenty times that waits in the worker, in order, and decoding goes on."""
    engine = ScriptedEngine()
    harness = start(engine)
    count = 20_000
    harness.send(Submit(7, "a", [1], SamplingParams(max_tokens=count)))
    for _ in range(2000):
        if not engine.has_work and engine.num_steps:
            break
        threading.Event().wait(0.01)
    assert engine.num_steps == count, "the loop got stuck on a full pipe"
    assert harness.outbox.has_backlog
    tokens = [harness.receive().output.token_ids for _ in range(count)]
    assert tokens == [(number,) for number in range(count)]


def test_lost_api_process_ends_the_loop_at_work_and_at_rest(start):
    resting = start(ScriptedEngine())
    resting.commands.close()
    assert isinstance(resting.join(), EOFError)
    working = start(ScriptedEngine())
    working.send(Submit(7, "a", [1], SamplingParams(max_tokens=10**9)))
    working.receive()
    working.events.close()
    assert isinstance(working.join(), BrokenPipeError)


def test_a_failure_of_the_engine_itself_ends_the_loop(start):
    harness = start(ScriptedEngine(failing_step=2))
    harness.send(Submit(7, "a", [1], PARAMS))
    harness.receive()
    assert isinstance(harness.join(), RuntimeError)
