"""Memory over time: robust slopes, so that one large request is not taken for a leak."""

from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import theilslopes

from chaos.server_process import Sample

MIB = 2**20
MIN_SAMPLES = 20


@dataclass(frozen=True, slots=True)
class Slope:
    """MiB a minute with its 95 % interval, over `minutes`."""

    value: float
    low: float
    high: float
    minutes: float


def slope_of(times: Sequence[float], values: Sequence[float]) -> Slope | None:
    """Theil-Sen's slope of bytes over seconds; None where there is too little to tell."""
    if len(times) < MIN_SAMPLES:
        return None
    slope, _, low, high = theilslopes(values, times)
    scale = 60.0 / MIB
    return Slope(slope * scale, low * scale, high * scale, (times[-1] - times[0]) / 60.0)


def api_slope(samples: Sequence[Sample], warm_up: float) -> Slope | None:
    """Of the API process, from `warm_up` seconds after its start."""
    late = [sample for sample in samples if sample.at >= warm_up]
    return slope_of([sample.at for sample in late], [sample.rss for sample in late])


def worker_slopes(samples: Sequence[Sample], warm_up: float, least_seconds: float) -> dict[int, Slope]:
    """Of each worker that lived `least_seconds` beyond its own warm-up, by process id."""
    lives: dict[int, list[tuple[float, int]]] = {}
    for sample in samples:
        for pid, rss in sample.workers.items():
            lives.setdefault(pid, []).append((sample.at, rss))
    slopes = {}
    for pid, life in lives.items():
        late = [(at, rss) for at, rss in life if at >= life[0][0] + warm_up]
        if late and late[-1][0] - late[0][0] >= least_seconds:
            slope = slope_of([at for at, _ in late], [rss for _, rss in late])
            if slope is not None:
                slopes[pid] = slope
    return slopes
