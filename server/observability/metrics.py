"""Every Prometheus metric of the server, named once. One registry an app, so that tests can run several.

Every series carries the label `model`, so that one Prometheus can watch several models.

Estimated speedup of speculation = rate(medusa_baseline_seconds_total) / rate(medusa_decode_seconds_total).
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.metrics_core import Metric

import medusa_core
from medusa_core.engine.outputs import FinishReason, StepStats
from medusa_core.model_info import ModelInfo
from medusa_core.sampling_params import SpeculationMode
from server.errors import ApiError

UNROUTED = "none"  # route of what reached none: unknown paths, refusals before routing
REJECTED = "rejected"  # finish reason of requests that never got into the queue (429)
FINISH_REASONS = (*FinishReason, REJECTED)
RESTART_REASONS = ("crash", "hang", "load")  # it died, was killed for making no progress, could not load
WORKER_STATES = ("starting", "ready", "failed")
INFO_LABELS = ("num_heads", "dtype", "device", "context_length", "tree_nodes")  # fields of `ModelInfo`

# fmt: off
STEP_BUCKETS = (
    0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 5.0,
)
LATENCY_BUCKETS = (
    0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0,
)
REQUEST_BUCKETS = (
    0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0, 300.0, 600.0, 1800.0,
)
# fmt: on
ACCEPTANCE_BUCKETS = (1, 2, 3, 4, 5, 6, 7, 8)


class ModelRegistry(CollectorRegistry):
    """A registry that adds the label `model` to every sample; prometheus_client has no constant labels."""

    def __init__(self, model: str) -> None:
        super().__init__()
        self._model = {"model": model}

    def collect(self) -> Iterable[Metric]:
        for family in super().collect():
            family.samples = [
                sample._replace(labels={**sample.labels, **self._model}) for sample in family.samples
            ]
            yield family


class ServerMetrics:
    """All metrics and the rules by which a step or a finished request changes them."""

    def __init__(self, model: str = "") -> None:
        # Else every counter has a second series that nobody plots.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = ModelRegistry(model) if model else CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._define_work()
        self._define_requests()
        self._define_workers()

    def _define_work(self) -> None:
        """What the engine's steps cost and gained."""
        counter = partial(Counter, registry=self.registry)
        histogram = partial(Histogram, registry=self.registry, buckets=STEP_BUCKETS)
        steps = counter("medusa_decode_steps", "Decode steps.", ["mode"])
        tokens = counter("medusa_generation_tokens", "Generated tokens.", ["mode"])
        self.prompt_tokens = counter("medusa_prompt_tokens", "Prompt tokens processed.")
        self.drafted = counter("medusa_drafted_tokens", "Tree nodes drafted, by head (from 0).", ["head"])
        self.accepted = counter("medusa_accepted_tokens", "Drafted tokens accepted, by head.", ["head"])
        self.acceptance_length = histogram(
            "medusa_acceptance_length", "Tokens a decode step brought the client.", buckets=ACCEPTANCE_BUCKETS
        )
        phases = histogram("medusa_step_phase_seconds", "Time of a decode step by phase.", ["phase"])
        self.inter_token_latency = histogram(
            "medusa_inter_token_latency_seconds", "Decode step time apportioned to the tokens it gained."
        )
        self.decode_seconds = counter(
            "medusa_decode_seconds", "Time of decode steps whose baseline was measured."
        )
        self.baseline_seconds = counter(
            "medusa_baseline_seconds", "What the tokens of those steps would have taken without speculation."
        )
        # Children are looked up once: a step touches a dozen of them.
        self._steps = {mode: steps.labels(mode.value) for mode in SpeculationMode}
        self._tokens = {mode: tokens.labels(mode.value) for mode in SpeculationMode}
        self._phases = [phases.labels(phase) for phase in ("propose", "verify", "commit")]
        self._heads: list[tuple[Counter, Counter]] = []

    def _define_requests(self) -> None:
        """What clients and workers do."""
        counter = partial(Counter, registry=self.registry)
        histogram = partial(Histogram, registry=self.registry)
        gauge = partial(Gauge, registry=self.registry)
        requests = counter(
            "medusa_requests", "Requests by their end; 'rejected' found the queue full.", ["finish_reason"]
        )
        self._requests = {reason: requests.labels(reason) for reason in FINISH_REASONS}
        self.time_to_first_token = histogram(
            "medusa_time_to_first_token_seconds",
            "From acceptance of a request to its first token, queue included.",
            buckets=LATENCY_BUCKETS,
        )
        self.request_seconds = histogram(
            "medusa_request_seconds", "From acceptance of a request to its end.", buckets=REQUEST_BUCKETS
        )
        self.queue_wait = histogram(
            "medusa_queue_wait_seconds", "Time a request waited for a slot.", buckets=LATENCY_BUCKETS
        )
        self.queue_depth = gauge("medusa_queue_depth", "Requests waiting for a slot.")
        self.running = gauge("medusa_running", "Requests in a slot.")
        self.queue_limit = gauge("medusa_queue_limit", "Requests that may wait for a slot.")
        self._responses = counter(
            "medusa_http_responses", "HTTP responses by route and status.", ["route", "status"]
        )
        self._errors = counter(
            "medusa_errors", "Errors told to clients, in responses and in streams, by code.", ["code"]
        )
        self.out_of_memory = counter(
            "medusa_out_of_memory", "Requests that failed because the device ran out of memory."
        )
        self.client_retries = counter(
            "medusa_client_retries", "Requests that OpenAI's SDK marked as retries."
        )

    def _define_workers(self) -> None:
        """The processes that decode, and what they serve."""
        gauge = partial(Gauge, registry=self.registry)
        self._ready = gauge("medusa_ready", "1 while a request would be served, else 0.")
        self._workers = gauge("medusa_workers", "Workers by state.", ["state"])
        self._slots = gauge("medusa_slots", "Slots of the workers that are ready.")
        restarts = Counter(
            "medusa_worker_restarts",
            "Worker processes started again, by what ended the one before.",
            ["reason"],
            registry=self.registry,
        )
        self.worker_restarts = {reason: restarts.labels(reason) for reason in RESTART_REASONS}
        self._model_info = gauge(
            "medusa_model_info",
            "Always 1; the labels say what is served.",
            ["heads", *INFO_LABELS, "version"],
        )

    def watch_queue(self, depth: Callable[[], float], running: Callable[[], float]) -> None:
        """Read the two gauges from their owner at each scrape."""
        self.queue_depth.set_function(depth)
        self.running.set_function(running)

    def watch_workers(
        self,
        is_ready: Callable[[], bool],
        states: Callable[[], Mapping[str, int]],
        slots: Callable[[], float],
    ) -> None:
        """Read the state of the workers from their owner at each scrape; `states` counts `WORKER_STATES`."""
        self._ready.set_function(is_ready)
        self._slots.set_function(slots)
        for state in WORKER_STATES:
            self._workers.labels(state).set_function(partial(_count_of, states, state))

    def describe_model(self, info: ModelInfo) -> None:
        """What is served, once it is known."""
        labels = (getattr(info, name) for name in INFO_LABELS)
        self._model_info.labels(info.heads or "none", *labels, medusa_core.__version__).set(1)

    def observe_response(self, route: str, status: int) -> None:
        """Account for one HTTP response; `route` is the pattern, not the path, so that series stay few."""
        self._responses.labels(route, str(status)).inc()

    def observe_error(self, code: str) -> None:
        """Account for one error a client was told of."""
        self._errors.labels(code).inc()

    def observe_refusal(self, error: ApiError) -> None:
        """Account for an answer to what is no request, or no whole one, and reached no route."""
        self.observe_response(UNROUTED, error.status)
        self.observe_error(error.label)

    def observe_step(self, stats: StepStats, num_tokens: int) -> None:
        """Account for one engine step that gained `num_tokens` tokens."""
        if num_tokens:
            self._tokens[stats.mode].inc(num_tokens)
        if stats.is_prefill:
            self.prompt_tokens.inc(stats.prompt_tokens)
            return
        self._steps[stats.mode].inc()
        for child, seconds in zip(
            self._phases, (stats.propose_seconds, stats.verify_seconds, stats.commit_seconds), strict=True
        ):
            child.observe(seconds)
        for _ in range(num_tokens):
            self.inter_token_latency.observe(stats.seconds / num_tokens)
        if stats.baseline_seconds > 0.0:
            self.decode_seconds.inc(stats.seconds)
            self.baseline_seconds.inc(stats.baseline_seconds)
        self._observe_heads(stats)

    def observe_end(self, reason: str, seconds: float) -> None:
        """Account for an accepted request that ended `seconds` after its acceptance."""
        self._requests[reason].inc()
        self.request_seconds.observe(seconds)

    def observe_rejection(self) -> None:
        self._requests[REJECTED].inc()

    def _observe_heads(self, stats: StepStats) -> None:
        while len(self._heads) < len(stats.drafted):
            head = str(len(self._heads))
            self._heads.append((self.drafted.labels(head), self.accepted.labels(head)))
        for (drafted, accepted), num_drafted, num_accepted in zip(
            self._heads, stats.drafted, stats.accepted, strict=False
        ):
            drafted.inc(num_drafted)
            if num_accepted:
                accepted.inc(num_accepted)


def _count_of(states: Callable[[], Mapping[str, int]], state: str) -> float:
    return states().get(state, 0)
