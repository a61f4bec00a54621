"""Recipe defaults, and the merging of recipe, YAML file and flags into one configuration.

Later ones win: TrainConfig's defaults, the recipe's, the joint mode's (medusa-2), the file, the flags.
Sources: the Medusa paper, §2.2 and its training configurations; the README of Hydra's code.
"""

from collections.abc import Mapping
from dataclasses import fields
from enum import StrEnum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from medusa_core.errors import ConfigError
from medusa_core.option_field import option_of
from medusa_core.training.config import JOINT_PANEL, JointMode, Recipe, TrainConfig, Tune

_HYDRA: Mapping[str, Any] = {
    "decay": 1.0,
    "dropout": 0.2,
    "learning_rate": 5e-4,
    "final_rate": 0.33,
    "warmup": 100.0,
    "weight_decay": 0.1,
}
RECIPES: Mapping[Recipe, Mapping[str, Any]] = {
    Recipe.MEDUSA_1: {},
    Recipe.MEDUSA_2: {"learning_rate": 5e-4, "epochs": 2.0, "warmup": 40.0},
    Recipe.HYDRA: _HYDRA,
    Recipe.HYDRA_PLUS: {**_HYDRA, "num_layers": 4},
}
# Direct training is the control that the paper compares with: one rate, no balance of the losses.
JOINT_MODES: Mapping[JointMode, Mapping[str, Any]] = {
    JointMode.TWO_STAGE: {},
    JointMode.SINE: {"learning_rate": 1e-4, "heads_weight": 0.01, "warmup": 20.0},
    JointMode.DIRECT: {"heads_weight": 1.0, "heads_rate": 1.0},
}
REQUIRED = ("model", "data", "out")


def resolve_config(flags: Mapping[str, Any], file: Path | None = None) -> TrainConfig:
    """The settings of one run. `flags` that are None were not given. Raises `ConfigError`."""
    given = read_config_file(file) if file is not None else {}
    given |= {name: _convert(name, value, "--") for name, value in flags.items() if value is not None}
    missing = [name for name in REQUIRED if name not in given]
    if missing:
        raise ConfigError(f"{', '.join(missing)} must be given, as an option or in the --config file")
    recipe = given.get("recipe", Recipe.MEDUSA_1)
    if recipe != Recipe.MEDUSA_2:
        joint = [
            spec.name for spec in fields(TrainConfig) if (o := option_of(spec)) and o.panel == JOINT_PANEL
        ]
        _refuse(given, joint, "recipe medusa-2, which trains the backbone too")
    if given.get("joint", JointMode.TWO_STAGE) != JointMode.TWO_STAGE:
        _refuse(given, ["stage_one"], "two-stage runs")
    if given.get("tune", Tune.LORA) != Tune.LORA:
        _refuse(given, ["lora_rank", "lora_alpha", "lora_dropout"], "LoRA")
    defaults = dict(RECIPES[recipe])
    if recipe == Recipe.MEDUSA_2:
        defaults |= JOINT_MODES[given.get("joint", JointMode.TWO_STAGE)]
    return TrainConfig(**(defaults | given))


def _refuse(given: Mapping[str, Any], names: list[str], whose: str) -> None:
    """Raise `ConfigError` for settings that would have no effect in this run."""
    default = {spec.name: spec.default for spec in fields(TrainConfig)}
    unused = [name for name in names if given.get(name, default[name]) != default[name]]
    if unused:
        raise ConfigError(f"{', '.join(unused)} {'is' if len(unused) == 1 else 'are'} for {whose}")


def read_config_file(path: Path) -> dict[str, Any]:
    """A YAML mapping of `TrainConfig` fields. Raises `ConfigError` that names a key it does not know."""
    import yaml  # needed for this alone

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"cannot read {path}: {reason}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold a mapping of settings")
    known = {spec.name for spec in fields(TrainConfig)}
    unknown = [str(key) for key in content if key not in known]
    if unknown:
        raise ConfigError(f"{path}: unknown key {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    return {name: _convert(name, value, f"{path}: ") for name, value in content.items() if value is not None}


def _convert(name: str, value: Any, place: str) -> Any:
    """The value in its field's type. YAML reads `1e-3` as text and `1` for 1.0; both are meant as numbers."""
    hint = get_type_hints(TrainConfig)[name]
    if get_origin(hint) is tuple:
        items = list(value) if isinstance(value, list | tuple) else [value]
        if not all(isinstance(item, str | Path) for item in items):
            raise ConfigError(f"{place}{name} must be text or a list of texts, not {value!r}")
        return tuple(items)
    kind = field_type(hint)
    if kind is bool or isinstance(value, bool):
        right = kind is bool and isinstance(value, bool)
    else:
        right = isinstance(value, {float: (int, float, str), int: (int,)}.get(kind, (str, Path)))
    if right:
        try:
            return kind(value)
        except ValueError:
            right = False
    raise ConfigError(f"{place}{name} must be {_describe(kind)}, not {value!r}")


def field_type(hint: Any) -> Any:
    """`X` of `X` and of `X | None`."""
    if get_origin(hint) in (Union, UnionType):
        return next(kind for kind in get_args(hint) if kind is not NoneType)
    return hint


def _describe(kind: Any) -> str:
    if issubclass(kind, StrEnum):
        return "one of " + ", ".join(kind)
    names = {bool: "true or false", int: "a whole number", float: "a number"}
    return names.get(kind, "text")
