"""dtype=auto on a CPU: what is timed, what follows from the times, and that they are kept."""

import json
import logging
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, LlamaConfig, PretrainedConfig

from medusa_core.loading import devices
from medusa_core.loading.cpu_dtype import (
    MAX_WEIGHTS,
    ROWS,
    TREE_ROWS,
    Times,
    choose,
    fastest_cpu_dtype,
    measure_products,
    weight_shapes,
)
from medusa_core.loading.devices import resolve_dtype

LOGGER = "medusa_core.loading.cpu_dtype"


def times(single: float, half: float, packed: float, *, one: float = 1.0) -> Times:
    """Of `TREE_ROWS` rows; those of one row are `one` for bfloat16 and 1.0 for float32."""
    at = {"float32": single, "bfloat16": half, "packed bfloat16": packed}
    return {kind: {1: 1.0 if kind == "float32" else one, TREE_ROWS: t} for kind, t in at.items()}


def saved(config: PretrainedConfig, folder: Path) -> Path:
    config.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("measured", "rows", "chosen"),
    [
        (times(2.0, 3.0, 1.5), TREE_ROWS, torch.bfloat16),  # packed, as it will be served
        (times(2.0, 1.5, 3.0), TREE_ROWS, torch.bfloat16),
        (times(2.0, 3.0, 2.5), TREE_ROWS, torch.float32),
        (times(2.0, 3.0, 2.5, one=0.8), 1, torch.bfloat16),
        (times(2.0, 1.0, 1.0, one=1.1), 1, torch.float32),
    ],
)
def test_the_faster_dtype_is_chosen(measured: Times, rows: int, chosen: torch.dtype) -> None:
    assert choose(measured, rows)[0] == chosen


def test_the_choice_is_explained_in_figures() -> None:
    assert choose(times(0.002, 0.003, 0.0015, one=0.5), TREE_ROWS)[1] == (
        "bfloat16 is fastest here at 16 rows (ms for 1 / 16 rows: float32 1000.00 / 2.00, "
        "bfloat16 500.00 / 3.00, packed bfloat16 500.00 / 1.50)"
    )


def test_a_small_model_is_timed_whole(tiny_model_dir: Path) -> None:
    layer = [(64, 64), (32, 64), (32, 64), (64, 64), (128, 64), (128, 64), (64, 128)]
    assert weight_shapes(tiny_model_dir) == [*layer, *layer, (320, 64)]


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(hidden_size=2048, intermediate_size=5632, num_key_value_heads=4, num_hidden_layers=22),
        LlamaConfig(hidden_size=8192, intermediate_size=28672, num_attention_heads=64, num_hidden_layers=80),
        LlamaConfig(hidden_size=512, intermediate_size=1024, num_hidden_layers=90, vocab_size=250_000),
        GPT2Config(),
    ],
)
def test_a_large_model_is_timed_in_part(config: PretrainedConfig, tmp_path: Path) -> None:
    shapes = weight_shapes(saved(config, tmp_path))
    assert shapes is not None
    assert 0.8 * MAX_WEIGHTS < sum(rows * length for rows, length in shapes) <= MAX_WEIGHTS
    assert {length for _, length in shapes} >= {config.hidden_size}
    assert all(rows % 16 == 0 for rows, _ in shapes)


@pytest.mark.parametrize("text", ["", "{}", '{"model_type": "llama", "hidden_size": "large"}'])
def test_a_config_that_says_nothing_is_left_to_loading(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    assert fastest_cpu_dtype(tmp_path, TREE_ROWS) is None
    assert fastest_cpu_dtype(tmp_path / "nosuch", TREE_ROWS) is None


def test_quantized_weights_are_not_what_is_timed(tiny_model_dir: Path, tmp_path: Path) -> None:
    config = json.loads((tiny_model_dir / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert fastest_cpu_dtype(tmp_path, TREE_ROWS) is None


def test_products_are_timed() -> None:
    measured = measure_products([(64, 32), (32, 64)])
    assert list(measured) == ["float32", "bfloat16", "packed bfloat16"]
    assert all(0 < measured[kind][rows] < 1 for kind in measured for rows in ROWS)


def test_times_are_kept(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MEDUSA_CACHE_DIR", str(tmp_path))
    caplog.set_level(logging.INFO, LOGGER)
    first = fastest_cpu_dtype(tiny_model_dir, TREE_ROWS)
    [file] = tmp_path.iterdir()
    for damaged in ("", "{}", '{"float32": {"1": "soon"}}'):
        file.write_text(damaged)
        assert fastest_cpu_dtype(tiny_model_dir, TREE_ROWS) in (torch.float32, torch.bfloat16)
    other = 9.0 if first is torch.float32 else 1e-9
    stored = json.loads(file.read_text())
    file.write_text(json.dumps(stored | {"float32": {"1": other, "16": other}}))
    assert fastest_cpu_dtype(tiny_model_dir, TREE_ROWS) != first
    assert len([record for record in caplog.records if record.name == LOGGER]) == 5
    assert "ms for 1 / 16 rows" in caplog.text


@pytest.mark.parametrize("native", [True, False])
def test_without_native_bfloat16_nothing_is_timed(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, native: bool
) -> None:
    monkeypatch.setenv("MEDUSA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(devices, "cpu_has_native_bfloat16", lambda: native)
    cpu = torch.device("cpu")
    assert resolve_dtype("auto", cpu, tiny_model_dir, rows=1) in (torch.float32, torch.bfloat16)
    assert len(list(tmp_path.iterdir())) == native
    if not native:
        assert resolve_dtype("auto", cpu, tiny_model_dir, rows=1) == torch.float32
