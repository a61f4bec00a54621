"""Requests made up from our own /openapi.json: whatever is sent, the answer is one the schema announces."""

import pytest
import schemathesis
import schemathesis.specs.openapi.schemas  # deep in a test's stack its import trips over CPython 3.11
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

pytestmark = pytest.mark.e2e

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_answers_conform(live, mode):
    schema = schemathesis.openapi.from_url(f"{live.url}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    assert {operation.label for operation in operations} >= {"POST /v1/chat/completions", "GET /v1/models"}
    statuses = set()
    for operation in operations:
        is_chat = operation.method == "post"
        if mode is GenerationMode.NEGATIVE and not is_chat:
            continue  # nothing to get wrong

        @settings(
            max_examples=40 if is_chat else 3,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def conforms(case):
            if isinstance(case.body, dict) and "model" in case.body and mode is GenerationMode.POSITIVE:
                case.body |= {"model": live.model, "max_tokens": 3, "stream": None, "stream_options": None}
                case.body.pop("max_completion_tokens", None)
            statuses.add(case.call_and_validate(checks=CHECKS).status_code)

        conforms()
    assert (200 if mode is GenerationMode.POSITIVE else 400) in statuses
