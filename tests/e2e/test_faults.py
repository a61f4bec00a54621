"""Workers that die, hang or never come back, and requests that run out of time."""

import contextlib
import json
import shutil
import signal
import socket
import threading
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


class Background:
    """Requests in threads, with their results in order of asking."""

    def __init__(self, calls):
        self.results = [None] * len(calls)
        self.threads = [threading.Thread(target=self._run, args=(i, call)) for i, call in enumerate(calls)]
        for thread in self.threads:
            thread.start()

    def _run(self, index, call):
        self.results[index] = call()

    def join(self):
        for thread in self.threads:
            thread.join(120)
            assert not thread.is_alive(), "a client hangs"
        return self.results


def error_of(events):
    """The error event of a stream that ended with one and then [DONE]."""
    *_, last, done = events
    assert done == "[DONE]"
    assert [event for event in events if '"error"' in event] == [last]
    return json.loads(last)["error"]


def num_pipes():
    """Pipes that this process, which the server runs in, has open."""
    links = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            links.append(str(descriptor.readlink()))
    return sum(link.startswith("pipe:") for link in links)


def stop_while_loading(server, wait_until):
    """Kill the worker, and stop the next one in the middle of its start."""
    pid = server.worker_pid
    server.kill_worker()
    # Not before its first word: the object is there before its process.
    wait_until(lambda: server.worker is not None and server.worker.stage == "importing libraries")
    assert server.worker_pid != pid
    server.kill_worker(signal.SIGSTOP)


@pytest.fixture(scope="module")
def four_slots(start_server):
    """A server whose worker may be silent for three seconds. Every test leaves it with a worker."""
    server = start_server(slots=4, stall_timeout=3.0)
    yield server
    server.stop()


def test_a_kill_under_four_streams(four_slots, wait_until):
    server = four_slots
    restarts = server.metric("medusa_worker_restarts_total", reason="crash")
    failed = server.metric("medusa_requests_total", finish_reason="error")
    first_pid, first_worker, pipes = server.worker_pid, server.worker, num_pipes()
    streams = Background([lambda: server.stream(max_tokens=8000)] * 4)
    wait_until(lambda: server.runtime.scheduler.num_running == 4)
    server.kill_worker()
    for events in streams.join():
        assert error_of(events)["code"] == "worker_lost"
    # The next request waits for the restart.
    assert server.post(timeout=120, max_tokens=3).status_code == 200
    assert server.worker_pid != first_pid
    assert first_worker.exit_code == -signal.SIGKILL
    assert num_pipes() == pipes, "descriptors add up over restarts"
    assert server.metric("medusa_worker_restarts_total", reason="crash") == restarts + 1
    assert server.metric("medusa_requests_total", finish_reason="error") == failed + 4


def test_a_hung_worker_is_judged_only_while_work_is_pending(four_slots, wait_until):
    server = four_slots
    lost = server.runtime.metrics.registry.get_sample_value
    labels = {"code": "worker_lost", "model": server.model}
    before = lost("medusa_errors_total", labels) or 0
    server.kill_worker(signal.SIGSTOP)
    time.sleep(3.5)
    assert server.get("/ready").status_code == 200
    streams = Background([lambda: server.stream(max_tokens=100)])
    wait_until(lambda: server.get("/ready").status_code == 503)
    assert error_of(streams.join()[0])["code"] == "worker_lost"
    assert server.post(timeout=120, max_tokens=3).status_code == 200
    assert server.get("/ready").status_code == 200
    assert server.metric("medusa_worker_restarts_total", reason="hang") == 1
    assert lost("medusa_errors_total", labels) == before + 1


def test_a_worker_that_hangs_while_it_loads_is_not_waited_for(four_slots, wait_until):
    server = four_slots
    stop_while_loading(server, wait_until)
    assert "the worker is starting: " in server.get("/ready").text
    assert server.metric("medusa_workers", state="starting") == 1
    assert server.metric("medusa_ready") == 0
    # Only now: how long an honest start takes depends on the machine.
    patient = server.runtime.pool.settings
    server.runtime.pool.settings = patient.model_copy(update={"load_timeout": 1.0})
    wait_until(lambda: server.metric("medusa_worker_restarts_total", reason="load") == 1)
    server.runtime.pool.settings = patient
    assert server.post(timeout=120, max_tokens=3).status_code == 200


def test_slow_reader_is_cut_off_and_waiting_requests_survive_a_kill(
    start_server, open_request, wait_until, caplog
):
    server = start_server(send_timeout=0.5, keepalive=0.05)
    scheduler = server.runtime.scheduler
    try:
        # Small buffers, which accepted connections inherit; else the whole answer fits into the kernel's.
        server.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        connection = open_request(server, max_tokens=8000, stream=True)
        wait_until(lambda: "left its stream unread" in caplog.text, timeout=120)  # buffers fill first
        wait_until(lambda: scheduler.num_running == 0)
        assert server.metric("medusa_requests_total", finish_reason="abort") == 1
        connection.close()

        running = Background([lambda: server.post(max_tokens=8000)])
        wait_until(lambda: scheduler.num_running == 1)
        waiting = Background(
            [lambda: server.post(timeout=120, max_tokens=5)] * 2 + [lambda: server.stream(max_tokens=5)]
        )
        wait_until(lambda: scheduler.num_waiting == 3)
        server.kill_worker()
        [lost] = running.join()
        assert lost.status_code == 500
        assert lost.json()["error"]["code"] == "worker_lost"
        *answers, events = waiting.join()
        assert [answer.status_code for answer in answers] == [200, 200]
        assert '"finish_reason":"length"' in events[-2]
    finally:
        server.stop()


def test_two_workers_behind_one_queue(start_server, wait_until):
    server = start_server(device="cpu", workers=2)
    supervisors = server.runtime.pool.supervisors
    try:
        wait_until(lambda: all(supervisor.is_ready for supervisor in supervisors), 120)
        streams = Background([lambda: server.stream(max_tokens=2500)] * 2)
        wait_until(lambda: server.runtime.scheduler.num_running == 2)
        assert [supervisor.worker.num_free for supervisor in supervisors] == [0, 0]
        server.kill_worker()
        lost, whole = sorted(streams.join(), key=lambda events: '"error"' not in events[-2])
        assert error_of(lost)["code"] == "worker_lost"
        assert '"finish_reason":"length"' in whole[-2]
        assert server.get("/ready").status_code == 200
    finally:
        server.stop()


def test_deadlines_of_running_and_waiting_requests(start_server, wait_until, caplog):
    server = start_server(request_timeout=2.5)
    try:
        # Running: what there is, with finish_reason "length".
        choice = server.post(max_tokens=8100).json()["choices"][0]
        assert choice["finish_reason"] == "length"
        assert len(choice["message"]["content"]) > 100
        assert "cut short" in caplog.text
        # Waiting: 503, as a status or inside the stream.
        stop_while_loading(server, wait_until)
        answer, events = Background([server.post, server.stream]).join()
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "queue_timeout"
        assert answer.headers["retry-after"]
        assert error_of(events)["code"] == "queue_timeout"
    finally:
        server.stop()


def test_the_end_of_restarts(start_server, endless_model_dir, tmp_path, wait_until):
    model = tmp_path / "endless"
    shutil.copytree(endless_model_dir, model)
    server = start_server(model=str(model), restart_limit=1)
    try:
        shutil.rmtree(model)  # no restart can succeed
        streams = Background([lambda: server.stream(max_tokens=8000)])
        wait_until(lambda: server.runtime.scheduler.num_running == 1)
        server.kill_worker()
        assert error_of(streams.join()[0])["code"] == "worker_lost"
        wait_until(lambda: "given up after 1 restarts" in server.get("/ready").text, 120)
        assert server.get("/ready").status_code == 503
        assert server.get("/health").status_code == 200
        refused = server.post()
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "no_worker"
        assert "endless" not in refused.json()["error"]["message"], "no paths for clients"
    finally:
        server.stop()


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_process_group_leaves_the_workers_alone(live, number):
    """A terminal that closes sends it to all; the server drains, and needs its workers for that."""
    pid = live.worker_pid
    live.kill_worker(number)
    assert live.post(max_tokens=3).status_code == 200
    assert live.worker_pid == pid


def test_requests_end_though_the_hung_worker_does_not(start_server, wait_until, monkeypatch):
    """A process that waits inside a driver cannot be killed; its clients need not wait for it."""
    server = start_server(stall_timeout=1.0)
    try:
        pid = server.worker_pid
        monkeypatch.setattr(server.worker, "kill", lambda: None)
        streams = Background([lambda: server.stream(max_tokens=8000)])
        wait_until(lambda: server.runtime.scheduler.num_running == 1)
        server.kill_worker(signal.SIGSTOP)
        assert error_of(streams.join()[0])["code"] == "worker_lost"
        assert server.worker_pid == pid
        assert "the worker was killed after" in server.get("/ready").text
        server.kill_worker()
        assert server.post(timeout=120, max_tokens=3).status_code == 200
        assert server.metric("medusa_worker_restarts_total", reason="hang") == 1
    finally:
        server.stop()


def test_no_failure_of_the_start_leaves_a_server_that_never_gets_ready(start_server, monkeypatch):
    def fail(*args):
        raise KeyError("added_tokens")

    monkeypatch.setattr("server.runtime.load_chat_tokenizer", fail)
    with pytest.raises(AssertionError, match="cannot load the tokenizer of .*KeyError"):
        start_server()


def test_worker_leaves_when_the_server_is_killed(endless_model_dir, start_medusa, wait_until):
    process, _ = start_medusa("--model", str(endless_model_dir), "--dtype", "float32", "--measure", "false")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert children
    process.kill()
    process.wait(10)
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in children))
