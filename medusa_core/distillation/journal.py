"""The journal of a distillation run on disk, from which a killed run resumes.

Three files: OUT with a dialogue a line (`messages` for `medusa train`, and `seed_row`), OUT.dropped.jsonl
with the seed rows that gave none, OUT.settings.json. The first two are append-only, with each seed row in one
of them, so a killed run loses only the dialogues in progress.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Self

from medusa_core.errors import ConfigError, DataError
from medusa_core.files import read_json, write_json

Record = Mapping[str, Any]


class Journal:
    """Opens or resumes `out`; a context manager. One process at a time may hold it.

    Raises `ConfigError` if `out` was begun with another `record` of settings or by something else,
    `DataError` if it is damaged, cannot be written or is in use by another run.
    """

    def __init__(self, out: Path, record: Record) -> None:
        self.done: set[int] = set()  # seed rows that need no more work
        self._settings = out.with_name(f"{out.name}.settings.json")
        with contextlib.ExitStack() as opened:
            self._rows = opened.enter_context(_open(out))
            _lock(self._rows, out)
            self._dropped = opened.enter_context(_open(out.with_name(f"{out.name}.dropped.jsonl")))
            self._resume(out, record)
            opened.pop_all()  # closed by `__exit__` from here on

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        for file in (self._rows, self._dropped):
            os.fsync(file.fileno())
            file.close()

    def add(self, row: int, messages: Sequence[Mapping[str, str]]) -> None:
        """Record a finished dialogue."""
        _append(self._rows, {"seed_row": row, "messages": list(messages)})
        self.done.add(row)

    def drop(self, row: int, reason: str) -> None:
        """Record a seed row that gives no dialogue with these settings."""
        _append(self._dropped, {"seed_row": row, "reason": reason})
        self.done.add(row)

    def _resume(self, out: Path, record: Record) -> None:
        if self._settings.exists():
            _check_settings(self._settings, record)
        elif os.fstat(self._rows.fileno()).st_size:
            raise ConfigError(f"{out} is there, but no {self._settings.name} beside it: not a run to resume")
        else:
            _write_settings(self._settings, record)
        for file in (self._rows, self._dropped):
            self.done |= _read_rows(file)


def _open(path: Path) -> BinaryIO:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("a+b", buffering=0)  # each line is handed to the system at once
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}") from error


def _lock(file: BinaryIO, path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise DataError(f"{path} is being written by another run") from error


def _append(file: BinaryIO, value: Record) -> None:
    line = memoryview(json.dumps(value, ensure_ascii=False).encode() + b"\n")
    while line:
        try:
            line = line[file.write(line) :]
        except OSError as error:
            raise DataError(f"cannot write {file.name}: {error.strerror}") from error


def _read_rows(file: BinaryIO) -> set[int]:
    """The seed rows in it; an incomplete last line, left by a killed run or a full disk, is cut off."""
    rows, end = set(), 0
    with Path(file.name).open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.endswith(b"\n"):
                file.truncate(end)
                break
            end += len(line)
            try:
                rows.add(int(json.loads(line)["seed_row"]))
            except (ValueError, TypeError, LookupError, RecursionError) as error:
                raise DataError(f"{file.name}:{number} is damaged ({error!r}): remove the line") from error
    return rows


def _check_settings(path: Path, record: Record) -> None:
    found = read_json(path, ConfigError)
    names = [name for name in sorted({*record, *found}) if record.get(name) != found.get(name)]
    if names:
        changes = ", ".join(f"{name}: {found.get(name)!r} then, {record.get(name)!r} now" for name in names)
        raise ConfigError(f"{path} records other settings ({changes}): give another --out, or those settings")


def _write_settings(path: Path, record: Record) -> None:
    try:
        write_json(path, record)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}") from error
