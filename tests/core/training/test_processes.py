"""Two processes (gloo on loopback) train like one with the same global batch."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from medusa_core.training.recipes import resolve_config
from medusa_core.training.trainer import train_heads

ANSWERS = ("There are several cheap restaurants in the centre.", "Your table for two people is booked.")


def write_run(folder: Path, model: Path, **changes: object) -> Path:
    data = folder.parent / "dialogues.jsonl"
    rows = [
        [
            {"role": "user", "content": f"I need {number} cheap restaurants, please."},
            {"role": "assistant", "content": ANSWERS[number % 2] * (1 + number % 3)},
        ]
        for number in range(40)
    ]
    data.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows), encoding="utf-8")
    settings = {
        "model": str(model),
        "data": str(data),
        "out": str(folder),
        "num_heads": 2,
        "learning_rate": 0.005,
        "lora_dropout": 0.0,
        "lora_rank": 4,
        "dtype": "float32",
        "device": "cpu",
        "log_steps": 1,
        "val_fraction": 0.1,
    }
    file = folder.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(settings | changes), encoding="utf-8")
    return file


def train_in_two(file: Path) -> dict[str, Any]:
    """The report of a run started as people start it."""
    launcher = [
        *("-m", "torch.distributed.run", "--nnodes", "1", "--nproc-per-node", "2", "--no-python"),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"),
    ]
    medusa = str(Path(sys.executable).with_name("medusa"))
    command = [sys.executable, *launcher, medusa, "train", "--config", str(file)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return report(file.with_suffix(""))


def report(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "training.json").read_text())["report"]
    return content


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Both stages of medusa-2: heads beside a frozen backbone, then heads and adapters."""
    settings = {"recipe": "medusa-2", "max_steps": 6, "warmup": 0.0}
    alone, together = tmp_path / "one", tmp_path / "two"
    train_heads(resolve_config({}, write_run(alone, tiny_model_dir, batch_size=4, **settings)))
    shared = train_in_two(write_run(together, tiny_model_dir, batch_size=2, **settings))
    for ours, theirs in ((report(alone), shared), (report(alone / "stage-1"), report(together / "stage-1"))):
        assert [step for step, _ in ours["losses"]] == [step for step, _ in theirs["losses"]] == [1, 2, 3]
        for (_, one), (_, two) in zip(ours["losses"], theirs["losses"], strict=True):
            assert two == pytest.approx(one, rel=1e-4)
    assert shared["backbone_after"] == pytest.approx(report(alone)["backbone_after"], rel=1e-4)
