"""Which accesses are logged."""

import logging

import pytest

from server.log import is_worth_logging


@pytest.mark.parametrize(
    ("name", "path", "status", "kept"),
    [
        ("uvicorn.access", "/health", 200, False),
        ("uvicorn.access", "/metrics", 200, False),
        ("uvicorn.access", "/ready", 503, True),
        ("uvicorn.access", "/v1/models", 200, True),
        ("server.worker_pool", "/health", 200, True),
    ],
)
def test_probes_are_left_out_unless_something_is_wrong(name, path, status, kept):
    line = '%s - "%s %s HTTP/%s" %d'
    record = logging.LogRecord(
        name, logging.INFO, "", 0, line, ("127.0.0.1", "GET", path, "1.1", status), None
    )
    assert is_worth_logging(record) is kept
