"""The governor on made-up step times: down the ladder where speculation costs, up again later."""

import pytest

from medusa_core.draft.tree_size import MAX_RETRY_STEPS, RETRY_STEPS, WINDOW_STEPS, Governor, Governors
from medusa_core.sampling_params import SamplingParams, SpeculationMode, SpeculationParams


def observe(governor: Governor, steps: int, speedup: float) -> None:
    for _ in range(steps):
        governor.observe(0.01, 0.01 * speedup)


def steps_until_retry(governor: Governor, speedup: float = 1.0) -> int:
    for step in range(2 * MAX_RETRY_STEPS):
        if governor.nodes > 1:
            return step
        governor.observe(0.01, 0.01 * speedup)
    raise AssertionError("no retry")


@pytest.mark.parametrize(
    ("nodes", "ladder"),
    [(1, [1]), (2, [2, 1]), (3, [3, 2, 1]), (16, [16, 8, 4, 2, 1]), (24, [24, 16, 8, 4, 2, 1])],
)
def test_the_tree_shrinks_down_to_off(nodes: int, ladder: list[int]) -> None:
    governor = Governor(nodes)
    seen = [governor.nodes]
    for _ in range(len(ladder) + 2):
        observe(governor, WINDOW_STEPS, speedup=0.9)
        if governor.nodes != seen[-1]:
            seen.append(governor.nodes)
    assert seen == ladder


def test_a_tree_that_pays_stays(caplog: pytest.LogCaptureFixture) -> None:
    governor = Governor(16)
    observe(governor, 50 * WINDOW_STEPS, speedup=1.0)
    assert governor.nodes == 16
    assert not caplog.records


def test_only_whole_windows_are_judged(caplog: pytest.LogCaptureFixture) -> None:
    governor = Governor(16)
    observe(governor, WINDOW_STEPS - 1, speedup=0.1)
    assert governor.nodes == 16
    governor.observe(0.01, 10.0)  # one long run makes up for it
    assert governor.nodes == 16
    observe(governor, WINDOW_STEPS, speedup=0.5)
    assert governor.nodes == 8
    assert "speculation with 16 nodes is slower than without (estimated speedup 0.50)" in caplog.text
    assert "a tree of 8 nodes from now on" in caplog.text


def test_unknown_baselines_are_not_judged() -> None:
    governor = Governor(16)
    for _ in range(10 * WINDOW_STEPS):
        governor.observe(1.0, 0.0)
    assert governor.nodes == 16


def test_it_tries_again_ever_more_rarely() -> None:
    governor = Governor(4)
    observe(governor, 2 * WINDOW_STEPS, speedup=0.5)
    assert governor.nodes == 1
    waits = []
    for _ in range(9):
        waits.append(steps_until_retry(governor))
        assert governor.nodes == 2  # the smallest tree
        observe(governor, WINDOW_STEPS, speedup=0.5)
        assert governor.nodes == 1
    assert waits == [min(RETRY_STEPS * 2**i, MAX_RETRY_STEPS) for i in range(9)]


def test_a_trial_that_pays_leads_back_to_the_whole_tree() -> None:
    governor = Governor(16)
    observe(governor, 4 * WINDOW_STEPS, speedup=0.5)
    assert governor.nodes == 1
    sizes = {}
    for step in range(5 * RETRY_STEPS):
        sizes.setdefault(governor.nodes, step)
        observe(governor, 1, speedup=1.5)
    # Each waits its turn, none of them longer: a success forgets the failures.
    assert sizes == {1: 0, 2: RETRY_STEPS, 4: 2 * RETRY_STEPS, 8: 3 * RETRY_STEPS, 16: 4 * RETRY_STEPS}


def test_a_moment_of_load_does_not_shrink_the_tree_for_good() -> None:
    governor = Governor(16)
    observe(governor, WINDOW_STEPS, speedup=0.2)
    assert governor.nodes == 8
    observe(governor, RETRY_STEPS, speedup=1.5)
    assert governor.nodes == 16


def test_the_largest_size_that_pays_is_kept_most_of_the_time() -> None:
    governor = Governor(16)
    steps = dict.fromkeys((2, 4, 8, 16), 0)
    for _ in range(40 * RETRY_STEPS):
        steps[governor.nodes] += 1
        observe(governor, 1, speedup=0.9 if governor.nodes == 16 else 1.4)
    assert steps[8] > 0.95 * sum(steps.values())
    assert steps[2] == steps[4] == 0


def test_one_node_is_no_speculation_for_good() -> None:
    governor = Governor(1)
    observe(governor, 3 * RETRY_STEPS, speedup=2.0)
    assert governor.nodes == 1


def test_traffic_that_does_not_pay_leaves_other_traffic_alone(caplog: pytest.LogCaptureFixture) -> None:
    governors = Governors(16)
    hot, greedy = SamplingParams(temperature=1.9), SamplingParams(temperature=0.0)
    observe(governors.of(hot), 4 * WINDOW_STEPS, speedup=0.8)
    assert governors.of(hot).nodes == 1
    assert governors.of(greedy).nodes == 16
    assert "no speculation from now on (exact, dynamic tree, temperature above 1.5)" in caplog.text


def test_requests_are_told_apart_by_what_decides_acceptance() -> None:
    governors = Governors(16)
    typical = SpeculationParams(mode=SpeculationMode.TYPICAL)
    static = SpeculationParams(tree="static")
    kinds = [SamplingParams(temperature=t) for t in (0.0, 0.3, 0.8, 1.2, 2.0)]
    kinds += [SamplingParams(speculation=speculation) for speculation in (typical, static)]
    assert len({id(governors.of(params)) for params in kinds}) == len(kinds)
    assert governors.of(SamplingParams(temperature=0.7, seed=1)) is governors.of(
        SamplingParams(temperature=1.0)
    )
    assert governors.of(SamplingParams(temperature=50.0)) is governors.of(SamplingParams(temperature=1.6))
