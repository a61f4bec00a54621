"""Settings and the command line of `medusa train`."""

import json
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from typer import Typer
from typer.main import get_command
from typer.testing import CliRunner

from medusa_core.cli.train import train
from medusa_core.errors import ConfigError
from medusa_core.training.config import JointMode, LossKind, Recipe, TrainConfig
from medusa_core.training.recipes import resolve_config

ROW = {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Goodbye!"}]}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[
            (name, 0)
            for name in ("num_heads", "num_layers", "batch_size", "accumulation", "save_steps", "log_steps")
        ],
        *[(name, 0.0) for name in ("decay", "learning_rate", "epochs")],
        *[(name, value) for name in ("dropout", "val_fraction") for value in (-0.1, 1.0, float("nan"))],
        *[("stage_one", value) for value in (0.0, 1.0)],
        *[("warmup", value) for value in (-1.0, float("inf"), float("nan"))],
        ("final_rate", 1.1),
        ("draft_vocab", 0),
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
    options = {parameter.name: parameter for parameter in command_options()}
    assert set(options) == {"config", *(field.name for field in fields(TrainConfig))}
    assert all(option.default is None for option in options.values())
    panels = {option.rich_help_panel for option in options.values()}
    assert panels == {None, "Data", "Heads", "Backbone (medusa-2)", "Optimizer", "Run"}
    assert "hydra++: 4" in str(options["num_layers"].show_default)


def test_help_imports_no_torch() -> None:
    code = (
        "import sys\nfrom medusa_core.cli.main import main\ntry: main()\n"
        "finally: assert 'torch' not in sys.modules and 'transformers.trainer' not in sys.modules"
    )
    command = [sys.executable, "-c", code, "train", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "--self-distill" in result.stdout


def command_options() -> list[Any]:
    app = Typer(add_completion=False)
    app.command()(train)
    return [parameter for parameter in get_command(app).params if parameter.name != "help"]


def resolve(**flags: object) -> TrainConfig:
    return resolve_config({"model": "m", "data": ["d.jsonl"], "out": Path("o"), **flags})


def test_recipes_set_the_published_defaults() -> None:
    medusa = resolve()
    assert medusa == TrainConfig(model="m", data=("d.jsonl",), out=Path("o"))
    assert (medusa.decay, medusa.num_heads, medusa.num_layers) == (0.8, 4, 1)
    hydra, plus = resolve(recipe="hydra"), resolve(recipe="hydra++")
    expected = {
        "loss": LossKind.TEACHER,
        "decay": 1.0,
        "dropout": 0.2,
        "learning_rate": 5e-4,
        "noise": 0.0,
        "final_rate": 0.33,
        "warmup": 100.0,
        "weight_decay": 0.1,
        "num_heads": 4,
        "num_layers": 1,
    }
    assert {name: getattr(hydra, name) for name in expected} == expected
    assert replace(plus, recipe=Recipe.HYDRA, num_layers=1) == hydra
    assert plus.num_layers == 4
    two_stage, sine, direct = (resolve(recipe="medusa-2", joint=mode) for mode in JointMode)
    assert (two_stage.learning_rate, two_stage.heads_rate, two_stage.heads_weight) == (5e-4, 4.0, 0.2)
    assert (two_stage.lora_rank, two_stage.lora_alpha, two_stage.lora_dropout) == (32, 16.0, 0.05)
    assert (sine.learning_rate, sine.heads_rate, sine.heads_weight) == (1e-4, 4.0, 0.01)
    assert (direct.heads_rate, direct.heads_weight) == (1.0, 1.0)


def test_flags_win_over_the_file_and_the_file_over_the_recipe(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "model: m\ndata: [a.jsonl, org/name]\nout: o\nrecipe: hydra\ndropout: 0\nlearning_rate: 1e-4\n"
        "epochs: 3\nmax_steps: null\nstrict: true\nloss: hard\n"
    )
    config = resolve_config({"epochs": 2.0, "max_steps": None, "strict": False}, file)
    assert (config.model, config.data, config.out) == ("m", ("a.jsonl", "org/name"), Path("o"))
    assert (config.recipe, config.dropout, config.learning_rate) == (Recipe.HYDRA, 0.0, 1e-4)
    assert (config.epochs, config.max_steps, config.strict) == (2.0, None, False)
    assert (config.loss, config.weight_decay) == (LossKind.HARD, 0.1)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("learning_rat: 1", "unknown key learning_rat; known are accumulation, "),
        ("1: 2", "unknown key 1"),
        ("num_heads: four", "num_heads must be a whole number, not 'four'"),
        ("num_heads: 4.0", "num_heads must be a whole number, not 4.0"),
        ("num_heads: true", "num_heads must be a whole number, not True"),
        ("decay: low", "decay must be a number, not 'low'"),
        ("strict: 1", "strict must be true or false, not 1"),
        ("recipe: medusa", "recipe must be one of medusa-1, medusa-2, hydra, hydra"),
        ("model: 7", "model must be text, not 7"),
        ("data: [1]", "data must be text or a list of texts"),
        ("decay: -1", "decay must be above 0, not -1"),
        ("- model", "must hold a mapping"),
        ("model: [", "cannot read .*run.yaml: while parsing"),
        ("strict: true", "model, data, out must be given"),
    ],
)
def test_broken_files_are_refused_by_key(tmp_path: Path, text: str, reason: str) -> None:
    file = tmp_path / "run.yaml"
    head = "" if text.startswith(("-", "strict: t")) else "model: m\ndata: d\nout: o\n"
    file.write_text(head + text + "\n")
    if text == "model: 7" or text.startswith("data"):
        file.write_text(text + "\n")
    with pytest.raises(ConfigError, match=reason):
        resolve_config({}, file)
    with pytest.raises(ConfigError, match="cannot read"):
        resolve_config({}, tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ({"dropout": 0.1}, "noise and dropout are for recipes hydra"),
        ({"noise": 1.0, "recipe": "medusa-2"}, "noise and dropout are for recipes hydra"),
        ({"heads": "h", "recipe": "hydra"}, "heads to start from are Medusa heads"),
        ({"quantize": "8bit", "recipe": "medusa-2"}, "quantize needs a frozen backbone"),
        ({"self_distill": True}, "self_distill is for recipe medusa-2"),
        ({"self_distill": True, "recipe": "medusa-2", "tune": "full"}, "would need a second copy"),
        ({"gradient_checkpointing": True}, "gradient_checkpointing is for recipe medusa-2"),
        ({"joint": "sine", "lora_rank": 4, "recipe": "hydra"}, "joint, lora_rank are for recipe medusa-2"),
        ({"max_steps": 1, "recipe": "medusa-2"}, "max_steps must be at least 2"),
        ({"shared_output": True, "recipe": "medusa-2", "tune": "full"}, "shared_output needs a frozen"),
        ({"stage_one": 0.2, "recipe": "medusa-2", "joint": "sine"}, "stage_one is for two-stage runs"),
        ({"lora_rank": 8, "recipe": "medusa-2", "tune": "full"}, "lora_rank is for LoRA"),
    ],
)
def test_settings_that_do_not_go_together(flags: dict[str, object], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        resolve(**flags)
