"""More clients than the server takes: each gets an answer or a 429, none hangs."""

import asyncio

import httpx
import pytest

pytestmark = pytest.mark.e2e


async def ask_together(live, count, **changes):
    async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=None)) as client:
        requests = [
            client.post(f"{live.url}/v1/chat/completions", json=live.body(**changes)) for _ in range(count)
        ]
        return await asyncio.gather(*requests)


def test_64_clients_against_a_queue_of_16(live, run_async):
    rejected_before = live.metric("medusa_requests_total", finish_reason="rejected")
    answers = run_async(ask_together(live, 64, max_tokens=150))
    refused = [answer for answer in answers if answer.status_code == 429]
    served = [answer for answer in answers if answer.status_code == 200]
    assert len(served) + len(refused) == 64
    assert len(served) >= 17  # one running, sixteen waiting
    assert len({answer.json()["choices"][0]["message"]["content"] for answer in served}) == 1
    assert refused, "64 requests of 150 tokens cannot all find room"
    for answer in refused:
        assert answer.headers["retry-after"] == "1"
        assert answer.json()["error"]["code"] == "rate_limit_exceeded"
    rejected = live.metric("medusa_requests_total", finish_reason="rejected") - rejected_before
    assert rejected == len(refused)


def test_requests_are_served_in_order(live, wait_until, run_async):
    async def go():
        order = []

        async def one(number):
            await asyncio.sleep(0.05 * number)
            answer = await client.post(
                f"{live.url}/v1/chat/completions", json=live.body(max_tokens=600 - 50 * number)
            )
            assert answer.status_code == 200
            order.append(number)

        async with httpx.AsyncClient(timeout=60) as client:
            await asyncio.gather(*(one(number) for number in range(5)))
        return order

    assert run_async(go()) == [0, 1, 2, 3, 4]
