"""Answers of `POST /v1/chat/completions`: whole, or as the chunks of a stream."""

from dataclasses import dataclass

from msgspec import UNSET, Struct, UnsetType


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculationUsage:
    """Our extension of usage: decode steps of this request, and tokens per step (null without a step)."""

    steps: int
    acceptance_length: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Token counts of one request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    speculation: SpeculationUsage


@dataclass(frozen=True, slots=True, kw_only=True)
class AssistantMessage:
    """The answer's message."""

    role: str = "assistant"
    content: str
    refusal: None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The only choice; `finish_reason` is "stop" or "length"."""

    index: int = 0
    message: AssistantMessage
    logprobs: None = None
    finish_reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatCompletion:
    """The whole answer of a request that does not stream; `created` is Unix time."""

    id: str
    object: str = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[Choice]
    usage: Usage


class Delta(Struct, omit_defaults=True, frozen=True):
    """What a chunk adds to the message."""

    role: str | None = None
    content: str | None = None


class ChunkChoice(Struct, frozen=True, kw_only=True):
    """The only choice of a chunk."""

    index: int = 0
    delta: Delta
    logprobs: None = None
    finish_reason: str | None = None


class ChatChunk(Struct, frozen=True, kw_only=True):
    """One event of a stream; `usage` is left out unless the client asked for it."""

    id: str
    object: str = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str
    choices: tuple[ChunkChoice, ...] = ()
    usage: Usage | UnsetType | None = UNSET
