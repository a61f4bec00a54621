"""What bad input gets: a status and OpenAI's error body naming the parameter, and nothing else breaks."""

import json

import httpx
import pytest

pytestmark = pytest.mark.e2e

USER = {"role": "user", "content": "Hello"}

# changes to a good request -> status, param, code
BAD_VALUES = [
    ({"messages": None}, 400, "messages", "missing_required_parameter"),
    ({"model": None}, 400, "model", "missing_required_parameter"),
    ({"model": "gpt-5"}, 404, "model", "model_not_found"),
    ({"model": 7}, 400, "model", "invalid_type"),
    ({"messages": []}, 400, "messages", "invalid_value"),
    ({"messages": "hi"}, 400, "messages", "invalid_type"),
    ({"messages": [7]}, 400, "messages[0]", "invalid_type"),
    ({"messages": [USER, {"role": "robot", "content": "x"}]}, 400, "messages[1].role", "invalid_value"),
    ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages[0].role", "invalid_value"),
    ({"messages": [{"role": "user"}]}, 400, "messages[0].content", "missing_required_parameter"),
    ({"messages": [{"role": "user", "content": None}]}, 400, "messages[0].content", "invalid_type"),
    ({"messages": [{"role": "user", "content": []}]}, 400, "messages[0].content", "invalid_value"),
    ({"messages": [USER | {"name": "Bob"}]}, 400, "messages[0].name", "unsupported_parameter"),
    ({"messages": [USER | {"mood": "good"}]}, 400, "messages[0].mood", "unknown_parameter"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        400,
        "messages[0].content[0].type",
        "invalid_value",
    ),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "messages", "invalid_value"),
    ({"messages": [{"role": "user", "content": "word " * 9000}]}, 400, "messages", "context_length_exceeded"),
    ({"messages": [USER] * 2049}, 400, "messages", "invalid_value"),
    ({"max_tokens": 0}, 400, "max_tokens", "invalid_value"),
    ({"max_tokens": -5}, 400, "max_tokens", "invalid_value"),
    ({"max_tokens": 10**9}, 400, "max_tokens", "invalid_value"),
    ({"max_tokens": 10**30}, 400, "max_tokens", "invalid_value"),
    ({"max_tokens": 1.5}, 400, "max_tokens", "invalid_type"),
    ({"max_tokens": True}, 400, "max_tokens", "invalid_type"),
    ({"max_tokens": "12"}, 400, "max_tokens", "invalid_type"),
    ({"max_tokens": None, "max_completion_tokens": 8193}, 400, "max_completion_tokens", "invalid_value"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, 400, "max_tokens", "invalid_value"),
    ({"temperature": -0.1}, 400, "temperature", "invalid_value"),
    ({"temperature": 2.1}, 400, "temperature", "invalid_value"),
    ({"temperature": 1e300}, 400, "temperature", "invalid_value"),
    ({"temperature": "hot"}, 400, "temperature", "invalid_type"),
    ({"top_p": 0}, 400, "top_p", "invalid_value"),
    ({"top_p": 1.01}, 400, "top_p", "invalid_value"),
    ({"top_k": -1}, 400, "top_k", "invalid_value"),
    ({"min_p": 2}, 400, "min_p", "invalid_value"),
    ({"seed": 2**64}, 400, "seed", "invalid_value"),
    ({"seed": -(2**63) - 1}, 400, "seed", "invalid_value"),
    ({"stop": ""}, 400, "stop[0]", "invalid_value"),
    ({"stop": ["a"] * 5}, 400, "stop", "invalid_value"),
    ({"stop": "x" * 257}, 400, "stop[0]", "invalid_value"),
    ({"stop": 3}, 400, "stop", "invalid_type"),
    ({"stream": "yes"}, 400, "stream", "invalid_type"),
    ({"stream_options": {"include_usage": True}}, 400, "stream_options", "invalid_value"),
    ({"stream": True, "stream_options": {"color": 1}}, 400, "stream_options.color", "unknown_parameter"),
    ({"n": 2}, 400, "n", "unsupported_value"),
    ({"n": True}, 400, "n", "unsupported_value"),
    ({"frequency_penalty": 0.5}, 400, "frequency_penalty", "unsupported_value"),
    ({"presence_penalty": -1}, 400, "presence_penalty", "unsupported_value"),
    ({"logit_bias": {"5": 10}}, 400, "logit_bias", "unsupported_value"),
    ({"logprobs": True}, 400, "logprobs", "unsupported_value"),
    ({"top_logprobs": 5}, 400, "top_logprobs", "unsupported_value"),
    ({"response_format": {"type": "json_object"}}, 400, "response_format", "unsupported_value"),
    ({"tools": [{"type": "function"}]}, 400, "tools", "unsupported_value"),
    ({"prediction": {"type": "content", "content": "x"}}, 400, "prediction", "unsupported_parameter"),
    ({"store": True}, 400, "store", "unsupported_value"),
    ({"temprature": 1}, 400, "temprature", "unknown_parameter"),
    ({"x" * 5000: 1}, 400, "x" * 400 + "…", "unknown_parameter"),
    ({"\ud800": 1}, 400, None, "invalid_body"),
    ({"speculation": {"mode": "turbo"}}, 400, "speculation.mode", "invalid_value"),
    ({"speculation": {"source": "oracle"}}, 400, "speculation.source", "invalid_value"),
    ({"speculation": {"source": "both", "tree": "static"}}, 400, "speculation.tree", "invalid_value"),
    ({"speculation": {"tree": "../../etc/passwd"}}, 400, "speculation.tree", "invalid_value"),
    ({"speculation": {"epsilon": 1.5}}, 400, "speculation.epsilon", "invalid_value"),
    ({"speculation": {"delta": -1}}, 400, "speculation.delta", "invalid_value"),
    ({"speculation": True}, 400, "speculation", "invalid_type"),
]

BAD_BODIES = [
    (b"{not json", "application/json", None, "invalid_json"),
    (b"", "application/json", None, "invalid_body"),
    (b"[]", "application/json", None, "invalid_body"),
    (b"null", "application/json", None, "invalid_body"),
    (b'"text"', "application/json", None, "invalid_body"),
    (b"\xff\xfe{}", "application/json", None, "invalid_json"),
    (b"\x80{}", "application/json", None, "invalid_body"),
    (b"{}", "text/plain", None, "invalid_body"),
    (b"[" * 100_000, "application/json", None, "invalid_body"),
    (
        b'{"model": "endless", "messages": [], "seed": ' + b"9" * 5000 + b"}",
        "application/json",
        None,
        "invalid_body",
    ),
    (
        b'{"model": "endless", "messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
        "application/json",
        "temperature",
        "invalid_value",
    ),
]


def assert_error(answer, status, param, code):
    assert answer.status_code == status, answer.text[:500]
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    error = answer.json()["error"]
    assert set(answer.json()) == {"error"}
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["param"], error["code"], error["type"]) == (param, code, "invalid_request_error")
    assert 0 < len(error["message"]) < 1000
    return error["message"]


@pytest.mark.parametrize(
    ("changes", "status", "param", "code"),
    BAD_VALUES,
    ids=[f"{i}-{ascii(row[2])[:40]}" for i, row in enumerate(BAD_VALUES)],
)
def test_bad_value(live, changes, status, param, code):
    content = json.dumps(live.body(**changes))  # ASCII: httpx itself would refuse half a surrogate pair
    answer = httpx.post(
        f"{live.url}/v1/chat/completions", content=content, headers={"content-type": "application/json"}
    )
    assert_error(answer, status, param, code)


@pytest.mark.parametrize(("content", "kind", "param", "code"), BAD_BODIES, ids=range(len(BAD_BODIES)))
def test_bad_body(live, content, kind, param, code):
    answer = httpx.post(f"{live.url}/v1/chat/completions", content=content, headers={"content-type": kind})
    assert_error(answer, 400, param, code)


def test_many_errors_make_a_short_answer(live):
    answer = live.post(messages=[{"role": "user", "content": 7, str(i): "x" * 1000} for i in range(500)])
    assert_error(answer, 400, "messages[0].content", "invalid_type")
    assert len(answer.content) < 1000


def test_bad_stream_request_gets_a_status_not_a_stream(live):
    assert_error(live.post(stream=True, messages=[]), 400, "messages", "invalid_value")


def test_unknown_path_and_method(live):
    assert_error(live.get("/v1/nothing"), 404, None, "unknown_url")
    answer = live.get("/v1/chat/completions")
    assert_error(answer, 405, None, "method_not_allowed")
    assert answer.headers["allow"] == "POST"


@pytest.mark.parametrize("chunked", [False, True])
def test_body_too_large(live, chunked):
    content = b" " * (live.runtime.settings.max_body_bytes + 1)

    def pieces():
        for start in range(0, len(content), 65536):
            yield content[start : start + 65536]

    # A client that is still sending may see the connection go before it reads the answer.
    try:
        answer = httpx.post(
            f"{live.url}/v1/chat/completions",
            content=pieces() if chunked else content,
            headers={"content-type": "application/json"},
        )
    except httpx.TransportError:
        assert live.get("/health").status_code == 200
        return
    assert_error(answer, 413, None, "request_too_large")


def test_template_refusal_names_messages(live, monkeypatch):
    """The fixture's template takes every role that validation lets through; a stricter one stands in."""
    tokenizer = live.runtime.prompts.chat.tokenizer
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('roles must alternate') }}")
    message = assert_error(live.post(), 400, "messages", "invalid_value")
    assert "roles must alternate" in message


def test_crash_of_ours_is_a_500_without_details(live, caplog, monkeypatch):
    def broken():
        raise RuntimeError("secret detail")

    monkeypatch.setattr(live.runtime.scheduler, "check_room", broken)
    answer = live.post()
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "server_error"
    assert "secret" not in answer.text
    assert "secret detail" in caplog.text
