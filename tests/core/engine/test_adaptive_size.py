"""Adaptive sizes on made-up machines: whatever was measured at start, what runs decides in the end."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest

from medusa_core.draft.accuracy import HeadCalibration
from medusa_core.engine.adaptive_size import (
    CHOICE_STEPS,
    MAX_RETRY_STEPS,
    PROBE_STEPS,
    RETRY_STEPS,
    TRIAL_STEPS,
    AdaptiveTreeSize,
    AdaptiveTreeSizes,
)
from medusa_core.engine.live_times import LiveStepTimes
from medusa_core.engine.step_times import StepTimes
from medusa_core.sampling_params import SamplingParams, SpeculationMode, SpeculationParams

CONTEXT = 256
SECONDS = {1: 0.004, 2: 0.0045, 4: 0.005, 8: 0.0055, 16: 0.006, 32: 0.012}
EXPECTED = {2: 1.5, 4: 2.0, 8: 2.4, 16: 2.8, 32: 3.0}  # 16 nodes are best: 1.87 times as fast as none


@dataclass
class Machine:
    """Steps take `seconds` by tree nodes; of the drafts that calibration expects, `share` are accepted."""

    seconds: Mapping[int, float] = field(default_factory=lambda: SECONDS)
    share: float = 1.0
    load: float = 1.0
    sizes: Counter[int] = field(default_factory=Counter)
    tokens: float = 0.0
    total_seconds: float = 0.0

    def run(self, size: AdaptiveTreeSize, steps: int) -> None:
        for _ in range(steps):
            nodes = size.next_nodes
            before = int(self.tokens)
            self.tokens += 1.0 if nodes == 1 else 1.0 + self.share * (EXPECTED[nodes] - 1.0)
            self.sizes[nodes] += 1
            seconds = self.load * self.seconds[nodes]
            self.total_seconds += seconds
            size.observe(nodes, CONTEXT, int(self.tokens) - before, seconds)


def new_size(
    nodes: int = 16, table: Mapping[int, float] = SECONDS, *, most: int = 32, probes: bool = True
) -> AdaptiveTreeSize:
    times = LiveStepTimes(StepTimes(baseline={CONTEXT: table[1]}, trees=table))
    expected = {n: tokens for n, tokens in EXPECTED.items() if n <= most}
    return AdaptiveTreeSize(times, expected, nodes, probes=probes)


def scaled(factor: float, *sizes: int) -> dict[int, float]:
    return {n: seconds * (factor if n in sizes else 1.0) for n, seconds in SECONDS.items()}


TREES = tuple(EXPECTED)


def test_a_tree_that_pays_stays(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    size = new_size()
    Machine().run(size, 20_000)
    assert size.nodes == 16
    assert not caplog.records


def test_probes_cost_less_than_half_a_percent() -> None:
    machine, steps = Machine(), 50_000
    machine.run(new_size(), steps)
    assert 2 <= machine.sizes[1] <= steps / PROBE_STEPS  # the plain step, and every other size in turn
    assert all(machine.sizes[n] >= 2 for n in TREES)
    ideal = EXPECTED[16] / SECONDS[16]
    assert machine.tokens / machine.total_seconds > 0.995 * ideal


def test_no_other_step_runs_where_it_could_change_the_answer() -> None:
    machine = Machine()
    machine.run(new_size(probes=False), 3 * PROBE_STEPS)
    assert set(machine.sizes) == {16}


def test_trees_that_do_not_pay_end_in_no_speculation(caplog: pytest.LogCaptureFixture) -> None:
    size, machine = new_size(), Machine(share=0.02)
    machine.run(size, 1000)
    assert size.nodes == 1
    [warning] = [r.getMessage() for r in caplog.records]
    assert "is slower than without (estimated speedup 0." in warning
    assert "one in a plain step of 4.00 ms): no speculation from now on (all requests)" in warning


def test_fewer_right_drafts_want_a_smaller_tree() -> None:
    size = new_size()
    seconds = {1: 0.004, 2: 0.0041, 4: 0.0043, 8: 0.007, 16: 0.009, 32: 0.012}
    Machine(seconds, share=0.3).run(size, 30_000)
    assert size.nodes == 4


def test_a_hiccup_is_no_reason(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    size, machine = new_size(), Machine()
    for _ in range(20):
        machine.run(size, 7 * CHOICE_STEPS - 1)
        size.observe(16, CONTEXT, 1, 3.0)
    assert size.nodes == 16
    assert not caplog.records


def test_without_step_times_nothing_adapts() -> None:
    times = LiveStepTimes(StepTimes())
    size = AdaptiveTreeSize(times, EXPECTED, 16)
    Machine(share=0.0).run(size, 5000)
    assert (size.nodes, times.seconds(1, CONTEXT)) == (16, 0.0)


def test_it_tries_again_ever_more_rarely() -> None:
    size, machine = new_size(most=2, nodes=2), Machine(share=0.0)
    machine.run(size, 500)
    assert size.nodes == 1
    machine.sizes.clear()
    waits = [RETRY_STEPS * 2**i for i in range(7)]
    assert waits[-1] == MAX_RETRY_STEPS
    for wait in waits:
        machine.run(size, wait + TRIAL_STEPS)
        assert size.nodes == 1
    assert machine.sizes[2] == pytest.approx(TRIAL_STEPS * len(waits), abs=TRIAL_STEPS)


def test_a_trial_that_pays_leads_back_to_the_whole_tree() -> None:
    size = new_size()
    Machine(share=0.0).run(size, 1000)
    assert size.nodes == 1
    Machine().run(size, 2 * RETRY_STEPS)
    assert size.nodes == 16
    Machine(share=0.0).run(size, 500)
    assert size.nodes == 1
    Machine().run(size, RETRY_STEPS + TRIAL_STEPS + CHOICE_STEPS)  # a success forgets the failures
    assert size.nodes == 16


@pytest.mark.parametrize("load", [4.0, 0.25])
def test_a_moment_of_load_changes_nothing(load: float) -> None:
    size, machine = new_size(), Machine()
    for _ in range(3):
        machine.load = load
        machine.run(size, 700)
        machine.load = 1.0
        machine.run(size, 700)
    assert size.nodes == 16
    assert machine.sizes[16] > 0.93 * machine.sizes.total()


@pytest.mark.parametrize(
    ("table", "chosen"),
    [
        (scaled(3.0, *TREES), 1),  # load while trees were timed: they seemed not to pay
        (scaled(5.0, 1), 32),  # load while the plain step was timed
        (scaled(3.0, 16), 8),  # a hiccup at the best size
        (scaled(0.3, 32), 32),
        (scaled(4.0, 1, *TREES), 16),
    ],
)
def test_a_measurement_under_load_pins_no_size(table: dict[int, float], chosen: int) -> None:
    size = new_size(chosen, table)
    machine = Machine()
    machine.run(size, 60_000)
    machine.sizes.clear()
    machine.run(size, 10_000)
    assert size.nodes == 16
    assert machine.sizes[16] > 0.98 * machine.sizes.total()
    assert size.times.seconds(1, CONTEXT) == pytest.approx(SECONDS[1], rel=0.1)
    assert size.speedup(16, CONTEXT) == pytest.approx(EXPECTED[16] * SECONDS[1] / SECONDS[16], rel=0.15)


def test_a_limit_of_one_node_is_no_speculation_for_good() -> None:
    size, machine = new_size(1, most=1), Machine()
    machine.run(size, 3 * RETRY_STEPS)
    assert set(machine.sizes) == {1}


CALIBRATED = HeadCalibration(accuracies=((0.6, 0.2, 0.1), (0.5, 0.2), (0.4, 0.2)))


def sizes_of(
    nodes: int = 16, *, most: int | None = None, calibration: HeadCalibration | None = CALIBRATED
) -> AdaptiveTreeSizes:
    table = StepTimes(baseline={CONTEXT: 0.004}, trees=SECONDS)
    return AdaptiveTreeSizes(
        table, calibration, head_nodes=nodes, ngram_nodes=most or max(nodes, 16), most_nodes=most
    )


def test_traffic_that_does_not_pay_leaves_other_traffic_alone(caplog: pytest.LogCaptureFixture) -> None:
    sizes_by_kind = sizes_of()
    hot, greedy = SamplingParams(temperature=1.9), SamplingParams(temperature=0.0)
    for _ in range(500):
        sizes_by_kind.of(hot).observe(sizes_by_kind.of(hot).next_nodes, CONTEXT, 1, 0.006)
    assert sizes_by_kind.of(hot).nodes == 1
    assert sizes_by_kind.of(greedy).nodes == 16
    assert "no speculation from now on (exact, heads, dynamic tree, temperature above 1.5)" in caplog.text


def test_requests_are_told_apart_by_what_decides_acceptance() -> None:
    sizes_by_kind = sizes_of()
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


@pytest.mark.parametrize("most", [None, 1, 8])
def test_n_grams_have_nodes_of_their_own(most: int | None) -> None:
    sizes = sizes_of(1, most=most)
    assert sizes.of(SamplingParams()).nodes == 1
    for source in ("ngram", "both"):
        assert sizes.of(SamplingParams(speculation=SpeculationParams(source=source))).nodes == (most or 16)


@pytest.mark.parametrize("calibration", [CALIBRATED, None])
def test_n_grams_that_hit_seldom_get_smaller_trees_or_none(calibration: HeadCalibration | None) -> None:
    size = sizes_of(calibration=calibration).of(SamplingParams(speculation=SpeculationParams(source="ngram")))
    seconds = {1: 0.004, 2: 0.0043, 4: 0.0045, 8: 0.0055, 12: 0.0068, 16: 0.008}
    seen = []
    for step in range(3000):
        nodes = size.next_nodes
        seen.append(nodes)
        size.observe(nodes, CONTEXT, 1 + (nodes > 1 and step % 2), seconds[nodes])
    assert size.nodes in (2, 4)
    for _ in range(500):
        size.observe(size.next_nodes, CONTEXT, 1, seconds[size.next_nodes])
    assert size.nodes == 1
    assert max(seen) == 16


def test_no_speculation_is_never_tried_with_it() -> None:
    size = sizes_of().of(SamplingParams(speculation=SpeculationParams(mode=SpeculationMode.OFF)))
    for _ in range(2 * RETRY_STEPS):
        assert size.next_nodes == 1
        size.observe(1, CONTEXT, 1, 0.008)
    assert size.times.seconds(1, CONTEXT) == pytest.approx(0.008, rel=0.01)
