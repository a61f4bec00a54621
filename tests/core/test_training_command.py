"""Settings and the command line of `medusa train`."""

import json
from dataclasses import fields, replace
from inspect import signature
from pathlib import Path

import pytest
from typer import Typer
from typer.testing import CliRunner

from medusa_core.errors import ConfigError
from medusa_core.training.command import DEFAULTS, train
from medusa_core.training.config import TrainConfig

ROW = {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Goodbye!"}]}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[
            (name, 0)
            for name in ("num_heads", "num_layers", "batch_size", "accumulation", "save_steps", "log_steps")
        ],
        *[(name, 0.0) for name in ("decay", "learning_rate", "epochs")],
        *[(name, value) for name in ("warmup", "val_fraction") for value in (-0.1, 1.0, float("nan"))],
        ("learning_rate", float("nan")),
        ("weight_decay", -1.0),
        ("max_steps", 0),
        ("sequence_length", 2),
        ("data", ()),
        ("dtype", "float16"),
        ("dtype", "int8"),
        ("device", "cuda:1"),
        ("seed", -1),
    ],
)
def test_settings_are_checked(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=field):
        replace(TrainConfig(model="m", data=(Path("d"),), out=Path("o")), **{field: value})


@pytest.mark.parametrize("held_out", [0.5, 0.0])
def test_command(tiny_model_dir: Path, tmp_path: Path, held_out: float) -> None:
    data, out = tmp_path / "d.jsonl", tmp_path / "heads"
    data.write_text(f"{json.dumps(ROW)}\n" * 6)
    app = Typer()
    app.command()(train)
    paths = ["--model", str(tiny_model_dir), "--data", str(data), "--data", str(data), "--out", str(out)]
    options = ["--max-steps", "2", "--num-heads", "2", "--dtype", "float32", "--loss", "hard", "--strict"]
    result = CliRunner().invoke(
        app, [*paths, *options, "--val-fraction", str(held_out)], catch_exceptions=False
    )
    assert result.exit_code == 0
    assert "2 steps" in result.output
    assert ("top-1 accuracy" in result.output) is (held_out > 0)
    written = json.loads((out / "training.json").read_text())["config"]
    assert (written["num_heads"], written["loss"], written["max_steps"]) == (2, "hard", 2)
    assert (written["data"], written["strict"]) == ([str(data), str(data)], True)


def test_command_has_an_option_for_every_setting() -> None:
    parameters = signature(train).parameters
    assert set(parameters) == {field.name for field in fields(TrainConfig)}
    for name, parameter in parameters.items():
        if name not in ("model", "data", "out"):
            assert parameter.default == getattr(DEFAULTS, name), name
