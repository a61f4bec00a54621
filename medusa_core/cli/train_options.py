"""Command-line options from the fields of `TrainConfig`, so that no setting lacks one. No torch here."""

import math
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from inspect import Parameter, Signature
from typing import Annotated, Any, get_origin, get_type_hints

import typer

from medusa_core.training.config import TrainConfig
from medusa_core.training.recipes import RECIPES, REQUIRED, field_type


def options_signature(before: Mapping[str, Any]) -> Signature:
    """Keyword parameters for every field, and `before` (name to annotated type) ahead of them.

    All are optional and None if not given: which value then holds is the recipe's or the file's business.
    """
    hints = get_type_hints(TrainConfig)
    annotations = dict(before) | {
        spec.name: _annotation(spec, hints[spec.name]) for spec in fields(TrainConfig)
    }
    return Signature(
        [
            Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
            for name, annotation in annotations.items()
        ]
    )


def _annotation(spec: Field[Any], hint: Any) -> Any:
    kind = list[str] if get_origin(hint) is tuple else field_type(hint)
    limits = spec.metadata["limits"]
    option = typer.Option(
        help=spec.metadata["help"] + (" Required." if spec.name in REQUIRED else ""),
        rich_help_panel=spec.metadata["panel"],
        show_default=_default(spec),
        # What typer has no word for (above, below) TrainConfig refuses all the same.
        min=limits.least if limits is not None and math.isfinite(limits.least) else None,
        max=limits.most if limits is not None and math.isfinite(limits.most) else None,
    )
    return Annotated[kind | None, option]


def _default(spec: Field[Any]) -> str | bool:
    """What the help shows: the default, and which recipes have another."""
    if spec.default in (MISSING, None, False):
        return False
    others: dict[str, list[str]] = {}
    for recipe, values in RECIPES.items():
        if spec.name in values:
            others.setdefault(f"{values[spec.name]:g}", []).append(recipe)
    own = f"{spec.default:g}" if isinstance(spec.default, float) else str(spec.default)
    return "; ".join([own, *(f"{', '.join(names)}: {value}" for value, names in others.items())])
