"""Settings: where they come from, what is refused and how that reads."""

import re

import pytest
from typer.testing import CliRunner

from medusa_core.errors import ConfigError
from medusa_core.sampling_params import DraftSourceName
from server.cli import app
from server.settings import EMBEDDED_NAME, Settings, load_settings, unknown_variables


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for name in Settings.model_fields:
        monkeypatch.delenv(f"MEDUSA_{name.upper()}", raising=False)


def test_defaults():
    settings = load_settings()
    assert (settings.host, settings.port, settings.slots) == ("127.0.0.1", 8000, 1)
    assert settings.model_name == EMBEDDED_NAME
    assert settings.devices == ("auto",)


def test_flags_override_the_environment(monkeypatch):
    monkeypatch.setenv("MEDUSA_PORT", "9000")
    monkeypatch.setenv("MEDUSA_SLOTS", "3")
    settings = load_settings({"port": "9001", "slots": None})
    assert (settings.port, settings.slots) == (9001, 3)


def test_empty_variables_are_unset(monkeypatch):
    monkeypatch.setenv("MEDUSA_HEADS", "")
    monkeypatch.setenv("MEDUSA_PORT", "")
    assert load_settings().heads is None
    assert load_settings().port == 8000


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", "-1"),
        ("port", "65536"),
        ("metrics_port", "x"),
        ("queue_limit", "-1"),
        ("request_timeout", "0"),
        ("request_timeout", "nan"),
        ("drain_timeout", "-2"),
        ("stall_timeout", "inf"),
        ("keepalive", "-1"),
        ("restart_limit", "-1"),
        ("max_body_bytes", "3"),
        ("log_level", "loud"),
        ("speculation", "turbo"),
        ("measure", "perhaps"),
        ("slots", "many"),
        ("device", "cpu,"),
        ("cors_origins", "https://a.example/"),
        ("cors_origins", "https://a.example,"),
        ("cors_origins", "a.example"),
        ("cors_origins", "https://user@a.example"),
        ("cors_origins", "https://A.example"),
        ("max_header_bytes", "10"),
        ("body_timeout", "0"),
        ("log_format", "xml"),
        ("log_prompts", "maybe"),
        ("otlp_endpoint", "collector:4318"),
        ("otlp_endpoint", "http://"),
        ("otlp_endpoint", "http://h:99999"),
        ("cors_origins", "https://a:b"),
    ],
)
def test_bad_values_name_variable_flag_and_value(monkeypatch, name, value):
    expected = f"MEDUSA_{name.upper()} (--{name.replace('_', '-')}): "
    for load in ("flag", "variable"):
        if load == "variable":
            monkeypatch.setenv(f"MEDUSA_{name.upper()}", value)
        with pytest.raises(ConfigError) as caught:
            load_settings({name: value} if load == "flag" else None)
        message = str(caught.value)
        assert message.startswith(expected)
        assert message.endswith(f"got {value!r}")
        assert "\n" not in message


@pytest.mark.parametrize(
    ("name", "value"), [("slots", "0"), ("dtype", "int3"), ("max_length", "1"), ("tree_nodes", "999")]
)
def test_engine_settings_are_checked_by_the_core(name, value):
    label = f"MEDUSA_{name.upper()} (--{name.replace('_', '-')}): must be"
    with pytest.raises(ConfigError, match="^" + re.escape(label)):
        load_settings({name: value})


def test_every_problem_is_named_at_once():
    with pytest.raises(ConfigError) as caught:
        load_settings({"port": "x", "queue_limit": "-1"})
    assert "MEDUSA_PORT" in str(caught.value)
    assert "MEDUSA_QUEUE_LIMIT" in str(caught.value)


def test_keys_show_nowhere():
    settings = load_settings({"api_keys": "sk-secret-1,sk-secret-2"})
    assert settings.api_keys.get_secret_value() == "sk-secret-1,sk-secret-2"
    assert "sk-secret" not in f"{settings!r} {settings} {settings.model_dump()} {settings.model_dump_json()}"
    with pytest.raises(ConfigError) as caught:
        load_settings({"api_keys": ["sk-secret-1"], "port": "x"})
    assert "MEDUSA_API_KEYS (--api-keys): " in str(caught.value)
    assert "sk-secret" not in str(caught.value)


def test_devices_and_engine_config():
    settings = load_settings(
        {"device": "cuda:0, cuda:1", "slots": "2", "tree_nodes": "8", "dtype": "bfloat16"}
    )
    assert settings.devices == ("cuda:0", "cuda:1")
    config = settings.engine_config("cuda:1")
    assert (config.device, config.slots, config.tree_nodes, config.dtype) == ("cuda:1", 2, 8, "bfloat16")


@pytest.mark.parametrize(
    ("device", "workers", "expected"),
    [
        ("auto", None, ["auto"]),
        ("auto", "1", ["auto"]),
        ("auto", "3", ["auto:0", "auto:1", "auto:2"]),
        ("cuda", "2", ["cuda:0", "cuda:1"]),
        ("cpu", "2", ["cpu", "cpu"]),
        ("cuda:1,cuda:3", "2", ["cuda:1", "cuda:3"]),
    ],
)
def test_workers_spread_over_devices(device, workers, expected):
    assert list(load_settings({"device": device, "workers": workers}).devices) == expected


@pytest.mark.parametrize(("device", "workers"), [("cuda:0", "2"), ("cuda:0,cuda:1", "3"), ("cpu,cpu", "1")])
def test_workers_and_devices_that_contradict_each_other(device, workers):
    with pytest.raises(ConfigError, match=rf"MEDUSA_WORKERS is {workers}, but MEDUSA_DEVICE names"):
        load_settings({"device": device, "workers": workers})


def test_model_name(tmp_path):
    (tmp_path / "my-model").mkdir()
    assert load_settings({"model": str(tmp_path / "my-model") + "/"}).model_name == "my-model"
    assert load_settings({"model": "org/model"}).model_name == "org/model"
    assert load_settings({"model": "org/model", "served_name": "chat"}).model_name == "chat"


def test_unknown_variables():
    environment = {"MEDUSA_PROT": "1", "MEDUSA_PORT": "1", "MEDUSA_slots": "1", "HOME": "/"}
    assert unknown_variables(environment) == ["MEDUSA_PROT"]


def test_help_names_the_words_that_a_setting_takes():
    shown = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "300"}).output
    for words in ("exact|typical|off", "heads|ngram|both", "text|json"):
        assert words in shown


@pytest.mark.parametrize("source", DraftSourceName)
def test_the_draft_source_is_a_setting(monkeypatch, source):
    monkeypatch.setenv("MEDUSA_SPECULATION_SOURCE", source.value)
    assert load_settings().speculation_source is source
