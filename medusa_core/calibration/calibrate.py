"""`medusa calibrate`: measures heads on the model's own answers and chooses the fastest tree."""

import os
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from medusa_core.calibration.collect import Answer, Observed, answer_prompts, observe
from medusa_core.calibration.measure import MAX_RANK, RankCounter, TauFitter, length_meters
from medusa_core.draft.accuracy import HeadCalibration
from medusa_core.draft.tree_size import TREE_SIZES, fastest_size
from medusa_core.engine.engine import Engine
from medusa_core.errors import ConfigError, DataError
from medusa_core.sampling_params import SamplingParams, SpeculationMode, SpeculationParams
from medusa_core.text.prompts import Prompt

Progress = Callable[[str], None]
GREEDY = 0.0
NO_HEADS = "there are no draft heads to calibrate: give --heads or a model that has some"


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationSettings:
    """How to answer. `temperatures`: those, beside 0, at which the heads' confidence is calibrated."""

    max_tokens: int = 128
    temperatures: tuple[float, ...] = (0.3, 0.7, 1.0)
    seed: int = 0

    def __post_init__(self) -> None:
        if any(not 0.0 < t <= 2.0 for t in self.temperatures):
            raise ConfigError(f"temperatures must be above 0 and at most 2, not {list(self.temperatures)}")
        if self.max_tokens < 8:
            raise ConfigError(f"max_tokens must be at least 8, not {self.max_tokens}")


def calibrate(
    engine: Engine, prompts: Sequence[Prompt], settings: CalibrationSettings, progress: Progress
) -> HeadCalibration:
    """Measure the engine's heads on the model's own answers to `prompts`. Raises `DataError` without answers.

    Greedy answers give accuracies and expected lengths; each temperature's taus come from answers of its own.
    Expected lengths of dynamic trees use taus of the first half and are measured on the second.
    """
    if engine.heads is None:
        raise DataError(NO_HEADS)
    progress("answering greedily")
    greedy = _answers(engine, prompts, settings, GREEDY)
    half = max(1, len(greedy) // 2)
    counter = RankCounter(engine.heads.num_heads, min(MAX_RANK, engine.heads.vocab_size))
    first_half = TauFitter(engine.heads.num_heads)
    everything = TauFitter(engine.heads.num_heads)
    for place, answer in enumerate(greedy):
        for observed in observe(engine, answer):
            counter.add(observed)
            everything.add(observed)
            if place < half:
                first_half.add(observed)
    progress("measuring trees")
    expected = _expected(engine, greedy[half:] or greedy, counter, first_half.taus())
    taus = {GREEDY: everything.taus()}
    for temperature in settings.temperatures:
        progress(f"answering at temperature {temperature:g}")
        taus[temperature] = _fit_taus(engine, _answers(engine, prompts, settings, temperature))
    measured = HeadCalibration(
        accuracies=counter.accuracies(),
        counts=tuple(counter.counts_K.tolist()),
        temperatures=taus,
        expected=expected,
        step_seconds={n: round(t, 6) for n, t in engine.step_times.trees.items()},
        machine=f"{platform.machine()} {engine.info.device} {engine.info.dtype}",
    )
    times = engine.step_times.trees
    return replace(measured, tree_nodes=fastest_size(times, measured)) if times else measured


def destination(heads: str | None, out: Path | None = None) -> Path:
    """The directory for `calibration.json`: the heads', where the engine looks for it, or `out`.

    Raises `DataError` if it cannot be written, so call it before calibrating.
    """
    if heads is None:
        raise DataError(NO_HEADS)
    path = Path(heads)
    if out is None and not path.exists():
        raise DataError(f"the heads {heads} are not local: give --out, where to write calibration.json")
    target = out or (path if path.is_dir() else path.parent)
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot make the directory {target}: {error.strerror}") from error
    if not os.access(target, os.W_OK):
        raise DataError(f"cannot write to {target}: give --out, where to write calibration.json")
    return target


def _answers(
    engine: Engine, prompts: Sequence[Prompt], settings: CalibrationSettings, temperature: float
) -> list[Answer]:
    params = SamplingParams(
        temperature=temperature,
        max_tokens=settings.max_tokens,
        seed=settings.seed,
        speculation=SpeculationParams(mode=SpeculationMode.EXACT),
    )
    answers = list(answer_prompts(engine, [p.messages for p in prompts], params))
    if not answers:
        raise DataError("no prompt got an answer of two tokens or more: nothing to calibrate on")
    return answers


def _fit_taus(engine: Engine, answers: Sequence[Answer]) -> tuple[float, ...]:
    assert engine.heads is not None
    fitter = TauFitter(engine.heads.num_heads)
    for observed in _observations(engine, answers):
        fitter.add(observed)
    return fitter.taus()


def _expected(
    engine: Engine, answers: Sequence[Answer], counter: RankCounter, taus: tuple[float, ...]
) -> dict[str, dict[int, float]]:
    assert engine.heads is not None
    meters = length_meters(engine.heads, counter.accuracies(), taus, TREE_SIZES, engine.backbone.device)
    for observed in _observations(engine, answers):
        for meter in chain.from_iterable(row.values() for row in meters.values()):
            meter.add(observed)
    return {kind: {n: meter.mean for n, meter in row.items() if meter.steps} for kind, row in meters.items()}


def _observations(engine: Engine, answers: Sequence[Answer]) -> Iterator[Observed]:
    return chain.from_iterable(observe(engine, answer) for answer in answers)
