"""Requests that must be refused: those that cost the server work, memory or time, or leave something behind.

That each wrong value gets its own answer is tested one by one, in tests/e2e.
"""

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from chaos.wire import PATH, request_bytes
from chaos.world import World, encode

Content = Callable[[World], bytes]


@dataclass(frozen=True, slots=True)
class BadRequest:
    """`leaves`: the client goes away itself. `may_close`: the server need not read it to the end.

    `waits`: the client keeps its side open, though it sends no more.
    """

    name: str
    content: Content
    codes: Collection[str] = ()
    status: int = 400
    leaves: bool = False
    may_close: bool = False
    waits: bool = False


def _changed(**changes: Any) -> Content:
    """A good request with these changes."""
    return lambda world: request_bytes(encode(world.body(**changes)))


def _long_number(world: World) -> bytes:
    """What `json.dumps` would not write."""
    return request_bytes(json.dumps(world.body(max_tokens=77)).replace("77", "9" * 5000).encode())


def _body(body: bytes, **request: Any) -> Content:
    return lambda world: request_bytes(body, **request)


def _half(world: World) -> bytes:
    return request_bytes(encode(world.body()))[:-20]


def _too_large(world: World) -> bytes:
    return request_bytes(b" " * (world.body_limit + 1))


def _too_large_chunked(world: World) -> bytes:
    head = request_bytes(b"", headers={"transfer-encoding": "chunked"})
    return head + (b"10000\r\n" + b" " * 0x10000 + b"\r\n") * (world.body_limit // 0x10000 + 2)


VALUE, MISSING = "invalid_value", "missing_required_parameter"
BODY, JSON, LARGE = "invalid_body", "invalid_json", "request_too_large"
PARTS = [{"role": "user", "content": [{}] * 150_000}]

BAD_REQUESTS = (
    BadRequest("wrong model", _changed(model="gpt-5"), ["model_not_found"], 404),
    BadRequest("unknown path", _body(b"{}", path="/v1/nothing"), ["unknown_url"], 404),
    BadRequest("wrong method", _body(b"", method="PUT"), ["method_not_allowed"], 405),
    BadRequest("no JSON", _body(b"{hello"), [JSON]),
    BadRequest("half a surrogate pair", _changed(messages=[{"role": "user", "content": "\ud800"}]), [VALUE]),
    BadRequest("many messages", _changed(messages=[{"role": "user"}] * 5000), [VALUE, MISSING]),
    BadRequest("many wrong parts", _changed(messages=PARTS), [VALUE, MISSING]),
    BadRequest("many numbers", _changed(messages=[7] * 250_000), ["invalid_type", VALUE]),
    BadRequest("parameter with a long name", _changed(**{"x" * 9000: 1}), ["unknown_parameter"]),
    BadRequest("a number of 5000 digits", _long_number, [VALUE, BODY, JSON]),
    BadRequest("deep nesting", _body(b"[" * 200_000), [BODY, JSON]),
    BadRequest("deep objects", _body(b'{"model":' * 50_000), [BODY, JSON]),
    BadRequest("half a body, then away", _half, leaves=True),
    BadRequest("half a body, then silence", _half, ["request_timeout"], 408),
    BadRequest("body over the limit", _too_large, [LARGE], 413, may_close=True),
    BadRequest("chunks over the limit", _too_large_chunked, [LARGE], 413, may_close=True),
    BadRequest("claims a petabyte", _body(b"", headers={"content-length": str(10**15)}), [LARGE], 413),
)


def _raw(content: str) -> Content:
    return lambda world: content.encode("latin-1")


# Outside of HTTP: the server's HTTP library answers for itself, or the header limits do.
VIOLATIONS = (
    BadRequest("garbage", _raw("\x00\x01\x02hello\r\n\r\n")),
    BadRequest("half the headers", _raw(f"POST {PATH} HTTP/1.1\r\nhost: x\r\ncontent-")),
    BadRequest("nothing at all", _raw(""), waits=True),
    BadRequest("headers that never end", _raw(f"POST {PATH} HTTP/1.1\r\nx: y\r\n"), waits=True),
    BadRequest("a header of 1 MB", _body(b"{}", headers={"x-long": "y" * 2**20})),
    BadRequest("20,000 headers", _body(b"{}", headers={f"x-{n}": "y" for n in range(20_000)})),
    BadRequest("a path of 1 MB", _body(b"{}", path="/" + "y" * 2**20)),
    BadRequest("a negative length", _body(b"{}", headers={"content-length": "-5"})),
    BadRequest("a broken chunk", _body(b"zz\r\nno chunk\r\n", headers={"transfer-encoding": "chunked"})),
)
