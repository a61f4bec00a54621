"""Requests that must be refused, each with its status and the codes it may have."""

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from chaos.wire import PATH, request_bytes
from chaos.world import World, encode

Content = Callable[[World], bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class BadRequest:
    """`leaves`: the client goes away itself. `may_close`: the server need not read it to the end.

    `waits`: the client keeps its side open, though it sends no more.
    """

    name: str
    content: Content
    status: int = 400
    codes: Collection[str] = ()
    leaves: bool = False
    may_close: bool = False
    waits: bool = False


def _changed(**changes: Any) -> Content:
    """A good request with these changes; Ellipsis takes a field out."""

    def content(world: World) -> bytes:
        body = world.body(**changes)
        return request_bytes(encode({name: value for name, value in body.items() if value is not ...}))

    return content


def _text(replace: str, by: str) -> Content:
    """A good request whose JSON text is changed, to what `json.dumps` would not write."""

    def content(world: World) -> bytes:
        text = json.dumps(world.body(temperature=0.25, max_tokens=77))
        assert replace in text
        return request_bytes(text.replace(replace, by).encode())

    return content


def _body(body: bytes, **request: Any) -> Content:
    return lambda world: request_bytes(body, **request)


def _half(world: World) -> bytes:
    whole = request_bytes(encode(world.body()))
    return whole[: len(whole) - 20]


def _too_large(world: World) -> bytes:
    return request_bytes(b" " * (world.body_limit + 1))


def _too_large_chunked(world: World) -> bytes:
    chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    return request_bytes(b"", headers={"transfer-encoding": "chunked"}) + chunk * (
        world.body_limit // 0x10000 + 2
    )


def _claims_large(world: World) -> bytes:
    return request_bytes(b"", headers={"content-length": str(10**15)})


VALUE, TYPE = ("invalid_value",), ("invalid_type",)
BODY, JSON = ("invalid_body",), ("invalid_json",)
NOT_OBJECT = ("invalid_body", "invalid_json")

BAD_REQUESTS = (
    BadRequest(name="no messages", content=_changed(messages=...), codes=("missing_required_parameter",)),
    BadRequest(name="empty messages", content=_changed(messages=[]), codes=VALUE),
    BadRequest(name="messages of a wrong type", content=_changed(messages="hello"), codes=TYPE),
    BadRequest(name="a message of a wrong type", content=_changed(messages=[7]), codes=TYPE),
    BadRequest(
        name="an unknown role", content=_changed(messages=[{"role": "x", "content": "x"}]), codes=VALUE
    ),
    BadRequest(
        name="many messages",
        content=_changed(messages=[{"role": "user"}] * 5000),
        codes=(*VALUE, "missing_required_parameter"),
    ),
    BadRequest(
        name="half a surrogate pair",
        content=_changed(messages=[{"role": "user", "content": "\ud800"}]),
        codes=VALUE,
    ),
    BadRequest(
        name="many wrong parts",
        content=_changed(messages=[{"role": "user", "content": [{}] * 150_000}]),
        codes=(*VALUE, "missing_required_parameter"),
    ),
    BadRequest(name="many numbers", content=_changed(messages=[7] * 250_000), codes=(*TYPE, *VALUE)),
    BadRequest(name="wrong model", content=_changed(model="gpt-5"), status=404, codes=("model_not_found",)),
    BadRequest(name="a model of a wrong type", content=_changed(model=["x"]), codes=TYPE),
    BadRequest(name="unknown parameter", content=_changed(temprature=1), codes=("unknown_parameter",)),
    BadRequest(
        name="parameter with a long name", content=_changed(**{"x" * 9000: 1}), codes=("unknown_parameter",)
    ),
    BadRequest(name="unsupported value", content=_changed(n=3), codes=("unsupported_value",)),
    BadRequest(name="a number as text", content=_changed(max_tokens="12"), codes=TYPE),
    BadRequest(name="a negative number", content=_changed(max_tokens=-1), codes=VALUE),
    BadRequest(name="a huge number", content=_changed(max_tokens=10**40), codes=VALUE),
    BadRequest(name="a huge seed", content=_changed(seed=2**80), codes=VALUE),
    BadRequest(name="temperature out of range", content=_changed(temperature=1e300), codes=VALUE),
    BadRequest(
        name="an unknown tree", content=_changed(speculation={"tree": "../../etc/passwd"}), codes=VALUE
    ),
    BadRequest(name="too many stops", content=_changed(stop=["a"] * 5), codes=VALUE),
    BadRequest(name="options of a stream alone", content=_changed(stream_options={}), codes=VALUE),
    BadRequest(name="NaN", content=_text("0.25", "NaN"), codes=(*VALUE, *JSON)),
    BadRequest(name="infinity", content=_text("0.25", "-Infinity"), codes=(*VALUE, *JSON)),
    BadRequest(name="a number beyond floats", content=_text("0.25", "1e999"), codes=(*VALUE, *JSON)),
    BadRequest(name="a number of 5000 digits", content=_text("77", "9" * 5000), codes=(*VALUE, *NOT_OBJECT)),
    BadRequest(name="deep nesting", content=_body(b"[" * 200_000), codes=NOT_OBJECT),
    BadRequest(name="deep objects", content=_body(b'{"model":' * 50_000), codes=NOT_OBJECT),
    BadRequest(name="no JSON", content=_body(b"{hello"), codes=JSON),
    BadRequest(name="JSON cut short", content=_text("}", ""), codes=JSON),
    BadRequest(name="a list", content=_body(b"[]"), codes=BODY),
    BadRequest(name="null", content=_body(b"null"), codes=BODY),
    BadRequest(name="nothing", content=_body(b""), codes=BODY),
    BadRequest(name="not UTF-8", content=_body(b'{"model": "\xff\xfe\x80"}'), codes=NOT_OBJECT),
    BadRequest(
        name="UTF-16",
        content=_body('{"model": "x"}'.encode("utf-16")),
        codes=(*NOT_OBJECT, "missing_required_parameter"),
    ),
    BadRequest(name="wrong content type", content=_body(b"{}", content_type="text/plain"), codes=BODY),
    BadRequest(name="no content type", content=_body(b"{}", content_type=""), codes=BODY),
    BadRequest(
        name="a form", content=_body(b"a=1", content_type="application/x-www-form-urlencoded"), codes=BODY
    ),
    BadRequest(
        name="unknown path", content=_body(b"{}", path="/v1/nothing"), status=404, codes=("unknown_url",)
    ),
    BadRequest(
        name="a path out of the root",
        content=_body(b"{}", path="/../../etc/passwd"),
        status=404,
        codes=("unknown_url",),
    ),
    BadRequest(
        name="wrong method", content=_body(b"", method="PUT"), status=405, codes=("method_not_allowed",)
    ),
    BadRequest(name="a GET", content=_body(b"", method="GET"), status=405, codes=("method_not_allowed",)),
    BadRequest(
        name="a model that is not there",
        content=_body(b"", method="GET", path="/v1/models/x"),
        status=404,
        codes=("model_not_found",),
    ),
    BadRequest(name="half a body, then away", content=_half, leaves=True),
    BadRequest(
        name="body over the limit",
        content=_too_large,
        status=413,
        codes=("request_too_large",),
        may_close=True,
    ),
    BadRequest(
        name="chunks over the limit",
        content=_too_large_chunked,
        status=413,
        codes=("request_too_large",),
        may_close=True,
    ),
    BadRequest(name="half a body, then silence", content=_half, status=408, codes=("request_timeout",)),
    BadRequest(name="claims a petabyte", content=_claims_large, status=413, codes=("request_too_large",)),
)


def _raw(content: bytes) -> Content:
    return lambda world: content


# Outside of HTTP: the server's HTTP library answers for itself, or the header limits do.
VIOLATIONS = (
    BadRequest(name="garbage", content=_raw(b"\x00\x01\x02hello\r\n\r\n")),
    BadRequest(
        name="a TLS hello", content=_raw(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x11" * 200)
    ),
    BadRequest(name="half a request line", content=_raw(b"POST /v1/ch")),
    BadRequest(
        name="half the headers", content=_raw(f"POST {PATH} HTTP/1.1\r\nhost: x\r\ncontent-".encode())
    ),
    BadRequest(name="nothing at all", content=_raw(b""), waits=True),
    BadRequest(
        name="headers that never end", content=_raw(f"POST {PATH} HTTP/1.1\r\nx: y\r\n".encode()), waits=True
    ),
    BadRequest(name="a header of 1 MB", content=_body(b"{}", headers={"x-long": "y" * 2**20})),
    BadRequest(name="20,000 headers", content=_body(b"{}", headers={f"x-{n}": "y" for n in range(20_000)})),
    BadRequest(name="a path of 1 MB", content=_body(b"{}", path="/" + "y" * 2**20)),
    BadRequest(name="a negative length", content=_body(b"{}", headers={"content-length": "-5"})),
    BadRequest(name="a length that is no number", content=_body(b"{}", headers={"content-length": "many"})),
    BadRequest(name="a NUL in a header", content=_body(b"{}", headers={"x-nul": "a\x00b"})),
    BadRequest(
        name="a broken chunk", content=_body(b"zz\r\nno chunk\r\n", headers={"transfer-encoding": "chunked"})
    ),
)
