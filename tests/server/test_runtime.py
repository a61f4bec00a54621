"""What the server says of the model it has loaded."""

from dataclasses import replace

import pytest

from medusa_core.model_info import ModelInfo
from server.runtime import fingerprint, summary

INFO = ModelInfo(
    model="/models/demo", heads="hydra", num_heads=4, parameters=10**6, context_length=512, vocab_size=318,
    dtype="float32", device="cpu", tree_nodes=16, trees=("dynamic",), sources=("heads",), slots=1,
    expected_speedup=1.84,
)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {},
            "demo with 4 heads of hydra, float32 on cpu, tree of 16 nodes, 1 slot, "
            "about 1.8x plain decoding expected",
        ),
        (
            {"heads": None, "num_heads": 0, "tree_nodes": 1, "slots": 4, "expected_speedup": None},
            "demo with no draft heads, float32 on cpu, no draft tree, 4 slots",
        ),
        (
            {"tree_nodes": 1, "expected_speedup": None, "tree_choice": "no tree pays here: 0.9x"},
            "demo with 4 heads of hydra, float32 on cpu, no draft tree (no tree pays here: 0.9x), 1 slot",
        ),
    ],
)
def test_the_summary_is_a_line_for_people(changes, line):
    assert summary("demo", replace(INFO, **changes)) == line


def test_the_fingerprint_changes_with_what_decides_the_answers_alone():
    assert fingerprint(INFO) == fingerprint(replace(INFO, expected_speedup=2.0, tree_choice="fastest"))
    assert fingerprint(INFO) != fingerprint(replace(INFO, dtype="bfloat16"))
