"""Seed dialogues asked again by the tiny model, and what a run leaves on disk."""

import asyncio
import gzip
import io
import json
import logging
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from medusa_core.cli.main import app
from medusa_core.distillation.answers import EngineAnswerer, Reply, RowError
from medusa_core.distillation.journal import Journal
from medusa_core.distillation.run import Distillation, DistillProgress, DistillReport, answer_seed, reask
from medusa_core.distillation.seeds import SeedDialogue, Seeds, digest, load_seeds
from medusa_core.distillation.settings import DistillSettings, EndpointSettings
from medusa_core.engine.outputs import FinishReason
from medusa_core.errors import ConfigError, DataError, MedusaError
from medusa_core.sampling_params import SamplingParams
from medusa_core.status_bar import StatusBar
from medusa_core.text.rows import read_dialogue

RECORD = {"format": 1, "seed": 0}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def write_rows(path: Path, rows: Sequence[object]) -> Path:
    text = "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def read_rows(path: Path) -> dict[int, list[dict[str, str]]]:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows = {line["seed_row"]: line["messages"] for line in lines}
    assert len(rows) == len(lines), "a row twice"
    return rows


def settings_for(tmp_path: Path, **changes: object) -> DistillSettings:
    values: dict[str, object] = {"data": (tmp_path / "seeds.jsonl",), "out": tmp_path / "out.jsonl"}
    return DistillSettings(**(values | changes))  # type: ignore[arg-type]


class Scripted:
    """Answers by the last user message, and remembers what it was asked."""

    def __init__(self, replies: dict[str, Reply | MedusaError]) -> None:
        self.replies = replies
        self.asked: list[list[dict[str, str]]] = []

    async def answer(self, messages: Sequence[dict[str, str]], seed: int) -> Reply:
        self.asked.append([dict(message) for message in messages])
        reply = self.replies.get(messages[-1]["content"], Reply("yes", tokens=1))
        if isinstance(reply, MedusaError):
            raise reply
        return reply


def seeds_of(*texts: str) -> Seeds:
    return Seeds(tuple(SeedDialogue(i, f"f:{i}", ((user(t),),)) for i, t in enumerate(texts)), 0)


def run(seeds: Seeds, journal: Journal, answerer: Scripted, settings: DistillSettings) -> DistillReport:
    progress = DistillProgress(StatusBar(Console(file=io.StringIO()), "asking"))
    return asyncio.run(Distillation(seeds, journal, answerer, settings, progress).run())


def test_seed_rows_become_groups_to_answer(tmp_path: Path) -> None:
    rows = [
        {"messages": [system("s"), user("a"), assistant("x"), user("b"), user("c")]},
        {"conversations": [{"from": "gpt", "value": "hi"}, {"from": "human", "value": "d"}], "id": 3},
        {"messages": [system("s"), assistant("opening"), user("e"), assistant("y")]},
    ]
    first = write_rows(tmp_path / "a.jsonl.gz", rows[:2])
    second = write_rows(tmp_path / "b.jsonl", ["", rows[2]])
    seeds = load_seeds([first, second])
    assert [d.groups for d in seeds.dialogues] == [
        ((system("s"), user("a")), (user("b"), user("c"))),
        ((user("d"),),),
        ((system("s"), user("e")),),
    ]
    assert [(d.row, d.origin) for d in seeds.dialogues][1:] == [(1, f"{first}:2"), (2, f"{second}:2")]
    assert load_seeds([first, second], limit=1).dialogues == seeds.dialogues[:1]
    sharegpt = tmp_path / "sharegpt.json"
    sharegpt.write_text(json.dumps(rows, indent=1))
    assert [d.groups for d in load_seeds([sharegpt]).dialogues] == [d.groups for d in seeds.dialogues]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{nonsense", "not JSON"),
        ("[1]", "not a JSON object"),
        ({"messages": [{"role": "user"}]}, "lacks a string role or content"),
        ({"conversations": [{"from": "human", "text": "a"}]}, "lacks a string from or value"),
        ({"conversations": [{"from": "bard", "value": "a"}]}, "from 'bard'"),
        ({"messages": [user("a"), {"role": "tool", "content": "{}"}]}, "cannot ask a 'tool' message"),
        ({"messages": [system("s"), assistant("x")]}, "no user message"),
        ({"messages": []}, "an empty one"),
        ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "half a surrogate pair"),
    ],
)
def test_bad_seed_rows(tmp_path: Path, caplog: pytest.LogCaptureFixture, row: object, message: str) -> None:
    path = write_rows(tmp_path / "seeds.jsonl", [row, {"messages": [user("good")]}])
    seeds = load_seeds([path])
    assert (seeds.bad_rows, [d.row for d in seeds.dialogues]) == (1, [1])
    assert f"{path}:1" in caplog.text
    assert message in caplog.text
    with pytest.raises(DataError, match=f"seeds.jsonl:1: .*{message}"):
        load_seeds([path], strict=True)


def test_seed_files_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read"):
        load_seeds([tmp_path / "missing.jsonl"])
    with pytest.raises(DataError, match="no usable seed dialogue"):
        load_seeds([write_rows(tmp_path / "empty.jsonl", ["", "{}"])])
    broken = tmp_path / "broken.jsonl.gz"
    broken.write_bytes(gzip.compress(b'{"messages": []}\n' * 99)[:-12])
    with pytest.raises(DataError, match="cannot read"):
        load_seeds([broken])
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes('{"messages": "é"}\n'.encode("latin-1"))
    with pytest.raises(DataError, match="cannot read"):
        load_seeds([latin])


def test_each_answer_conditions_the_next_turn(tmp_path: Path) -> None:
    answerer = Scripted({"a": Reply("first", tokens=2), "c": Reply("second", tokens=3)})
    dialogue = SeedDialogue(0, "f:1", ((system("s"), user("a")), (user("b"), user("c")), (user("d"),)))
    result = asyncio.run(reask(dialogue, answerer, settings_for(tmp_path, turns=2)))
    expected = [system("s"), user("a"), assistant("first"), user("b"), user("c"), assistant("second")]
    assert answerer.asked == [expected[:2], expected[:5]]
    assert list(result.messages) == expected
    assert (result.answers, result.tokens, result.cut) == (2, 5, None)


@pytest.mark.parametrize("reply", [Reply("half an ans", cut="length"), Reply(" \n")])
def test_a_dialogue_ends_before_an_answer_that_does_not(tmp_path: Path, reply: Reply) -> None:
    dialogue = SeedDialogue(0, "f:1", ((user("a"),), (user("b"),), (user("c"),)))
    answerer = Scripted({"b": reply})
    result = asyncio.run(reask(dialogue, answerer, settings_for(tmp_path)))
    assert list(result.messages) == [user("a"), assistant("yes")]
    assert result.cut == (reply.cut or "empty answer")
    assert len(answerer.asked) == 2
    nothing = asyncio.run(reask(SeedDialogue(0, "f:1", ((user("b"),),)), answerer, settings_for(tmp_path)))
    assert nothing.messages == ()


def test_seeds_of_answers_differ_by_run_row_and_turn() -> None:
    seeds = {answer_seed(s, r, t) for s in (0, 1, 11) for r in (0, 1, 11) for t in (0, 1, 11)}
    assert len(seeds) == 27
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_what_became_of_each_row(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = settings_for(tmp_path, concurrency=3)
    answerer = Scripted({"long": Reply("a b", cut="length"), "bad": RowError("HTTP 500")})
    with Journal(settings.out, RECORD) as journal:
        report = run(seeds_of("a", "long", "bad", "d"), journal, answerer, settings)
    assert (report.total, report.written, report.dropped, report.failed) == (4, 2, 1, 1)
    assert "f:2 failed: HTTP 500" in caplog.text
    assert set(read_rows(settings.out)) == {0, 3}
    dropped = (tmp_path / "out.jsonl.dropped.jsonl").read_text()
    assert json.loads(dropped) == {"seed_row": 1, "reason": "length"}
    # Again: only what failed is asked.
    answerer = Scripted({})
    with Journal(settings.out, RECORD) as journal:
        report = run(seeds_of("a", "long", "bad", "d"), journal, answerer, settings)
    assert answerer.asked == [[user("bad")]]
    assert (report.finished, report.written, report.failed, report.handled) == (3, 1, 0, 4)
    assert set(read_rows(settings.out)) == {0, 2, 3}


def test_a_run_in_which_everything_fails_stops(tmp_path: Path) -> None:
    texts = [str(i) for i in range(40)]
    answerer = Scripted({text: RowError("down") for text in texts[3:]})
    settings = settings_for(tmp_path)
    with (
        Journal(settings.out, RECORD) as journal,
        pytest.raises(DataError, match="10 failures in a row, the last: down"),
    ):
        run(seeds_of(*texts), journal, answerer, settings)
    assert len(answerer.asked) == 13
    assert set(read_rows(settings.out)) == {0, 1, 2}


def test_an_error_for_good_ends_the_run_at_once(tmp_path: Path) -> None:
    answerer = Scripted({"b": ConfigError("no such model")})
    settings = settings_for(tmp_path, concurrency=2)
    with Journal(settings.out, RECORD) as journal, pytest.raises(ConfigError, match="no such model"):
        run(seeds_of("a", "b", "c", "d"), journal, answerer, settings)
    assert 0 in read_rows(settings.out)


def test_a_half_written_line_is_cut_off(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out.jsonl"
    with Journal(out, RECORD) as journal:
        journal.add(0, [user("é" * 80_000), assistant("b")])
        journal.drop(5, "length")
    whole = out.read_bytes()
    half = json.dumps({"seed_row": 7, "messages": [user("x" * 200_000)]}).encode()
    out.write_bytes(whole + half)
    with Journal(out, RECORD) as journal:
        assert journal.done == {0, 5}
        journal.add(7, [user("a"), assistant("b")])
    assert out.read_bytes().startswith(whole)
    assert set(read_rows(out)) == {0, 7}
    out.write_bytes(half)  # nothing but half a line
    with Journal(out, RECORD) as journal:
        assert journal.done == {5}
    assert out.read_bytes() == b""


def test_other_settings_or_files_are_not_resumed(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with Journal(out, RECORD) as journal:
        journal.add(0, [user("a"), assistant("b")])
        with pytest.raises(DataError, match="being written by another run"):
            Journal(out, RECORD)
    with pytest.raises(ConfigError, match=r"other settings \(seed: 0 then, 1 now\)"):
        Journal(out, RECORD | {"seed": 1})
    record = tmp_path / "out.jsonl.settings.json"
    for content, message in (("[]", "is not a JSON object"), ("[" * 100_000, "cannot read")):
        record.write_text(content)
        with pytest.raises(ConfigError, match=message):
            Journal(out, RECORD)
    record.unlink()
    with pytest.raises(ConfigError, match="not a run to resume"):
        Journal(out, RECORD)
    record.write_text(json.dumps(RECORD))
    out.write_text('{"messages": []}\n')
    with pytest.raises(DataError, match=r"out.jsonl:1 is damaged"):
        Journal(out, RECORD)
    with pytest.raises(DataError, match="cannot write"):
        Journal(out / "below", RECORD)


def test_a_full_disk_is_an_error_of_one_line() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    from medusa_core.distillation.journal import _append

    with Path("/dev/full").open("ab", buffering=0) as file, pytest.raises(DataError, match="No space left"):
        _append(file, {"seed_row": 0})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": ()}, "data"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": 2.5}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"seed": -1}, "seed"),
        *[({name: 0}, name) for name in ("max_tokens", "turns", "limit", "concurrency")],
    ],
)
def test_settings_are_checked(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings_for(tmp_path, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"url": "localhost:8000"}, "endpoint must be an http"),
        ({"model": ""}, "endpoint model"),
        ({"attempts": 0}, "attempts"),
        ({"retry_delay": 0.0}, "retry_delay"),
        ({"timeout": float("inf")}, "timeout"),
        ({"api_key": "schlüssel"}, "API key"),
    ],
)
def test_endpoint_settings_are_checked(changes: dict[str, object], message: str) -> None:
    values: dict[str, object] = {"url": "http://127.0.0.1/v1", "model": "m"}
    with pytest.raises(ConfigError, match=message):
        EndpointSettings(**(values | changes))  # type: ignore[arg-type]


def test_the_key_is_not_shown() -> None:
    assert "secret" not in repr(EndpointSettings(url="http://h/v1", model="m", api_key="secret"))


def test_our_engine_answers_as_it_would_elsewhere(tmp_path: Path, build_engine, random_heads) -> None:
    """Same text with heads and without, from sampling that the model's own defaults complete."""
    plain, drafted = build_engine(None), build_engine(random_heads)
    settings = settings_for(tmp_path, temperature=0.7, max_tokens=30)
    messages = [user("a cheap restaurant")]
    replies = []
    for seed in range(12):
        reply = asyncio.run(EngineAnswerer(plain, settings).answer(messages, seed))
        assert reply == asyncio.run(EngineAnswerer(drafted, settings).answer(messages, seed))
        answer = plain.chat(messages, SamplingParams(temperature=0.7, top_p=0.95, max_tokens=30, seed=seed))
        assert reply.text == answer.text
        assert (reply.cut is None) is (answer.finish_reason is FinishReason.STOP)
        replies.append(reply)
    assert len({reply.text for reply in replies}) > 6
    assert {reply.cut for reply in replies} == {None, "length"}


def test_our_engine_on_what_it_cannot_answer(tmp_path: Path, build_engine) -> None:
    answerer = EngineAnswerer(build_engine(None, max_length=64), settings_for(tmp_path, top_p=0.5))
    reply = asyncio.run(answerer.answer([user("word " * 60)], 0))
    assert reply.cut is not None
    assert "outgrow the context" in reply.cut
    with pytest.raises(RowError, match="unknown role"):
        asyncio.run(answerer.answer([{"role": "tool", "content": "a"}], 0))


def invoke(tiny_model_dir: Path, data: Path, out: Path, *arguments: str) -> str:
    options = ["--model", str(tiny_model_dir), "--dtype", "float32", "--max-length", "128"]
    command = ["distill", "--data", str(data), "--out", str(out), *options, *arguments]
    result = CliRunner().invoke(app, command, catch_exceptions=False, env={"COLUMNS": "200"})
    assert result.exit_code == 0
    return result.output


def test_command_makes_rows_for_train_and_resumes(
    tiny_model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"messages": [user(f"hello {i}"), assistant("no"), user("more")]} for i in range(16)]
    data, out = write_rows(tmp_path / "seeds.jsonl", [*rows, "{"]), tmp_path / "out.jsonl"
    quick = ("--max-tokens", "48", "--temperature", "0.9")
    shown = invoke(tiny_model_dir, data, out, *quick, "--limit", "4")
    assert "4 seed dialogues: 0 finished before" in shown
    first = out.read_text()
    shown = invoke(tiny_model_dir, data, out, *quick)
    assert "16 seed dialogues: 4 finished before" in shown
    assert "1 rows skipped" in shown
    assert "16 of 16 dialogues" in caplog.text  # no terminal here
    assert out.read_text().startswith(first)
    written = read_rows(out)
    assert 2 < len(written) < 16  # some of its answers end, others do not
    for row, messages in written.items():
        assert read_dialogue({"messages": messages}) == messages
        assert messages[0] == rows[row]["messages"][0]
        assert messages[-1]["role"] == "assistant"
    again = tmp_path / "again.jsonl"
    invoke(tiny_model_dir, data, again, *quick)
    assert read_rows(again) == written
    before = out.read_bytes()
    # Nothing left to do: no model is loaded, not even one that is gone.
    record = tmp_path / "out.jsonl.settings.json"
    record.write_text(record.read_text().replace(str(tiny_model_dir), "gone"))
    shown = invoke(Path("gone"), data, out, *quick)
    assert "16 finished before, 0 written" in shown
    assert out.read_bytes() == before
    with pytest.raises(ConfigError, match="temperature: 0.9 then, 0.3 now"):
        invoke(Path("gone"), data, out, "--max-tokens", "48")
    write_rows(data, rows[1:])
    with pytest.raises(ConfigError, match="data: "):
        invoke(Path("gone"), data, out, *quick)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--concurrency", "4"], "--concurrency needs --endpoint"),
        (["--endpoint-model", "m"], "--endpoint-model needs --endpoint"),
        (["--endpoint", "http://h/v1", "--model", "m"], "--model has no effect with --endpoint"),
        (["--endpoint", "http://h/v1"], "endpoint model must have a name"),
        (
            ["--endpoint", "http://h/v1", "--endpoint-model", "m", "--api-key-env", "NO_SUCH_KEY"],
            "NO_SUCH_KEY, which should hold the API key, is not set",
        ),
        (["--strict"], "seeds.jsonl:1: not JSON"),
    ],
)
def test_mistakes(tmp_path: Path, arguments: list[str], message: str) -> None:
    data = write_rows(tmp_path / "seeds.jsonl", ["{", {"messages": [user("a")]}])
    command = ["distill", "--data", str(data), "--out", str(tmp_path / "out.jsonl"), *arguments]
    with pytest.raises(MedusaError, match=message):
        CliRunner().invoke(app, command, catch_exceptions=False)


def test_progress_on_a_terminal() -> None:
    screen = io.StringIO()
    with StatusBar(Console(file=screen, force_terminal=True, width=120), "asking") as bar:
        DistillProgress(bar).show(DistillReport(total=7, written=3, answers=5, failed=1))
    assert "4/7" in screen.getvalue()
    assert "5 answers" in screen.getvalue()


def test_progress_elsewhere_is_a_line_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "medusa_core")
    screen = io.StringIO()
    with StatusBar(Console(file=screen), "asking") as bar:
        progress = DistillProgress(bar)
        progress.show(DistillReport(total=3, written=1))
        progress.show(DistillReport(total=3, written=3, answers=4))
    assert [record.message.partition(" · ")[0] for record in caplog.records] == ["3 of 3 dialogues"]
    assert screen.getvalue() == ""


def test_an_endpoint_needs_no_torch() -> None:
    code = (
        "import sys, medusa_core.cli.distill, medusa_core.distillation.endpoint\n"
        "import medusa_core.distillation.run\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], timeout=60, check=True)


def test_parquet_seeds(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "seeds.parquet"
    parquet.write_table(pyarrow.table({"messages": [[user("a"), assistant("x")], [user("b")]]}), path)
    assert [d.groups for d in load_seeds([path]).dialogues] == [((user("a"),),), ((user("b"),),)]
    assert digest([path, "owner/name:train"])[1] == {"name": "owner/name:train"}
