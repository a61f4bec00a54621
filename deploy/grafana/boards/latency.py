"""*Latency*: what a client waits for."""

from boards.dashboard import Line, Row, dashboard
from boards.panels import (
    BLUE,
    GREEN,
    RED,
    YELLOW,
    Json,
    Look,
    Query,
    heatmap,
    quantile,
    quantiles,
    rate,
    series,
    stat,
)

TTFT = "medusa_time_to_first_token_seconds"
ITL = "medusa_inter_token_latency_seconds"
REQUEST = "medusa_request_seconds"
QUEUE = "medusa_queue_wait_seconds"
SECONDS = Look(unit="s")
BUDGET = 0.05  # share of requests that may miss the objective, as in deploy/prometheus/rules
WINDOWS = ("5m", "1h", "6h", "1d", "3d")

ABOUT_TTFT = "From acceptance of a request to its first token, the wait in the queue included."
ABOUT_ITL = "Time of a decode step, divided among the tokens it gained: one observation a token."
ABOUT_REQUEST = "From acceptance of a request to its end, whatever that was."
ABOUT_QUEUE = "How long requests waited for a slot."


def board() -> Json:
    return dashboard(
        "medusa-latency",
        "Medusa / Latency",
        "What a client waits for.",
        [
            Row("", [_now()]),
            Row("Time to first token", [_both("Time to first token", ABOUT_TTFT, TTFT), _objective()]),
            Row("Time per token", [_both("Inter-token latency", ABOUT_ITL, ITL)]),
            Row("Whole requests", [_requests()]),
        ],
    )


def _now() -> Line:
    look = Look(unit="s", steps=((None, BLUE),))
    kinds = (
        ("First token, p90 now", ABOUT_TTFT, TTFT),
        ("Per token, p90 now", ABOUT_ITL, ITL),
        ("Whole request, p90 now", ABOUT_REQUEST, REQUEST),
        ("Queue, p90 now", ABOUT_QUEUE, QUEUE),
    )
    stats = [
        (
            5,
            stat(
                title,
                f"{about} Over the last 5 minutes; a tenth took longer.",
                [Query(expr=quantile(0.9, metric, "5m"), instant=True)],
                look,
            ),
        )
        for title, about, metric in kinds
    ]
    in_time = stat(
        "In time, last 30 minutes",
        "Requests whose first token came within 5 seconds; the objective is 95 %. A request that was "
        "refused (429) or failed counts as late. All instances of the model together.",
        [
            Query(
                expr='1 - job_model:medusa_ttft_slo_miss:ratio_rate30m{model=~"$model"}',
                legend="{{model}}",
                instant=True,
            )
        ],
        Look(
            unit="percentunit", decimals=1, high=1, steps=((None, RED), (1 - BUDGET, YELLOW), (0.99, GREEN))
        ),
        textMode="value",
    )
    return Line(4, [*stats, (4, in_time)])


def _both(title: str, about: str, metric: str) -> Line:
    lines = series(f"{title}, quantiles", about, quantiles(metric), SECONDS)
    return Line(9, [(12, lines), (12, heatmap(f"{title}, distribution", about, metric, "s"))])


def _objective() -> Line:
    missed = series(
        "Late first tokens by window",
        "Share of requests without a first token within 5 seconds, refused and failed ones included, by the "
        "window of an alert. The line is the error budget of 5 %. All instances of the model together.",
        [
            Query(
                expr=f'job_model:medusa_ttft_slo_miss:ratio_rate{window}{{model=~"$model"}}',
                legend=f"{{{{model}}}}, {window}",
            )
            for window in WINDOWS
        ],
        Look(unit="percentunit", decimals=1, high=1, steps=((None, "transparent"), (BUDGET, RED))),
        limit=True,
    )
    return Line(8, [(24, missed)])


def _requests() -> Line:
    ends = series("Request time, quantiles", ABOUT_REQUEST, quantiles(REQUEST), SECONDS)
    waits = series("Queue wait, quantiles", ABOUT_QUEUE, quantiles(QUEUE), SECONDS)
    parts = series(
        "Where the time goes, mean",
        "Of a request: waiting for a slot, from there to the first token (mostly the prompt), and decoding.",
        [
            Query(expr=_mean(QUEUE), legend="queue"),
            Query(expr=f"{_mean(TTFT)} - {_mean(QUEUE)}", legend="prompt"),
            Query(expr=f"{_mean(REQUEST)} - {_mean(TTFT)}", legend="decoding"),
        ],
        SECONDS,
        stack="normal",
    )
    return Line(9, [(8, ends), (8, waits), (8, parts)])


def _mean(metric: str) -> str:
    return f"{rate(f'{metric}_sum')} / ({rate(f'{metric}_count')} > 0)"
