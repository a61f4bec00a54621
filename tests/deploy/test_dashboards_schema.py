"""The boards against Grafana's schema, by the types that Grafana generates from it."""

import copy
import enum
import json
import types
import typing
import warnings

import pytest

BOARDS = ("speedup", "latency", "service")


@pytest.fixture(scope="module")
def schema():
    """The class of a dashboard, with panels and queries of every kind registered."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they prefer the types of Grafana's newer, other format
        from grafana_foundation_sdk.cog import plugins
        from grafana_foundation_sdk.models.dashboard import Dashboard
    plugins.register_default_plugins()
    return Dashboard


@pytest.mark.parametrize("name", BOARDS)
def test_nothing_is_unknown_to_grafana(name, dashboards, schema):
    """What the schema does not know does not come back from its types; what they add are defaults."""
    from grafana_foundation_sdk.cog.encoder import JSONEncoder

    def back(board):
        return json.loads(json.dumps(schema.from_json(board).to_json(), cls=JSONEncoder))

    board = dashboards[name]
    assert lost(board, back(board)) == []
    strange = copy.deepcopy(board)
    strange["panels"][0]["options"]["sparkle"] = True
    assert lost(strange, back(strange)) == [".panels[0].options.sparkle"]


def lost(before, after, path=""):
    """Where `after` lacks or changes what `before` has."""
    if isinstance(before, dict) and isinstance(after, dict):
        inner = [(value, after.get(key, lost), f"{path}.{key}") for key, value in before.items()]
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        pairs = zip(before, after, strict=True)
        inner = [(a, b, f"{path}[{index}]") for index, (a, b) in enumerate(pairs)]
    else:
        return [] if before == after else [path]
    return [place for a, b, inner_path in inner for place in lost(a, b, inner_path)]


@pytest.mark.parametrize("name", BOARDS)
def test_every_value_has_its_type(name, dashboards, schema):
    assert members(schema.from_json(dashboards[name]), "") == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("panels", 0, "options", "colorMode"), "rainbow"),
        (("panels", 0, "gridPos", "h"), "9"),
        (("panels", 0, "targets", 0, "format"), "table of contents"),
        (("panels", 0, "fieldConfig", "defaults", "thresholds", "mode"), "relative"),
        (("templating", "list", 1, "refresh"), 7),
    ],
    ids=lambda value: str(value[-1]) if isinstance(value, tuple) else "",
)
def test_wrong_values_are_seen(path, value, dashboards, schema):
    board = copy.deepcopy(dashboards["speedup"])
    *parents, last = path
    place = board
    for part in parents:
        place = place[part]
    assert last in place
    place[last] = value
    assert len(members(schema.from_json(board), "")) == 1


def members(instance, path):
    """What is wrong in an instance of Grafana's types, down to the last."""
    if not type(instance).__module__.startswith("grafana_foundation_sdk"):
        return []
    hints = typing.get_type_hints(type(instance))
    return [
        problem
        for name, hint in hints.items()
        for problem in problems(getattr(instance, name), hint, f"{path}.{name}")
    ]


def problems(value, hint, path):
    """What is wrong with a value of which `hint` is the type; in a union, with the one that fits best."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        found = [problems(value, argument, path) for argument in arguments]
        # The longest path is the one that got furthest before something was wrong.
        return [] if [] in found else max(found, key=lambda wrong: max(map(len, wrong)))
    if origin is list and isinstance(value, list):
        return [p for i, item in enumerate(value) for p in problems(item, arguments[0], f"{path}[{i}]")]
    if origin is dict and isinstance(value, dict):
        return [p for key, item in value.items() for p in problems(item, arguments[1], f"{path}.{key}")]
    return members(value, path) if is_of(value, hint) else [f"{path}: {type(value).__name__}, not {hint}"]


def is_of(value, hint):
    """Whether the value itself is of a type that is no container and no union."""
    if hint in (object, typing.Any):
        return True
    if typing.get_origin(hint) is typing.Literal:
        return value in typing.get_args(hint)
    if typing.get_origin(hint) is not None or isinstance(value, bool):
        return hint is bool
    if issubclass(hint, enum.Enum):
        return value in [member.value for member in hint]
    return isinstance(value, (int, float) if hint is float else hint)
