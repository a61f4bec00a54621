"""`medusa train`: trains draft heads as a YAML file or options say, and shows how they do."""

import logging
import os
from dataclasses import MISSING, Field, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_origin, get_type_hints

from rich.console import Console

from medusa_core.cli.options import OptionGroup, parameter, with_options
from medusa_core.cli.output import figures, say
from medusa_core.errors import ConfigError
from medusa_core.option_field import Option, option_of
from medusa_core.training.config import TrainConfig
from medusa_core.training.recipes import RECIPES, REQUIRED, field_type, resolve_config

if TYPE_CHECKING:
    from inspect import Parameter

    from medusa_core.training.report import TrainReport


def _train_options() -> OptionGroup:
    """`--config`, and every field of `TrainConfig`.

    All are None if not given: which value then holds is the recipe's or the file's business.
    """
    file = Option(help="YAML file of these settings (words joined by _); flags win over it.")
    hints = get_type_hints(TrainConfig)
    parameters = [parameter("config", Path | None, file, None)]
    parameters += [_parameter(spec, hints[spec.name]) for spec in fields(TrainConfig)]
    return OptionGroup(tuple(parameters), lambda config, **flags: resolve_config(flags, config))


def _parameter(spec: Field[Any], hint: Any) -> "Parameter":
    described = option_of(spec)
    assert described is not None
    text = described.help + (" Required." if spec.name in REQUIRED else "")
    kind = list[str] if get_origin(hint) is tuple else field_type(hint)
    return parameter(spec.name, kind | None, replace(described, help=text, shown=_default(spec)), None)


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


@with_options
def train(settings: Annotated[TrainConfig, _train_options()]) -> None:
    """Train draft heads for a model: Medusa-1, Medusa-2, Hydra or Hydra++."""
    if find_spec("accelerate") is None:
        raise ConfigError('training needs accelerate: pip install "medusa-serve[train]"')
    is_first = os.environ.get("RANK", "0") == "0"  # torchrun's number of this process
    if is_first:
        logging.getLogger("medusa_core").setLevel(logging.INFO)  # losses, where no progress bar shows them
    # Imported here: torch takes seconds, which `medusa --help` should not.
    from medusa_core.training.trainer import train_heads

    report = train_heads(settings)
    if is_first:
        _show(report, settings.out)


def _show(report: "TrainReport", out: Path) -> None:
    say(f"{report.steps} steps, {report.seconds:.0f} s, {report.tokens_per_second:.0f} tokens/s: {out}")
    if report.backbone_before is not None and report.backbone_after is not None:
        say(
            f"backbone, nats per held-out assistant token: {report.backbone_before:.4f} before, "
            f"{report.backbone_after:.4f} after"
        )
    if report.evaluation is None:
        return
    columns = ("head", "top-1 accuracy", "cross-entropy")
    table = figures(f"held-out tokens: {report.evaluation.targets}", columns)
    rows = zip(report.evaluation.accuracy, report.evaluation.loss, strict=True)
    for head, (accuracy, loss) in enumerate(rows, start=1):
        table.add_row(str(head), f"{accuracy:.3f}", f"{loss:.3f}")
    Console().print(table)
