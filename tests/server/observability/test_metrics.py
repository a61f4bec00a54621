"""What a step and an ended request do to the metrics."""

from prometheus_client import generate_latest

from medusa_core.engine.outputs import StepStats
from medusa_core.sampling_params import SpeculationMode
from server.observability.metrics import WORKER_STATES, ServerMetrics

DECODE = StepStats(
    mode=SpeculationMode.EXACT,
    is_prefill=False,
    seconds=0.004,
    propose_seconds=0.001,
    verify_seconds=0.002,
    commit_seconds=0.001,
    baseline_seconds=0.006,
    drafted=(4, 3, 1),
    accepted=(1, 1, 0),
)


def sample(metrics, name, **labels):
    return metrics.registry.get_sample_value(f"medusa_{name}", labels)


def test_decode_step():
    metrics = ServerMetrics()
    metrics.observe_step(DECODE, 3)
    assert sample(metrics, "decode_steps_total", mode="exact") == 1
    assert sample(metrics, "generation_tokens_total", mode="exact") == 3
    assert [sample(metrics, "drafted_tokens_total", head=str(head)) for head in range(3)] == [4, 3, 1]
    assert [sample(metrics, "accepted_tokens_total", head=str(head)) for head in range(3)] == [1, 1, 0]
    assert sample(metrics, "step_phase_seconds_sum", phase="verify") == 0.002
    assert sample(metrics, "inter_token_latency_seconds_count") == 3, "one observation a token, not a step"
    assert abs(sample(metrics, "inter_token_latency_seconds_sum") - 0.004) < 1e-12
    speedup = sample(metrics, "baseline_seconds_total") / sample(metrics, "decode_seconds_total")
    assert abs(speedup - 1.5) < 1e-9


def test_steps_without_a_measured_baseline_stay_out_of_the_pair():
    metrics = ServerMetrics()
    metrics.observe_step(StepStats(mode=SpeculationMode.OFF, is_prefill=False, seconds=0.1), 1)
    assert sample(metrics, "decode_seconds_total") == 0
    assert sample(metrics, "baseline_seconds_total") == 0
    assert sample(metrics, "decode_steps_total", mode="off") == 1


def test_prefill_is_no_decode_step():
    metrics = ServerMetrics()
    metrics.observe_step(
        StepStats(mode=SpeculationMode.EXACT, is_prefill=True, seconds=1.0, prompt_tokens=512), 0
    )
    metrics.observe_step(
        StepStats(mode=SpeculationMode.EXACT, is_prefill=True, seconds=0.1, prompt_tokens=8), 1
    )
    assert sample(metrics, "prompt_tokens_total") == 520
    assert sample(metrics, "generation_tokens_total", mode="exact") == 1
    assert sample(metrics, "decode_steps_total", mode="exact") == 0
    assert sample(metrics, "inter_token_latency_seconds_count") == 0


def test_a_step_that_decided_the_end_alone_has_no_token_to_time():
    metrics = ServerMetrics()
    metrics.observe_step(DECODE, 0)
    assert sample(metrics, "decode_steps_total", mode="exact") == 1
    assert sample(metrics, "inter_token_latency_seconds_count") == 0


def test_ends_and_gauges():
    metrics = ServerMetrics()
    metrics.watch_queue(lambda: 4, lambda: 2)
    metrics.observe_end("stop", 0.5)
    metrics.observe_rejection()
    assert sample(metrics, "requests_total", finish_reason="stop") == 1
    assert sample(metrics, "requests_total", finish_reason="rejected") == 1
    assert sample(metrics, "request_seconds_count") == 1
    assert (sample(metrics, "queue_depth"), sample(metrics, "running")) == (4, 2)


def test_exposition_has_every_promised_metric():
    """The issue's list, as Prometheus sees it before the first request."""
    text = generate_latest(ServerMetrics().registry).decode()
    types = dict(line.split()[2:4] for line in text.splitlines() if line.startswith("# TYPE"))
    counters = [
        "decode_steps",
        "generation_tokens",
        "prompt_tokens",
        "drafted_tokens",
        "accepted_tokens",
        "requests",
        "worker_restarts",
        "client_retries",
        "http_responses",
        "errors",
        "out_of_memory",
        "decode_seconds",
        "baseline_seconds",
    ]
    histograms = [
        "acceptance_length",
        "step_phase_seconds",
        "time_to_first_token_seconds",
        "inter_token_latency_seconds",
        "request_seconds",
        "queue_wait_seconds",
    ]
    expected = {f"medusa_{name}_total": "counter" for name in counters}
    expected |= {f"medusa_{name}": "histogram" for name in histograms}
    gauges = ["queue_depth", "running", "queue_limit", "slots", "ready", "workers", "model_info"]
    expected |= {f"medusa_{name}": "gauge" for name in gauges}
    assert {name: kind for name, kind in types.items() if not name.startswith("process_")} == expected
    assert "process_resident_memory_bytes" in types
    assert 'medusa_inter_token_latency_seconds_bucket{le="0.0005"}' in text
    assert "_created" not in text


def test_every_series_names_the_model():
    metrics = ServerMetrics("a/model")
    metrics.observe_step(DECODE, 3)
    metrics.observe_response("/v1/models", 200)
    metrics.observe_error("worker_lost")
    samples = [sample for family in metrics.registry.collect() for sample in family.samples]
    assert len(samples) > 100
    assert {sample.labels["model"] for sample in samples} == {"a/model"}
    assert sample(metrics, "errors_total", code="worker_lost", model="a/model") == 1
    assert sample(metrics, "http_responses_total", route="/v1/models", status="200", model="a/model") == 1


def test_worker_gauges_are_read_at_each_scrape():
    metrics = ServerMetrics()
    states = {"ready": 2}
    metrics.watch_workers(is_ready=lambda: states["ready"] > 0, states=lambda: states, slots=lambda: 4)
    assert sample(metrics, "ready") == 1
    assert [sample(metrics, "workers", state=state) for state in WORKER_STATES] == [0, 2, 0]
    assert sample(metrics, "slots") == 4
    states.update(ready=0, failed=2)
    assert sample(metrics, "ready") == 0
    assert [sample(metrics, "workers", state=state) for state in WORKER_STATES] == [0, 0, 2]
