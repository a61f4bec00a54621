"""`medusa distill` against our own server: the very rows that it makes with the model in process."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from medusa_core.cli.main import app

pytestmark = pytest.mark.e2e

OPTIONS = ("--max-tokens", "80", "--temperature", "0.9")
USERS = [[f"I need {thing}", "and a taxi"] for thing in ("a room", "food", "a train", "help", "tea", "a map")]


def distill(data: Path, out: Path, *arguments: str) -> dict[int, Any]:
    command = ["distill", "--data", str(data), "--out", str(out), *OPTIONS, *arguments]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    return {row["seed_row"]: row["messages"] for row in rows}


def test_server_and_engine_give_the_same_rows(
    start_server: Callable[..., Any], tiny_model_dir: Path, tmp_path: Path
) -> None:
    data = tmp_path / "seeds.jsonl"
    dialogues = [[{"role": "user", "content": text} for text in texts] for texts in USERS]
    rows = [
        {"messages": [first, {"role": "assistant", "content": "?"}, second]}
        for first, second in dialogues * 2
    ]
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    live = start_server(model=str(tiny_model_dir), max_length=None)
    try:
        endpoint = ["--endpoint", f"{live.url}/v1", "--endpoint-model", live.model]
        asked = distill(data, tmp_path / "asked.jsonl", *endpoint, "--concurrency", "4")
    finally:
        live.stop()
    own = distill(data, tmp_path / "own.jsonl", "--model", str(tiny_model_dir), "--dtype", "float32")
    assert asked == own
    assert len(own) > 2
