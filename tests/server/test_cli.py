"""`medusa serve` on the command line, without starting anything."""

import json
import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from medusa_core.errors import MedusaError
from server import serve as listener
from server.cli import app, settings_options
from server.settings import Settings


def test_help_shows_every_setting():
    result = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "300"})
    assert result.exit_code == 0
    for name in Settings.model_fields:
        assert f"--{name.replace('_', '-')} " in result.output
        assert f"MEDUSA_{name.upper()}" in result.output
    assert "exact|typical|off" in result.output
    assert "the embedded demo model" in result.output


def test_help_shows_no_key():
    environment = {"COLUMNS": "300", "MEDUSA_API_KEYS": "sk-secret-0123456789"}
    result = CliRunner().invoke(app, ["serve", "--help"], env=environment)
    assert "MEDUSA_API_KEYS" in result.output
    assert "sk-secret" not in result.output


def test_a_failed_start_is_a_json_line_where_logs_are(tmp_path):
    missing = str(tmp_path / "keys")
    command = [sys.executable, "-c", "from server.cli import main; main()", "serve", "--port", "0"]
    for flags in (["--log-format", "json"], []):
        done = subprocess.run(
            [*command, "--api-keys-file", missing, *flags], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 1
        last = done.stderr.splitlines()[-1]
        message = json.loads(last)["message"] if flags else last.removeprefix("error: ")
        assert message == f"MEDUSA_API_KEYS_FILE ({missing}) cannot be read: No such file or directory"


def test_core_commands_are_there():
    output = CliRunner().invoke(app, ["--help"]).output
    for command in ("serve", "chat", "generate", "bench"):
        assert command in output


def test_flags_and_variables_reach_the_server(monkeypatch, logging_restored):
    seen = []
    monkeypatch.setattr(listener, "serve", seen.append)
    result = CliRunner().invoke(
        app,
        ["serve", "--port", "0", "--queue-limit", "7"],
        env={"MEDUSA_SLOTS": "3", "MEDUSA_QUEUE_LIMIT": "9"},
    )
    assert result.exit_code == 0, result.output
    [settings] = seen
    assert (settings.port, settings.queue_limit, settings.slots) == (0, 7, 3)


@pytest.mark.parametrize("flags", [["--cache-dir", "/tmp/named"], []])
def test_the_cache_folder_reaches_worker_processes(monkeypatch, logging_restored, flags):
    seen = []
    monkeypatch.setenv("MEDUSA_CACHE_DIR", "/tmp/of-the-environment")
    monkeypatch.setattr(listener, "serve", lambda settings: seen.append(os.environ["MEDUSA_CACHE_DIR"]))
    assert CliRunner().invoke(app, ["serve", *flags]).exit_code == 0
    assert seen == [flags[1] if flags else "/tmp/of-the-environment"]


def test_errors_are_for_the_wrapper_of_the_core():
    with pytest.raises(MedusaError, match="MEDUSA_PORT"):
        CliRunner().invoke(app, ["serve", "--port", "x"], catch_exceptions=False)


def test_an_extra_in_brackets_is_shown():
    output = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "300"}).output
    assert "medusa-serve[otel]" in output


def test_options_are_the_settings():
    group = settings_options()
    assert [parameter.name for parameter in group.parameters] == list(Settings.model_fields)
    assert group.build(max_body_bytes="5000", port=None).max_body_bytes == 5000


def test_api_process_imports_no_torch():
    code = "import sys, server.serve, server.cli; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
