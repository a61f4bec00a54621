"""Everything known of one HTTP request, for its log line and its trace."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

from starlette.requests import Request as HttpRequest
from starlette.types import Scope

from medusa_core.request import Request
from medusa_core.text.assembler import TextAssembler
from server.observability.logging import COMPLETION_ID, REQUEST_ID
from server.observability.timeline import Timeline

CONTEXT = "medusa.request_context"  # key of the ASGI scope
MAX_PROMPT_CHARS = 8192  # of messages, and of an answer, where prompts are logged


@dataclass(slots=True, kw_only=True)
class ChatContext:
    """The part of chat completions. `timeline` and `assembler` are those of the answer under way.

    Times are of the monotonic clock. `messages` (role and text) and `answer` (its first `MAX_PROMPT_CHARS`
    characters) are None unless prompts are to be logged.
    """

    request: Request
    timeline: Timeline
    assembler: TextAssembler
    is_stream: bool
    prepare_started: float
    prepare_ended: float
    messages: Sequence[tuple[str, str]] | None = None
    answer: str | None = None

    def add_text(self, text: str) -> None:
        """Keep a piece of the answer, as far as there is room for it."""
        if self.answer is not None and len(self.answer) < MAX_PROMPT_CHARS:
            self.answer = (self.answer + text)[:MAX_PROMPT_CHARS]


@dataclass(slots=True, kw_only=True)
class RequestContext:
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
    chat: ChatContext | None = None

    @property
    def request_id(self) -> str:
        return self.ids[REQUEST_ID]

    @property
    def seconds(self) -> float:
        return (time.monotonic() if self.ended is None else self.ended) - self.started

    def set_completion(self, completion_id: str) -> None:
        """From here on, log lines carry it too."""
        self.ids[COMPLETION_ID] = completion_id


def context_of(request: HttpRequest) -> RequestContext:
    """The context that `RequestContextMiddleware` has put into the request's scope."""
    return cast(RequestContext, request.scope[CONTEXT])


def put_context(scope: Scope, context: RequestContext) -> None:
    scope[CONTEXT] = context
