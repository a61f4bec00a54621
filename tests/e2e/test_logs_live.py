"""The log of `medusa serve` as JSON: every line of every process, with the ids of the requests."""

import json
import os
import re
import signal
from pathlib import Path

import httpx
import pytest

pytestmark = pytest.mark.e2e

SECRET = "a question nobody may read"


@pytest.fixture(scope="module")
def logged(endless_model_dir, start_medusa_for_module):
    """Output of a server that answered, streamed, refused, lost its worker and drained."""
    flags = ["--model", str(endless_model_dir), "--dtype", "float32", "--log-format", "json"]
    process, url = start_medusa_for_module(*flags, MEDUSA_NO_SUCH="x")

    def post(request_id, **changes):
        body = {"model": "endless", "messages": [{"role": "user", "content": SECRET}], "max_tokens": 9}
        return httpx.post(
            f"{url}/v1/chat/completions",
            json=body | changes,
            headers={"x-request-id": request_id},
            timeout=60,
        )

    assert post("whole").status_code == 200
    assert post("streamed", stream=True).text.endswith("data: [DONE]\n\n")
    assert post("refused", max_tokens=-1).status_code == 400
    forged = httpx.get(f"{url}/v1/models/x%0a%7b%22forged%22: 1%7d", headers={"x-request-id": "bad id\x7f"})
    assert forged.status_code == 404
    with httpx.stream(
        "POST",
        f"{url}/v1/chat/completions",
        json={"model": "endless", "messages": [{"role": "user", "content": SECRET}], "stream": True},
        headers={"x-request-id": "lost"},
        timeout=60,
    ) as answer:
        lines = answer.iter_lines()
        next(lines)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        [worker] = [pid for pid in children if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]
        os.kill(int(worker), signal.SIGKILL)
        events = [line for line in lines if line]
    assert json.loads(events[-2][6:])["error"]["code"] == "worker_lost"
    assert events[-3] == ": x-request-id lost"
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    return output


def records(output, **wanted):
    found = [json.loads(line) for line in output.splitlines()]
    return [line for line in found if all(line.get(key) == value for key, value in wanted.items())]


def test_every_line_is_an_object_with_the_same_keys(logged):
    lines = records(logged)
    assert len(lines) > 8
    for line in lines:
        assert {"time", "level", "logger", "message"} <= set(line)
    assert records(logged, level="WARNING", logger="server.cli")
    assert {line["worker"] for line in lines if "worker" in line} >= {1}


def test_a_request_is_one_line_with_all_that_is_known(logged):
    [line] = records(logged, logger="server.access", request_id="whole")
    assert line["completion_id"].startswith("chatcmpl-")
    assert (line["method"], line["path"], line["status"]) == ("POST", "/v1/chat/completions", 200)
    assert (line["completion_tokens"], line["finish_reason"], line["stream"]) == (9, "length", False)
    assert line["seconds"] >= line["ttft_seconds"] >= line["queue_seconds"] >= 0
    assert line["prompt_tokens"] > 0
    assert line["acceptance_length"] >= 1
    [streamed] = records(logged, logger="server.access", request_id="streamed")
    assert (streamed["completion_tokens"], streamed["stream"]) == (9, True)
    [refused] = records(logged, logger="server.access", request_id="refused")
    assert (refused["status"], refused["error"]) == (400, "invalid_value")
    assert "completion_id" not in refused


def test_errors_inside_a_stream_are_in_its_line(logged):
    [line] = records(logged, logger="server.access", request_id="lost")
    assert (line["status"], line["error"], line["finish_reason"]) == (200, "worker_lost", "error")


def test_a_path_cannot_forge_a_line(logged):
    assert not [line for line in records(logged) if "forged" in line]
    [line] = records(logged, status=404)
    assert line["request_id"].startswith("req_")


def test_probes_and_texts_are_not_logged(logged):
    assert not records(logged, path="/ready", status=200)
    assert SECRET not in logged


def test_what_is_served_is_one_line_with_the_model_described(logged):
    [line] = records(logged, logger="server.runtime", level="INFO")[:1]
    assert re.fullmatch(
        r"ready after [\d.]+ s: endless with 3 heads of .*, float32 on cpu, .*, 1 slot(, about .* expected)?",
        line["message"],
    )
    assert "ModelInfo" not in line["message"]
    assert line["model_info"]["num_heads"] == 3
    assert line["model_info"]["device"] == "cpu"


def test_the_server_says_that_it_listens_before_it_is_ready(logged):
    loggers = [line["logger"] for line in records(logged, level="INFO")]
    assert loggers.index("server.serve") < loggers.index("server.runtime")
    [line] = records(logged, logger="server.serve")
    assert line["message"].startswith("listening on http://127.0.0.1:")
