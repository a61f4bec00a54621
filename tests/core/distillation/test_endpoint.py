"""`medusa distill` against a real HTTP server on loopback that misbehaves as it is told."""

import asyncio
import json
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from medusa_core.cli.main import app
from medusa_core.distillation.answers import Reply, RowError
from medusa_core.distillation.endpoint import EndpointAnswerer, open_client, retry_after
from medusa_core.distillation.settings import DistillSettings, EndpointSettings
from medusa_core.errors import ConfigError, DataError

WAIT_SECONDS = 60.0
Script = Callable[[dict[str, Any], int], tuple[int, dict[str, str], object]]
MESSAGES = [{"role": "user", "content": "hello"}]


def completion(text: str, finish_reason: str = "stop") -> tuple[int, dict[str, str], object]:
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}
    return 200, {}, {"choices": [choice], "usage": {"completion_tokens": len(text.split())}}


def refusal(status: int, message: str = "no", **headers: str) -> tuple[int, dict[str, str], object]:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return status, names, {"error": {"message": message, "code": None}}


class ChatServer:
    """Answers POSTs by a script of (body, how often this last message was asked before)."""

    def __init__(self) -> None:
        self.script: Script = lambda body, again: completion(f"I heard {body['messages'][-1]['content']}.")
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.asked: Counter[str] = Counter()
        self.lock = threading.Lock()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with owner.lock:
                    key = body["messages"][-1]["content"]
                    again = owner.asked[key]
                    owner.asked[key] += 1
                    owner.bodies.append(body)
                    owner.headers.append(dict(self.headers))
                    owner.paths.append(self.path)
                status, headers, answer = owner.script(body, again)
                if status == 0:  # hang up
                    self.close_connection = True
                    return
                content = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *args: object) -> None:
                """Nothing on standard error."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def chat_server() -> Iterator[ChatServer]:
    server = ChatServer()
    yield server
    server.stop()


def ask(server: ChatServer, *, attempts: int = 3, api_key: str | None = None, **changes: Any) -> Reply:
    endpoint = EndpointSettings(
        url=server.url, model="parrot", api_key=api_key, attempts=attempts, retry_delay=0.01, timeout=20
    )
    settings = DistillSettings(data=(Path("d"),), out=Path("o"), **changes)

    async def go() -> Reply:
        async with open_client(endpoint, 2) as client:
            return await EndpointAnswerer(client, endpoint, settings).answer(MESSAGES, 5)

    return asyncio.run(go())


def test_the_request_and_the_answer(chat_server: ChatServer) -> None:
    reply = ask(chat_server, api_key="key-1", top_p=0.9, max_tokens=7)
    assert reply == Reply("I heard hello.", tokens=3)
    assert chat_server.paths == ["/v1/chat/completions"]
    assert chat_server.bodies == [
        {
            "model": "parrot",
            "messages": MESSAGES,
            "temperature": 0.3,
            "max_tokens": 7,
            "top_p": 0.9,
            "seed": 5,
        }
    ]
    headers = {name.lower(): value for name, value in chat_server.headers[0].items()}
    assert headers["authorization"] == "Bearer key-1"
    ask(chat_server)
    assert "top_p" not in chat_server.bodies[1]
    assert "authorization" not in {name.lower() for name in chat_server.headers[1]}


@pytest.mark.parametrize(
    "trouble",
    [
        refusal(429),
        refusal(429, Retry_After="0"),
        refusal(503, Retry_After="nonsense"),
        refusal(500),
        (502, {}, "<html>bad gateway</html>"),
        (0, {}, ""),
        (200, {}, "no json"),
        (200, {}, "[" * 100_000),
        (500, {}, "[" * 100_000),
        (200, {}, {"choices": []}),
        (200, {}, {"choices": [{"message": {"content": 5}, "finish_reason": "stop"}]}),
        (200, {}, '{"choices": [{"message": {"content": "\\ud800"}, "finish_reason": "stop"}]}'),
    ],
    ids=lambda trouble: f"{trouble[0]}-{str(trouble[2])[:40]}",
)
def test_what_passes_is_tried_again(chat_server: ChatServer, trouble: tuple[int, dict, object]) -> None:
    chat_server.script = lambda body, again: trouble if again < 2 else completion("well")
    assert ask(chat_server).text == "well"
    assert chat_server.asked["hello"] == 3
    chat_server.script = lambda body, again: trouble
    with pytest.raises(RowError, match=r"\(2 attempts\)"):
        ask(chat_server, attempts=2)
    assert chat_server.asked["hello"] == 5


def test_what_does_not_pass_is_not_tried_again(chat_server: ChatServer) -> None:
    chat_server.script = lambda body, again: refusal(400, "max_tokens is\n too large")
    with pytest.raises(RowError, match="^HTTP 400: max_tokens is too large$"):
        ask(chat_server)
    chat_server.script = lambda body, again: (422, {}, '["odd"]')
    with pytest.raises(RowError, match="HTTP 422: .*odd"):
        ask(chat_server)
    chat_server.script = lambda body, again: (400, {}, {"error": "plain words"})
    with pytest.raises(RowError, match="plain words"):
        ask(chat_server)
    assert chat_server.asked["hello"] == 3


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_wrong_key_or_model_ends_everything(chat_server: ChatServer, status: int) -> None:
    chat_server.script = lambda body, again: refusal(status, "who are you?")
    with pytest.raises(ConfigError, match=rf"refuses requests: HTTP {status}: who are you\?"):
        ask(chat_server)
    assert chat_server.asked["hello"] == 1


def test_answers_that_a_limit_cut(chat_server: ChatServer) -> None:
    for reason in ("length", "content_filter"):
        chat_server.script = lambda body, again, reason=reason: completion("half", reason)
        assert ask(chat_server).cut == reason
    chat_server.script = lambda body, again: completion("whole", "eos_token")  # as TGI says it
    assert ask(chat_server).cut is None
    full = {"error": {"message": "maximum context length is 8", "code": "context_length_exceeded"}}
    chat_server.script = lambda body, again: (400, {}, full)
    assert "maximum context length is 8" in (ask(chat_server).cut or "")


def test_retry_after_is_honored(chat_server: ChatServer) -> None:
    moments: list[float] = []

    def script(body: dict[str, Any], again: int) -> tuple[int, dict[str, str], object]:
        moments.append(time.monotonic())
        return completion("well") if again else refusal(429, Retry_After="0.3")

    chat_server.script = script
    assert ask(chat_server).text == "well"
    assert moments[1] - moments[0] >= 0.3  # a longer wait is as right
    chat_server.script = lambda body, again: refusal(429, Retry_After="100000")
    with pytest.raises(RowError, match="asks to wait 100000 s"):
        ask(chat_server)


def test_retry_after_values() -> None:
    assert retry_after(None) is None
    assert retry_after("soon") is None
    assert retry_after("nan") is None
    assert retry_after("-3") == 0.0
    assert retry_after("2.5") == 2.5
    moment = datetime.now(UTC) + timedelta(seconds=3600)
    assert 3000 < (retry_after(format_datetime(moment, usegmt=True)) or 0) <= 3600
    assert retry_after("Wed, 21 Oct 2015 07:28:00 -0000") == 0.0


def test_an_address_that_is_none() -> None:
    endpoint = EndpointSettings(url="http://[::1", model="m")
    with pytest.raises(ConfigError, match="endpoint"):
        open_client(endpoint, 1)


def write_seeds(path: Path, count: int) -> Path:
    rows = [[f"row {i} one", f"row {i} two"] for i in range(count)]
    lines = [
        json.dumps({"conversations": [{"from": "human", "value": text} for text in texts]})
        if i % 2
        else json.dumps(
            {
                "messages": [
                    {"role": "user", "content": texts[0]},
                    {"role": "assistant", "content": "?"},
                    {"role": "user", "content": texts[1]},
                ]
            }
        )
        for i, texts in enumerate(rows)
    ]
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def arguments(server: ChatServer, data: Path, out: Path, *more: str) -> list[str]:
    where = ["--endpoint", server.url, "--endpoint-model", "parrot", "--retry-delay", "0.01"]
    return ["distill", "--data", str(data), "--out", str(out), *where, "--attempts", "2", *more]


def rows_of(out: Path) -> dict[int, list[dict[str, str]]]:
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    rows = {line["seed_row"]: line["messages"] for line in lines}
    assert len(rows) == len(lines)
    return rows


def test_rows_that_fail_make_the_command_fail_and_are_tried_again(
    chat_server: ChatServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PARROT_KEY", "secret")
    data, out = write_seeds(tmp_path / "seeds.jsonl", 9), tmp_path / "out.jsonl"
    normal = chat_server.script
    chat_server.script = lambda body, again: (
        refusal(500) if "row 4 two" in body["messages"][-1]["content"] else normal(body, again)
    )
    command = arguments(chat_server, data, out, "--api-key-env", "PARROT_KEY")
    with pytest.raises(DataError, match="1 dialogues failed: the same command tries them again"):
        CliRunner().invoke(app, command, catch_exceptions=False)
    assert set(rows_of(out)) == {0, 1, 2, 3, 5, 6, 7, 8}
    assert "secret" not in "".join(path.read_text() for path in tmp_path.iterdir())
    chat_server.script = normal
    asked = chat_server.asked.total()
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert (result.exit_code, chat_server.asked.total() - asked) == (0, 2)
    assert rows_of(out)[4] == [
        {"role": "user", "content": "row 4 one"},
        {"role": "assistant", "content": "I heard row 4 one."},
        {"role": "user", "content": "row 4 two"},
        {"role": "assistant", "content": "I heard row 4 two."},
    ]


def test_a_killed_run_loses_and_repeats_nothing(chat_server: ChatServer, tmp_path: Path) -> None:
    """kill -9 in the middle, twice; then the same command finishes the file as an unbroken run writes it."""
    count, concurrency = 40, 3
    data, out = write_seeds(tmp_path / "seeds.jsonl", count), tmp_path / "out.jsonl"
    limit = count // 4

    def until_limit(body: dict[str, Any], again: int) -> tuple[int, dict[str, str], object]:
        while len(out.read_bytes().splitlines()) >= limit:  # let no run get further before it is killed
            time.sleep(0.01)
            if not gate:
                break
        return completion(f"I heard {body['messages'][-1]['content']}.")

    gate = [True]
    chat_server.script = until_limit
    command = arguments(chat_server, data, out, "--concurrency", str(concurrency))
    for _ in range(2):
        code = "from medusa_core.cli.main import main; main()"
        with subprocess.Popen([sys.executable, "-c", code, *command]) as process:
            deadline = time.monotonic() + WAIT_SECONDS
            while not out.exists() or len(out.read_bytes().splitlines()) < limit:
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
        with out.open("ab") as file:
            file.write(b'{"seed_row": 39, "mess')  # as a full disk would leave it
        limit += count // 4
    gate.clear()
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0
    rows = rows_of(out)
    assert set(rows) == set(range(count))
    unbroken = tmp_path / "unbroken.jsonl"
    chat_server.script = lambda body, again: completion(f"I heard {body['messages'][-1]['content']}.")
    before = Counter(chat_server.asked)
    CliRunner().invoke(app, arguments(chat_server, data, unbroken), catch_exceptions=False)
    assert rows_of(unbroken) == rows
    repeated = sum(times - 1 for times in before.values())
    assert repeated <= 2 * 2 * concurrency  # only dialogues in progress at a kill: two turns each
