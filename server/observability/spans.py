"""Requests as OpenTelemetry spans, from HTTP down to the steps of the engine.

Spans are made when a request has ended, from the times noted on its way: while it runs, they cost nothing.
"""

import json
import os
import threading
from collections.abc import Iterable, Mapping

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, StatusCode, Tracer, format_trace_id, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

import medusa_core
from server.observability.request_context import ChatContext, RequestContext
from server.observability.request_log import PROBES, bounded_messages
from server.observability.timeline import StepMark, Timeline

TRACES_PATH = "/v1/traces"
EXPORT_SECONDS = 5.0  # for one batch, retries included
FLUSH_SECONDS = 5.0
SERVICE = "medusa"
METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS")

Attributes = Mapping[str, AttributeValue | None]


class SpanTracing:
    """Owns the exporter and its thread. OTEL_... variables mean what they mean everywhere."""

    def __init__(self, endpoint: str, model: str) -> None:
        self._model = model
        # It would wait for half a minute at exit; `stop` is bounded.
        self._provider = TracerProvider(resource=_resource(), shutdown_on_exit=False)
        exporter = OTLPSpanExporter(endpoint=traces_url(endpoint), timeout=EXPORT_SECONDS)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("medusa", medusa_core.__version__)
        self._propagator = TraceContextTextMapPropagator()

    def export(self, request: RequestContext) -> str | None:
        """Make the spans of a request that has ended and queue them."""
        if request.path in PROBES:
            return None
        parent = self._propagator.extract(request.trace_context, Context())
        writer = _SpanWriter(self._tracer, request)
        root = writer.start(
            _name(request), request.started, parent, _http_attributes(request), SpanKind.SERVER
        )
        if root.is_recording() and request.chat is not None:
            _write_chat(writer, request.chat, set_span_in_context(root, parent), self._model)
        if request.error is not None or (request.status or 500) >= 500:
            root.set_status(StatusCode.ERROR, request.error)
        writer.end(root, request.ended)
        return format_trace_id(root.get_span_context().trace_id)

    def stop(self) -> None:
        """Flush for at most `FLUSH_SECONDS`; the collector may be gone."""
        thread = threading.Thread(target=self._provider.shutdown, name="flush-traces", daemon=True)
        thread.start()
        thread.join(FLUSH_SECONDS)


class _SpanWriter:
    """Starts and ends spans of one request at times of the monotonic clock."""

    def __init__(self, tracer: Tracer, request: RequestContext) -> None:
        self._tracer = tracer
        self._request = request

    def start(
        self,
        name: str,
        at: float,
        context: Context,
        attributes: Attributes,
        kind: SpanKind = SpanKind.INTERNAL,
    ) -> Span:
        return self._tracer.start_span(
            name, context, kind, attributes=_present(attributes), start_time=self._wall_ns(at)
        )

    def write(
        self,
        name: str,
        times: tuple[float, float | None],
        context: Context,
        attributes: Attributes,
        marks: Iterable[StepMark] = (),
    ) -> None:
        """A whole span, with an event for each step."""
        span = self.start(name, times[0], context, attributes)
        for mark in marks:
            span.add_event("step", _present(_step_attributes(mark)), self._wall_ns(mark.at))
        self.end(span, times[1])

    def end(self, span: Span, at: float | None) -> None:
        span.end(None if at is None else self._wall_ns(at))

    def _wall_ns(self, at: float) -> int:
        return self._request.started_ns + round((at - self._request.started) * 1e9)


def traces_url(endpoint: str) -> str:
    """Where traces go on a collector whose address is given with or without their path."""
    base = endpoint.rstrip("/")
    return base if base.endswith(TRACES_PATH) else base + TRACES_PATH


def _write_chat(writer: _SpanWriter, chat: ChatContext, context: Context, model: str) -> None:
    timeline = chat.timeline
    tokens = {"gen_ai.usage.input_tokens": len(chat.request.prompt_ids)}
    writer.write("prompt", (chat.prepare_started, chat.prepare_ended), context, tokens)
    writer.write("queue", (timeline.arrived, timeline.dispatched or timeline.ended), context, {})
    if timeline.dispatched is None:
        return
    span = writer.start(f"chat {model}", timeline.dispatched, context, _generation_attributes(chat, model))
    if timeline.reason == "error":
        span.set_status(StatusCode.ERROR)
    inner = set_span_in_context(span, context)
    prefill, decode = _split(timeline.marks)
    writer.write(
        "prefill",
        (timeline.dispatched, timeline.first_token or timeline.ended),
        inner,
        {"medusa.steps": timeline.prefill_steps, "medusa.step_seconds": timeline.prefill_seconds},
        prefill,
    )
    if timeline.first_token is not None:
        times = (timeline.first_token, timeline.ended)
        writer.write("decode", times, inner, _decode_attributes(chat, timeline), decode)
    writer.end(span, timeline.ended)


def _split(marks: Iterable[StepMark]) -> tuple[list[StepMark], list[StepMark]]:
    prefill = [mark for mark in marks if mark.stats.is_prefill]
    return prefill, [mark for mark in marks if not mark.stats.is_prefill]


def _name(request: RequestContext) -> str:
    method = request.method if request.method in METHODS else "HTTP"
    return f"{method} {request.route}" if request.route else method


def _http_attributes(request: RequestContext) -> Attributes:
    return {
        "http.request.method": request.method if request.method in METHODS else "_OTHER",
        "http.response.status_code": request.status,
        "http.route": request.route,
        "url.path": request.path,
        "url.scheme": request.scheme,
        "client.address": request.client,
        "error.type": request.error,
        "medusa.request_id": request.request_id,
    }


def _generation_attributes(chat: ChatContext, model: str) -> Attributes:
    params, timeline = chat.request.params, chat.timeline
    first_token = timeline.first_token
    return {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": SERVICE,
        "gen_ai.request.model": model,
        "gen_ai.response.model": model,
        "gen_ai.response.id": chat.request.request_id,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.request.top_k": params.top_k,
        "gen_ai.request.max_tokens": params.max_tokens,
        "gen_ai.response.finish_reasons": None if timeline.reason is None else (timeline.reason,),
        "gen_ai.usage.input_tokens": len(chat.request.prompt_ids),
        "gen_ai.usage.output_tokens": chat.assembler.num_tokens,
        "gen_ai.response.time_to_first_chunk": first_token and first_token - timeline.arrived,
        "gen_ai.input.messages": _messages_json(chat),
        "gen_ai.output.messages": _answer_json(chat),
        "medusa.stream": chat.is_stream,
        "medusa.speculation.mode": params.speculation.mode.value,
        "medusa.speculation.tree": params.speculation.tree,
        "medusa.speculation.source": params.speculation.source.value,
    }


def _decode_attributes(chat: ChatContext, timeline: Timeline) -> Attributes:
    return {
        "medusa.steps": chat.assembler.decode_steps,
        "medusa.acceptance_length": chat.assembler.acceptance_length,
        "medusa.propose_seconds": timeline.propose_seconds,
        "medusa.verify_seconds": timeline.verify_seconds,
        "medusa.commit_seconds": timeline.commit_seconds,
    }


def _step_attributes(mark: StepMark) -> Attributes:
    stats = mark.stats
    if stats.is_prefill:
        return {"medusa.prompt_tokens": stats.prompt_tokens, "medusa.step_seconds": stats.seconds}
    return {
        "medusa.tokens": mark.num_tokens,
        "medusa.tree_nodes": stats.tree_nodes,
        "medusa.accepted_drafts": sum(stats.accepted),
        "medusa.step_seconds": stats.seconds,
        "medusa.propose_seconds": stats.propose_seconds,
        "medusa.verify_seconds": stats.verify_seconds,
        "medusa.commit_seconds": stats.commit_seconds,
    }


def _messages_json(chat: ChatContext) -> str | None:
    if chat.messages is None:
        return None
    return json.dumps([_message(said["role"], said["content"]) for said in bounded_messages(chat)])


def _answer_json(chat: ChatContext) -> str | None:
    return None if chat.answer is None else json.dumps([_message("assistant", chat.answer)])


def _message(role: str, text: str) -> dict[str, object]:
    return {"role": role, "parts": [{"type": "text", "content": text}]}


def _present(attributes: Attributes) -> dict[str, AttributeValue]:
    return {name: value for name, value in attributes.items() if value is not None}


def _resource() -> Resource:
    named = "OTEL_SERVICE_NAME" in os.environ or "service.name=" in os.environ.get(
        "OTEL_RESOURCE_ATTRIBUTES", ""
    )
    return Resource.create(
        {"service.version": medusa_core.__version__} | ({} if named else {"service.name": SERVICE})
    )
