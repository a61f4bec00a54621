"""What crosses the boundary between the API process and a worker: frozen structs as msgpack bytes.

Every message carries the generation of the worker it concerns, so that a restarted worker is never handed
what was meant for the one before.
"""

import msgspec
from msgspec import Struct

from medusa_core.engine.outputs import StepOutput
from medusa_core.model_info import ModelInfo
from medusa_core.request import Request

MAX_TEXT = 1200  # bytes of a text in an event: what a log line bears


class Submit(Struct, frozen=True, tag=True):
    """Start a request in a free slot."""

    generation: int
    request: Request


class Abort(Struct, frozen=True, tag=True):
    """Free the request's slot; nothing more is expected of it."""

    generation: int
    request_id: str


class Shutdown(Struct, frozen=True, tag=True):
    """Leave now."""


class Ready(Struct, frozen=True, tag=True):
    """The engine is loaded."""

    generation: int
    info: ModelInfo


class Loading(Struct, frozen=True, tag=True):
    """What the worker is about to load: a sign of life while it starts."""

    generation: int
    stage: str


class StartFailed(Struct, frozen=True, tag=True):
    """The engine could not be built; the worker leaves. `message` is one readable line."""

    generation: int
    message: str


class Step(Struct, frozen=True, tag=True):
    """One request's share of one engine step; without an output it is a sign of life."""

    generation: int
    output: StepOutput | None


class Rejected(Struct, frozen=True, tag=True):
    """The engine refused the request; others are unaffected. `message` is fit for the client."""

    generation: int
    request_id: str
    message: str
    param: str | None


Command = Submit | Abort | Shutdown
Event = Loading | Ready | StartFailed | Step | Rejected

_encoder = msgspec.msgpack.Encoder()
_command_decoder: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)
_event_decoder: msgspec.msgpack.Decoder[Event] = msgspec.msgpack.Decoder(Event)


def encode_command(command: Command) -> bytes:
    return _encoder.encode(command)


def encode_event(event: Event) -> bytes:
    return _encoder.encode(event)


def decode_command(frame: bytes) -> Command:
    return _command_decoder.decode(frame)


def decode_event(frame: bytes) -> Event:
    return _event_decoder.decode(frame)


def clip(text: str) -> str:
    """One line of at most `MAX_TEXT` bytes."""
    line = " ".join(text.split()).encode("utf-8", "replace")
    return line.decode() if len(line) <= MAX_TEXT else line[: MAX_TEXT - 3].decode("utf-8", "ignore") + "…"
