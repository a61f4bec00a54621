"""One log line per request, at its end; and its messages and answer, if those are to be logged."""

import json
import logging

from server.observability.request_context import MAX_PROMPT_CHARS, ChatContext, RequestContext

request_logger = logging.getLogger("server.access")
prompt_logger = logging.getLogger("server.prompts")

PROBES = ("/health", "/ready", "/metrics")


def log_request(context: RequestContext, trace_id: str | None = None) -> None:
    """The request line: its fields are key=value in text and members in JSON."""
    request = {name: getattr(context, name) for name in ("client", "method", "path", "status")}
    fields = _fields(context)
    if trace_id is not None:
        fields["trace_id"] = trace_id
    is_probe = context.path in PROBES and context.status == 200
    pairs = " ".join(f"{name}={_short(value)}" for name, value in fields.items())
    request_logger.log(
        logging.DEBUG if is_probe else logging.INFO,
        '%s "%s %s" %s %s',
        *request.values(),
        pairs,
        extra=request | fields | context.ids,
    )
    if context.chat is not None and context.chat.messages is not None:
        _log_prompt(context, context.chat)


def _fields(context: RequestContext) -> dict[str, object]:
    fields: dict[str, object] = {"seconds": round(context.seconds, 6)}
    if context.error is not None:
        fields["error"] = context.error
    if context.chat is not None:
        fields |= _chat_fields(context.chat)
    return fields


def _chat_fields(chat: ChatContext) -> dict[str, object]:
    timeline, assembler = chat.timeline, chat.assembler
    length = assembler.acceptance_length
    fields = {
        "stream": chat.is_stream,
        "queue_seconds": _since(timeline.dispatched, timeline.arrived),
        "ttft_seconds": _since(timeline.first_token, timeline.arrived),
        "prompt_tokens": len(chat.request.prompt_ids),
        "completion_tokens": assembler.num_tokens,
        "decode_steps": assembler.decode_steps,
        "acceptance_length": None if length is None else round(length, 3),
        "finish_reason": timeline.reason,
    }
    return {name: value for name, value in fields.items() if value is not None}


def _log_prompt(context: RequestContext, chat: ChatContext) -> None:
    said = bounded_messages(chat)
    prompt_logger.info(
        "messages=%s answer=%s",
        json.dumps(said),
        json.dumps(chat.answer),
        extra={"messages": said, "answer": chat.answer, **context.ids},
    )


def bounded_messages(chat: ChatContext) -> list[dict[str, str]]:
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
