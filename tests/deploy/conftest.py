"""What tests of the monitoring share: the shipped dashboards and rules, and Prometheus' programs."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
TOOLS = ROOT / ".venv" / "tools" / "usr" / "bin"


@dataclass(frozen=True)
class Expression:
    """A PromQL expression and where it stands."""

    place: str
    expr: str

    def __str__(self) -> str:
        return self.place


def load_dashboards() -> dict[str, dict[str, Any]]:
    files = sorted((ROOT / "deploy/grafana/dashboards").glob("*.json"))
    return {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files}


def load_rules(kind: str) -> list[dict[str, Any]]:
    """All rules that have the key `kind`: alert or record."""
    files = sorted((ROOT / "deploy/prometheus/rules").glob("*.yml"))
    groups = [group for file in files for group in yaml.safe_load(file.read_text(encoding="utf-8"))["groups"]]
    return [rule for group in groups for rule in group["rules"] if kind in rule]


def panel_expressions() -> Iterator[Expression]:
    for name, board in load_dashboards().items():
        for panel in board["panels"]:
            for target in panel.get("targets", []):
                yield Expression(f"{name}: {panel['title']} {target['refId']}", target["expr"])


def rule_expressions(kind: str) -> Iterator[Expression]:
    for rule in load_rules(kind):
        yield Expression(rule[kind], rule["expr"])


@pytest.fixture(scope="session")
def dashboards() -> dict[str, dict[str, Any]]:
    return load_dashboards()


@pytest.fixture(scope="session")
def panel_queries() -> list[Expression]:
    return list(panel_expressions())


@pytest.fixture(scope="session")
def records() -> list[Expression]:
    return list(rule_expressions("record"))


@pytest.fixture(scope="session")
def alerts() -> list[Expression]:
    return list(rule_expressions("alert"))


@pytest.fixture(scope="session")
def alert_rules() -> list[dict[str, Any]]:
    return load_rules("alert")


def prometheus_program(name: str) -> Path:
    if not (TOOLS / name).exists():
        pytest.skip(f"there is no {name} in .venv/tools: `make tools` gets it")
    return TOOLS / name


@pytest.fixture(scope="session")
def promtool() -> Path:
    return prometheus_program("promtool")


@pytest.fixture(scope="session")
def prometheus() -> Path:
    return prometheus_program("prometheus")


@pytest.fixture(scope="session")
def one_line():
    """An expression with single spaces."""
    return lambda expr: re.sub(r"\s+", " ", expr).strip()
