"""Seed dialogues: what users said, in the groups the model is asked them in. No torch here."""

import gzip
import hashlib
import json
import logging
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medusa_core.errors import DataError
from medusa_core.prompts import parse_messages

ROLES = ("system", "user", "assistant")
REPORTED_ROWS = 20
HASH_BLOCK = 1 << 20

Message = dict[str, str]
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SeedDialogue:
    """`row` counts the lines of all files that are not blank, from 0: the same in every run on these files.

    `groups`: messages up to and including a user's that the model is to answer, one group per answer.
    """

    row: int
    origin: str
    groups: tuple[tuple[Message, ...], ...]


@dataclass(frozen=True, slots=True)
class Seeds:
    """Usable dialogues in order, and how many rows were not usable."""

    dialogues: tuple[SeedDialogue, ...]
    bad_rows: int


def load_seeds(paths: Sequence[Path], *, limit: int | None = None, strict: bool = False) -> Seeds:
    """Read the first `limit` rows. `DataError` if a file cannot be read or no row is usable.

    With `strict` also if any is not. A row is an object with `messages` or ShareGPT's `conversations`; its
    assistant's turns are left out.
    """
    dialogues: list[SeedDialogue] = []
    bad = 0
    for row, (origin, line) in enumerate(_lines(paths)):
        if limit is not None and row >= limit:
            break
        try:
            dialogues.append(SeedDialogue(row, origin, _groups(json.loads(line), origin)))
        except (DataError, ValueError, RecursionError) as error:
            reason = str(error) if isinstance(error, DataError) else f"{origin}: not JSON: {error}"
            if strict:
                raise DataError(reason) from error
            bad += 1
            if bad <= REPORTED_ROWS:
                log.warning("skipped: %s", reason)
    if not dialogues:
        raise DataError(f"no usable seed dialogue in {', '.join(map(str, paths))}")
    return Seeds(tuple(dialogues), bad)


def digest(paths: Sequence[Path]) -> list[dict[str, str]]:
    """Name and SHA-256 of each file, by which a later run knows that its rows are the same."""
    digests = []
    for path in paths:
        sha = hashlib.sha256()
        try:
            with path.open("rb") as file:
                while block := file.read(HASH_BLOCK):
                    sha.update(block)
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from error
        digests.append({"name": path.name, "sha256": sha.hexdigest()})
    return digests


def _groups(record: Any, origin: str) -> tuple[tuple[Message, ...], ...]:
    """Everything between two of the assistant's turns is one group, if it ends with the user's words.

    What ends otherwise (a system message before the assistant opens the dialogue) belongs to the next.
    """
    groups: list[tuple[Message, ...]] = []
    waiting: list[Message] = []
    for message in parse_messages(record, origin):
        if message["role"] not in ROLES:
            raise DataError(f"{origin}: cannot ask a {message['role']!r} message, only {', '.join(ROLES)}")
        if message["role"] != "assistant":
            _check_text(message["content"], origin)
            waiting.append(message)
        elif waiting and waiting[-1]["role"] == "user":
            groups.append(tuple(waiting))
            waiting = []
    if waiting and waiting[-1]["role"] == "user":
        groups.append(tuple(waiting))
    if not groups:
        raise DataError(f"{origin}: no user message to answer")
    return tuple(groups)


def _check_text(text: str, origin: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(f"{origin}: half a surrogate pair, which is not valid Unicode") from None


def _lines(paths: Sequence[Path]) -> Iterator[tuple[str, bytes]]:
    """(file:line, bytes) of every line that is not blank."""
    for path in paths:
        try:
            with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        yield f"{path}:{number}", line
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"cannot read {path}: {error}") from error
