"""When a request got where, and what its steps cost: for its line in the log and for traces."""

import time
from dataclasses import dataclass, field

from medusa_core.request import StepOutput, StepStats

MAX_MARKS = 128  # steps remembered one by one, those after only in the sums


@dataclass(frozen=True, slots=True)
class StepMark:
    """One step: when the API process heard of its end, and what it reported."""

    at: float
    num_tokens: int
    stats: StepStats


@dataclass(slots=True)
class Timeline:
    """Times are of the monotonic clock, None for what has not happened; durations are in seconds."""

    arrived: float
    dispatched: float | None = None
    first_token: float | None = None
    ended: float | None = None
    reason: str | None = None
    num_tokens: int = 0
    prefill_steps: int = 0
    prefill_seconds: float = 0.0
    decode_steps: int = 0
    propose_seconds: float = 0.0
    verify_seconds: float = 0.0
    commit_seconds: float = 0.0
    marks: list[StepMark] = field(default_factory=list)

    def dispatch(self) -> None:
        """A worker takes it."""
        self.dispatched = time.monotonic()

    def step(self, output: StepOutput) -> None:
        """A step of it has ended."""
        now = time.monotonic()
        num_tokens, stats = len(output.token_ids), output.stats
        if num_tokens and self.first_token is None:
            self.first_token = now
        self.num_tokens += num_tokens
        if stats is None:
            return
        if len(self.marks) < MAX_MARKS:
            self.marks.append(StepMark(now, num_tokens, stats))
        if stats.is_prefill:
            self.prefill_steps += 1
            self.prefill_seconds += stats.seconds
        else:
            self.decode_steps += 1
            self.propose_seconds += stats.propose_seconds
            self.verify_seconds += stats.verify_seconds
            self.commit_seconds += stats.commit_seconds

    def end(self, reason: str) -> None:
        """It has its end."""
        self.ended = time.monotonic()
        self.reason = reason
