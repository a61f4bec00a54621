"""The cache folder: where it is, what is read from it, and that nothing fails without it."""

import json
import logging
import multiprocessing
from pathlib import Path

import pytest
import torch

from medusa_core.disk_cache import cache_folder, key_of, load_json, store_json
from medusa_core.machine import machine_facts


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MEDUSA_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == tmp_path / "home/.cache/medusa"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg/medusa"
    monkeypatch.setenv("MEDUSA_CACHE_DIR", str(tmp_path / "named"))
    assert cache_folder() == tmp_path / "named"
    assert (tmp_path / "named").is_dir()
    assert (tmp_path / "named").stat().st_mode & 0o077 == 0  # programs in it run in the server


def test_what_was_stored_is_loaded(folder: Path) -> None:
    assert load_json("times") is None
    store_json("times", {"seconds": 0.5})
    store_json("times", {"seconds": [1, 2.5]})
    assert load_json("times") == {"seconds": [1, 2.5]}
    assert [path.name for path in folder.iterdir()] == ["times.json"]


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00" * 30])
def test_a_damaged_file_is_nothing(folder: Path, text: str, caplog: pytest.LogCaptureFixture) -> None:
    store_json("times", {})
    (folder / "times.json").write_text(text)
    with caplog.at_level(logging.INFO):
        assert load_json("times") is None
    assert "damaged" in caplog.text
    store_json("times", {"good": True})
    assert load_json("times") == {"good": True}


def test_without_a_folder_nothing_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MEDUSA_CACHE_DIR", str(tmp_path / "file" / "below"))
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            store_json("times", {"seconds": 0.5})
            assert load_json("times") is None
    (record,) = caplog.records  # once
    assert "MEDUSA_CACHE_DIR" in record.getMessage()


def test_a_folder_that_went_away_is_no_error(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert cache_folder() == folder
    folder.rmdir()
    with caplog.at_level(logging.INFO):
        store_json("times", {"seconds": 0.5})
    assert "could not write to the cache" in caplog.text
    assert load_json("times") is None


def _store_often(number: int) -> None:
    for _ in range(50):
        store_json("times", {"numbers": [number] * 1000})


def test_processes_at_once_leave_a_whole_value(folder: Path) -> None:
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_store_often, args=(number,)) for number in (1, 2)]
    for writer in writers:
        writer.start()
    seen = set()
    while any(writer.is_alive() for writer in writers):
        if (folder / "times.json").exists():
            seen.add(len(set(json.loads((folder / "times.json").read_text())["numbers"])))
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert seen <= {1}
    assert load_json("times") in [{"numbers": [number] * 1000} for number in (1, 2)]


def test_keys_are_of_all_facts() -> None:
    key = key_of(model="a", shape={"x": 1, "y": 2}, device=torch.device("cpu"))
    assert key == key_of(device=torch.device("cpu"), shape={"y": 2, "x": 1}, model="a")
    others = [key_of(model="b"), key_of(model="a"), key_of(model="a", shape={"x": 1, "y": 3})]
    assert len({key, *others}) == 4
    assert key.isalnum()


def test_the_machine_is_the_same_twice() -> None:
    facts = machine_facts(torch.device("cpu"))
    assert facts == machine_facts()
    assert facts["threads"] == torch.get_num_threads()
    assert {"machine", "torch", "transformers"} <= facts.keys()
