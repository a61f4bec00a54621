"""Requests that are too large, too slow or no HTTP at all, on raw connections to a live server."""

import json
import socket

import httpx
import pytest

pytestmark = pytest.mark.e2e

KEY = "sk-live-0123456789abcdef"


@pytest.fixture(scope="module")
def strict(start_server):
    """A server with a key, small headers and little patience."""
    server = start_server(api_keys=KEY, max_header_bytes=2048, max_body_bytes=4096, body_timeout=0.5)
    yield server
    server.stop()


def connect(server):
    return socket.create_connection(server.listener.getsockname(), timeout=20)


def read_all(connection):
    """What comes until the server ends the connection: status, headers and body of the only answer."""
    received = b""
    while part := connection.recv(65536):
        received += part
    head, _, body = received.partition(b"\r\n\r\n")
    status = int(head.split(b" ", 2)[1]) if head else None
    return status, head.decode().lower(), json.loads(body) if body else None


def head(method="POST", path="/v1/chat/completions", *lines, key=KEY):
    start = [f"{method} {path} HTTP/1.1", "Host: x", f"Authorization: Bearer {key}"]
    return "\r\n".join([*start, "Content-Type: application/json", *lines, "", ""]).encode()


def assert_error(body, code):
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["code"] == code


def test_keys_and_bodies_work_in_time(strict):
    sdk = {"authorization": f"Bearer {KEY}"}
    answer = httpx.post(f"{strict.url}/v1/chat/completions", json=strict.body(), headers=sdk)
    assert answer.status_code == 200
    assert httpx.get(f"{strict.url}/ready").status_code == 401
    assert httpx.get(f"{strict.url}/health").status_code == 200


@pytest.mark.parametrize("path", ["//health", "/health/", "/health/../v1/models", "/%2e/health", "/Health"])
def test_dressed_up_paths_need_a_key(strict, path):
    with connect(strict) as connection:
        connection.sendall(head("GET", path, "Connection: close", key="wrong"))
        status, _, body = read_all(connection)
    assert status == 401
    assert_error(body, "invalid_api_key")


def test_large_headers_at_once(strict):
    with connect(strict) as connection:
        connection.sendall(head("GET", "/health", "X: " + "x" * 3000, "Connection: close"))
        status, headers, body = read_all(connection)
    assert status == 431
    assert "x-request-id" in headers
    assert_error(body, "headers_too_large")


def test_headers_without_end(strict):
    with connect(strict) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nX: " + b"x" * 4000)
        status, headers, body = read_all(connection)
    assert status == 431
    assert "connection: close" in headers
    assert_error(body, "headers_too_large")


@pytest.mark.parametrize(
    "rubbish", [b"\x16\x03\x01\x02\x00\r\n\r\n", b"GET\r\n\r\n", b"G@T / HTTP/1.1\r\n\r\n"]
)
def test_what_is_no_http_gets_an_error_like_openai_s(strict, rubbish):
    with connect(strict) as connection:
        connection.sendall(rubbish)
        status, headers, body = read_all(connection)
    assert status == 400
    assert "content-type: application/json" in headers
    assert_error(body, "invalid_http")


def test_refusals_before_a_request_are_counted(strict):
    with connect(strict) as connection:
        connection.sendall(b"GET\r\n\r\n")
        read_all(connection)
        before = strict.metric("medusa_errors_total", code="invalid_http")
        responses = strict.metric("medusa_http_responses_total", route="none", status="400")
    with connect(strict) as connection:
        connection.sendall(b"GET\r\n\r\n")
        read_all(connection)
    assert strict.metric("medusa_errors_total", code="invalid_http") == before + 1
    assert strict.metric("medusa_http_responses_total", route="none", status="400") == responses + 1


def test_a_client_that_leaves_inside_its_body_is_told_no_error(strict, wait_until):
    route = "/v1/chat/completions"

    def count(status):
        labels = {"model": strict.model, "route": route, "status": status}
        return strict.runtime.metrics.registry.get_sample_value("medusa_http_responses_total", labels) or 0.0

    before = count("499"), count("400")
    with connect(strict) as connection:
        connection.sendall(head("POST", route, "Content-Length: 100") + b"{")
    wait_until(lambda: count("499") == before[0] + 1)
    assert count("400") == before[1]


@pytest.mark.parametrize("start", [b"", b"GET /health HTTP/1.1\r\nX-Slow: "], ids=["nothing", "half"])
def test_headers_that_never_come_end_the_connection(strict, start):
    with connect(strict) as connection:
        connection.sendall(start)
        assert read_all(connection) == (None, "", None)


def test_half_a_request_after_a_whole_one_ends_the_connection(strict):
    with connect(strict) as connection:
        connection.sendall(head("GET", "/health"))
        received = b""
        while not received.endswith(b'{"status":"ok"}'):
            received += connection.recv(65536)
        connection.sendall(b"GET /health HTTP/1.1\r\nX-Slow: ")
        assert connection.recv(65536) == b""


@pytest.mark.parametrize("framing", ["Content-Length: 100", "Transfer-Encoding: chunked"])
def test_a_body_that_never_ends_is_a_408(strict, framing):
    with connect(strict) as connection:
        connection.sendall(head("POST", "/v1/chat/completions", framing) + b"5\r\n")
        status, headers, body = read_all(connection)
    assert status == 408
    assert "x-request-id" in headers
    assert_error(body, "request_timeout")


def test_a_large_body_is_refused_declared_or_not(strict):
    with connect(strict) as connection:
        connection.sendall(head("POST", "/v1/chat/completions", "Content-Length: 5000", "Connection: close"))
        status, _, body = read_all(connection)
    assert status == 413
    assert_error(body, "request_too_large")
    with connect(strict) as connection:
        connection.sendall(head("POST", "/v1/chat/completions", "Transfer-Encoding: chunked"))
        connection.sendall(b"1388\r\n" + b" " * 5000 + b"\r\n")
        status, _, body = read_all(connection)
    assert status == 413
    assert_error(body, "request_too_large")


def test_a_refused_request_cannot_keep_its_connection_by_sending_on(strict):
    """The refusal is out at once; a body that drips in behind it ends with the connection."""
    with connect(strict) as connection:
        connection.sendall(head("POST", "/v1/models", "Content-Length: 4000", key="wrong"))
        connection.settimeout(0.5)
        assert connection.recv(65536).startswith(b"HTTP/1.1 401")
        for _ in range(40):
            try:
                connection.sendall(b"x")
                if connection.recv(65536) == b"":
                    return
            except TimeoutError:
                continue
            except (BrokenPipeError, ConnectionResetError):
                return
    pytest.fail("the connection was still open")


def test_rubbish_inside_a_chunked_body(strict):
    with connect(strict) as connection:
        connection.sendall(
            head("POST", "/v1/chat/completions", "Transfer-Encoding: chunked") + b"not hex\r\n"
        )
        status, _, body = read_all(connection)
    assert status == 400
    assert_error(body, "invalid_http")
    assert httpx.get(f"{strict.url}/health").status_code == 200


def test_a_finished_body_does_not_time_out(strict, wait_until):
    """The limit is for the body; the answer may take longer."""
    answer = httpx.post(
        f"{strict.url}/v1/chat/completions",
        json=strict.body(max_tokens=600),
        headers={"authorization": f"Bearer {KEY}"},
        timeout=60,
    )
    assert answer.status_code == 200
    assert answer.json()["usage"]["completion_tokens"] == 600
