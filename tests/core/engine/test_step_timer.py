"""Step times on disk: a second start takes those of the first, unless steps take another time now."""

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from medusa_core.draft.medusa import MedusaHeads
from medusa_core.engine.engine import Engine
from medusa_core.engine.step_timer import StepTimer
from medusa_core.engine.step_times import MIN_REPEATS, StepTimes
from medusa_core.model.backbone import Backbone
from tests.core.conftest import BuildEngine, new_heads

CONTEXT = 300


@dataclass
class Clock:
    """In place of real steps' times; `slower` than at first."""

    slower: float = 1.0
    calls: list[tuple[int, int]] = field(default_factory=list)

    def seconds(self, nodes: int, context: int) -> float:
        self.calls.append((nodes, context))
        return self.slower * (0.001 * nodes + 1e-6 * context)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Path:
    monkeypatch.setenv("MEDUSA_CACHE_DIR", str(tmp_path))
    caplog.set_level(logging.INFO, "medusa_core.engine.step_timer")
    return tmp_path


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(StepTimer, "seconds", lambda _, nodes, context: clock.seconds(nodes, context))
    return clock


def timer(engine: Engine, step_name: str = "eager") -> StepTimer:
    return StepTimer(engine._runner, engine._cache, engine.backbone, engine.head_source, step_name)


def test_a_second_start_takes_the_times_of_the_first(
    build_engine: BuildEngine,
    random_heads: MedusaHeads,
    cache: Path,
    clock: Clock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    first = timer(build_engine(random_heads)).measure(CONTEXT)
    [file] = cache.iterdir()
    assert StepTimes.from_json(json.loads(file.read_text())) == first
    assert "step times (ms), measured: {1: 1.26, 2: 2.26" in caplog.text
    clock.slower, clock.calls = 1.2, []  # not slow enough to be another machine
    assert timer(build_engine(random_heads)).measure(CONTEXT) == first
    assert len(clock.calls) == 2 * (MIN_REPEATS + 1)
    assert "from an earlier start" in caplog.text


@pytest.mark.parametrize("slower", [2.0, 0.5])
def test_times_that_are_off_are_measured_anew(
    build_engine: BuildEngine,
    random_heads: MedusaHeads,
    cache: Path,
    clock: Clock,
    caplog: pytest.LogCaptureFixture,
    slower: float,
) -> None:
    first = timer(build_engine(random_heads)).measure(CONTEXT)
    clock.slower = slower
    again = timer(build_engine(random_heads)).measure(CONTEXT)
    assert "measured anew" in caplog.text
    assert again.trees == pytest.approx({nodes: slower * s for nodes, s in first.trees.items()})
    [file] = cache.iterdir()
    assert StepTimes.from_json(json.loads(file.read_text())) == again


@pytest.mark.parametrize("text", ["", "{}", '{"baseline": {"32": -1}, "trees": {"1": 1}}'])
@pytest.mark.usefixtures("clock")
def test_a_damaged_file_is_measured_over(
    build_engine: BuildEngine, random_heads: MedusaHeads, cache: Path, text: str
) -> None:
    first = timer(build_engine(random_heads)).measure(CONTEXT)
    [file] = cache.iterdir()
    file.write_text(text)
    assert timer(build_engine(random_heads)).measure(CONTEXT) == first
    assert StepTimes.from_json(json.loads(file.read_text())) == first


@pytest.mark.usefixtures("clock")
def test_whatever_decides_the_time_has_times_of_its_own(
    build_engine: BuildEngine, random_heads: MedusaHeads, tiny_backbone: Backbone, cache: Path
) -> None:
    engine = build_engine(random_heads)
    for repeat in range(2):
        timer(engine).measure(CONTEXT)
        timer(engine).measure(CONTEXT + 1)
        timer(engine, "another").measure(CONTEXT)
        timer(build_engine(None)).measure(CONTEXT)
        timer(build_engine(new_heads(tiny_backbone, 2))).measure(CONTEXT)
        assert len(list(cache.iterdir())) == 5, repeat
