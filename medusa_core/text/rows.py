"""Reads dialogues from JSONL, JSON and Parquet files and from Hub data sets.

A row is an object with `messages` (role, content) or ShareGPT's `conversations` (from, value). No torch here.
"""

import gzip
import json
import logging
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from medusa_core.errors import DataError, first_line
from medusa_core.text.tokenizer import HUB_NAME

SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
FILE_SUFFIXES = (".jsonl", ".json", ".parquet", ".gz")
PARQUET_BATCH = 1024
DEFAULT_SPLIT = "train"
REPORTED_ROWS = 20

logger = logging.getLogger(__name__)

Messages = list[dict[str, str]]


@dataclass(frozen=True, slots=True)
class Row:
    """One row and where it stands. `content` is a line of JSON or what has been parsed already."""

    place: str
    content: object


@dataclass(slots=True)
class BadRows:
    """Counts rows that cannot be used; logs the first of them, or raises with `strict`."""

    strict: bool
    count: int = 0

    def add(self, place: str, error: Exception) -> None:
        if self.strict:
            raise DataError(f"{place}: {error}") from error
        self.count += 1
        if self.count <= REPORTED_ROWS:
            logger.warning("%s skipped: %s", place, error)


def read_rows(source: str | Path) -> Iterator[Row]:
    """Every row of a file, or of a data set (a Hub name or a directory) given as `name` or `name:split`.

    Raises `DataError` if there is no such source or it is broken as a whole; a row's own faults are found by
    `read_dialogue`.
    """
    path = Path(source)
    name, _, split = str(source).partition(":")
    may_be_name = HUB_NAME.fullmatch(name) and not path.exists() and path.suffix not in FILE_SUFFIXES
    if may_be_name or Path(name).is_dir():
        return _dataset_rows(name, split or DEFAULT_SPLIT)
    return _parquet_rows(path) if path.suffix == ".parquet" else read_lines(path)


def read_dialogue(content: object) -> Messages:
    """Messages of a row that has an answer to learn from. Raises `DataError` with what is wrong with it."""
    messages = read_messages(content)
    if not any(message["role"] == "assistant" for message in messages[1:]):
        raise DataError("no assistant message that answers another")
    return messages


def read_messages(content: object) -> Messages:
    """Messages (role, content) of one row. Raises `DataError` with what is wrong with it."""
    if isinstance(content, str):
        try:
            content = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise DataError(f"not JSON ({error})") from error
    if not isinstance(content, dict):
        raise DataError("not a JSON object")
    if content.get("messages") is not None:
        return _read_messages(content["messages"], "role", "content", None)
    if content.get("conversations") is not None:
        return _read_messages(content["conversations"], "from", "value", SHAREGPT_ROLES)
    raise DataError("neither messages nor conversations")


def _read_messages(value: Any, role_key: str, text_key: str, roles: Mapping[str, str] | None) -> Messages:
    if not isinstance(value, list) or not value:
        raise DataError("messages are no list, or an empty one")
    messages = []
    for number, item in enumerate(value, start=1):
        role = item.get(role_key) if isinstance(item, dict) else None
        text = item.get(text_key) if isinstance(item, dict) else None
        if not isinstance(role, str) or not isinstance(text, str):
            raise DataError(f"message {number} lacks a string {role_key} or {text_key}")
        if roles is not None and role not in roles:
            raise DataError(f"message {number} is from {role!r}, not one of {', '.join(roles)}")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise DataError(f"message {number} holds half a surrogate pair: not valid Unicode") from None
        messages.append({"role": roles[role] if roles else role, "content": text})
    return messages


def read_lines(path: Path) -> Iterator[Row]:
    """Lines that are not blank (.gz too), or the items of a file that is one JSON list (ShareGPT's)."""
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            may_be_list = ".jsonl" not in path.suffixes
            for number, line in enumerate(file, start=1):
                text = line.decode().strip()
                if may_be_list and text.startswith("["):
                    yield from _list_rows(path, line + file.read())
                elif text:
                    yield Row(f"{path}:{number}", text)
                may_be_list = may_be_list and not text
    except UnicodeDecodeError as error:
        raise DataError(f"cannot read {path}, line {number}: not UTF-8 ({error})") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {path}: {error}") from error


def _list_rows(path: Path, text: bytes) -> Iterator[Row]:
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"cannot read {path}: not JSON ({error})") from error
    for number, row in enumerate(rows, start=1):
        yield Row(f"{path}[{number}]", row)


def _parquet_rows(path: Path) -> Iterator[Row]:
    _require("pyarrow", f"reading {path}")
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            names = [name for name in ("messages", "conversations") if name in file.schema_arrow.names]
            for batch in file.iter_batches(batch_size=PARQUET_BATCH, columns=names):
                for row in batch.to_pylist():
                    number += 1
                    yield Row(f"{path}[{number}]", row)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"cannot read {path}: {error}") from error


def _dataset_rows(name: str, split: str) -> Iterator[Row]:
    _require("datasets", f"the data set {name}")
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        rows = load_dataset(name, split=split)
    except (OSError, ValueError, DatasetsError) as error:
        raise DataError(
            f"{name} is neither a file nor a data set the Hub provides: {first_line(error)}"
        ) from error
    for number, row in enumerate(rows, start=1):
        yield Row(f"{name}:{split}[{number}]", row)


def _require(package: str, purpose: str) -> None:
    if find_spec(package) is None:
        raise DataError(f'{purpose} needs {package}: pip install "medusa-serve[train]"')
