"""What tests of the monitoring share: the shipped dashboards and rules, and Prometheus' programs."""

import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
SET_OPERATOR = re.compile(r"\b(?:and|or|unless)\b(?:\s+(?:on|ignoring)\s*\([^)]*\))?")
COMPARISON = re.compile(r"(?:==|!=|>=|<=|>|<)")
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


@pytest.fixture(scope="session")
def without_comparisons():
    """What an alert compares, as expressions without the comparison."""
    return compared


def compared(expr: str) -> list[str]:
    """The expressions that an alert compares: what is left and right of comparisons, numbers left out."""
    expr = expr.strip()
    if expr.startswith("(") and closing(expr) == len(expr) - 1:
        return compared(expr[1:-1])
    for operator in (SET_OPERATOR, COMPARISON):
        parts = split(expr, operator)
        if len(parts) > 1:
            return [piece for part in parts for piece in compared(part)]
    return [expr] if re.search("[a-z]", expr) else []


def depths(expr: str) -> list[int]:
    """For each character how many brackets are open around it; more for quoted text."""
    quotes = itertools.accumulate(char == '"' for char in expr)
    opened = itertools.accumulate({"(": 1, "{": 1, "[": 1, ")": -1, "}": -1, "]": -1}.get(c, 0) for c in expr)
    return [depth + quote % 2 for depth, quote in zip(opened, quotes, strict=True)]


def closing(expr: str) -> int:
    return depths(expr).index(0)


def split(expr: str, operator: re.Pattern[str]) -> list[str]:
    """Parts between operators that stand in no bracket."""
    level = depths(expr)
    parts, start = [], 0
    for match in operator.finditer(expr):
        if level[match.start()] == 0:
            parts.append(expr[start : match.start()])
            start = match.end()
    return [*parts, expr[start:]]
