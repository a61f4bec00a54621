"""The size chosen at start, and adaptive sizes: down the ladder where speculation costs, up again later."""

import pytest

from medusa_core.draft.accuracy import HeadCalibration
from medusa_core.draft.tree import expected_acceptance_length, grow_tree
from medusa_core.draft.tree_size import (
    MAX_RETRY_STEPS,
    RETRY_STEPS,
    WINDOW_STEPS,
    AdaptiveTreeSize,
    AdaptiveTreeSizes,
    expected_speedup,
    expected_tokens,
    fastest_size,
)
from medusa_core.sampling_params import SamplingParams, SpeculationMode, SpeculationParams


def observe(size: AdaptiveTreeSize, steps: int, speedup: float) -> None:
    for _ in range(steps):
        size.observe(0.01, 0.01 * speedup)


def steps_until_retry(size: AdaptiveTreeSize, speedup: float = 1.0) -> int:
    for step in range(2 * MAX_RETRY_STEPS):
        if size.nodes > 1:
            return step
        size.observe(0.01, 0.01 * speedup)
    raise AssertionError("no retry")


@pytest.mark.parametrize(
    ("nodes", "ladder"),
    [(1, [1]), (2, [2, 1]), (3, [3, 2, 1]), (16, [16, 8, 4, 2, 1]), (24, [24, 16, 8, 4, 2, 1])],
)
def test_the_tree_shrinks_down_to_off(nodes: int, ladder: list[int]) -> None:
    size = AdaptiveTreeSize(nodes)
    seen = [size.nodes]
    for _ in range(len(ladder) + 2):
        observe(size, WINDOW_STEPS, speedup=0.9)
        if size.nodes != seen[-1]:
            seen.append(size.nodes)
    assert seen == ladder


def test_a_tree_that_pays_stays(caplog: pytest.LogCaptureFixture) -> None:
    size = AdaptiveTreeSize(16)
    observe(size, 50 * WINDOW_STEPS, speedup=1.0)
    assert size.nodes == 16
    assert not caplog.records


def test_only_whole_windows_are_judged(caplog: pytest.LogCaptureFixture) -> None:
    size = AdaptiveTreeSize(16)
    observe(size, WINDOW_STEPS - 1, speedup=0.1)
    assert size.nodes == 16
    size.observe(0.01, 10.0)  # one long run makes up for it
    assert size.nodes == 16
    observe(size, WINDOW_STEPS, speedup=0.5)
    assert size.nodes == 8
    assert "speculation with 16 nodes is slower than without (estimated speedup 0.50)" in caplog.text
    assert "a tree of 8 nodes from now on" in caplog.text


def test_unknown_baselines_are_not_judged() -> None:
    size = AdaptiveTreeSize(16)
    for _ in range(10 * WINDOW_STEPS):
        size.observe(1.0, 0.0)
    assert size.nodes == 16


def test_it_tries_again_ever_more_rarely() -> None:
    size = AdaptiveTreeSize(4)
    observe(size, 2 * WINDOW_STEPS, speedup=0.5)
    assert size.nodes == 1
    waits = []
    for _ in range(9):
        waits.append(steps_until_retry(size))
        assert size.nodes == 2  # the smallest tree
        observe(size, WINDOW_STEPS, speedup=0.5)
        assert size.nodes == 1
    assert waits == [min(RETRY_STEPS * 2**i, MAX_RETRY_STEPS) for i in range(9)]


def test_a_trial_that_pays_leads_back_to_the_whole_tree() -> None:
    size = AdaptiveTreeSize(16)
    observe(size, 4 * WINDOW_STEPS, speedup=0.5)
    assert size.nodes == 1
    sizes = {}
    for step in range(5 * RETRY_STEPS):
        sizes.setdefault(size.nodes, step)
        observe(size, 1, speedup=1.5)
    # Each waits its turn, none of them longer: a success forgets the failures.
    assert sizes == {1: 0, 2: RETRY_STEPS, 4: 2 * RETRY_STEPS, 8: 3 * RETRY_STEPS, 16: 4 * RETRY_STEPS}


def test_a_moment_of_load_does_not_shrink_the_tree_for_good() -> None:
    size = AdaptiveTreeSize(16)
    observe(size, WINDOW_STEPS, speedup=0.2)
    assert size.nodes == 8
    observe(size, RETRY_STEPS, speedup=1.5)
    assert size.nodes == 16


def test_the_largest_size_that_pays_is_kept_most_of_the_time() -> None:
    size = AdaptiveTreeSize(16)
    steps = dict.fromkeys((2, 4, 8, 16), 0)
    for _ in range(40 * RETRY_STEPS):
        steps[size.nodes] += 1
        observe(size, 1, speedup=0.9 if size.nodes == 16 else 1.4)
    assert steps[8] > 0.95 * sum(steps.values())
    assert steps[2] == steps[4] == 0


def test_one_node_is_no_speculation_for_good() -> None:
    size = AdaptiveTreeSize(1)
    observe(size, 3 * RETRY_STEPS, speedup=2.0)
    assert size.nodes == 1


def test_traffic_that_does_not_pay_leaves_other_traffic_alone(caplog: pytest.LogCaptureFixture) -> None:
    sizes_by_kind = AdaptiveTreeSizes(16, 16)
    hot, greedy = SamplingParams(temperature=1.9), SamplingParams(temperature=0.0)
    observe(sizes_by_kind.of(hot), 4 * WINDOW_STEPS, speedup=0.8)
    assert sizes_by_kind.of(hot).nodes == 1
    assert sizes_by_kind.of(greedy).nodes == 16
    assert "no speculation from now on (exact, heads, dynamic tree, temperature above 1.5)" in caplog.text


def test_requests_are_told_apart_by_what_decides_acceptance() -> None:
    sizes_by_kind = AdaptiveTreeSizes(16, 16)
    typical = SpeculationParams(mode=SpeculationMode.TYPICAL)
    static = SpeculationParams(tree="static")
    kinds = [SamplingParams(temperature=t) for t in (0.0, 0.3, 0.8, 1.2, 2.0)]
    kinds += [SamplingParams(speculation=speculation) for speculation in (typical, static)]
    assert len({id(sizes_by_kind.of(params)) for params in kinds}) == len(kinds)
    assert sizes_by_kind.of(SamplingParams(temperature=0.7, seed=1)) is sizes_by_kind.of(
        SamplingParams(temperature=1.0)
    )
    assert sizes_by_kind.of(SamplingParams(temperature=50.0)) is sizes_by_kind.of(
        SamplingParams(temperature=1.6)
    )


def test_n_grams_have_nodes_of_their_own() -> None:
    sizes = AdaptiveTreeSizes(1, 8)
    assert sizes.of(SamplingParams()).nodes == 1
    for source in ("ngram", "both"):
        assert sizes.of(SamplingParams(speculation=SpeculationParams(source=source))).nodes == 8


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
