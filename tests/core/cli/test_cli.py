"""The core's commands as people and scripts run them, on the tiny model."""

import io
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from medusa_core import __version__
from medusa_core.cli import chat as chat_command
from medusa_core.cli.chat import Conversation
from medusa_core.cli.main import app, main
from medusa_core.cli.options import with_options
from medusa_core.config import EngineConfig
from medusa_core.engine.answer import AnswerStats
from medusa_core.engine.engine import Engine
from medusa_core.engine.outputs import FinishReason
from medusa_core.errors import RequestError
from medusa_core.sampling_params import DraftSourceName, SamplingParams, SpeculationParams

GREEDY = SamplingParams(temperature=0.0, max_tokens=40)


@pytest.fixture(scope="module")
def engine(tiny_model_dir: Path) -> Engine:
    return Engine.from_pretrained(tiny_model_dir, config=EngineConfig(dtype="float32", measure=False))


@pytest.fixture
def invoke(tiny_model_dir: Path):
    """Run a command in this process on the tiny model in float32; returns the result."""

    def call(command: str, *arguments: str, stdin: str | None = None):
        model = ["--model", str(tiny_model_dir), "--dtype", "float32"]
        return CliRunner().invoke(app, [command, *arguments, *model], input=stdin, catch_exceptions=False)

    return call


def run_medusa(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    code = "from medusa_core.cli.main import main; main()"
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=120, check=False)


def test_help_names_the_commands_and_imports_no_torch():
    code = (
        "import sys, medusa_core.cli.main\n"
        "try: medusa_core.cli.main.main()\n"
        "finally: assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    command = [sys.executable, "-c", code, "--help"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    for name in ("chat", "generate", "bench", "distill", "train", "calibrate", "convert"):
        assert name in result.stdout


def test_version():
    assert CliRunner().invoke(app, ["--version"]).output == f"{__version__}\n"


def test_mistakes_are_one_line_and_exit_code_1(tmp_path):
    result = run_medusa("generate", "hello", "--model", str(tmp_path / "missing"))
    assert result.returncode == 1
    assert "missing" in result.stderr
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--temperature", "-1"], "temperature must be between"),
        (["--dtype", "int3"], "dtype must be one of"),
        (["--tree", "nope"], "tree 'nope'"),
        (["--raw", "--system", "x"], "--raw leaves out"),
        (["--chat-template", "nope"], "chat template 'nope'"),
        # What the HTTP API refuses too.
        (["--temperature", "2.1"], "temperature must be between 0 and 2"),
        (["--top-k", str(2**31)], "top_k must be at most"),
        (["--max-tokens", "0"], "max_tokens must be at least 1"),
        (["--seed", str(2**64)], "seed must fit"),
        (["--stop", ""], "texts that are not empty"),
        (["--stop", "x" * 257], "at most 256 characters"),
        (["--stop", "a", "--stop", "b", "--stop", "c", "--stop", "d", "--stop", "e"], "at most 4 texts"),
    ],
)
def test_bad_options_are_named(tiny_model_dir, monkeypatch, capsys, options, message):
    monkeypatch.setattr(
        sys, "argv", ["medusa", "generate", "hello", "--model", str(tiny_model_dir), *options]
    )
    with pytest.raises(SystemExit) as exit_info:
        main()
    assert exit_info.value.code == 1
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert message in shown


def test_generate_prints_what_the_engine_decodes(engine, invoke):
    expected = engine.chat([{"role": "user", "content": "Hello"}], GREEDY).text
    result = invoke("generate", "Hello", "--temperature", "0", "--max-tokens", "40")
    assert result.exit_code == 0
    assert result.stdout == expected + "\n"
    assert "tokens/step" in result.stderr


def test_generate_json_reports_text_and_figures(engine, invoke):
    expected = engine.stream("Hello", GREEDY).read()
    result = invoke(
        "generate", "-", "--raw", "--json", "--temperature", "0", "--max-tokens", "40", stdin="Hello"
    )
    report = json.loads(result.stdout)
    assert report["text"] == expected.text
    assert report["finish_reason"] == expected.finish_reason
    assert report["prompt_tokens"] == len(engine.tokenizer.encode("Hello"))
    assert report["completion_tokens"] == expected.stats.tokens
    assert report["tokens_per_step"] == 1.0


def test_generate_takes_seed_and_system_message(invoke):
    texts = {
        name: json.loads(invoke("generate", "Hello", "--json", "--temperature", "2", *options).stdout)["text"]
        for name, options in {
            "seven": ["--seed", "7"],
            "again": ["--seed", "7"],
            "eight": ["--seed", "8"],
            "system": ["--seed", "7", "--system", "Be brief."],
        }.items()
    }
    assert texts["seven"] == texts["again"]
    assert len(set(texts.values())) == 3


def test_generate_ends_before_a_stop_text(engine, invoke):
    whole = engine.stream("Hello", GREEDY).read().text
    stop = whole[5:8]
    options = ["--raw", "--json", "--temperature", "0", "--max-tokens", "40"]
    report = json.loads(invoke("generate", "Hello", *options, "--stop", "@@@@", "--stop", stop).stdout)
    assert (report["text"], report["finish_reason"]) == (whole[: whole.index(stop)], "stop")


def test_a_seed_of_our_own_is_told_and_repeats_the_answer(invoke):
    options = ["--json", "--temperature", "2", "--max-tokens", "20"]
    first = json.loads(invoke("generate", "Hello", *options).stdout)
    again = json.loads(invoke("generate", "Hello", *options, "--seed", str(first["seed"])).stdout)
    other = json.loads(invoke("generate", "Hello", *options).stdout)
    assert again["text"] == first["text"]
    assert other["seed"] != first["seed"]


@pytest.mark.parametrize("command", ["generate", "chat", "bench"])
def test_every_draft_source_is_offered(command):
    shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"}).output
    assert "heads|ngram|both" in shown


def test_speculation_options_reach_request_and_engine():
    app, seen = typer.Typer(), []

    @app.command()
    @with_options
    def command(speculation: SpeculationParams, config: EngineConfig) -> None:
        """Does nothing."""
        seen.append((speculation, config))

    arguments = ["--source", "ngram", "--tree", "static", "--tree-nodes", "9", "--dtype", "float32"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    speculation = SpeculationParams(source=DraftSourceName.NGRAM, tree="static")
    assert seen == [(speculation, EngineConfig(dtype="float32", tree_nodes=9, compile="off"))]


def test_chat_reads_turns_from_a_pipe(engine, invoke):
    conversation = Conversation(engine, GREEDY, None)
    answers = []
    for text in ("Hello", "Book a table."):
        pieces: list[str] = []
        conversation.answer(text, pieces.append)
        answers.append("".join(pieces))
    conversation.reset()
    conversation.answer("Hello", lambda piece: None)
    turns = "Hello\n\nBook a table.\n/reset\nHello\n/stats\n/quit\nnever\n"
    result = invoke("chat", "--temperature", "0", "--max-tokens", "40", stdin=turns)
    assert result.exit_code == 0
    shown, stats = result.stdout.split(f"{answers[0]}\n{answers[1]}\n{answers[0]}\n")
    assert shown == ""
    assert "tokens/step" in stats
    assert result.stderr.count("tokens/step") == 3


def test_each_turn_has_the_next_seed_and_the_whole_conversation(engine):
    params = SamplingParams(temperature=1.0, max_tokens=20, seed=2**64 - 1)
    conversation = Conversation(engine, params, "Be brief.")
    first, second = [], []
    conversation.answer("Hello", first.append)
    conversation.answer("Hello", second.append)
    roles = [message["role"] for message in conversation.messages]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    expected = engine.chat(conversation.messages[:4], SamplingParams(max_tokens=20, seed=0))
    assert "".join(second) == expected.text
    assert conversation.stats.tokens > 0


def test_a_refused_message_leaves_the_conversation_as_it_was(engine):
    conversation = Conversation(engine, GREEDY, None)
    conversation.answer("Hello", lambda piece: None)
    before = list(conversation.messages)
    with pytest.raises(RequestError, match="tokens"):
        conversation.answer("too long " * 300, lambda piece: None)
    assert conversation.messages == before
    assert engine.num_free_slots == 1


def test_ctrl_c_ends_an_answer_early_and_keeps_what_was_said(engine):
    conversation = Conversation(engine, GREEDY, None)
    said: list[str] = []
    before = signal.getsignal(signal.SIGINT)  # ignored where tests run in the background

    def write(piece: str) -> None:
        said.append(piece)
        signal.raise_signal(signal.SIGINT)

    stats = conversation.answer("Hello", write)
    assert len(said) == 1
    assert conversation.messages[-1] == {"role": "assistant", "content": said[0]}
    assert stats.finish_reason is None
    assert engine.num_free_slots == 1
    assert signal.getsignal(signal.SIGINT) is before


def test_chat_at_a_terminal(engine, monkeypatch, capsys):
    lines = iter(["/help", "", "Hello", "/stats", "x " * 400, "/reset", "/quit"])

    class Terminal(Console):
        def input(self, *_args: object, **_keywords: object) -> str:
            return next(lines)

    screen = io.StringIO()
    monkeypatch.setattr(chat_command, "Console", lambda **_options: Terminal(file=screen, width=200))
    chat_command._talk(Conversation(engine, GREEDY, None))
    shown = screen.getvalue()
    for text in (
        "Ctrl-C ends an answer",
        "tokens/step",
        "parameters",
        "(/reset starts",
        "A new conversation.",
    ):
        assert text in shown
    assert next(lines, None) is None
    assert capsys.readouterr().out.strip()


def test_chat_at_a_terminal_ends_with_its_input(engine, monkeypatch):
    class Closed(Console):
        def input(self, *_args: object, **_keywords: object) -> str:
            raise EOFError

    monkeypatch.setattr(chat_command, "Console", lambda **_options: Closed(file=io.StringIO()))
    chat_command._talk(Conversation(engine, GREEDY, None))


def test_commands_from_a_pipe_are_commands(engine, invoke):
    """They must not reach the model as messages; a wrong one gets help, as at a terminal."""
    result = invoke("chat", stdin="/help\n/nope\n/reset\n/exit\nnever\n")
    assert result.exit_code == 0
    assert result.stdout.split() == f"{chat_command.HELP} {chat_command.HELP}".split()
    assert result.stderr == "A new conversation.\n"


def test_estimated_speedup_needs_a_measured_baseline():
    stats = AnswerStats(decode_tokens=6, decode_steps=2, decode_seconds=2.0)
    assert stats.estimated_speedup is None
    assert "plain" not in stats.summary()
    stats.add(AnswerStats(baseline_seconds=4.0, finish_reason=FinishReason.LENGTH))
    assert stats.estimated_speedup == 2.0
    assert (stats.tokens_per_second, stats.tokens_per_step) == (3.0, 3.0)
    assert "about 2.0x plain decoding" in stats.summary()
