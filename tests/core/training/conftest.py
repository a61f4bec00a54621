"""Training data for whole runs."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

ANSWERS = ("There are several cheap restaurants in the centre.", "Your table for two people is booked.")
GOODBYE = [{"role": "user", "content": "Goodbye!"}, {"role": "assistant", "content": "Goodbye!"}]
WriteDialogues = Callable[[int, Callable[[int], int]], Path]


@pytest.fixture(scope="session")
def write_dialogues(tmp_path_factory: pytest.TempPathFactory) -> WriteDialogues:
    """Write `count` short dialogues of a few fixed sentences, the n-th with `goodbyes(n)` more turns."""

    def write(count: int, goodbyes: Callable[[int], int]) -> Path:
        path = tmp_path_factory.mktemp("data") / "dialogues.jsonl"
        rows = [
            [
                {"role": "user", "content": f"I need {number} cheap restaurants, please."},
                {"role": "assistant", "content": ANSWERS[number % 2]},
                *(GOODBYE * goodbyes(number)),
            ]
            for number in range(count)
        ]
        path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows), encoding="utf-8")
        return path

    return write
