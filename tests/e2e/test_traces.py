"""Traces, as a real collector receives them: OTLP over HTTP, decoded with its own protocol."""

import gzip
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from medusa_core.errors import ConfigError
from server.app import create_app
from server.observability.spans import traces_url
from server.settings import Settings

pytestmark = pytest.mark.e2e

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT_ID = "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE_ID}-{PARENT_ID}-01"


class Collector:
    """Keeps every span it is sent, by name."""

    def __init__(self):
        self.spans = []
        self.resources = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                assert self.path == "/v1/traces"
                for group in ExportTraceServiceRequest.FromString(body).resource_spans:
                    collector.resources.append(attributes(group.resource))
                    for scope in group.scope_spans:
                        collector.spans += scope.spans
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    def close(self):
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def of_trace(self, trace_id):
        return {span.name: span for span in self.spans if span.trace_id.hex() == trace_id}


def attributes(holder):
    return {item.key: getattr(item.value, item.value.WhichOneof("value")) for item in holder.attributes}


@pytest.fixture(scope="module")
def collected(start_server):
    """A server that has answered a few requests and was stopped, and the collector that heard of them."""
    collector = Collector()
    server = start_server(otlp_endpoint=collector.url, slots=1)
    try:
        with httpx.stream(
            "POST",
            f"{server.url}/v1/chat/completions",
            json=server.body(stream=True, max_tokens=700),
            headers={"traceparent": TRACEPARENT, "x-request-id": "mine"},
            timeout=60,
        ) as answer:
            lines = list(answer.iter_lines())
        assert lines[-2] == "data: [DONE]"
        secret = [{"role": "user", "content": "a secret question"}]
        assert server.post(messages=secret, max_tokens=5).status_code == 200
        assert server.post(messages=[]).status_code == 400
        httpx.get(f"{server.url}/health", headers={"traceparent": "00-" + "1" * 32 + "-" + "2" * 16 + "-01"})
        httpx.get(
            f"{server.url}/v1/models", headers={"traceparent": "00-" + "3" * 32 + "-" + "4" * 16 + "-00"}
        )
        httpx.get(f"{server.url}/v1/models", headers={"traceparent": "rubbish"})
    finally:
        server.stop()
        collector.close()
    return collector


def test_a_request_is_one_trace_from_http_to_steps(collected):
    spans = collected.of_trace(TRACE_ID)
    assert set(spans) == {
        "POST /v1/chat/completions",
        "prompt",
        "queue",
        "chat endless",
        "prefill",
        "decode",
    }
    root, chat = spans["POST /v1/chat/completions"], spans["chat endless"]
    assert root.parent_span_id.hex() == PARENT_ID
    for name in ("prompt", "queue", "chat endless"):
        assert spans[name].parent_span_id == root.span_id
    for name in ("prefill", "decode"):
        assert spans[name].parent_span_id == chat.span_id
    order = ("POST /v1/chat/completions", "prompt", "queue", "chat endless", "decode")
    starts = [spans[name].start_time_unix_nano for name in order]
    assert starts == sorted(starts)
    assert all(root.start_time_unix_nano <= s.start_time_unix_nano for s in spans.values())
    assert all(s.start_time_unix_nano <= s.end_time_unix_nano for s in spans.values())
    assert all(s.end_time_unix_nano <= root.end_time_unix_nano for s in spans.values())


def test_spans_say_what_happened(collected):
    spans = collected.of_trace(TRACE_ID)
    root, chat = attributes(spans["POST /v1/chat/completions"]), attributes(spans["chat endless"])
    assert (root["http.response.status_code"], root["http.route"]) == (200, "/v1/chat/completions")
    assert root["medusa.request_id"] == "mine"
    assert chat["gen_ai.operation.name"] == "chat"
    assert chat["gen_ai.request.model"] == "endless"
    assert chat["gen_ai.request.temperature"] == 0.0
    assert chat["gen_ai.usage.output_tokens"] == 700
    assert chat["gen_ai.usage.input_tokens"] > 0
    assert [value.string_value for value in chat["gen_ai.response.finish_reasons"].values] == ["length"]
    assert chat["gen_ai.response.id"].startswith("chatcmpl-")
    decode = attributes(spans["decode"])
    assert decode["medusa.steps"] > 128
    assert decode["medusa.acceptance_length"] >= 1
    assert decode["medusa.verify_seconds"] > 0
    assert collected.resources[0]["service.name"] == "medusa"


def test_steps_are_events_and_bounded(collected):
    spans = collected.of_trace(TRACE_ID)
    prefill, decode = spans["prefill"].events, spans["decode"].events
    assert len(prefill) == 1
    assert len(prefill) + len(decode) == 128
    step = attributes(decode[0])
    assert step["medusa.tokens"] >= 1
    assert step["medusa.step_seconds"] >= step["medusa.verify_seconds"] > 0
    assert attributes(prefill[0])["medusa.prompt_tokens"] > 0


def test_refusals_have_a_span_and_probes_and_unsampled_requests_none(collected):
    refused = [span for span in collected.spans if attributes(span).get("error.type")]
    assert [attributes(span)["http.response.status_code"] for span in refused] == [400]
    assert collected.of_trace("1" * 32) == {}
    assert collected.of_trace("3" * 32) == {}
    assert [span.name for span in collected.spans].count("GET /v1/models") == 1


def test_no_text_of_anybody_is_in_a_trace(collected):
    assert collected.spans
    assert not any(b"secret" in span.SerializeToString() for span in collected.spans)


def test_texts_are_in_traces_and_log_if_asked_for(start_server, caplog):
    collector = Collector()
    server = start_server(otlp_endpoint=collector.url, log_prompts=True)
    caplog.set_level("INFO", "server.prompts")
    try:
        text = server.text(messages=[{"role": "user", "content": "a secret question"}], max_tokens=5)
    finally:
        server.stop()
        collector.close()
    [line] = [record for record in caplog.records if record.name == "server.prompts"]
    assert line.messages == [{"role": "user", "content": "a secret question"}]
    assert line.answer == text
    [chat] = [attributes(span) for span in collector.spans if span.name == "chat endless"]
    assert "a secret question" in chat["gen_ai.input.messages"]
    assert text == json.loads(chat["gen_ai.output.messages"])[0]["parts"][0]["content"]


def test_a_collector_that_is_gone_hurts_nobody(start_server, free_port):
    server = start_server(otlp_endpoint=f"http://127.0.0.1:{free_port}", log_level="error")
    try:
        assert server.text(max_tokens=5)
    finally:
        server.stop()


def test_without_the_libraries_the_start_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    monkeypatch.delitem(sys.modules, "server.observability.spans", raising=False)
    with pytest.raises(ConfigError, match=r"pip install 'medusa-serve\[otel\]'"):
        create_app(Settings(otlp_endpoint="http://127.0.0.1:4318"))


@pytest.mark.parametrize("given", ["http://c:4318", "http://c:4318/", "http://c:4318/v1/traces"])
def test_the_path_of_traces_is_added_once(given):
    assert traces_url(given) == "http://c:4318/v1/traces"
