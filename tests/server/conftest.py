"""A stand-in for a worker process, and requests on it."""

import asyncio
import logging
import sys
import threading
from types import SimpleNamespace

import pytest

from medusa_core.engine.outputs import FinishReason, StepOutput
from medusa_core.request import Request
from medusa_core.sampling_params import SamplingParams
from server.observability.logging import LIBRARIES
from server.observability.metrics import ServerMetrics
from server.workers.scheduler import Scheduler

PARAMS = SamplingParams()


class NotingWorker:
    """Takes requests up to its slots, as a worker process does, and notes what it was told."""

    def __init__(self, slots=1):
        self.slots = slots
        self.running = []
        self.aborted = []

    @property
    def num_free(self):
        return self.slots - len(self.running)

    def submit(self, request):
        assert self.num_free > 0
        self.running.append(request.request_id)

    def abort(self, request_id):
        if request_id in self.running:
            self.running.remove(request_id)
            self.aborted.append(request_id)


def make_scheduler(**changes):
    options = {"queue_limit": 2, "request_timeout": 60.0} | changes
    return Scheduler(**options, metrics=ServerMetrics())


def run(scenario, **options):
    async def go():
        async with asyncio.timeout(10):
            await scenario(make_scheduler(**options))

    asyncio.run(go())


def finish(scheduler, worker, request_id, *tokens, reason=FinishReason.STOP, stats=None):
    """A last output as a worker process reports it: its slot is free before anyone hears of it."""
    worker.running.remove(request_id)
    scheduler.worker_output(
        worker, StepOutput(request_id=request_id, token_ids=tokens, stats=stats, finish_reason=reason)
    )


async def taken(job):
    """The tokens of a job that were not yet taken, and its end if it has one."""
    outputs, end = await job.tokens.take()
    return [token for output in outputs for token in output.token_ids], end


async def end_of(job):
    return (await job.tokens.take())[1]


def submit(scheduler, name):
    return scheduler.submit(Request(request_id=name, prompt_ids=[1, 2, 3], params=PARAMS))


@pytest.fixture
def logging_restored():
    """Whatever a test does to logging as a whole is undone."""
    root = logging.getLogger()
    before = (root.handlers[:], root.level, sys.excepthook, threading.excepthook)
    levels = {name: logging.getLogger(name).level for name in LIBRARIES}
    yield
    logging.captureWarnings(False)
    root.handlers[:], level, sys.excepthook, threading.excepthook = before
    root.setLevel(level)
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


@pytest.fixture(scope="session")
def bench() -> SimpleNamespace:
    """What tests of the scheduler share: a worker that takes notes, and ways to submit, finish and run."""
    return SimpleNamespace(
        Worker=NotingWorker, run=run, submit=submit, finish=finish, taken=taken, end_of=end_of
    )
