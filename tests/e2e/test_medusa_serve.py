"""`medusa serve` as a process of its own: refusals at start, what it maps, SIGTERM."""

import json
import signal
import socket
import threading
import time
from pathlib import Path

import httpx
import pytest

pytestmark = pytest.mark.e2e

# It drains as SIGTERM does, but where tests run under nohup, which the server respects.
HANGUP = signal.SIGTERM if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else signal.SIGHUP


def ask(url, **changes):
    body = {"model": "endless", "messages": [{"role": "user", "content": "hi"}], "temperature": 0} | changes
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)


@pytest.fixture
def model_flags(endless_model_dir):
    return ["--model", str(endless_model_dir), "--dtype", "float32", "--measure", "false"]


def test_serves_without_libtorch_and_drains_on_sigterm(start_medusa, model_flags, free_port):
    process, url = start_medusa(*model_flags, "--metrics-port", str(free_port), MEDUSA_DRAIN_TIMEUOT="3")
    assert ask(url, max_tokens=3).status_code == 200
    maps = Path(f"/proc/{process.pid}/maps").read_text()
    assert "libtorch" not in maps
    assert httpx.get(f"{url}/metrics").status_code == 404
    operations = f"http://127.0.0.1:{free_port}"
    assert "medusa_requests_total" in httpx.get(f"{operations}/metrics").text
    assert httpx.get(f"{operations}/ready").json() == {"status": "ready"}
    assert httpx.get(f"{operations}/health").status_code == 200
    assert httpx.get(f"{operations}/v1/models").json()["error"]["code"] == "unknown_url"

    events = []
    is_streaming = threading.Event()

    def read():
        body = {"model": "endless", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1500}
        with httpx.stream(
            "POST", f"{url}/v1/chat/completions", json=body | {"stream": True, "temperature": 0}, timeout=60
        ) as answer:
            for line in answer.iter_lines():
                events.append(line)
                is_streaming.set()

    reader = threading.Thread(target=read)
    reader.start()
    assert is_streaming.wait(30)
    process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + 10
    while (refused := httpx.get(f"{url}/ready")).status_code == 200:
        assert time.monotonic() < deadline
    assert refused.json() == {"status": "unavailable", "reason": "the server is shutting down"}
    answer = ask(url)
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "shutting_down"
    assert answer.headers["retry-after"]
    assert httpx.get(f"{url}/health").status_code == 200
    reader.join(60)
    assert not reader.is_alive()
    data = [line for line in events if line.startswith("data: ")]
    assert data[-1] == "data: [DONE]"
    assert json.loads(data[-2][6:])["choices"][0]["finish_reason"] == "length"
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "MEDUSA_DRAIN_TIMEUOT is set, but there is no such setting" in output
    assert "Traceback" not in output


def test_drain_deadline_then_a_terminal_event(start_medusa, model_flags):
    process, url = start_medusa(*model_flags, "--drain-timeout", "0.3")
    lines = []
    with httpx.stream(
        "POST",
        f"{url}/v1/chat/completions",
        json={
            "model": "endless",
            "messages": [{"role": "user", "content": "hi"}],
            "temperature": 0,
            "stream": True,
            "max_tokens": 4000,
        },
        timeout=60,
    ) as answer:
        for line in answer.iter_lines():
            if not lines:
                process.send_signal(HANGUP)
            lines.append(line)
    *_, error, done = [line for line in lines if line.startswith("data: ")]
    assert done == "data: [DONE]"
    assert json.loads(error[6:])["error"]["code"] == "shutting_down"
    process.communicate(timeout=30)
    assert process.returncode == 0


def test_second_signal_ends_at_once(start_medusa, model_flags):
    process, url = start_medusa(*model_flags)
    with httpx.stream(
        "POST",
        f"{url}/v1/chat/completions",
        json={
            "model": "endless",
            "messages": [{"role": "user", "content": "hi"}],
            "stream": True,
            "temperature": 0,
        },
        timeout=60,
    ) as answer:
        lines = answer.iter_lines()
        next(lines)
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=10)
        assert process.returncode == 1
        assert "ended at once" in output
        assert "Traceback" not in output
        *_, error, done = [line for line in lines if line.startswith("data: ")]
        assert '"code":"shutting_down"' in error
        assert done == "data: [DONE]"


@pytest.mark.slow
def test_a_template_that_loops_does_not_outlive_the_server(start_medusa, model_flags, tmp_path):
    template = tmp_path / "loop.jinja"
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    template.write_text(
        "{{ messages[0].content }}{% if messages[0].content == 'hi' %}" + loop + "{% endif %}"
    )
    flags = (*model_flags, "--chat-template", str(template), "--request-timeout", "0.5")
    process, url = start_medusa(*flags)
    answer = ask(url)
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "prompt_timeout"
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0


def one_line_refusal(run_medusa, *flags, **environment):
    """The error line of a server that does not start."""
    code, output = run_medusa(*flags, **environment)
    assert code == 1
    assert "Traceback" not in output
    [line] = [line for line in output.splitlines() if line.startswith("error: ")]
    assert output.splitlines()[-1] == line
    return line


@pytest.mark.parametrize(
    ("flags", "environment", "said"),
    [
        (["--port", "http"], {}, ["MEDUSA_PORT (--port)", "'http'"]),
        ([], {"MEDUSA_METRICS_PORT": "70000"}, ["MEDUSA_METRICS_PORT (--metrics-port)", "70000"]),
        (
            [],
            {"MEDUSA_QUEUE_LIMIT": "-1", "MEDUSA_LOG_LEVEL": "loud"},
            ["MEDUSA_QUEUE_LIMIT", "MEDUSA_LOG_LEVEL"],
        ),
        (["--slots", "0"], {}, ["MEDUSA_SLOTS (--slots): must be between"]),
        (["--dtype", "int3"], {}, ["dtype", "int3"]),
        (["--host", "no.such.host.invalid"], {}, ["cannot listen on no.such.host.invalid"]),
        (["--host", ".."], {}, ["cannot listen on ..: it is no host name"]),
        (["--model", "/no/such/model"], {}, ["/no/such/model"]),
        (
            ["--heads", "none", "--speculation-source", "both"],
            {},
            ["MEDUSA_SPECULATION_SOURCE (--speculation-source) is both"],
        ),
        (["--chat-template", "/no/such/template"], {}, ["/no/such/template"]),
    ],
)
def test_refused_settings(run_medusa, model_flags, flags, environment, said):
    line = one_line_refusal(run_medusa, *model_flags, "--port", "0", *flags, **environment)
    assert all(text in line for text in said)


def test_refused_ports(run_medusa, model_flags):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"port {port}: Address already in use" in one_line_refusal(
            run_medusa, *model_flags, "--port", port
        )
        line = one_line_refusal(run_medusa, *model_flags, "--port", "0", "--metrics-port", port)
        assert f"no operations port: cannot listen on 127.0.0.1 port {port}: Address already in use" in line


@pytest.mark.slow
def test_refused_models(run_medusa, model_flags, endless_model_dir, vicuna_layout_dir, tmp_path):
    """Files missing, heads of another size, a broken tree: found by the worker, said by the server."""
    import shutil

    from medusa_core.checkpoints.writing import save_heads
    from medusa_core.draft.medusa import MedusaHeads

    no_weights = tmp_path / "no_weights"
    shutil.copytree(endless_model_dir, no_weights)
    (no_weights / "model.safetensors").unlink()
    heads = MedusaHeads(num_heads=2, num_layers=1, hidden_size=32, vocab_size=320)
    save_heads(heads, tmp_path / "small_heads", base_model="x")
    (tmp_path / "tree.json").write_text("[[1, 0]]")
    for flags, said in (
        (["--model", str(no_weights)], "no_weights"),
        (["--heads", str(tmp_path / "small_heads")], "hidden"),
        (["--static-tree", str(tmp_path / "tree.json")], "tree"),
    ):
        assert said in one_line_refusal(run_medusa, *model_flags, "--port", "0", *flags)
