"""What is known of one HTTP request: gathered on its way through, told to log and traces at its end."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

from starlette.requests import Request
from starlette.types import Scope

from medusa_core.sampling_params import SamplingParams
from server.observability.logging import COMPLETION_ID, REQUEST_ID
from server.pipeline.generation import Generation
from server.workers.scheduler import Job

RECORD = "medusa.record"  # key of the ASGI scope
MAX_PROMPT_CHARS = 8192  # of messages, and of an answer, where prompts are logged


@dataclass(slots=True)
class ChatRecord:
    """The part of chat completions. Times are of the monotonic clock."""

    is_stream: bool
    params: SamplingParams
    prepare_started: float
    prepare_ended: float
    generation: Generation
    messages: Sequence[tuple[str, str]] | None = None  # role and text, if prompts are to be logged

    @property
    def job(self) -> Job:
        return self.generation.job

    @property
    def answer(self) -> str:
        """The text so far, if prompts are to be logged."""
        return self.generation.transcript


@dataclass(slots=True)
class RequestRecord:
    """One HTTP request. `started_ns` is of the wall clock, `started` and `ended` of the monotonic one."""

    method: str
    path: str
    scheme: str
    client: str
    trace_context: Mapping[str, str]  # W3C headers of whoever called
    ids: dict[str, str]
    started: float = field(default_factory=time.monotonic)
    started_ns: int = field(default_factory=time.time_ns)
    ended: float | None = None
    status: int | None = None
    route: str | None = None
    error: str | None = None
    chat: ChatRecord | None = None

    @property
    def request_id(self) -> str:
        return self.ids[REQUEST_ID]

    @property
    def seconds(self) -> float:
        return (time.monotonic() if self.ended is None else self.ended) - self.started

    def set_completion(self, completion_id: str) -> None:
        """From here on, log lines carry it too."""
        self.ids[COMPLETION_ID] = completion_id


def record_of(request: Request) -> RequestRecord:
    """The record that `RequestContext` has put into the request's scope."""
    return cast(RequestRecord, request.scope[RECORD])


def put_record(scope: Scope, record: RequestRecord) -> None:
    scope[RECORD] = record
