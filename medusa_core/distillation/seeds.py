"""Reads seed dialogues and groups their messages into the turns to ask. Imports no torch."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

from medusa_core.errors import DataError
from medusa_core.text.rows import BadRows, Messages, read_messages, read_rows

ROLES = ("system", "user", "assistant")

Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class SeedDialogue:
    """`row`: number of the row over all sources, from 0, the same in every run.

    `groups`: one per answer, the messages up to the user's that the model answers.
    """

    row: int
    origin: str
    groups: tuple[tuple[Message, ...], ...]


@dataclass(frozen=True, slots=True)
class Seeds:
    """Usable dialogues in order, and the number of unusable rows."""

    dialogues: tuple[SeedDialogue, ...]
    bad_rows: int


def load_seeds(sources: Sequence[str | Path], *, limit: int | None = None, strict: bool = False) -> Seeds:
    """Read the first `limit` rows of files or Hub data sets, in any format `medusa train` reads.

    Assistant turns are dropped. Raises `DataError` if a source cannot be read or no row is usable, with
    `strict` also if any row is not.
    """
    dialogues: list[SeedDialogue] = []
    bad = BadRows(strict)
    rows = chain.from_iterable(read_rows(source) for source in sources)
    for number, row in enumerate(islice(rows, limit)):
        try:
            dialogues.append(SeedDialogue(number, row.place, _groups(read_messages(row.content))))
        except DataError as error:
            bad.add(row.place, error)
    if not dialogues:
        raise DataError(f"no usable seed dialogue in {', '.join(map(str, sources))}")
    return Seeds(tuple(dialogues), bad.count)


def digest(sources: Sequence[str | Path]) -> list[dict[str, str]]:
    """Name and, of files, SHA-256 of each source, by which a resumed run knows its rows."""
    return [_file_digest(Path(s)) if Path(s).exists() else {"name": str(s)} for s in sources]


def _file_digest(path: Path) -> dict[str, str]:
    try:
        with path.open("rb") as file:
            return {"name": path.name, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def _groups(messages: Messages) -> tuple[tuple[Message, ...], ...]:
    """The messages between two assistant turns form a group if the last is the user's.

    Others (a system message before the assistant opens the dialogue) belong to the next group.
    """
    groups: list[tuple[Message, ...]] = []
    waiting: list[Message] = []
    for message in messages:
        if message["role"] not in ROLES:
            raise DataError(f"cannot ask a {message['role']!r} message, only {', '.join(ROLES)}")
        if message["role"] != "assistant":
            waiting.append(message)
        elif waiting and waiting[-1]["role"] == "user":
            groups.append(tuple(waiting))
            waiting = []
    if waiting and waiting[-1]["role"] == "user":
        groups.append(tuple(waiting))
    if not groups:
        raise DataError("no user message to answer")
    return tuple(groups)
