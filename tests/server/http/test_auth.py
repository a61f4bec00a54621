"""API keys: everything needs one but liveness, however the request is dressed up."""

import asyncio
import json
import logging
from types import SimpleNamespace

import pytest

from medusa_core.errors import ConfigError
from server.app import create_app
from server.http.auth import KeyRing, load_keys
from server.settings import Settings, load_settings

KEYS = ("sk-first-0123456789", "sk-second-0123456789")
GOOD = ("authorization", f"Bearer {KEYS[0]}")


def ask(app, path="/v1/models", method="GET", headers=(), root_path="", body=b"", receive=None):
    """One request straight into the app, which has not been started: no client library tidies it up."""
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": root_path,
        "query_string": b"",
        "headers": [(name.encode(), value.encode("latin-1")) for name, value in headers],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
        "state": {},
    }
    sent = []

    async def receive_body():
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message):
        sent.append(message)

    async def go():
        async with asyncio.timeout(20):
            await app(scope, receive or receive_body, send)

    asyncio.run(go())
    headers = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    content = b"".join(message.get("body", b"") for message in sent[1:])
    return SimpleNamespace(status=sent[0]["status"], headers=headers, content=content)


@pytest.fixture(scope="module")
def app():
    return create_app(Settings(api_keys=",".join(KEYS)))


@pytest.fixture(scope="module")
def app_with_cors():
    return create_app(Settings(api_keys=",".join(KEYS), cors_origins="https://chat.example"))


def assert_refused(answer):
    assert answer.status == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    error = json.loads(answer.content)["error"]
    assert (error["type"], error["code"], error["param"]) == (
        "invalid_request_error",
        "invalid_api_key",
        None,
    )
    assert not any(key in answer.content.decode() for key in KEYS)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("scheme", ["Bearer ", "bearer ", "BEARER  "])
def test_each_key_opens(app, key, scheme):
    assert ask(app, headers=[("authorization", scheme + key)]).status == 200


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_liveness_is_open(app, method):
    assert ask(app, "/health", method).status == 200


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/v1/models",
        "/v1/chat/completions",
        "/ready",
        "/metrics",
        "/docs",
        "/redoc",
        "/openapi.json",
        "/no/such/path",
        "//health",
        "/health/",
        "/health//",
        "/HEALTH",
        "/health/../v1/models",
        "/health/v1/models",
        "/./health",
        "/health\x00",
        "/health ",
        "/health;x",
        "/%68ealth",
        "/health%2e",
        "",
        "health",
        "*",
    ],
)
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "OPTIONS", "DELETE", "get", "X"])
def test_everything_else_is_closed(app, path, method):
    assert_refused(ask(app, path, method))


@pytest.mark.parametrize("method", ["POST", "PUT", "OPTIONS", "health", "get"])
def test_liveness_is_open_to_reading_only(app, method):
    assert_refused(ask(app, "/health", method))


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("authorization", "")],
        [("authorization", "Bearer")],
        [("authorization", "Bearer ")],
        [("authorization", KEYS[0])],
        [("authorization", f"Basic {KEYS[0]}")],
        [("authorization", f"Token {KEYS[0]}")],
        [("authorization", f"Bearer\t{KEYS[0]}")],
        [("authorization", f"Bearer {KEYS[0]}x")],
        [("authorization", f"Bearer {KEYS[0][:-1]}")],
        [("authorization", f"Bearer {KEYS[0].upper()}")],
        [("authorization", f"Bearer {KEYS[0]} {KEYS[1]}")],
        [("authorization", ",".join(["Bearer " + KEYS[0], "Bearer " + KEYS[1]]))],
        [("authorization", f"Bearer {','.join(KEYS)}")],
        [("authorization", f'Bearer "{KEYS[0]}"')],
        [("authorization", "Bearer sk-\xfc\xe9\xff")],
        [("authorization", f"Bearer {KEYS[0]}\x00")],
        [("authorization", f"Bearer \xa0{KEYS[0]}")],
        [GOOD, GOOD],
        [("authorization", "Bearer wrong"), GOOD],
        [GOOD, ("authorization", "Basic x")],
        [("x-api-key", KEYS[0])],
        [("api-key", KEYS[0])],
        [("proxy-authorization", f"Bearer {KEYS[0]}")],
        [("cookie", f"authorization=Bearer {KEYS[0]}")],
        [("x-forwarded-for", "127.0.0.1"), ("x-original-url", "/health"), ("x-rewrite-url", "/health")],
    ],
    ids=range(26),
)
def test_only_one_right_bearer_key_opens(app, headers):
    assert_refused(ask(app, headers=headers))


def test_a_root_path_hides_nothing(app):
    assert ask(app, "/api/health", root_path="/api").status == 200
    assert ask(app, "/api/v1/models", root_path="/api", headers=[GOOD]).status == 200
    for path in ("/api/v1/models", "/api/apihealth", "/api", "/api/api/health"):
        assert_refused(ask(app, path, root_path="/api"))
    assert_refused(ask(app, "/v1/models", root_path="/v1/models"))


def test_the_body_of_a_refused_request_is_not_read(app):
    async def receive():
        raise AssertionError("the body was asked for")

    assert_refused(ask(app, "/v1/chat/completions", "POST", receive=receive))


def test_other_protocols_are_closed(app):
    sent = []

    async def send(message):
        sent.append(message)

    scope = {"type": "websocket", "path": "/health", "headers": [], "query_string": b"", "subprotocols": []}
    asyncio.run(app(scope, None, send))
    assert [message["type"] for message in sent] == ["websocket.close"]


def test_without_keys_everything_is_open():
    assert ask(create_app(Settings())).status == 200


def test_preflights_need_no_key_and_nothing_more(app_with_cors):
    origin = ("origin", "https://chat.example")
    asks = ("access-control-request-method", "POST")
    wants = ("access-control-request-headers", "authorization,content-type,x-stainless-os")
    answer = ask(app_with_cors, "/v1/chat/completions", "OPTIONS", [origin, asks, wants])
    assert answer.status == 200
    assert answer.headers["access-control-allow-origin"] == "https://chat.example"
    assert "authorization" in answer.headers["access-control-allow-headers"]
    assert "access-control-allow-credentials" not in answer.headers
    assert answer.headers["x-request-id"]
    assert_refused(ask(app_with_cors, "/v1/models", "OPTIONS", [origin]))
    assert_refused(ask(app_with_cors, "/v1/models", "GET", [origin, asks, wants]))
    stranger = ask(app_with_cors, "/v1/models", "OPTIONS", [("origin", "https://evil.example"), asks])
    assert stranger.status == 400
    assert "access-control-allow-origin" not in stranger.headers


def test_pages_may_read_refusals_and_request_ids(app_with_cors):
    answer = ask(app_with_cors, headers=[("origin", "https://chat.example")])
    assert_refused(answer)
    assert answer.headers["access-control-allow-origin"] == "https://chat.example"
    assert "x-request-id" in answer.headers["access-control-expose-headers"]
    assert "retry-after" in answer.headers["access-control-expose-headers"]


def test_cors_is_off_by_default(app):
    answer = ask(app, headers=[GOOD, ("origin", "https://chat.example")])
    assert answer.status == 200
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_a_key_ring_keeps_digests_alone():
    ring = KeyRing(KEYS)
    assert ring.accepts(KEYS[1].encode())
    assert not ring.accepts(b"")
    assert not any(key in repr(vars(ring)) for key in KEYS)


def test_keys_come_from_a_file(tmp_path, caplog):
    path = tmp_path / "keys"
    path.write_text(
        f"\ufeff# of the web shop\n{KEYS[0]}\n\n   # indented\n  {KEYS[1]}  \r\n", encoding="utf-8"
    )
    path.chmod(0o600)
    ring = load_keys(load_settings({"api_keys_file": str(path), "api_keys": "sk-third-0123456789"}))
    assert all(ring.accepts(key.encode()) for key in (*KEYS, "sk-third-0123456789"))
    assert not any(ring.accepts(line) for line in (b"", b"# of the web shop", b"# indented"))
    assert caplog.text == ""
    path.chmod(0o604)
    load_keys(load_settings({"api_keys_file": str(path)}))
    assert "chmod 600" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file or directory"),
        (b"", "holds no key"),
        (b"# sk-secret\n\n", "holds no key"),
        (b"sk secret", "key 1 must be printable ASCII"),
        ("good\nsk-secrét".encode(), "key 2 must be printable ASCII"),
        (b"\xff\xfe\x00", "not a text file"),
    ],
)
def test_bad_key_files_are_refused_by_name(tmp_path, content, message):
    path = tmp_path / "keys"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        load_keys(load_settings({"api_keys_file": str(path)}))
    assert f"MEDUSA_API_KEYS_FILE ({path})" in str(caught.value)
    assert "secr" not in str(caught.value)


@pytest.mark.parametrize("keys", ["sk-secret,", ",sk-secret", "sk-secret,,b", " "])
def test_an_empty_key_is_refused(keys):
    with pytest.raises(ConfigError, match="MEDUSA_API_KEYS: key . is empty") as caught:
        load_keys(load_settings({"api_keys": keys}))
    assert "secret" not in str(caught.value)


def test_a_short_key_and_an_open_server_are_warned_of(caplog):
    with caplog.at_level(logging.WARNING):
        load_keys(load_settings({"api_keys": "sk-secret"}))
        assert "fewer than 16 characters" in caplog.text
        assert "sk-secret" not in caplog.text
        caplog.clear()
        for host in ("127.0.0.1", "::1", "localhost"):
            load_keys(load_settings({"host": host}))
        load_keys(load_settings({"host": "0.0.0.0", "api_keys": KEYS[0]}))
        assert caplog.text == ""
        load_keys(load_settings({"host": "0.0.0.0"}))
        assert "anybody who reaches 0.0.0.0" in caplog.text


def test_a_key_file_without_end_is_refused():
    with pytest.raises(ConfigError, match="is it the right file"):
        load_keys(load_settings({"api_keys_file": "/dev/zero"}))
