"""Options made from the fields of dataclasses."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from medusa_core.cli.options import with_options
from medusa_core.errors import ConfigError
from medusa_core.option_field import check_limits, option


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """A group with each kind of field."""

    names: tuple[str, ...] = option("Names [extra].", default=())
    count: int = option("How many.", "Numbers", default=3, least=1)
    share: float | None = option("What share.", "Numbers", default=None, env="SIZES_SHARE", above=0, below=1)
    fast: bool = option("Hurry.", default=False)
    folder: Path | None = option("Where.", default=None, flag="--to", path="folder", shown="nowhere")
    hidden: int = 7  # set by code alone

    def __post_init__(self) -> None:
        check_limits(self)


def run(*arguments: str, **environment: str):
    """Invoke a command of one argument and the group; returns the result and what it was called with."""
    app, seen = typer.Typer(), []

    @app.command()
    @with_options
    def command(word: Annotated[str, typer.Argument()], sizes: Sizes, context: typer.Context) -> None:
        """Does nothing."""
        seen.append((word, sizes, context.params["count"]))

    environment = {"COLUMNS": "200"} | environment
    return CliRunner().invoke(app, arguments, env=environment, catch_exceptions=False), seen


def test_a_command_gets_the_object_its_options_make(tmp_path):
    assert run("w")[1] == [("w", Sizes(), 3)]
    given = ["--names", "a", "--names", "b", "--count", "4", "--fast", "--to", str(tmp_path)]
    expected = Sizes(names=("a", "b"), count=4, share=0.25, fast=True, folder=tmp_path)
    assert run("w", *given, SIZES_SHARE="0.25")[1] == [("w", expected, 4)]


def test_help_shows_what_the_fields_say():
    output = run("--help")[0].output
    for text in ("Names [extra].", "Numbers", "env var: SIZES_SHARE", "[default: 3]", "(nowhere)", "x>=1"):
        assert text in output
    assert "hidden" not in output
    assert "--no-fast" not in output


@pytest.mark.parametrize(
    "arguments", [["--count", "0"], ["--to", __file__], ["--hidden", "1"], ["--no-fast"]]
)
def test_what_the_options_do_not_allow(arguments):
    assert run("w", *arguments)[0].exit_code == 2


def test_limits_that_the_command_line_cannot_say_are_the_objects():
    with pytest.raises(ConfigError, match="share must be above 0 and below 1, not 1"):
        run("w", "--share", "1")
    with pytest.raises(ConfigError, match="count must be at least 1"):
        Sizes(count=0)


def test_an_option_without_default_is_required():
    @dataclass(frozen=True, slots=True, kw_only=True)
    class Needed:
        name: str = option("A name.")

    app = typer.Typer()

    def command(needed: Needed) -> None:
        """Does nothing."""

    command.__annotations__["needed"] = Needed
    app.command()(with_options(command))
    assert CliRunner().invoke(app, []).exit_code == 2
    assert CliRunner().invoke(app, ["--name", "x"]).exit_code == 0
