"""Loading reports its steps, tensors and downloads."""

import logging
import shutil
import threading
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from medusa_core.checkpoints.weight_files import describe_files
from medusa_core.config import EngineConfig
from medusa_core.engine.engine import Engine
from medusa_core.loading.progress import LoadProgress
from medusa_core.model.backbone import load_backbone


def test_every_stage_of_a_start_is_told_and_logged(
    tiny_model_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[str] = []
    config = EngineConfig(dtype="float32", max_length=40, slots=2)
    with caplog.at_level(logging.INFO):
        Engine.from_pretrained(tiny_model_dir, config=config, on_stage=told.append)
    size = (tiny_model_dir / "model.safetensors").stat().st_size / 2**30
    assert told == [
        f"tokenizer of {tiny_model_dir}",
        f"weights of {tiny_model_dir}: {size:.2f} GiB in 1 file, as float32 on cpu",
        "cache of 2 x 40 tokens",
        "measuring step times",
    ]
    logged = [
        record.getMessage() for record in caplog.records if record.name == "medusa_core.loading.progress"
    ]
    assert logged == told
    assert "GiB of memory needed on cpu (weights" in caplog.text


def test_heads_and_shards_are_told(vicuna_layout_dir: Path, tiny_model_dir: Path) -> None:
    told: list[str] = []
    Engine.from_pretrained(vicuna_layout_dir, config=EngineConfig(measure=False), on_stage=told.append)
    assert "in 2 files" in told[1]
    assert not any("measuring" in stage for stage in told)


def test_weights_are_counted_while_they_are_read(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medusa_core.loading.progress.WATCH_SECONDS", 0.0)
    told: list[str] = []
    with LoadProgress(told.append).counting_weights():
        load_backbone(tiny_model_dir, dtype=torch.float32, device=torch.device("cpu"))
    count = len(told)
    assert count > 10
    assert told[0] == f"1 of {count} tensors read"
    assert told[-1] == f"{count} of {count} tensors read"
    load_backbone(tiny_model_dir, dtype=torch.float32, device=torch.device("cpu"))
    assert len(told) == count


def test_a_growing_download_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("medusa_core.loading.progress.WATCH_SECONDS", 0.01)
    blobs = tmp_path / "models--someone--model" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "old").write_bytes(b"x")
    told: list[str] = []
    heard = threading.Event()

    def on_stage(text: str) -> None:
        told.append(text)
        heard.set()

    with LoadProgress(on_stage).downloading("someone/model"):
        assert not heard.wait(0.1)  # nothing grows
        with (blobs / "new.incomplete").open("wb") as file:
            file.truncate(3 * 2**30)  # sparse
        assert heard.wait(30)
    assert told == ["downloading someone/model: 3.00 GiB so far"]
    assert not [thread for thread in threading.enumerate() if thread.name == "download-watch"]


@pytest.mark.parametrize("name", ["", ".", "./model", "/somewhere/model", "a/b/c"])
def test_local_models_are_not_watched(name: str) -> None:
    with LoadProgress().downloading(name):
        assert not [thread for thread in threading.enumerate() if thread.name == "download-watch"]


def test_a_model_in_the_hubs_cache_is_sized_and_described(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--someone--model"
    shutil.copytree(tiny_model_dir, repository / "snapshots" / "0123abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abc")
    told: list[str] = []
    with caplog.at_level(logging.INFO):
        Engine.from_pretrained(
            "someone/model", config=EngineConfig(dtype="float32", measure=False), on_stage=told.append
        )
    assert "GiB of memory needed on cpu" in caplog.text
    assert told[1].startswith("weights of someone/model: 0.00 GiB in 1 file")
    (repository / "snapshots" / "0123abc" / "model.safetensors").unlink()
    assert describe_files("someone/model") == "not downloaded yet"
