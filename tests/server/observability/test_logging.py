"""What a log line is made of, in both formats, and that nobody can forge one."""

import io
import json
import logging
import re
import sys
import threading
import warnings

import pytest

from server.observability.logging import configure_logging, escape, request_ids

FORGED = "x\n2026-01-01 00:00:00,000 ERROR   root: forged\r\x1b[31m\x00\u2028\x85\ud800"


@pytest.fixture
def logs(monkeypatch, logging_restored):
    """`logs(format, ...)` sends all logging into memory."""
    stream = io.StringIO()

    def start(log_format, level="info", **options):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", stream)
            configure_logging(level, log_format, **options)
        return stream

    return start


def lines(stream):
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_json_line_has_time_level_logger_message_and_what_else_is_known(logs):
    stream = logs("json", worker=3)
    logging.getLogger("server.x").warning("%s left", "one", extra={"status": 200})
    [line] = lines(stream)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+\+00:00", line.pop("time"))
    assert line == {
        "level": "WARNING",
        "logger": "server.x",
        "message": "one left",
        "worker": 3,
        "status": 200,
    }


def test_a_traceback_is_one_json_line_and_indented_in_text(logs):
    for log_format in ("json", "text"):
        stream = logs(log_format)
        start = stream.tell()
        try:
            raise ValueError(FORGED)
        except ValueError:
            logging.getLogger("x").exception("failed: %s", FORGED)
        written = stream.getvalue()[start:]
        if log_format == "json":
            line = json.loads(written)
            assert line["message"] == f"failed: {FORGED}"
            assert "ValueError: x" in line["exc_info"]
        else:
            first, *rest = written.rstrip("\n").split("\n")
            assert "failed: x\\n2026" in first
            assert len(rest) > 3
            assert all(line.startswith("    | ") for line in rest)


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_no_text_makes_a_second_line(logs, log_format):
    stream = logs(log_format)
    logging.getLogger("x").info("%s", FORGED, extra={"path": FORGED, "request_id": FORGED})
    written = stream.getvalue()
    assert written.count("\n") == 1
    assert written.rstrip("\n").isprintable()
    assert written.encode()


def test_escape_keeps_what_can_be_printed():
    assert escape("Grüße, 世界 🙂") == "Grüße, 世界 🙂"
    assert escape("a\tb\u202ec\ud800") == "a\\tb\\u202ec\\ud800"


def test_lines_carry_the_ids_of_their_request(logs):
    stream = logs("json", client_ids={"chatcmpl-1": "req_1"})
    log = logging.getLogger("x")
    log.info("nobody's")
    ids = {"request_id": "req_2"}
    token = request_ids.set(ids)
    log.info("early")
    ids["completion_id"] = "chatcmpl-2"
    log.info("late")
    log.info("another's", extra={"completion_id": "chatcmpl-1"})
    log.info("a stranger's", extra={"completion_id": "chatcmpl-3"})
    request_ids.reset(token)
    found = [(line["message"], line.get("request_id"), line.get("completion_id")) for line in lines(stream)]
    assert found == [
        ("nobody's", None, None),
        ("early", "req_2", None),
        ("late", "req_2", "chatcmpl-2"),
        ("another's", "req_1", "chatcmpl-1"),
        ("a stranger's", None, "chatcmpl-3"),
    ]


def test_text_lines_end_in_the_ids_and_name_the_worker(logs):
    stream = logs("text", worker=7)
    logging.getLogger("x").info("done", extra={"request_id": "req_1", "completion_id": "chatcmpl-1"})
    assert stream.getvalue().endswith(" INFO    worker 7 x: done [req_1 chatcmpl-1]\n")


def test_warnings_and_what_ends_a_thread_are_lines_too(logs):
    stream = logs("json")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("beware", stacklevel=1)
    thread = threading.Thread(target=lambda: 1 / 0)
    thread.start()
    thread.join()
    first, second = lines(stream)
    assert (first["logger"], "beware" in first["message"]) == ("py.warnings", True)
    assert (second["level"], "ZeroDivisionError" in second["exc_info"]) == ("CRITICAL", True)


def test_levels(logs):
    stream = logs("json", level="warning")
    logging.getLogger("x").info("quiet")
    logging.getLogger("uvicorn.error").info("quiet")
    logging.getLogger("x").warning("loud")
    assert [line["message"] for line in lines(stream)] == ["loud"]
