"""Per-request timestamps, and what its steps cost."""

import time
from dataclasses import dataclass, field

from medusa_core.engine.outputs import StepOutput, StepStats

MAX_MARKS = 128  # steps remembered one by one where they are traced, those after only in the sums


@dataclass(frozen=True, slots=True)
class StepMark:
    """One step: when the API process heard of its end, and what it reported."""

    at: float
    num_tokens: int
    stats: StepStats


@dataclass(slots=True)
class Timeline:
    """Times are of the monotonic clock, None for what has not happened; durations are in seconds."""

    arrived: float = field(default_factory=time.monotonic)
    max_marks: int = 0
    dispatched: float | None = None
    first_token: float | None = None
    ended: float | None = None
    reason: str | None = None
    prefill_steps: int = 0
    prefill_seconds: float = 0.0
    propose_seconds: float = 0.0
    verify_seconds: float = 0.0
    commit_seconds: float = 0.0
    marks: list[StepMark] = field(default_factory=list)

    def dispatch(self) -> float:
        """A worker takes it. Returns the seconds it has waited."""
        self.dispatched = time.monotonic()
        return self.dispatched - self.arrived

    def step(self, output: StepOutput) -> float | None:
        """A step of it has ended. Returns the seconds to the first token, if this step brought it."""
        now = time.monotonic()
        num_tokens = len(output.token_ids)
        if output.stats is not None:
            self._add(output.stats, num_tokens, now)
        if num_tokens == 0 or self.first_token is not None:
            return None
        self.first_token = now
        return now - self.arrived

    def end(self, reason: str) -> float:
        """It has its end. Returns the seconds since it arrived."""
        self.ended = time.monotonic()
        self.reason = reason
        return self.ended - self.arrived

    def _add(self, stats: StepStats, num_tokens: int, now: float) -> None:
        if len(self.marks) < self.max_marks:
            self.marks.append(StepMark(now, num_tokens, stats))
        if stats.is_prefill:
            self.prefill_steps += 1
            self.prefill_seconds += stats.seconds
        else:
            self.propose_seconds += stats.propose_seconds
            self.verify_seconds += stats.verify_seconds
            self.commit_seconds += stats.commit_seconds
