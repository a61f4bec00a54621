"""Accuracy tables in the layouts of the Medusa repository, with figures of our own."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from medusa_core.calibration.tables import read_accuracy_table
from medusa_core.checkpoints.writing import save_heads
from medusa_core.cli.main import app
from medusa_core.config import EngineConfig
from medusa_core.draft.accuracy import HeadCalibration, load_calibration, save_calibration, wilson_interval
from medusa_core.draft.medusa import MedusaHeads
from medusa_core.engine.engine import Engine
from medusa_core.errors import DataError, MedusaError
from medusa_core.sampling_params import SamplingParams, SpeculationParams

CUMULATIVE = ((0.5, 0.7, 0.75), (0.3, 0.4, 0.45), (0.2, 0.25, 0.25), (0.1, 0.15, 0.2))
RANKS = ((0.5, 0.2, 0.05), (0.3, 0.1, 0.05), (0.2, 0.05, 0.0), (0.1, 0.05, 0.05))


def write_runs(path: Path, names: tuple[str, ...] = ("7b", "13b")) -> Path:
    """As the reference exports its training runs: quoted, other columns around."""
    columns = ["Name", "State", "train/medusa0_loss"]
    columns += [f"train/medusa{h}_top{r + 1}" for h in range(4) for r in range(3)] + ["train/train_loss"]
    lines = [",".join(f'"{name}"' for name in columns)]
    for place, name in enumerate(names):
        scale = 1.0 if place == 0 else 0.5
        values = [name, "finished", "2.06", *(str(x * scale) for row in CUMULATIVE for x in row), "24.9"]
        lines.append(",".join(f'"{value}"' for value in values))
    path.write_text("\n".join(lines))
    return path


def write_heads(path: Path, text: str | None = None) -> Path:
    rows = "".join(f"{h},{a},{b},{c}\n" for h, (a, b, c) in enumerate(CUMULATIVE))
    path.write_text(f"head,top1,top2,top3\n{rows}" if text is None else text, encoding="utf-8-sig")
    return path


def test_an_export_of_runs(tmp_path: Path) -> None:
    path = write_runs(tmp_path / "medusa_acc.csv")
    calibration = read_accuracy_table(path, "7b")
    assert calibration == HeadCalibration(accuracies=RANKS)
    assert read_accuracy_table(path, "13b").accuracies[0] == (0.25, 0.1, 0.025)
    assert read_accuracy_table(write_runs(tmp_path / "one.csv", ("7b",))) == calibration
    for name in (None, "70b"):
        with pytest.raises(DataError, match="holds 2 runs: name one of them, 7b, 13b"):
            read_accuracy_table(path, name)


def test_a_row_per_head(tmp_path: Path) -> None:
    assert read_accuracy_table(write_heads(tmp_path / "a.csv")).accuracies == RANKS
    counted = write_heads(tmp_path / "b.csv", "head,top1,count\n0,0.5,100\n1,0.25,90\n")
    assert read_accuracy_table(counted) == HeadCalibration(accuracies=((0.5,), (0.25,)), counts=(100, 90))


def test_rows_go_by_the_column_head(tmp_path: Path) -> None:
    mixed = write_heads(tmp_path / "a.csv", "head,top1\n3,0.25\n1,0.75\n2,0.5\n")
    assert read_accuracy_table(mixed).accuracies == ((0.75,), (0.5,), (0.25,))
    for heads in ("0\n0", "0\n2", "a\nb"):
        rows = "".join(f"{head},0.5\n" for head in heads.split())
        with pytest.raises(DataError, match="column head must count the rows from 0 or 1"):
            read_accuracy_table(write_heads(tmp_path / "b.csv", f"head,top1\n{rows}"))


def test_hit_tensors_have_their_own_denominators(tmp_path: Path) -> None:
    """What `heads_accuracy.py` saves: later heads have fewer positions."""
    first = torch.zeros(20, 3, dtype=torch.bool)
    first[:10, 0] = first[10:14, 1] = True
    second = torch.zeros(16, 3, dtype=torch.bool)
    second[:4, 0] = True
    torch.save([first, second], tmp_path / "heads_accuracy.pt")
    expected = HeadCalibration(accuracies=((0.5, 0.2, 0.0), (0.25, 0.0, 0.0)), counts=(20, 16))
    assert read_accuracy_table(tmp_path / "heads_accuracy.pt") == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no rows"),
        ("head,top1\n", "has no rows"),
        ("head,accuracy\n0,0.5\n", "neither columns top1"),
        ("head,top1,top3\n0,0.5,0.6\n", "without a gap"),
        ("head,top1,top2\n0,0.5,0.4\n", "head 0 fall"),
        ("head,top1\n0,high\n", "top1 must be a share between 0 and 1, not 'high'"),
        ("head,top1\n0,1.5\n", "not '1.5'"),
        ("head,top1,top2\n0,0.5\n", "top2 must be a share between 0 and 1, not None"),
        ("head,top1,count\n0,0.5,some\n", "count must be a whole number"),
        (f"head,top1,count\n0,0.5,{'9' * 400}\n", "count must be a whole number"),
        ("head,top1,count\n0,0.5,3\n1,0.4,\n", "a count for some heads"),
        ("x/medusa1_top1\n0.5\n", "skips a head"),
    ],
)
def test_tables_that_cannot_be_used(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_accuracy_table(write_heads(tmp_path / "table.csv", text))


class Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("executed",)


def test_files_that_are_no_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="cannot read"):
        read_accuracy_table(tmp_path / "missing.csv")
    (tmp_path / "latin.csv").write_bytes("head,top1\n0,\xe9\n".encode("latin-1"))
    with pytest.raises(DataError, match="cannot read"):
        read_accuracy_table(tmp_path / "latin.csv")
    (tmp_path / "code.pt").write_bytes(pickle.dumps(Payload(), protocol=2))
    with pytest.raises(DataError, match="cannot read"):
        read_accuracy_table(tmp_path / "code.pt")
    torch.save([Payload()], tmp_path / "zip.pt")
    with pytest.raises(DataError, match="cannot read"):
        read_accuracy_table(tmp_path / "zip.pt")
    assert not (tmp_path / "executed").exists()
    for content in (b"", b"\x80"):
        (tmp_path / "short.pt").write_bytes(content)
        with pytest.raises(DataError, match="cannot read"):
            read_accuracy_table(tmp_path / "short.pt")
    for value in ([], {"a": 1}, [torch.zeros(3)], [torch.zeros(0, 3)]):
        torch.save(value, tmp_path / "other.pt")
        with pytest.raises(DataError, match="no list of hit tensors"):
            read_accuracy_table(tmp_path / "other.pt")


def calibrate(*arguments: str | Path) -> str:
    command = ["calibrate", *map(str, arguments)]
    result = CliRunner().invoke(app, command, catch_exceptions=False, env={"COLUMNS": "160"})
    assert result.exit_code == 0
    return result.output


def test_heads_with_a_table_decode_with_its_tree(
    tmp_path: Path, tiny_model_dir: Path, random_heads: MedusaHeads
) -> None:
    heads = tmp_path / "heads"
    save_heads(random_heads, heads, base_model=str(tiny_model_dir))
    table = write_runs(tmp_path / "medusa_acc.csv")
    where = ("--model", tiny_model_dir, "--heads", heads)
    shown = calibrate("--from-table", table, "--table-run", "7b", *where)
    assert f"4 heads. Written to {heads / 'calibration.json'}" in shown
    assert load_calibration(heads) == HeadCalibration(accuracies=RANKS)
    config = EngineConfig(dtype="float32", measure=False, tree_nodes=8)
    engine = Engine.from_pretrained(tiny_model_dir, heads=heads, config=config)
    params = SamplingParams(temperature=0.0, max_tokens=12, speculation=SpeculationParams(tree="static"))
    steps = [output for output in engine.steps("Hello", params) if output.stats is not None]
    # The best seven products: .5 .2 .05 by head 1; .15 .06 .05 with head 2 behind it; .03 with head 3 too.
    assert max(step.stats.drafted for step in steps if step.stats is not None) == (3, 3, 1)
    assert engine.head_source is not None
    assert engine.head_source.calibration.taus(0.7, 4) == (1.0,) * 4
    other = tmp_path / "elsewhere"
    calibrate("--from-table", write_heads(tmp_path / "t.csv"), "--out", other, *where)
    assert load_calibration(other) == load_calibration(heads)


def test_a_table_of_other_heads_is_refused(
    tmp_path: Path, tiny_model_dir: Path, random_heads: MedusaHeads
) -> None:
    save_heads(random_heads, tmp_path / "heads", base_model="tiny")
    table = write_heads(tmp_path / "t.csv", "head,top1\n0,0.5\n")
    with pytest.raises(DataError, match="t.csv is about 1 heads, .*heads holds 4"):
        calibrate("--from-table", table, "--model", tiny_model_dir, "--heads", tmp_path / "heads")
    assert load_calibration(tmp_path / "heads") is None


def test_mistakes(tmp_path: Path, tiny_model_dir: Path) -> None:
    table = write_heads(tmp_path / "t.csv")
    for arguments, message in (
        (("--table-run", "7b"), "--table-run needs --from-table"),
        (("--plot-only",), "--plot-only needs --plot"),
        (("--plot-only", "--plot", tmp_path, "--from-table", table), "and no --from-table"),
        (("--from-table", table, "--model", tiny_model_dir), "no draft heads to calibrate"),
    ):
        with pytest.raises(MedusaError, match=message):
            calibrate(*arguments)


def test_intervals_are_written_for_people(tmp_path: Path) -> None:
    calibration = HeadCalibration(accuracies=((0.5, 0.25),), counts=(40,))
    path = save_calibration(calibration, tmp_path)
    written = json.loads(path.read_text())["intervals"]
    assert written == [[[round(x, 4) for x in wilson_interval(rate, 40)] for rate in (0.5, 0.25)]]
    assert load_calibration(tmp_path) == calibration
