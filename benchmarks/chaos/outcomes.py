"""How an exchange with the server ended, and whether it may end like that.

Readers raise `ContractError` where the server's answer is none of OpenAI's API: the request has failed.
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

DONE = "[DONE]"
FINISH_REASONS = ("stop", "length")
ERROR_KEYS = {"message", "type", "param", "code"}
# Where the server runs and what it is written in is nobody's business.
INSIDES = re.compile(
    r"Traceback|File \"|\.py\b|site-packages|\bline \d+, in |0x[0-9a-f]{6,}"
    r"|/(?:work|home|root|usr|opt|tmp|var|proc|models?)/"
)
# What a sound request may be refused with, or lose its answer to, while workers are killed.
REFUSALS: Mapping[int, Collection[str]] = {
    429: ("rate_limit_exceeded",),
    500: ("worker_lost",),
    503: ("model_loading", "no_worker", "queue_timeout", "shutting_down"),
}
RETRYABLE = (429, 503)


class ContractError(Exception):
    """The server answered something it must never answer; the text says what."""


class Kind(StrEnum):
    """How a request ended. Every kind but `FAILED` is a legal end."""

    COMPLETED = "completed"  # a finish reason, and [DONE] behind a stream
    REFUSED = "refused"  # an expected status with OpenAI's error body
    ERROR = "error"  # an error event in a stream, or the 500 of a lost worker
    LEFT = "left"  # the client went away, as planned
    CUT_OFF = "cut off"  # the server closed on a client that did not read, or did not speak HTTP
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One request's end. `detail`: finish reason, error code, or what was wrong."""

    kind: Kind
    detail: str = ""
    first_token: float | None = None  # seconds


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer. `tokens` is None where the server did not say."""

    text: str
    finish_reason: str
    tokens: int | None


@dataclass(frozen=True, slots=True)
class StreamError:
    """A stream that ended with an error event."""

    code: str


def read_error(body: bytes) -> str:
    """The code of an error body, or its type where it has none."""
    text = body.decode("utf-8", "replace")
    error = _object(text).get("error")
    if not isinstance(error, dict) or set(_object(text)) != {"error"} or set(error) != ERROR_KEYS:
        raise ContractError(f"not an OpenAI error body: {text[:300]}")
    if not (isinstance(error["message"], str) and error["message"] and isinstance(error["type"], str)):
        raise ContractError(f"an error without message or type: {text[:300]}")
    if not all(error[key] is None or isinstance(error[key], str) for key in ("param", "code")):
        raise ContractError(f"param and code must be strings or null: {text[:300]}")
    if INSIDES.search(text):
        raise ContractError(f"an error that shows the server's insides: {text[:300]}")
    return error["code"] or error["type"]


def read_completion(body: bytes) -> Answer:
    """The answer of a request that does not stream."""
    value = _object(body.decode("utf-8", "replace"))
    try:
        [choice] = value["choices"]
        answer = Answer(
            choice["message"]["content"], choice["finish_reason"], value["usage"]["completion_tokens"]
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ContractError(f"not a completion ({error!r}): {body[:300]!r}") from error
    if answer.finish_reason not in FINISH_REASONS:
        raise ContractError(f"finish_reason {answer.finish_reason!r}")
    return answer


def read_stream(payloads: Sequence[str], *, with_usage: bool) -> Answer | StreamError:
    """What a stream's events (without `data: `) say, if they are in OpenAI's order and came to their end."""
    if not payloads or payloads[-1] != DONE:
        raise ContractError(f"a stream without [DONE] after {len(payloads)} events: {payloads[-1:]!r}")
    events = [_object(payload) for payload in payloads[:-1]]
    if not events:
        raise ContractError("a stream of [DONE] alone")
    if "error" in events[-1]:
        return StreamError(read_error(payloads[-2].encode()))
    if any("error" in event for event in events):
        raise ContractError("an error event that is not the last")
    usage = _pop_usage(events) if with_usage else None
    return _read_chunks(events, usage)


def judge_response(
    status: int, headers: Mapping[str, str], body: bytes, allowed: Mapping[int, Collection[str]] = REFUSALS
) -> Outcome:
    """A response that is not a 200: which of the allowed ones it is."""
    code = read_error(body)
    if code not in allowed.get(status, ()):
        raise ContractError(f"unexpected status {status} with code {code!r}")
    if status in RETRYABLE and not headers.get("retry-after", "").isdigit():
        raise ContractError(f"a {status} without Retry-After")
    return Outcome(kind=Kind.ERROR if code == "worker_lost" else Kind.REFUSED, detail=f"{status} {code}")


def judge_answer(answer: Answer | StreamError, first_token: float | None = None) -> Outcome:
    """An answer that came with a 200; errors in it are those that faults cause."""
    if isinstance(answer, Answer):
        return Outcome(kind=Kind.COMPLETED, detail=answer.finish_reason, first_token=first_token)
    if answer.code not in {code for codes in REFUSALS.values() for code in codes}:
        raise ContractError(f"unexpected error event with code {answer.code!r}")
    return Outcome(kind=Kind.ERROR, detail=f"event {answer.code}")


def _pop_usage(events: list[dict[str, Any]]) -> int:
    usage = events.pop().get("usage")
    if not isinstance(usage, dict) or not events:
        raise ContractError("no usage in the last event though asked for")
    return int(usage["completion_tokens"])


def _read_chunks(events: Sequence[dict[str, Any]], tokens: int | None) -> Answer:
    try:
        choices = [choice for event in events for choice in event["choices"]]
        text = "".join(choice["delta"].get("content") or "" for choice in choices)
        reasons = [choice["finish_reason"] for choice in choices]
        role = choices[0]["delta"].get("role")
        ids = {event["id"] for event in events}
    except (KeyError, TypeError, IndexError) as error:
        raise ContractError(f"not a chunk ({error!r}): {json.dumps(events[-1])[:300]}") from error
    if reasons[-1] not in FINISH_REASONS or any(reasons[:-1]):
        raise ContractError(
            f"finish reasons {[reason for reason in reasons if reason]} in {len(reasons)} chunks"
        )
    if role != "assistant" or len(ids) != 1:
        raise ContractError("a stream without a role first, or of several ids")
    return Answer(text, reasons[-1], tokens)


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ContractError(f"not JSON: {text[:300]}") from error
    if not isinstance(value, dict):
        raise ContractError(f"not a JSON object: {text[:300]}")
    return value
