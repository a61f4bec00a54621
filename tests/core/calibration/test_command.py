"""`medusa calibrate` on the tiny model with heads saved as any user's would be."""

import json
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from medusa_core.checkpoints.writing import save_heads
from medusa_core.cli.calibrate import accuracy_table, size_table
from medusa_core.cli.main import app
from medusa_core.draft.accuracy import HeadCalibration, load_calibration
from medusa_core.draft.medusa import MedusaHeads
from medusa_core.errors import MedusaError

PROMPT = {
    "messages": [{"role": "user", "content": "a cheap restaurant"}, {"role": "assistant", "content": "no"}]
}
QUICK = ("--max-tokens", "10", "--temperatures", "0.7", "--dtype", "float32", "--max-length", "64")


@pytest.fixture
def heads_dir(tmp_path: Path, tiny_model_dir: Path, random_heads: MedusaHeads) -> Path:
    save_heads(random_heads, tmp_path / "heads", base_model=str(tiny_model_dir))
    return tmp_path / "heads"


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.jsonl"
    file.write_text(f"{json.dumps(PROMPT)}\n" * 5)
    return file


def calibrate(model: Path, *arguments: str | Path) -> Result:
    command = ["calibrate", "--model", str(model), *QUICK, *map(str, arguments)]
    return CliRunner().invoke(app, command, catch_exceptions=False, env={"COLUMNS": "160"})


def test_calibrate_writes_beside_the_heads(tiny_model_dir: Path, heads_dir: Path, prompts: Path) -> None:
    result = calibrate(tiny_model_dir, "--heads", heads_dir, "--prompts", prompts, "--limit", "2")
    assert result.exit_code == 0
    calibration = load_calibration(heads_dir)
    assert calibration is not None
    assert calibration.num_heads == 4
    assert calibration.counts[0] <= 18  # two answers of ten tokens: nine positions each
    assert set(calibration.temperatures) == {0.0, 0.7}
    assert f"fastest here: {calibration.tree_nodes} nodes. Written to {heads_dir}" in result.output.replace(
        "\n", ""
    )
    for text in ("Head accuracy", "rank 1", "95 %", "Draft trees", "dynamic tokens/step"):
        assert text in result.output


def test_calibrate_one_weight_file_to_another_folder(
    tiny_model_dir: Path, heads_dir: Path, prompts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "new" / "folder"
    weights = heads_dir / "medusa_lm_head.safetensors"
    result = calibrate(tiny_model_dir, "--heads", weights, "--prompts", prompts, "--out", out)
    assert result.exit_code == 0
    assert load_calibration(out) is not None
    assert load_calibration(heads_dir) is None


def test_default_prompts(tiny_model_dir: Path, heads_dir: Path) -> None:
    (heads_dir / "calibration.json").write_text("[]")  # what is there is no obstacle, whatever it says
    assert calibrate(tiny_model_dir, "--heads", heads_dir, "--limit", "3").exit_code == 0
    assert load_calibration(heads_dir) is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--temperatures", "warm"], "temperatures must be numbers separated by commas, not 'warm'"),
        (["--temperatures", "0"], "temperatures must be above 0"),
        (["--max-tokens", "3"], "max_tokens must be at least 8"),
        (["--prompts", "nosuch.jsonl"], "cannot read nosuch.jsonl"),
        (["--heads", "none"], "no draft heads to calibrate"),
        ([], "no draft heads to calibrate"),
        (["--device", "tpu"], "device must be auto, cpu, cuda or cuda:N, not 'tpu'"),
    ],
)
def test_mistakes(tiny_model_dir: Path, options: list[str], message: str) -> None:
    with pytest.raises(MedusaError, match=message):
        calibrate(tiny_model_dir, *options)


def test_tables_without_step_times_or_lengths() -> None:
    """Such a file comes from an engine that measured nothing, or from very short answers."""
    accuracies = ((0.5, 0.2), (0.4, 0.1))
    lengths = {"static": {4: 1.9}, "dynamic": {4: 2.0}}
    calibration = HeadCalibration(accuracies=accuracies, counts=(10, 8), expected=lengths)
    assert accuracy_table(calibration).row_count == 2
    assert [list(column.cells) for column in size_table(calibration).columns] == [
        ["4"],
        ["1.90"],
        ["2.00"],
        ["-"],
        ["-"],
        ["-"],
    ]
    nothing = HeadCalibration(accuracies=accuracies, counts=(10, 8), expected={"static": {}, "dynamic": {}})
    assert size_table(nothing).row_count == 0


def test_table_with_step_times() -> None:
    calibration = HeadCalibration(
        accuracies=((0.5,),),
        counts=(10,),
        expected={"static": {4: 1.9}, "dynamic": {4: 2.0}},
        step_seconds={1: 0.010, 4: 0.016},
    )
    assert [next(iter(column.cells)) for column in size_table(calibration).columns] == [
        "4",
        "1.90",
        "2.00",
        "16.00",
        "125",
        "1.25",
    ]
