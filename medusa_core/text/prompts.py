"""Reads prompts for measurements: conversations in JSONL files."""

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medusa_core.config import EMBEDDED_MODEL
from medusa_core.errors import DataError

DEFAULT_PROMPTS = EMBEDDED_MODEL.parent / "bench_prompts.jsonl"


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation that waits for the assistant; `origin` says where it stands, for error messages."""

    messages: tuple[dict[str, str], ...]
    origin: str


def load_prompts(path: Path = DEFAULT_PROMPTS, limit: int | None = None) -> list[Prompt]:
    """Read up to `limit` conversations from a JSONL file (`.gz` too) of objects with `messages`.

    Other keys are ignored and a trailing assistant turn is dropped: that is the answer to be generated.
    Raises `DataError` naming file and line.
    """
    prompts: list[Prompt] = []
    for number, line in _lines(path):
        if limit is not None and len(prompts) >= limit:
            break
        if line.strip():
            prompts.append(_parse(line, f"{path}, line {number}"))
    if not prompts:
        raise DataError(f"{path} holds no prompts")
    return prompts


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                yield number, _decode(line, f"{path}, line {number}")
    except (OSError, EOFError, zlib.error) as error:  # BadGzipFile is an OSError
        raise DataError(f"cannot read prompts from {path}: {error}") from error


def _decode(line: bytes, origin: str) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{origin}: not UTF-8") from error


def _parse(line: str, origin: str) -> Prompt:
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{origin}: not JSON: {error}") from error
    messages = record.get("messages") if isinstance(record, dict) else None
    if not isinstance(messages, list):
        raise DataError(f"{origin}: not an object with a list of `messages`")
    turns = tuple(_turn(message, origin) for message in messages)
    if turns and turns[-1]["role"] == "assistant":
        turns = turns[:-1]
    if not turns:
        raise DataError(f"{origin}: no message before the assistant's answer")
    return Prompt(turns, origin)


def _turn(message: Any, origin: str) -> dict[str, str]:
    """Role and content of a message; whatever else it carries is ignored."""
    if not isinstance(message, dict):
        raise DataError(f"{origin}: a message must be an object")
    for key in ("role", "content"):
        if not isinstance(message.get(key), str):
            raise DataError(f"{origin}: a message's `{key}` must be text")
    return {"role": message["role"], "content": message["content"]}
