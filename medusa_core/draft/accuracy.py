"""What calibration knows about a set of heads, as plain data stored beside them in `calibration.json`."""

import json
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from medusa_core.errors import CheckpointError

Number = TypeVar("Number", int, float)
FILE_NAME = "calibration.json"
FORMAT_VERSION = 1
# Vicuna-7B v0.1 heads, top-1..top-5 increments (Medusa repository, medusa_acc.csv): a stand-in until heads
# are calibrated. It only shapes the static tree and its expected length, never what is accepted.
TYPICAL_ACCURACIES = (
    (0.560, 0.111, 0.056, 0.032, 0.020),
    (0.316, 0.107, 0.062, 0.043, 0.034),
    (0.201, 0.086, 0.060, 0.036, 0.033),
    (0.147, 0.078, 0.048, 0.037, 0.029),
    (0.117, 0.069, 0.048, 0.038, 0.027),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadCalibration:
    """Measured accuracy and confidence of K draft heads.

    `accuracies[k][r]`: share of positions at which head k's guess of rank r was the model's token;
    `counts[k]`: how many positions. `temperatures`: sampling temperature -> tau per head, the divisor that
    makes the heads' scores probabilities of being right. `expected`: tree kind ("static", "dynamic") -> nodes
    (root included) -> mean acceptance length in tokens per step. `tree_nodes`: the size that was fastest on
    `machine`.
    """

    accuracies: tuple[tuple[float, ...], ...]
    counts: tuple[int, ...] = ()
    temperatures: Mapping[float, tuple[float, ...]] = field(default_factory=dict)
    expected: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    step_seconds: Mapping[int, float] = field(default_factory=dict)
    tree_nodes: int | None = None
    machine: str = ""

    @property
    def num_heads(self) -> int:
        return len(self.accuracies)

    def taus(self, temperature: float, num_heads: int) -> tuple[float, ...]:
        """tau per head at a sampling temperature, linearly interpolated between the calibrated ones."""
        if not self.temperatures:
            return (1.0,) * num_heads
        below, above, share = bracket(self.temperatures, temperature)
        low, high = self.temperatures[below], self.temperatures[above]
        return tuple(a + share * (b - a) for a, b in zip(low, high, strict=True))[:num_heads]


def bracket(known: Collection[Number], value: Number) -> tuple[Number, Number, float]:
    """The two of `known` around a value, and its place between them from 0 to 1; beyond the ends, the end."""
    below = max((k for k in known if k <= value), default=min(known))
    above = min((k for k in known if k >= value), default=max(known))
    return below, above, 0.0 if below == above else (value - below) / (above - below)


def default_calibration(num_heads: int) -> HeadCalibration:
    """For heads nobody calibrated: published accuracies, the last head's repeated where there are more."""
    rows = [TYPICAL_ACCURACIES[min(k, len(TYPICAL_ACCURACIES) - 1)] for k in range(num_heads)]
    return HeadCalibration(accuracies=tuple(rows))


def wilson_interval(rate: float, count: int) -> tuple[float, float]:
    """95 % interval of a share seen in `count` trials (Wilson 1927)."""
    z, n = 1.96, max(count, 1)
    center = (rate + z * z / (2 * n)) / (1 + z * z / n)
    spread = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return center - spread, center + spread


def save_calibration(calibration: HeadCalibration, directory: Path) -> Path:
    """Write `calibration.json` (to a temporary file, then renamed).

    `intervals` [head][rank] in it are the 95 % intervals of the accuracies, for people: they follow from the
    counts and are not read back.
    """
    target = directory / FILE_NAME
    temporary = target.with_suffix(".tmp")
    data = {"format": FORMAT_VERSION, **asdict(calibration), "intervals": _intervals(calibration)}
    temporary.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    temporary.replace(target)
    return target


def _intervals(calibration: HeadCalibration) -> list[list[tuple[float, ...]]]:
    if not calibration.counts:
        return []
    return [
        [tuple(round(bound, 4) for bound in wilson_interval(rate, count)) for rate in row]
        for row, count in zip(calibration.accuracies, calibration.counts, strict=True)
    ]


def load_calibration(directory: Path) -> HeadCalibration | None:
    """Read `calibration.json`; None if there is none. Raises `CheckpointError` if it is not one of ours."""
    path = directory / FILE_NAME
    if not path.exists():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data.pop("format") != FORMAT_VERSION:
            raise ValueError("another format version")
        return _from_json(data)
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a calibration file of this version: {error}") from error


def _from_json(data: dict[str, Any]) -> HeadCalibration:
    calibration = HeadCalibration(
        accuracies=tuple(_numbers("accuracies", row) for row in data["accuracies"]),
        counts=tuple(int(x) for x in data["counts"]),
        temperatures={float(t): _numbers("temperatures", row) for t, row in data["temperatures"].items()},
        expected={
            kind: dict(zip(map(int, row), _numbers("expected", row.values()), strict=True))
            for kind, row in data["expected"].items()
        },
        step_seconds={int(n): float(s) for n, s in data["step_seconds"].items()},
        tree_nodes=None if data["tree_nodes"] is None else int(data["tree_nodes"]),
        machine=str(data["machine"]),
    )
    heads = calibration.num_heads
    if heads == 0 or not all(calibration.accuracies):
        raise ValueError("no accuracies")
    if any(len(row) != heads or min(row) <= 0.0 for row in calibration.temperatures.values()):
        raise ValueError(f"temperatures need {heads} divisors above 0 each")
    return calibration


def _numbers(name: str, row: Iterable[Any]) -> tuple[float, ...]:
    numbers = tuple(float(x) for x in row)
    if not all(math.isfinite(x) and x >= 0.0 for x in numbers):
        raise ValueError(f"{name} must be finite and not negative")
    return numbers
