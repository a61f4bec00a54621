"""*Service*: whether it runs, how much it is asked, and what it runs on."""

from boards.dashboard import Line, Row, dashboard
from boards.panels import (
    BLUE,
    GREEN,
    RED,
    SELECTED,
    YELLOW,
    Json,
    Look,
    Query,
    alerts,
    colored,
    mapped,
    rate,
    series,
    stat,
)

SELECTOR = f"{{{SELECTED}}}"
COUNT = Look(unit="none", decimals=0, empty="No server")
PER_SECOND = Look(unit="reqps")


def board() -> Json:
    return dashboard(
        "medusa-service",
        "Medusa / Service",
        "Whether it runs, how much it is asked, and what it runs on.",
        [
            Row("", [_now()]),
            Row("Requests", [_requests(), _errors()]),
            Row("Load and workers", [_load(), _workers()]),
            Row("Alerts", [_alerts()]),
            Row("Process", [_process()]),
            Row("GPU", [_gpu_work(), _gpu_body()]),
        ],
    )


def _now() -> Line:
    ready = stat(
        "Ready",
        "Whether a request would be served now, for each server.",
        [Query(expr=f"medusa_ready{SELECTOR}", legend="{{instance}}", instant=True)],
        Look(unit="none", low=None, steps=((None, RED), (1, GREEN)), empty="No server"),
        colorMode="background",
    )
    workers = stat(
        "Workers ready",
        "Share of all workers, of all servers together.",
        [
            Query(
                expr=f'sum(medusa_workers{{{SELECTED},state="ready"}}) / (sum(medusa_workers{SELECTOR}) > 0)',
                instant=True,
            )
        ],
        Look(unit="percentunit", high=1, steps=((None, RED), (0.01, YELLOW), (1, GREEN)), empty="No server"),
    )
    firing = stat(
        "Alerts firing",
        "Of any server; the list is further down.",
        [Query(expr='count(ALERTS{alertstate="firing",alertname=~"Medusa.+"}) or vector(0)', instant=True)],
        Look(unit="none", steps=((None, GREEN), (1, RED))),
    )
    asked = stat(
        "Requests per second",
        "Requests that ended, refused ones included, mean of the last 5 minutes.",
        [Query(expr=f"{rate('medusa_requests_total', window='5m')} > 0", instant=True)],
        Look(unit="reqps", decimals=2, steps=((None, BLUE),)),
    )
    waiting = stat(
        "Running / waiting",
        "Requests in a slot, and requests waiting for one.",
        [
            Query(expr=f"sum(medusa_running{SELECTOR})", legend="running", instant=True),
            Query(expr=f"sum(medusa_queue_depth{SELECTOR})", legend="waiting", instant=True),
        ],
        Look(unit="none", steps=((None, BLUE),), empty="No server"),
    )
    uptime = stat(
        "Up for",
        "Age of the API process.",
        [Query(expr=f"time() - process_start_time_seconds{SELECTOR}", legend="{{instance}}", instant=True)],
        Look(unit="dtdurations", steps=((None, BLUE),), empty="No server"),
        textMode="value",
    )
    words = {"0": ("Not ready", RED), "1": ("Ready", GREEN)}
    return Line(4, [(4, panel) for panel in (mapped(ready, words), workers, firing, asked, waiting, uptime)])


def _requests() -> Line:
    ends = series(
        "Requests by finish reason",
        "stop and length are answers; abort: the client left; error: it failed after acceptance; rejected: "
        "the queue was full.",
        [Query(expr=f"{rate('medusa_requests_total', by='finish_reason')} > 0", legend="{{finish_reason}}")],
        PER_SECOND,
        stack="normal",
    )
    colors = {"stop": GREEN, "length": BLUE, "abort": YELLOW, "error": RED, "rejected": "orange"}
    statuses = series(
        "HTTP responses by status",
        "Of all routes. A stream that fails in the middle stays a 200: its error is under Errors by code.",
        [Query(expr=f"{rate('medusa_http_responses_total', by='status')} > 0", legend="{{status}}")],
        PER_SECOND,
        stack="normal",
    )
    return Line(8, [(12, colored(ends, colors)), (12, statuses)])


def _errors() -> Line:
    codes = series(
        "Errors by code",
        "Errors told to clients, in responses and in streams. The first of a code shows with the second: a "
        "rate needs two counts.",
        [Query(expr=f"{rate('medusa_errors_total', by='code')} > 0", legend="{{code}}")],
        Look(unit="reqps", empty="No errors"),
    )
    routes = series(
        "HTTP responses by route",
        "Everything that was asked, also of unknown paths.",
        [Query(expr=f"{rate('medusa_http_responses_total', by='route')} > 0", legend="{{route}}")],
        PER_SECOND,
    )
    retries = series(
        "Client retries",
        "Requests that OpenAI's SDK marked as retries.",
        [Query(expr=rate("medusa_client_retries_total"), legend="retries")],
        PER_SECOND,
    )
    return Line(8, [(8, codes), (8, routes), (8, retries)])


def _load() -> Line:
    queue = series(
        "Queue",
        "Requests waiting for a slot, and how many may (MEDUSA_QUEUE_LIMIT); beyond that they get a 429.",
        [
            Query(expr=f"sum(medusa_queue_depth{SELECTOR})", legend="waiting"),
            Query(expr=f"sum(medusa_queue_limit{SELECTOR})", legend="limit"),
        ],
        COUNT,
    )
    slots = series(
        "Slots",
        "Requests in progress, and how many the workers that are ready take at once.",
        [
            Query(expr=f"sum(medusa_running{SELECTOR})", legend="running"),
            Query(expr=f"sum(medusa_slots{SELECTOR})", legend="slots"),
        ],
        COUNT,
    )
    return Line(8, [(12, colored(queue, {"limit": RED})), (12, colored(slots, {"slots": RED}))])


def _workers() -> Line:
    states = series(
        "Workers by state",
        "failed: given up after MEDUSA_RESTART_LIMIT failures in a row.",
        [Query(expr=f"sum by (state) (medusa_workers{SELECTOR})", legend="{{state}}")],
        COUNT,
        stack="normal",
    )
    window = "[$__rate_interval]"
    restarts = series(
        "Restarts and memory",
        "Worker processes started again (crash: it died; hang: it made no progress and was killed; load: it "
        "could not load the model), and requests that failed for want of device memory.",
        [
            Query(
                expr=f"sum by (reason) (increase(medusa_worker_restarts_total{SELECTOR}{window}))",
                legend="restart: {{reason}}",
            ),
            Query(
                expr=f"sum(increase(medusa_out_of_memory_total{SELECTOR}{window}))", legend="out of memory"
            ),
        ],
        COUNT,
    )
    colors = {"ready": GREEN, "starting": YELLOW, "failed": RED}
    return Line(8, [(12, colored(states, colors)), (12, restarts)])


def _alerts() -> Line:
    about = "Alerts of deploy/prometheus/rules; docs/monitoring.md says what to do about each."
    return Line(6, [(24, alerts("Alerts pending and firing", about))])


def _process() -> Line:
    memory = series(
        "Memory of the API process",
        "Resident memory. The models live in the workers, which are processes of their own.",
        [Query(expr=f"process_resident_memory_bytes{SELECTOR}", legend="{{instance}}")],
        Look(unit="bytes", empty="No server"),
    )
    files = series(
        "Open file descriptors",
        "Each connection is one.",
        [Query(expr=f"process_open_fds{SELECTOR}", legend="{{instance}}")],
        Look(unit="none", decimals=0, empty="No server"),
    )
    processor = series(
        "Processor time of the API process",
        "Cores in use; the workers' are not among them.",
        [Query(expr=rate("process_cpu_seconds_total", by="instance"), legend="{{instance}}")],
        Look(unit="none", decimals=2, empty="No server"),
    )
    return Line(8, [(8, memory), (8, files), (8, processor)])


def _gpu_work() -> Line:
    busy = _gpu("GPU utilization", "Share of time in which a kernel ran.", {"busy": "GPU_UTIL"}, "percent")
    memory = _gpu("GPU memory", "In use, and free.", {"used": "FB_USED", "free": "FB_FREE"}, "mbytes")
    return Line(8, [(12, busy), (12, memory)])


def _gpu_body() -> Line:
    power = _gpu("GPU power", "What the GPU draws.", {"power": "POWER_USAGE"}, "watt")
    heat = _gpu("GPU temperature", "Of the chip.", {"temperature": "GPU_TEMP"}, "celsius")
    return Line(8, [(12, power), (12, heat)])


def _gpu(title: str, about: str, fields: dict[str, str], unit: str) -> Json:
    """GPUs of the whole installation: the exporter knows no models or instances of ours."""
    queries = [
        Query(expr=f"DCGM_FI_DEV_{field}", legend=f"{{{{Hostname}}}} GPU {{{{gpu}}}}, {name}")
        for name, field in fields.items()
    ]
    description = f"{about} From dcgm-exporter: every GPU it sees, whatever is selected above."
    return series(title, description, queries, Look(unit=unit, empty="No GPU metrics"))
