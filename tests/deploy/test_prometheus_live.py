"""Prometheus with the shipped configuration scrapes a live server, and every expression finds data.

Only the address of the server and the two intervals differ from what is shipped.
"""

import contextlib
import itertools
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from tests.conftest import eventually, free_ports

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "deploy" / "prometheus"
MODEL = "medusa-demo"
TIMEOUT = 120.0
CLIENTS = 6  # a slot and a queue of two: some find no room


@contextlib.contextmanager
def running(command, log, is_up, **options):
    """A program until the end of the block; `is_up` is asked until it says so."""
    with (
        log.open("w") as output,
        subprocess.Popen(
            [str(part) for part in command], stdout=output, stderr=subprocess.STDOUT, **options
        ) as process,
    ):
        try:

            def answers():
                assert process.poll() is None, log.read_text()
                with contextlib.suppress(httpx.TransportError):
                    return is_up().status_code == 200
                return False

            eventually(answers, TIMEOUT, f"{command[0]} does not answer")
            yield process
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


class Monitoring:
    """A server under Prometheus."""

    def __init__(self, server, prometheus, target):
        self.server = server
        self.prometheus = prometheus
        self.target = target

    def query(self, expr):
        """Samples of an instant query as (labels, value) pairs."""
        answer = httpx.post(f"{self.prometheus}/api/v1/query", data={"query": expr}, timeout=30)
        assert answer.status_code == 200, (expr, answer.text)
        data = answer.json()["data"]
        if data["resultType"] == "scalar":
            return [({}, float(data["result"][1]))]
        return [(sample["metric"], float(sample["value"][1])) for sample in data["result"]]

    def substituted(self, expr):
        """As Grafana would ask with everything selected and the time of this test in view."""
        values = {
            "$__rate_interval": "20s",
            "$__range": "2m",
            "$model": re.escape(MODEL),
            "$instance": re.escape(self.target),
        }
        for name, value in values.items():
            expr = expr.replace(name, value.replace("\\", "\\\\"))
        assert "$" not in expr, expr
        return expr


def shipped_config(folder, target):
    """The shipped folder with the test's address and shorter intervals."""
    shutil.copytree(SHIPPED, folder)
    path = folder / "prometheus.yml"
    text = path.read_text(encoding="utf-8")
    changes = {
        "server:9400": target,
        "scrape_interval: 5s": "scrape_interval: 1s",
        "scrape_timeout: 4s": "scrape_timeout: 1s",
        "evaluation_interval: 10s": "evaluation_interval: 1s",
    }
    for old, new in changes.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def monitoring(prometheus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("monitoring")
    api, operations, port = free_ports(3)
    server, target, url = (f"http://127.0.0.1:{api}", f"127.0.0.1:{operations}", f"http://127.0.0.1:{port}")
    config = shipped_config(folder / "prometheus", target)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MEDUSA_")}
    environment["MEDUSA_COMPILE"] = "off"
    medusa = [sys.executable, "-c", "from server.cli import main; main()", "serve", "--port", api]
    medusa += ["--metrics-port", operations, "--queue-limit", 2, "--max-length", 512]
    scraper = [prometheus, f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}"]
    scraper += [f"--web.listen-address=127.0.0.1:{port}"]
    with (
        running(
            medusa,
            folder / "server.log",
            lambda: httpx.get(f"{server}/ready"),
            env=environment,
        ),
        running(scraper, folder / "prometheus.log", lambda: httpx.get(f"{url}/-/ready")),
    ):
        yield Monitoring(server, url, target)


@pytest.fixture(scope="module")
def idle(monitoring, panel_queries, records):
    """Answers to every expression before the first request, after a few scrapes."""
    eventually(lambda: monitoring.query("count_over_time(medusa_ready[1m]) > 4"), TIMEOUT, "no scrapes")
    queries = [*panel_queries, *records]
    return {str(query): monitoring.query(monitoring.substituted(query.expr)) for query in queries}


@pytest.fixture(scope="module")
def busy(monitoring, idle):
    """The server under load by several clients, from after the idle look to the end of the module."""
    is_over = threading.Event()
    failures = []

    def client(number):
        try:
            with httpx.Client(base_url=monitoring.server, timeout=60) as http:
                for turn in itertools.count(number):
                    if is_over.is_set():
                        return
                    ask(http, turn)
        except Exception as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=client, args=(number,)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    yield monitoring
    is_over.set()
    for thread in threads:
        thread.join(60)
    assert failures == []
    assert not any(thread.is_alive() for thread in threads)


def ask(http, turn):
    """One request: modes and streaming alternate, every ninth is a mistake."""
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": f"I need a cheap restaurant. Question {turn}"}],
        "max_tokens": 40,
        "temperature": 0.5,
        "speculation": {"mode": ("exact", "typical", "off")[turn % 3]},
        "stream": turn % 2 == 0,
    }
    expected = {200, 429}
    if turn % 9 == 0:
        body, expected = body | {"max_tokens": -1}, {400}
    headers = {"x-stainless-retry-count": "1"} if turn % 5 == 0 else {}
    answer = http.post("/v1/chat/completions", json=body, headers=headers)
    assert answer.status_code in expected, answer.text
    if answer.status_code == 429:
        time.sleep(0.05)


def found(monitoring, expr):
    """Samples once there are any and all are numbers; else the last answer, after a while."""
    last = []

    def has_numbers():
        last[:] = monitoring.query(expr)
        return last and all(math.isfinite(value) for _, value in last)

    eventually(has_numbers, TIMEOUT, lambda: f"{expr}\nfound {last}")
    return last


def test_without_traffic_nothing_is_nan(idle):
    assert len(idle) > 60
    bad = {place: samples for place, samples in idle.items() if not all(math.isfinite(v) for _, v in samples)}
    assert bad == {}
    assert idle["speedup: Estimated speedup now A"] == []
    assert idle["latency: First token, p90 now A"] == []
    assert [value for _, value in idle["service: Ready A"]] == [1.0]


def test_every_panel_finds_data(busy, panel_queries, dashboards):
    assert len(panel_queries) > 50
    for board in dashboards.values():
        busy.query(busy.substituted(board["annotations"]["list"][0]["expr"]))  # alerts need not fire here
    for query in panel_queries:
        expr = busy.substituted(query.expr)
        if "DCGM_" in expr:
            assert busy.query(expr) == []  # no GPU exporter here: the syntax is all that can be checked
        else:
            found(busy, expr)


def test_every_recording_rule_finds_data(busy, records):
    for record in records:
        found(busy, record.expr)
        labels, _ = found(busy, record.place)[0]
        assert labels["model"] == MODEL


def test_every_alert_compares_data(busy, alerts, without_comparisons):
    for alert in alerts:
        parts = without_comparisons(alert.expr)
        assert parts, alert.place
        for part in parts:
            found(busy, part)


def test_the_load_had_every_mode_errors_and_refusals(busy):
    every_mode = {"exact", "typical", "off"}
    eventually(lambda: modes(busy) == every_mode, TIMEOUT, lambda: f"only {modes(busy)}")
    eventually(lambda: {"200", "400", "429"} <= statuses(busy), TIMEOUT, lambda: f"only {statuses(busy)}")
    codes = {labels["code"] for labels, _ in found(busy, "medusa_errors_total")}
    assert "rate_limit_exceeded" in codes
    assert len(codes) >= 2


def modes(monitoring):
    return {labels["mode"] for labels, _ in monitoring.query("medusa_decode_steps_total > 0")}


def statuses(monitoring):
    return {labels["status"] for labels, _ in monitoring.query("medusa_http_responses_total")}


def test_prometheus_itself_is_content(busy, records, alerts):
    """Every rule was evaluated without an error, and the server is its only target."""
    groups = httpx.get(f"{busy.prometheus}/api/v1/rules", timeout=30).json()["data"]["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert sorted(rule["name"] for rule in rules) == sorted(rule.place for rule in [*records, *alerts])
    assert {rule["health"] for rule in rules} == {"ok"}
    (target,) = httpx.get(f"{busy.prometheus}/api/v1/targets", timeout=30).json()["data"]["activeTargets"]
    assert (target["labels"], target["health"]) == ({"instance": busy.target, "job": "medusa"}, "up")
