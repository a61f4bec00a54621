"""Answers of a live server: OpenAI's contract, raw and by its SDK, and what speculation must not change."""

import json
import re

import openai
import pytest

pytestmark = pytest.mark.e2e


def test_answer_has_openais_shape(live):
    answer = live.post()
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"].startswith("req_")
    body = answer.json()
    assert set(body) == {"id", "object", "created", "model", "system_fingerprint", "choices", "usage"}
    assert body["object"] == "chat.completion"
    assert body["model"] == "endless"
    [choice] = body["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"]
    usage = body["usage"]
    assert usage["completion_tokens"] == 24
    assert usage["total_tokens"] == usage["prompt_tokens"] + 24
    assert usage["speculation"]["acceptance_length"] >= 1.0


def test_request_id_of_the_client_is_kept_if_sane(live):
    import httpx

    for given, kept in (("my-id.7", True), ("x" * 200, False), ("a b", False)):
        answer = httpx.get(f"{live.url}/health", headers={"x-request-id": given})
        assert (answer.headers["x-request-id"] == given) is kept


def test_stream_follows_the_chunk_contract(live):
    *events, done = live.stream(stream_options={"include_usage": True})
    assert done == "[DONE]"
    chunks = [json.loads(event) for event in events]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert len({chunk["created"] for chunk in chunks}) == 1
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    first, *middle, last, usage = chunks
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert all(set(chunk["choices"][0]["delta"]) == {"content"} for chunk in middle)
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in middle)
    assert last["choices"][0]["delta"] == {}
    assert last["choices"][0]["finish_reason"] == "length"
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 24
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in middle) == live.text()


def test_stream_without_usage_never_mentions_it(live):
    assert not any("usage" in event for event in live.stream())


def test_openai_sdk(live):
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="unused", max_retries=0) as client:
        question = {
            "model": "endless",
            "messages": live.body()["messages"],
            "max_tokens": 24,
            "temperature": 0,
        }
        assert [model.id for model in client.models.list()] == ["endless"]
        assert client.models.retrieve("endless").object == "model"
        whole = client.chat.completions.create(**question)
        assert whole._request_id
        assert whole.usage.model_extra["speculation"]["steps"] > 0
        pieces, usage = [], None
        with client.chat.completions.create(
            **question, stream=True, stream_options={"include_usage": True}
        ) as stream:
            for chunk in stream:
                pieces += [choice.delta.content or "" for choice in chunk.choices]
                usage = chunk.usage or usage
        assert "".join(pieces) == whole.choices[0].message.content
        assert usage == whole.usage
        with pytest.raises(openai.NotFoundError) as caught:
            client.chat.completions.create(**(question | {"model": "other"}))
        assert caught.value.code == "model_not_found"
        assert caught.value.param == "model"


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_speculation_does_not_change_the_text(live, temperature):
    sampled = {"temperature": temperature, "top_p": 0.95, "seed": 7, "max_tokens": 40}
    plain = live.text(**sampled, speculation={"mode": "off"})
    for tree in ("dynamic", "static"):
        assert live.text(**sampled, speculation={"mode": "exact", "tree": tree}) == plain


@pytest.mark.parametrize("source", ["heads", "ngram", "both"])
def test_no_draft_source_changes_the_text(live, source):
    quoting = {"messages": [{"role": "user", "content": "the table is booked, the table is booked, the"}]}
    plain = live.text(**quoting, max_tokens=60, speculation={"mode": "off"})
    assert live.text(**quoting, max_tokens=60, speculation={"source": source}) == plain


def test_typical_mode_answers(live):
    assert live.text(temperature=0.8, seed=1, speculation={"mode": "typical", "epsilon": 0.2, "delta": 0.4})


def test_seeds_are_reproducible_and_64_bits(live):
    sampled = {"temperature": 1.5, "max_tokens": 40}
    texts = {seed: live.text(**sampled, seed=seed) for seed in (-1, 0, 2**63)}
    assert len(set(texts.values())) == 3
    assert live.text(**sampled, seed=2**64 - 1) == texts[-1]
    assert live.text(**sampled, seed=0) == texts[0]
    assert live.text(**sampled) != live.text(**sampled), "unseeded requests get a seed each"


def test_sampling_defaults_are_the_models_own(live):
    seeded = {"seed": 11, "max_tokens": 40}
    default = live.text(**seeded, temperature=None)
    assert default == live.text(**seeded, temperature=0.3, top_p=0.95)


def test_stop_string_cuts_the_text_and_frees_the_slot(live):
    text = live.text(max_tokens=60)
    stop = text[20:24]
    cut = text[: text.index(stop)]
    answer = live.post(max_tokens=4000, stop=stop).json()
    assert answer["choices"][0]["message"]["content"] == cut
    assert answer["choices"][0]["finish_reason"] == "stop"
    events = live.stream(max_tokens=4000, stop=["never in there", stop])
    chunks = [json.loads(event) for event in events[:-1]]
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == cut
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    # One slot: these would wait for 4000 tokens if the two above still ran.
    assert live.post(timeout=5, max_tokens=1).status_code == 200


def test_usage_counts_up_to_the_stop_string_however_tokens_come(live):
    text = live.text(max_tokens=60)
    counts = {
        live.post(max_tokens=60, stop=text[20:24], speculation={"mode": mode}).json()["usage"][
            "completion_tokens"
        ]
        for mode in ("off", "exact")
    }
    assert len(counts) == 1


def test_one_token_needs_no_decode_step(live):
    usage = live.post(max_completion_tokens=1, max_tokens=None).json()["usage"]
    assert usage["completion_tokens"] == 1
    assert usage["speculation"] == {"steps": 0, "acceptance_length": None}


def test_neutral_and_inert_parameters_are_accepted(live):
    neutral = {
        "n": 1,
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "logprobs": False,
        "logit_bias": {},
        "tools": [],
        "tool_choice": "none",
        "functions": [],
        "response_format": {"type": "text"},
        "store": False,
        "user": "me",
        "metadata": {"a": "b"},
        "service_tier": "auto",
        "modalities": ["text"],
        "reasoning_effort": "none",
        "verbosity": "medium",
    }
    assert live.text(**neutral) == live.text()


def test_message_forms_are_equal(live):
    def ask(*messages):
        return live.text(messages=list(messages))

    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    assert ask({"role": "user", "content": parts}) == ask({"role": "user", "content": "Hello"})
    question = {"role": "user", "content": "Hello"}
    assert ask({"role": "developer", "content": "Be kind"}, question) == ask(
        {"role": "system", "content": "Be kind"}, question
    )
    earlier = {"role": "assistant", "content": "Hi", "refusal": None, "tool_calls": None, "annotations": []}
    assert ask(question, earlier, question)


def test_answer_ends_with_the_context(live):
    long_text = "a" * 8100
    answer = live.post(messages=[{"role": "user", "content": long_text}], max_tokens=8000).json()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["total_tokens"] in (8192, 8193)  # the last token needs no room in the cache


def test_health_models_and_readiness(live):
    assert live.get("/health").json() == {"status": "ok"}
    assert live.get("/ready").json() == {"status": "ready"}
    listing = live.get("/v1/models").json()
    assert listing["object"] == "list"
    assert listing["data"] == [live.get("/v1/models/endless").json()]
    assert listing["data"][0]["context_length"] == 8192
    assert live.get("/v1/models/other").status_code == 404


def test_metrics_after_a_request(live):
    # A tree that was named is kept; the dynamic one shrinks where speculation does not pay.
    live.post(seed=1, temperature=0.8, max_tokens=50, speculation={"tree": "static"})
    text = live.get("/metrics").text
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    label = f'model="{live.model}"'
    assert all(label in line for line in lines)
    bare = (re.sub(rf",{label}|{label},|{{{label}}}", "", line) for line in lines)
    samples = dict(line.rsplit(" ", 1) for line in bare)
    assert float(samples['medusa_generation_tokens_total{mode="exact"}']) >= 30
    assert float(samples['medusa_drafted_tokens_total{head="0"}']) > 0
    assert 'medusa_accepted_tokens_total{head="2"}' in samples
    assert float(samples["medusa_decode_seconds_total"]) > 0
    assert float(samples["medusa_baseline_seconds_total"]) > 0
    assert float(samples["medusa_acceptance_length_count"]) > 0
    for metric in ("time_to_first_token_seconds", "inter_token_latency_seconds", "request_seconds"):
        assert float(samples[f"medusa_{metric}_count"]) > 0
    assert float(samples["medusa_queue_depth"]) == 0.0
    assert float(samples["medusa_running"]) == 0.0
    steps = sum(live.metric("medusa_decode_steps_total", mode=mode) for mode in ("exact", "typical", "off"))
    assert float(samples['medusa_step_phase_seconds_count{phase="verify"}']) == steps


def test_retries_of_the_sdk_are_counted(live):
    import httpx

    before = live.metric("medusa_client_retries_total")
    for count in ("0", "1", "2"):
        httpx.get(f"{live.url}/health", headers={"x-stainless-retry-count": count})
    assert live.metric("medusa_client_retries_total") == before + 2
