"""The verdict on a soak: everything that must not have happened, in words."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from chaos.clients import WEIGHTS
from chaos.faults import FaultLog
from chaos.leaks import Level
from chaos.load import Tally
from chaos.memory import Slope, api_slope, worker_slopes
from chaos.outcomes import Kind
from chaos.server_process import Sample

MAX_SLOPE = 1.0  # MiB a minute
# At first memory finds its level: each new mix of large bodies at once makes a new high water. Short spans
# tell nothing.
API_WARM_UP_SHARE = 0.25  # of all samples
WORKER_WARM_UP = 30.0
LEAST_MINUTES = 5.0
LEAST_WORKER_SECONDS = 90.0


@dataclass(slots=True)
class SoakRun:
    """What a soak saw."""

    tally: Tally = field(default_factory=Tally)
    samples: list[Sample] = field(default_factory=list)
    faults: FaultLog = field(default_factory=FaultLog)
    level_before: Level | None = None
    level_after: Level | None = None
    health_seconds: list[float] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    log: str = ""

    @property
    def api_slope(self) -> Slope | None:
        if not self.samples:
            return None
        return api_slope(self.samples, API_WARM_UP_SHARE * self.samples[-1].at)

    @property
    def worker_slopes(self) -> list[Slope]:
        return list(worker_slopes(self.samples, WORKER_WARM_UP, LEAST_WORKER_SECONDS).values())


def find_failures(run: SoakRun, slots: int, health_limit: float) -> list[str]:
    """Empty for a run that passed. `health_limit`: seconds in which a living server says so."""
    worst = max(run.health_seconds, default=0.0)
    return [
        *_of_requests(run, slots),
        *run.left,
        *run.faults.failures,
        *_of_workers(run),
        *_of_memory(run),
        *([f"GET /health took {worst:.1f} s: the event loop stood still"] if worst > health_limit else []),
    ]


def _of_requests(run: SoakRun, slots: int) -> Iterator[str]:
    failed = run.tally.count(Kind.FAILED)
    if failed:
        yield f"{failed} requests failed, see failed_requests"
    missing = [name for name in WEIGHTS if name not in run.tally.ends]
    if missing:
        yield f"no client of class {', '.join(missing)} came to its turn"
    lost, most = run.tally.count_detail("worker_lost"), run.faults.num_deaths * slots
    if lost > most:
        yield f"{lost} requests lost their worker, though {run.faults.num_deaths} deaths can have hit {most}"


def _of_workers(run: SoakRun) -> Iterator[str]:
    restarts = run.metrics.get("medusa_worker_restarts_total", 0.0)
    if restarts != run.faults.num_deaths:
        yield f"{restarts:g} worker restarts after {run.faults.num_deaths} faults that end a worker"
    if not run.metrics.get("medusa_ready"):
        yield "the server was not ready at the end"
    if "Traceback" in run.log:
        yield f"a traceback in the server's log: {_around(run.log, 'Traceback')}"


def _of_memory(run: SoakRun) -> Iterator[str]:
    api = run.api_slope
    slopes = [("the API process", api)] if api is not None and api.minutes >= LEAST_MINUTES else []
    slopes += [("a worker", slope) for slope in run.worker_slopes]
    for name, slope in slopes:
        if slope.value >= MAX_SLOPE:
            yield f"{name} grew by {slope.value:.2f} MiB a minute over {slope.minutes:.1f} minutes"


def _around(text: str, word: str) -> str:
    place = text.index(word)
    return text[max(0, place - 300) : place + 1500]
