"""The size chosen at start: expected tokens over measured times."""

import pytest

from medusa_core.draft.accuracy import HeadCalibration
from medusa_core.draft.tree import expected_acceptance_length, grow_tree
from medusa_core.draft.tree_size import expected_speedup, expected_tokens, explain_choice, fastest_size

ACCURACIES = ((0.6, 0.2, 0.1), (0.5, 0.2), (0.4, 0.2))
CALIBRATED = HeadCalibration(
    accuracies=ACCURACIES, expected={"dynamic": {4: 2.0, 8: 2.4, 16: 2.6}, "static": {4: 1.9}}
)


@pytest.mark.parametrize(("nodes", "tokens"), [(4, 2.0), (6, 2.2), (8, 2.4), (10, 2.45), (16, 2.6)])
def test_expected_tokens_are_the_measured_ones(nodes: int, tokens: float) -> None:
    assert expected_tokens(CALIBRATED, nodes) == pytest.approx(tokens)


@pytest.mark.parametrize("nodes", [2, 3, 24])
def test_expected_tokens_outside_what_was_measured_are_estimated(nodes: int) -> None:
    estimate = expected_acceptance_length(grow_tree(ACCURACIES, nodes), ACCURACIES)
    assert expected_tokens(CALIBRATED, nodes) == estimate
    assert expected_tokens(HeadCalibration(accuracies=ACCURACIES), nodes) == estimate
    assert expected_tokens(CALIBRATED, 4, "static") == 1.9


@pytest.mark.parametrize(
    ("trees", "fastest"),
    [
        ({1: 1.0, 4: 1.1, 8: 1.2, 16: 1.25}, 16),  # wide steps are nearly free
        ({1: 1.0, 4: 1.1, 8: 1.2, 16: 1.5}, 8),
        ({1: 1.0, 4: 1.1, 8: 1.5, 16: 2.5}, 4),
        ({1: 1.0, 4: 2.1, 8: 2.5, 16: 3.0}, 1),  # no tree pays
    ],
)
def test_fastest_size(trees: dict[int, float], fastest: int) -> None:
    assert fastest_size(trees, CALIBRATED) == fastest


def test_expected_speedup_is_tokens_over_time() -> None:
    assert expected_speedup({1: 1.0, 8: 1.2}, CALIBRATED, 8) == pytest.approx(2.0)
    assert expected_speedup({1: 1.0, 8: 1.2}, CALIBRATED, 1) == 1.0


def test_the_choice_is_explained_in_figures() -> None:
    pays, costs = {1: 0.004, 4: 0.005, 8: 0.006}, {1: 0.004, 4: 0.01, 8: 0.011}
    assert explain_choice(pays, CALIBRATED, 8) == (
        "a tree of 8 nodes has 2.40 tokens expected in a step of 6.00 ms, one in a "
        "plain step of 4.00 ms: 1.60x"
    )
    assert explain_choice(costs, CALIBRATED, 1) == (
        "no tree pays here: the best, of 8 nodes, has 2.40 tokens expected in a step of 11.00 ms, one in a "
        "plain step of 4.00 ms: 0.87x"
    )
