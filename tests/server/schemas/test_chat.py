"""The request schema by itself: what passes, and the names errors get."""

import pytest
from pydantic import ValidationError

from server.errors import MAX_MESSAGE, ApiError, from_validation
from server.schemas.chat import ChatRequest

GOOD = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def refuse(**changes) -> ApiError:
    with pytest.raises(ValidationError) as caught:
        ChatRequest.model_validate(GOOD | changes)
    errors = [error | {"loc": ("body", *error["loc"])} for error in caught.value.errors()]
    return from_validation(errors)


def test_content_forms():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request = ChatRequest.model_validate(GOOD | {"messages": [{"role": "user", "content": parts}]})
    assert request.messages[0].text == "ab"
    assert ChatRequest.model_validate(GOOD).messages[0].text == "hi"


@pytest.mark.parametrize(("given", "stops"), [(None, None), ("x", ["x"]), (["x", "y"], ["x", "y"]), ([], [])])
def test_stop_forms(given, stops):
    assert ChatRequest.model_validate(GOOD | {"stop": given}).stop == stops


@pytest.mark.parametrize("name", sorted(set(ChatRequest.model_fields) - set(GOOD)))
def test_null_is_the_same_as_nothing(name):
    assert ChatRequest.model_validate(GOOD | {name: None}) == ChatRequest.model_validate(GOOD)


def test_integers_pass_for_numbers_but_booleans_do_not():
    assert ChatRequest.model_validate(GOOD | {"temperature": 1, "top_p": 1}).temperature == 1.0
    assert refuse(temperature=True).detail.param == "temperature"


@pytest.mark.parametrize(
    ("name", "value"), [("n", True), ("n", "1"), ("logprobs", 0), ("store", True), ("tools", {})]
)
def test_neutral_values_are_compared_with_their_type(name, value):
    error = refuse(**{name: value})
    assert (error.detail.param, error.detail.code) == (name, "unsupported_value")


def test_parameters_of_models_that_think_or_search():
    assert refuse(web_search_options={}).detail.code == "unsupported_parameter"
    assert refuse(reasoning_effort="high").detail.message == (
        """Invalid value for 'reasoning_effort': only "none" is supported."""
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tools": [{}]}, "tools are not supported"),
        ({"store": True}, "only false is supported"),
        ({"n": 3}, "only 1 is supported"),
        ({"response_format": {"type": "x"}}, 'only {"type": "text"} is supported'),
        ({"speculation": {"mode": "turbo"}}, 'Input should be "exact", "typical" or "off"'),
        ({"speculation": {"source": 7}}, 'Input should be "heads", "ngram" or "both"'),
        ({"messages": [{"role": "robot", "content": ""}]}, '"system", "developer", "user" or "assistant"'),
        ({"messages": [7]}, "Input should be an object"),
        ({"messages": 7}, "Input should be an array"),
        ({"metadata": 7}, "Input should be an object"),
    ],
)
def test_messages_speak_json(changes, said):
    message = refuse(**changes).detail.message
    assert said in message
    assert not any(word in message for word in ("True", "False", "None", "dict", "list", "tuple"))


def test_names_are_cut_and_printable():
    assert len(refuse(**{"k" * 9000: 1}).detail.message) < 2 * MAX_MESSAGE
    error = ApiError(400, "half a pair: \ud800", param="\udfff")
    assert error.detail.message == "half a pair: ?"
    assert error.detail.param == "?"


def test_json_schema_says_what_is_accepted():
    schema = ChatRequest.model_json_schema()
    assert schema["additionalProperties"] is False
    assert schema["properties"]["n"]["enum"] == [None, 1]
    content = schema["$defs"]["ChatMessage"]["properties"]["content"]
    assert [option["type"] for option in content["anyOf"]] == ["string", "array"]


def many(count):
    return {f"k{number}": 1 for number in range(count)}


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"messages": [{"role": "user", "content": [{}] * 9999}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}] * 9999}]},
            "messages[0].content",
        ),
        ({"messages": [{"role": "user", "content": [{}] * 2000}]}, "messages[0].content[0].type"),
        ({"messages": [7] * 9999}, "messages[0]"),
        ({"messages": [{}] * 2000}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": "a"} | many(9999)]}, "messages[0]"),
        ({"stop": [1] * 9999}, "stop"),
        ({"speculation": many(9999)}, "speculation"),
        ({"stream_options": many(9999)}, "stream_options"),
        ({"metadata": many(17)}, "metadata"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        (many(9999), None),
    ],
)
def test_a_large_body_is_refused_at_its_first_fault(changes, param):
    """Validation runs on the event loop: a million errors would stop every stream for seconds."""
    with pytest.raises(ValidationError) as caught:
        ChatRequest.model_validate(GOOD | changes)
    assert caught.value.error_count() <= 10
    assert refuse(**changes).detail.param == param


def test_what_clients_send_is_not_too_large():
    metadata = {f"k{number}": "v" for number in range(16)}
    parts = [{"type": "text", "text": "a"}] * 2048
    body = GOOD | {"metadata": metadata, "messages": [{"role": "user", "content": parts}]}
    assert len(ChatRequest.model_validate(body).messages[0].text) == 2048
