"""Clients that leave: their requests end, queued or running, streamed or not, and the slot is free again."""

import httpx
import pytest

pytestmark = pytest.mark.e2e


@pytest.mark.parametrize("stream", [False, True])
def test_running(live, open_request, wait_until, stream):
    before = live.metric("medusa_requests_total", finish_reason="abort")
    connection = open_request(live, max_tokens=8000, stream=stream)
    wait_until(lambda: live.runtime.scheduler.num_running == 1)
    connection.close()
    wait_until(lambda: live.runtime.scheduler.num_running == 0, 5)
    assert live.metric("medusa_requests_total", finish_reason="abort") == before + 1
    assert live.post(max_tokens=1).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_queued(live, open_request, wait_until, stream):
    running = open_request(live, max_tokens=8000)
    wait_until(lambda: live.runtime.scheduler.num_running == 1)
    queued = open_request(live, max_tokens=8000, stream=stream)
    wait_until(lambda: live.runtime.scheduler.num_waiting == 1)
    queued.close()
    wait_until(lambda: live.runtime.scheduler.num_waiting == 0, 5)
    assert live.runtime.scheduler.num_running == 1
    running.close()


def test_abandoned_stream_ends_on_the_worker_too(live, wait_until):
    with httpx.stream(
        "POST", f"{live.url}/v1/chat/completions", json=live.body(stream=True, max_tokens=8000)
    ) as answer:
        next(answer.iter_lines())
    live.wait_idle()
    wait_until(lambda: live.worker.num_free == 1)

    def generated():
        return sum(
            live.metric("medusa_generation_tokens_total", mode=mode) for mode in ("exact", "typical", "off")
        )

    live.post(max_tokens=1)  # commands keep their order: after this answer the abort has been obeyed
    count = generated()
    live.post(max_tokens=1)
    assert generated() == count + 1


def test_keep_alive_comments_while_waiting(live, open_request, wait_until):
    """A queued stream's headers and first chunk come at once, then comments until it has a slot."""
    running = open_request(live, max_tokens=8000)
    wait_until(lambda: live.runtime.scheduler.num_running == 1)
    with httpx.stream(
        "POST", f"{live.url}/v1/chat/completions", json=live.body(stream=True), timeout=30
    ) as answer:
        lines = answer.iter_lines()
        seen = [next(lines) for _ in range(2)]
        assert '"role":"assistant"' in seen[0]
        while not seen[-1].startswith(":"):
            seen.append(next(lines))
        assert seen[-1] == ": keep-alive"
        assert live.runtime.scheduler.num_waiting == 1
        running.close()
        rest = list(lines)
    assert rest[-2:] == ["data: [DONE]", ""] or rest[-1] == "data: [DONE]"
