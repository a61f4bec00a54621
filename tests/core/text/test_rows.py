"""Dialogues from every kind of source."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from medusa_core.errors import DataError
from medusa_core.text.rows import read_dialogue, read_rows

DIALOGUES = [
    [{"role": "user", "content": f"Question {n}"}, {"role": "assistant", "content": f"Answer {n}"}]
    for n in range(3)
]
ROLES = {"user": "human", "assistant": "gpt"}
SHAREGPT = [
    {"id": str(n), "conversations": [{"from": ROLES[m["role"]], "value": m["content"]} for m in dialogue]}
    for n, dialogue in enumerate(DIALOGUES)
]


def write_parquet(path: Path, rows: list[dict[str, object]]) -> None:
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)


def write_gzip(path: Path, text: str) -> None:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write(text)


LINES = "".join(json.dumps({"messages": dialogue}) + "\n" for dialogue in DIALOGUES)
WRITERS: dict[str, Callable[[Path], object]] = {
    "d.jsonl": lambda path: path.write_text(LINES),
    "d.json": lambda path: path.write_text("\n " + json.dumps(SHAREGPT, indent=2)),
    "lines.json": lambda path: path.write_text(LINES),
    "d.json.gz": lambda path: write_gzip(path, json.dumps(SHAREGPT)),
    "d.jsonl.gz": lambda path: write_gzip(path, LINES),
    "d.parquet": lambda path: write_parquet(path, [{"n": 1, "messages": d} for d in DIALOGUES]),
    "s.parquet": lambda path: write_parquet(path, SHAREGPT),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    WRITERS[name](path)
    rows = list(read_rows(path))
    assert [read_dialogue(row.content) for row in rows] == DIALOGUES
    assert len({row.place for row in rows}) == 3
    assert all(row.place.startswith(str(path)) for row in rows)


def test_data_sets_are_read_by_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory, which `datasets` loads as it loads a repository of the Hub."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text(LINES)
    (folder / "test.jsonl").write_text(LINES.splitlines()[1])
    assert [read_dialogue(row.content) for row in read_rows(folder)] == DIALOGUES
    (row,) = read_rows(f"{folder}:test")
    assert read_dialogue(row.content) == DIALOGUES[1]
    assert row.place == f"{folder}:test[1]"
    with pytest.raises(DataError, match="is neither a file nor a data set the Hub provides"):
        list(read_rows(f"{folder}:validation"))


def test_unknown_hub_names_are_an_error() -> None:
    with pytest.raises(DataError, match="org/none is neither a file nor a data set"):
        list(read_rows("org/none"))


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("d.json", b'[{"messages": []}, ', "cannot read .*d.json: not JSON"),
        ("deep.json", b"[" * 100_000, "cannot read .*deep.json: not JSON"),
        ("d.parquet", b"PAR1 not at all", "cannot read .*d.parquet"),
        ("d.jsonl.gz", b"plain", "cannot read .*d.jsonl.gz"),
    ],
)
def test_broken_files(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=reason):
        list(read_rows(tmp_path / name))
    with pytest.raises(DataError, match="cannot read"):
        list(read_rows(tmp_path / f"missing-{name}"))


def test_a_row_nested_too_deep_is_one_bad_row() -> None:
    with pytest.raises(DataError, match="not JSON"):
        read_dialogue('{"messages": ' + "[" * 100_000)


def test_parquet_without_dialogues(tmp_path: Path) -> None:
    write_parquet(tmp_path / "d.parquet", [{"text": "a"}])
    rows = list(read_rows(tmp_path / "d.parquet"))
    with pytest.raises(DataError, match="neither messages nor conversations"):
        read_dialogue(rows[0].content)


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medusa_core.text.rows.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r'needs pyarrow: pip install "medusa-serve\[train\]"'):
        list(read_rows(tmp_path / "d.parquet"))
    with pytest.raises(DataError, match="the data set org/name needs datasets"):
        list(read_rows("org/name"))
