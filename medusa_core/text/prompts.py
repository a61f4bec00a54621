"""Reads prompts for measurements: conversations in JSONL files."""

from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from medusa_core.config import EMBEDDED_MODEL
from medusa_core.errors import DataError
from medusa_core.text.rows import Messages, read_lines, read_messages

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
    for row in islice(read_lines(path), limit):
        try:
            prompts.append(Prompt(_without_answer(read_messages(row.content)), row.place))
        except DataError as error:
            raise DataError(f"{row.place}: {error}") from error
    if not prompts:
        raise DataError(f"{path} holds no prompts")
    return prompts


def _without_answer(messages: Messages) -> tuple[dict[str, str], ...]:
    turns = tuple(messages[:-1] if messages[-1]["role"] == "assistant" else messages)
    if not turns:
        raise DataError("no message before the assistant's answer")
    return turns
