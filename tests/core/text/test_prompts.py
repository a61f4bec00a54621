"""Reading prompt files: what is taken, what is refused, and that the message names file and line."""

import gzip
import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from medusa_core.errors import DataError
from medusa_core.text.prompts import load_prompts

USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "hello"}


def write_lines(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def test_other_keys_are_ignored_and_the_last_answer_is_dropped(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "p.jsonl",
        {"source": "x", "messages": [USER | {"name": "me"}, ASSISTANT, USER, ASSISTANT]},
        {"messages": [USER]},
    )
    first, second = load_prompts(path)
    assert first.messages == (USER, ASSISTANT, USER)
    assert second.messages == (USER,)
    assert first.origin == f"{path}:1"


def test_blank_lines_are_skipped_but_counted(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text("\n\n" + json.dumps({"messages": [USER]}) + "\n")
    assert [prompt.origin for prompt in load_prompts(path)] == [f"{path}:3"]


def test_gzip_and_limit(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.write(json.dumps({"messages": [USER]}) + "\n")
        file.write("beyond the limit nothing is read\n")
    assert len(load_prompts(path, limit=1)) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "not a JSON object"),
        ("{}", "neither messages nor conversations"),
        ('{"messages": "hi"}', "messages are no list, or an empty one"),
        ('{"messages": []}', "messages are no list, or an empty one"),
        ('{"messages": [{"role": "assistant", "content": "hello"}]}', "no message before"),
        ('{"messages": ["hi"]}', "message 1 lacks a string role or content"),
        ('{"messages": [{"role": "user"}]}', "message 1 lacks a string role or content"),
        ('{"messages": [{"role": 3, "content": "hi"}]}', "message 1 lacks a string role or content"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = write_lines(tmp_path / "p.jsonl", {"messages": [USER]})
    with path.open("a") as file:
        file.write(line)
    with pytest.raises(DataError) as caught:
        load_prompts(path)
    assert f"{path}:2" in str(caught.value)
    assert message in str(caught.value)


def test_bytes_that_are_not_utf8_are_named(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"messages": "\xff"}')
    with pytest.raises(DataError, match="p.jsonl, line 1: not UTF-8"):
        load_prompts(path)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    empty, broken, short = (tmp_path / name for name in ("empty.jsonl", "broken.gz", "short.gz"))
    empty.write_text("\n")
    broken.write_bytes(b"no gzip")
    short.write_bytes(gzip.compress(b'{"messages": []}' * 100)[:30])
    with pytest.raises(DataError, match="holds no prompts"):
        load_prompts(empty)
    for path in (tmp_path / "absent.jsonl", tmp_path, broken, short):
        with pytest.raises(DataError, match="cannot read"):
            load_prompts(path)


def test_the_embedded_prompts_suit_a_chat_template(dialogue_tokenizer: PreTrainedTokenizerFast) -> None:
    prompts = load_prompts()
    assert len(prompts) >= 20
    assert len({json.dumps(prompt.messages) for prompt in prompts}) == len(prompts)
    for prompt in prompts:
        assert prompt.messages[-1]["role"] == "user"
        assert dialogue_tokenizer.apply_chat_template(list(prompt.messages), tokenize=False)
