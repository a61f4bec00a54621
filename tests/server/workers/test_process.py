"""Worker processes that are real but run a few lines of ours instead of an engine."""

import asyncio
import importlib

import pytest

from medusa_core.config import EngineConfig
from medusa_core.engine.outputs import FinishReason
from medusa_core.request import Request
from medusa_core.sampling_params import SamplingParams
from server.errors import ApiError
from server.observability.metrics import ServerMetrics
from server.settings import Settings
from server.workers.pool import WorkerPool
from server.workers.scheduler import Scheduler
from server.workers.worker import WorkerConfig

SCRIPT = """
import os, signal, struct, time
from medusa_core.engine.outputs import FinishReason, StepOutput
from medusa_core.model_info import ModelInfo
from server.workers.messages import Ready, Step, decode_command, encode

INFO = ModelInfo(
    model="m", heads=None, num_heads=0, parameters=1, context_length=8, vocab_size=9, dtype="float32",
    device="cpu", tree_nodes=1, trees=(), sources=(), slots=1,
)

def start(config, generation, commands, events):
    events.send_bytes(encode(Ready(INFO)))
    while True:
        request = decode_command(commands.recv_bytes()).request
        output = StepOutput(
            request_id=request.request_id, token_ids=tuple(range(1000)), finish_reason=FinishReason.LENGTH
        )
        frame = encode(Step(output))
        frame = struct.pack("!i", len(frame)) + frame
        half = len(frame) // 2
        os.write(events.fileno(), frame[:half])
        if generation == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.2)
        os.write(events.fileno(), frame[half:])
"""


@pytest.fixture
def scripted_worker(tmp_path, monkeypatch):
    """The target of worker processes: the first of them dies in the middle of a frame, later ones pause."""
    (tmp_path / "scripted_worker.py").write_text(SCRIPT)
    monkeypatch.syspath_prepend(tmp_path)  # spawned processes get the same path
    script = importlib.import_module("scripted_worker")
    monkeypatch.setattr("server.workers.process.worker_main", script.start)


def test_a_frame_may_end_with_its_worker_or_come_in_halves(scripted_worker):
    """The event loop waits for neither: a request gets its end, and others go on meanwhile."""

    async def go():
        metrics = ServerMetrics()
        scheduler = Scheduler(queue_limit=4, request_timeout=60, metrics=metrics)
        config = WorkerConfig(model="m", heads=None, engine=EngineConfig(), log_level="warning")
        settings = Settings(restart_limit=3, stall_timeout=60, load_timeout=60)
        pool = WorkerPool([config], settings, scheduler, metrics)
        await pool.start()
        ticks = 0

        async def tick():
            nonlocal ticks
            while True:
                await asyncio.sleep(0.01)
                ticks += 1

        ticker = asyncio.create_task(tick())
        try:
            lost = scheduler.submit(request("lost"))
            outputs, end = await lost.tokens.take()
            assert outputs == []
            assert isinstance(end, ApiError)
            assert end.detail.code == "worker_lost"
            halved = scheduler.submit(request("halved"))
            await halved.tokens.take()  # of the next worker, which is there now
            halved = scheduler.submit(request("halved again"))
            ticks = 0
            [output], end = await halved.tokens.take()
            assert output.token_ids == tuple(range(1000))
            assert end == FinishReason.LENGTH
            assert ticks > 0, "the event loop stood still for half a frame"
        finally:
            ticker.cancel()
            await pool.stop()

    async def limited():
        async with asyncio.timeout(60):
            await go()

    asyncio.run(limited())


def request(name):
    return Request(request_id=name, prompt_ids=[1], params=SamplingParams())
