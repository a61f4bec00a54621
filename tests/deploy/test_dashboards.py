"""The boards Grafana reads: valid by its schema, asking for what exists, laid out without overlap."""

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from server.observability.metrics import ServerMetrics

ROOT = Path(__file__).parents[2]
GRAFANA = ROOT / "deploy" / "grafana"
BOARDS = ("speedup", "latency", "service")
# What PromQL says beside metrics and functions.
WORDS = {"and", "or", "unless", "by", "on", "without", "ignoring", "group_left", "group_right"}
NOT_OURS = {"up", "ALERTS"}


def exported_names():
    """Every name that a scrape of the server brings."""
    names = set()
    for family in ServerMetrics("m").registry.collect():
        match family.type:
            case "counter":
                names.add(f"{family.name}_total")
            case "histogram":
                names |= {f"{family.name}_{part}" for part in ("bucket", "sum", "count")}
            case _:
                names.add(family.name)
    return names


def metrics_in(expr):
    """Names of metrics in an expression: identifiers that are no function, label, word or number."""
    expr = re.sub(r'"[^"]*"', "", expr)
    expr = re.sub(r"\{[^}]*\}|\[[^\]]*\]", " ", expr)
    expr = re.sub(r"\b(by|on|without|ignoring|group_left|group_right)\s*\([^)]*\)", " ", expr)
    names = re.findall(r"(?<![\w.])[a-zA-Z_:][\w:]*(?!\w*\s*\()", expr)
    return set(names) - WORDS


def test_metrics_are_found_in_expressions():
    expr = 'sum by (le) (rate(a_bucket{model=~"b",x!="c"}[5m])) / on () group_left () (d:e:f > 0) and 1e3 * g'
    assert metrics_in(expr) == {"a_bucket", "d:e:f", "g"}


def test_every_metric_exists(panel_queries, records, alerts, dashboards):
    known = exported_names() | {record.place for record in records} | NOT_OURS
    assert "process_resident_memory_bytes" in known
    assert "medusa_ready" in known
    expressions = {str(query): query.expr for query in [*panel_queries, *records, *alerts]}
    for name, board in dashboards.items():
        expressions |= {f"{name}: annotation": board["annotations"]["list"][0]["expr"]}
    unknown = {
        place: names
        for place, expr in expressions.items()
        if (names := {name for name in metrics_in(expr) - known if not name.startswith("DCGM_FI_DEV_")})
    }
    assert unknown == {}
    assert len(expressions) > 60


def test_the_files_are_what_the_script_makes(tmp_path):
    subprocess.run([sys.executable, "-B", GRAFANA / "build.py", tmp_path], check=True)
    for name in BOARDS:
        committed = (GRAFANA / "dashboards" / f"{name}.json").read_text(encoding="utf-8")
        made = (tmp_path / f"{name}.json").read_text(encoding="utf-8")
        assert committed == made, "run deploy/grafana/build.py and commit what it writes"


@pytest.mark.parametrize("name", BOARDS)
def test_panels_lie_side_by_side(name, dashboards):
    panels = dashboards[name]["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    titles = [panel["title"] for panel in panels]
    assert len(set(titles)) == len(titles)
    places = [panel["gridPos"] for panel in panels]
    for place in places:
        assert place["x"] >= 0
        assert place["x"] + place["w"] <= 24
    for a, b in itertools.combinations(places, 2):
        beside = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        below = a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
        assert beside or below, (a, b)
    covered = sum(place["w"] * place["h"] for place in places)
    assert covered == 24 * max(place["y"] + place["h"] for place in places), "no holes either"


@pytest.mark.parametrize("name", BOARDS)
def test_every_panel_explains_itself_and_says_when_there_is_nothing(name, dashboards):
    for panel in dashboards[name]["panels"]:
        if panel["type"] in ("row", "alertlist"):
            continue
        defaults = panel["fieldConfig"]["defaults"]
        assert panel["description"].endswith("."), panel["title"]
        assert defaults["unit"], panel["title"]
        assert defaults["noValue"].startswith("No "), panel["title"]
        special = [m["options"] for m in defaults["mappings"] if m["type"] == "special"]
        assert special[0]["match"] == "null+nan"
        assert special[0]["result"]["text"] == defaults["noValue"]
        references = [target["refId"] for target in panel["targets"]]
        assert references
        assert len(set(references)) == len(references)
        for target in panel["targets"]:
            assert target["legendFormat"], panel["title"]
            assert target["instant"] is not target["range"]


def test_speedup_is_the_first_thing_seen(dashboards):
    first = dashboards["speedup"]["panels"][0]
    assert (first["type"], first["title"]) == ("stat", "Estimated speedup now")
    assert (first["gridPos"]["x"], first["gridPos"]["y"]) == (0, 0)
    steps = first["fieldConfig"]["defaults"]["thresholds"]["steps"]
    assert [(step["value"], step["color"]) for step in steps[:2]] == [(None, "red"), (1, "yellow")]


def test_one_data_source_everywhere(dashboards):
    text = (GRAFANA / "provisioning/datasources/prometheus.yml").read_text(encoding="utf-8")
    (source,) = yaml.safe_load(text)["datasources"]
    for board in dashboards.values():
        variables = {variable["name"]: variable for variable in board["templating"]["list"]}
        assert list(variables) == ["datasource", "model", "instance"]
        assert variables["datasource"]["current"]["value"] == source["uid"]
        assert all(
            variables[name]["multi"] and variables[name]["includeAll"] for name in ("model", "instance")
        )
        found = re.findall(r'"uid": "([^"]*)"', json.dumps(board))
        assert set(found) - {"${datasource}"} == {board["uid"]}


def test_boards_link_to_each_other(dashboards):
    assert {board["uid"] for board in dashboards.values()} == {f"medusa-{name}" for name in BOARDS}
    for board in dashboards.values():
        (link,) = board["links"]
        assert link["type"] == "dashboards"
        assert set(link["tags"]) <= set(board["tags"])


def divisors(expr):
    """What an expression divides by: each the inside of the parenthesis behind a slash, None without one."""
    for match in re.finditer(r" / (?:on \([^)]*\) group_left \(\) )?", expr):
        rest = expr[match.end() :]
        depths = itertools.accumulate({"(": 1, ")": -1}.get(char, 0) for char in rest)
        end = next((index for index, depth in enumerate(depths) if depth == 0), 0)
        yield rest[1:end] if rest.startswith("(") else None


def test_quotients_have_no_value_rather_than_nan(panel_queries, records, one_line):
    assert list(divisors("a / b")) == [None]
    assert list(divisors("a / on (x) group_left () ((b + c) > 0) / (d)")) == ["(b + c) > 0", "d"]
    queries = [*panel_queries, *records]
    assert sum(" / " in one_line(query.expr) for query in queries) > 15
    for query in queries:
        expr = one_line(query.expr)
        assert all((divisor or "").strip().endswith("> 0") for divisor in divisors(expr)), str(query)
        assert ("histogram_quantile" in expr) == expr.endswith(">= 0"), str(query)


def test_compose_mounts_what_is_provisioned():
    services = yaml.safe_load((ROOT / "deploy/docker/services.yml").read_text(encoding="utf-8"))["services"]
    mounts = dict(volume.split(":")[:2] for volume in services["grafana"]["volumes"])
    (provider,) = yaml.safe_load(
        (GRAFANA / "provisioning/dashboards/medusa.yml").read_text(encoding="utf-8")
    )["providers"]
    assert mounts["../grafana/provisioning"] == "/etc/grafana/provisioning"
    assert mounts["../grafana/dashboards"] == provider["options"]["path"]
    assert provider["allowUiUpdates"] is False
    home = services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == f"{provider['options']['path']}/speedup.json"
    mounts = dict(volume.split(":")[:2] for volume in services["prometheus"]["volumes"])
    assert mounts["../prometheus"] == "/etc/prometheus"
