"""The core's commands. `server.cli` adds `serve` and is what the console script `medusa` starts."""

import logging
import sys
from typing import Annotated

import typer

from medusa_core import __version__
from medusa_core.cli.bench import bench
from medusa_core.cli.calibrate import calibrate
from medusa_core.cli.chat import chat
from medusa_core.cli.convert import convert
from medusa_core.cli.distill import distill
from medusa_core.cli.generate import generate
from medusa_core.cli.train import train
from medusa_core.errors import MedusaError

app = typer.Typer(
    name="medusa",
    help="Medusa tree decoding: the same answers, sooner.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _configure(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Medusa tree decoding: the same answers, sooner."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")


app.command(rich_help_panel="Use a model")(chat)
app.command(rich_help_panel="Use a model")(generate)
app.command(rich_help_panel="Make it faster")(bench)
app.command(rich_help_panel="Make it faster")(distill)
app.command(rich_help_panel="Make it faster")(train)
app.command(rich_help_panel="Make it faster")(calibrate)
app.command(rich_help_panel="Make it faster")(convert)


def run(commands: typer.Typer) -> None:
    """Run the command line. A caller's mistake is one line on standard error and exit code 1."""
    try:
        commands()
    except MedusaError as error:
        typer.secho(f"error: {error}", fg=typer.colors.RED, err=True)
        sys.exit(1)


def main() -> None:
    run(app)
