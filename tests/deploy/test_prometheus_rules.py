"""Configuration, rules and alerts by promtool, and what it does not check."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml
from prometheus_client import generate_latest

from server.observability.metrics import ServerMetrics

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "deploy" / "prometheus"
TESTS = sorted((PROMETHEUS / "tests").glob("*.yml"))
MONITORING = (ROOT / "docs" / "monitoring.md").read_text(encoding="utf-8")


def run(*command):
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_configuration_and_rules_are_valid(promtool):
    output = run(promtool, "check", "config", "--lint-fatal", PROMETHEUS / "prometheus.yml")
    assert "2 rule files found" in output


@pytest.mark.parametrize("file", TESTS, ids=lambda file: file.stem)
def test_alerts_fire_when_they_should_and_are_silent_otherwise(promtool, file):
    assert "SUCCESS" in run(promtool, "test", "rules", file)


def test_every_alert_is_tested_both_ways(alert_rules):
    cases = [
        case
        for file in TESTS
        for test in yaml.safe_load(file.read_text(encoding="utf-8"))["tests"]
        for case in test.get("alert_rule_test", [])
    ]
    fires = {case["alertname"] for case in cases if case["exp_alerts"]}
    silent = {case["alertname"] for case in cases if not case["exp_alerts"]}
    names = {rule["alert"] for rule in alert_rules}
    assert fires == names
    assert silent == names


def test_every_alert_says_what_it_means_and_what_to_do(alert_rules):
    anchors = {heading.strip().lower() for heading in re.findall(r"^#+ (.*)$", MONITORING, re.MULTILINE)}
    for rule in alert_rules:
        assert rule["labels"]["severity"] in ("critical", "warning"), rule["alert"]
        assert set(rule["annotations"]) == {"summary", "description", "runbook"}, rule["alert"]
        page, _, anchor = rule["annotations"]["runbook"].partition("#")
        assert page == "docs/monitoring.md"
        assert anchor == rule["alert"].lower()
        assert anchor in anchors, rule["alert"]


def test_the_objective_is_a_bucket_spelled_as_prometheus_stores_it(records):
    """Prometheus 3 stores le="5" as "5.0", Prometheus 2 as it came: one spelling has to fit both."""
    bounds = set(re.findall(r'le="([^"]*)"', "".join(record.expr for record in records)))
    assert bounds == {"5.0"}
    text = generate_latest(ServerMetrics("m").registry).decode()
    buckets = re.findall(r'medusa_time_to_first_token_seconds_bucket{le="([^"]*)"', text)
    assert bounds <= set(buckets)
    every_bound = set(re.findall(r'le="([^"]*)"', text)) - {"+Inf"}
    assert all(re.fullmatch(r"\d+\.\d+", bound) for bound in every_bound)


def test_grafana_takes_rates_over_the_interval_of_the_scrapes():
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text(encoding="utf-8"))
    source = ROOT / "deploy/grafana/provisioning/datasources/prometheus.yml"
    (data,) = yaml.safe_load(source.read_text(encoding="utf-8"))["datasources"]
    assert data["jsonData"]["timeInterval"] == config["global"]["scrape_interval"]


def test_comparisons_are_taken_off(without_comparisons):
    assert without_comparisons('up{a="b"} == 0') == ['up{a="b"}']
    assert without_comparisons("a / (b > 0) > 0.8") == ["a / (b > 0)"]
    expr = "(x:y > 14.4 * 0.05 and z > 2) or (f(g[5m]) < 0.7 * h and on (job) i{k!='0'})"
    assert without_comparisons(expr) == ["x:y", "z", "f(g[5m])", "0.7 * h", "i{k!='0'}"]
