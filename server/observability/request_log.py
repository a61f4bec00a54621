"""One line a request, at its end, with all that is known of it; and what was said, if that is wanted."""

import json
import logging

from server.observability.request_context import MAX_PROMPT_CHARS, ChatRecord, RequestRecord

access = logging.getLogger("server.access")
prompts = logging.getLogger("server.prompts")

PROBES = ("/health", "/ready", "/metrics")


def log_request(record: RequestRecord, trace_id: str | None = None) -> None:
    """The access line: its fields are key=value in text and members in JSON."""
    request = {
        "client": record.client,
        "method": record.method,
        "path": record.path,
        "status": record.status,
    }
    fields = _fields(record)
    if trace_id is not None:
        fields["trace_id"] = trace_id
    is_probe = record.path in PROBES and record.status == 200
    pairs = " ".join(f"{name}={_short(value)}" for name, value in fields.items())
    access.log(
        logging.DEBUG if is_probe else logging.INFO,
        '%s "%s %s" %s %s',
        *request.values(),
        pairs,
        extra=request | fields | record.ids,
    )
    if record.chat is not None and record.chat.messages is not None:
        _log_prompt(record, record.chat)


def _fields(record: RequestRecord) -> dict[str, object]:
    fields: dict[str, object] = {"seconds": round(record.seconds, 6)}
    if record.error is not None:
        fields["error"] = record.error
    if record.chat is not None:
        fields |= _chat_fields(record.chat)
    return fields


def _chat_fields(chat: ChatRecord) -> dict[str, object]:
    usage, timeline = chat.generation.usage(), chat.job.timeline
    length = usage.speculation.acceptance_length
    fields = {
        "stream": chat.is_stream,
        "queue_seconds": _since(timeline.dispatched, timeline.arrived),
        "ttft_seconds": _since(timeline.first_token, timeline.arrived),
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "decode_steps": usage.speculation.steps,
        "acceptance_length": None if length is None else round(length, 3),
        "finish_reason": timeline.reason,
    }
    return {name: value for name, value in fields.items() if value is not None}


def _log_prompt(record: RequestRecord, chat: ChatRecord) -> None:
    said = bounded_messages(chat)
    prompts.info(
        "messages=%s answer=%s",
        json.dumps(said),
        json.dumps(chat.answer),
        extra={"messages": said, "answer": chat.answer, **record.ids},
    )


def bounded_messages(chat: ChatRecord) -> list[dict[str, str]]:
    """The last messages, together at most `MAX_PROMPT_CHARS` characters of text."""
    room = MAX_PROMPT_CHARS
    kept: list[dict[str, str]] = []
    for role, text in reversed(chat.messages or ()):
        if room <= 0:
            break
        kept.append({"role": role, "content": text if len(text) <= room else text[:room] + "…"})
        room -= len(text)
    return kept[::-1]


def _since(end: float | None, start: float) -> float | None:
    return None if end is None else round(end - start, 6)


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
