"""The assembled application without a worker: what unknown paths are told."""

import asyncio

import httpx
import pytest

from server.app import create_app
from server.settings import Settings

CHAT, MODELS = "POST /v1/chat/completions", "GET /v1/models"


@pytest.mark.parametrize(
    ("method", "path", "meant"),
    [
        ("GET", "/v1/models/", MODELS),
        ("GET", "/models", MODELS),
        ("GET", "/models/", MODELS),
        ("POST", "/chat/completions", CHAT),
        ("GET", "/chat/completions", CHAT),
        ("POST", "/completions", None),
        ("GET", "/v2/models", None),
        ("GET", "/", None),
    ],
)
def test_an_unknown_path_names_the_one_that_was_meant(method, path, meant):
    async def go():
        transport = httpx.ASGITransport(create_app(Settings()))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path)

    answer = asyncio.run(go())
    assert answer.status_code == 404
    error = answer.json()["error"]
    assert error["code"] == "unknown_url"
    hint = f" Did you mean {meant}?" if meant else ""
    assert error["message"] == f"Invalid URL ({method} {path}).{hint}"
