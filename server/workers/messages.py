"""What crosses the boundary between the API process and a worker: frozen structs as msgpack bytes.

A worker has pipes of its own: one that was started again is never handed what was meant for the one before.
"""

import msgspec
from msgspec import Struct

from medusa_core.engine.outputs import StepOutput
from medusa_core.model_info import ModelInfo
from medusa_core.request import Request

MAX_TEXT = 1200  # bytes of a text in an event: what a log line bears


class Submit(Struct, frozen=True, tag=True):
    """Start a request in a free slot."""

    request: Request


class Abort(Struct, frozen=True, tag=True):
    """Free the request's slot; nothing more is expected of it."""

    request_id: str


class Shutdown(Struct, frozen=True, tag=True):
    """Leave now."""


class Ready(Struct, frozen=True, tag=True):
    """The engine is loaded."""

    info: ModelInfo


class Loading(Struct, frozen=True, tag=True):
    """What the worker is about to load: a sign of life while it starts."""

    stage: str


class StartFailed(Struct, frozen=True, tag=True):
    """The engine could not be built; the worker leaves. `message` is one readable line."""

    message: str


class Step(Struct, frozen=True, tag=True):
    """One request's share of one engine step; without an output it is a sign of life."""

    output: StepOutput | None


class Rejected(Struct, frozen=True, tag=True):
    """The engine refused the request; others are unaffected. `message` is fit for the client."""

    request_id: str
    message: str
    param: str | None


Command = Submit | Abort | Shutdown
Event = Loading | Ready | StartFailed | Step | Rejected

encode = msgspec.msgpack.Encoder().encode
decode_command = msgspec.msgpack.Decoder[Command](Command).decode
decode_event = msgspec.msgpack.Decoder[Event](Event).decode


def clip(text: str) -> str:
    """One line of at most `MAX_TEXT` bytes."""
    line = " ".join(text.split()).encode("utf-8", "replace")
    return line.decode() if len(line) <= MAX_TEXT else line[: MAX_TEXT - 3].decode("utf-8", "ignore") + "…"
