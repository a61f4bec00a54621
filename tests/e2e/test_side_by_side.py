"""`benchmarks/side_by_side.py`: a live server beside itself, and the arithmetic on answers made by hand."""

import json

import pytest
import typer
from side_by_side import compare, main
from streamed import Answer
from typer.testing import CliRunner

pytestmark = pytest.mark.e2e


def run(*arguments):
    app = typer.Typer()
    app.command()(main)
    return CliRunner().invoke(app, list(arguments))


def test_a_server_beside_itself(live, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    contents = ("Hello", "I need a restaurant")
    rows = [{"messages": [{"role": "user", "content": content}]} for content in contents]
    prompts.write_text("\n".join(map(json.dumps, rows)))
    arguments = ["--server", f"one={live.url}", "--server", f"two={live.url},{live.model}"]
    arguments += ["--prompts", str(prompts), "--repeats", "2", "--max-tokens", "9"]
    arguments += ["--temperature", "0", "--temperature", "0.7", "--json", str(tmp_path / "out.json")]
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["settings"] == {"prompts": 2, "repeats": 2, "max_tokens": 9, "pause": 0.0}
    assert list(report["temperatures"]) == ["0", "0.7"]
    for results in report["temperatures"].values():
        assert list(results) == ["one", "two"]
        for measured in results.values():
            assert measured["same_texts"] == 1.0
            assert measured["tokens"] == 18
            assert all(value > 0 for value in measured.values())
    assert "one " in result.output


@pytest.mark.parametrize("server", ["http://127.0.0.1", "name=127.0.0.1:8000"])
def test_a_server_without_name_or_url_is_refused(server):
    result = run("--server", server)
    assert result.exit_code == 2
    assert "is not NAME=URL" in result.output


def test_a_refused_request_ends_the_run(live):
    result = run("--server", f"one={live.url},another-model")
    assert result.exit_code == 1
    assert "404" in str(result.output) + str(result.exception)


def answer(text="abcdefgh", tokens=5, *, stopped=True, first_text=2, first_seconds=1.0, seconds=3.0):
    return Answer(text, tokens, stopped, first_text, first_seconds, seconds)


def test_rates_are_all_tokens_by_all_seconds():
    fast = [[answer()], [answer("ij", 4, stopped=False, first_text=1)]]
    slow = [[answer(seconds=5.0)], [answer("kl", 4, stopped=False, first_text=2, seconds=7.0)]]
    results = compare({"fast": fast, "slow": slow})
    assert results["fast"]["tokens_per_second"] == 9 / 6
    assert results["fast"]["decode_tokens_per_second"] == (5 * 6 / 8 + 4 / 2) / 4
    assert results["slow"]["tokens_per_second_ratio"] == (9 / 12) / (9 / 6)
    assert results["slow"]["decode_tokens_per_second"] == (5 * 6 / 8) / 10
    assert results["slow"]["same_texts"] == 0.5


def test_seconds_are_medians_of_a_prompts_repeats():
    results = compare({"one": [[answer(seconds=3.0), answer(seconds=90.0), answer(seconds=4.0)]]})
    assert results["one"]["tokens_per_second"] == 5 / 4


def test_a_stop_token_counts_for_every_server_or_none():
    """Some servers leave it out of `usage`; that shows by what others count for the same text."""
    counting = [[answer(tokens=6)], [answer("ij", 3)], [answer("long", 8, stopped=False)]]
    leaving_out = [[answer(tokens=5)], [answer("other", 9)], [answer("long", 8, stopped=False)]]
    results = compare({"counting": counting, "leaving_out": leaving_out})
    assert results["counting"]["tokens"] == 6 + 3 + 8
    assert results["leaving_out"]["tokens"] == 6 + 10 + 8
