"""Prints what pyproject.toml requires: python requirements.py pyproject.toml EXTRA... > requirements.txt

So that an image gets its packages before its code, in a layer of their own. Standard library only.
"""

import sys
import tomllib
from pathlib import Path


def main(pyproject: str, *extras: str) -> None:
    """The project's own dependencies and those of some extras, one a line."""
    project = tomllib.loads(Path(pyproject).read_text(encoding="utf-8"))["project"]
    wanted = [project["dependencies"], *(project["optional-dependencies"][extra] for extra in extras)]
    sys.stdout.write("".join(f"{requirement}\n" for group in wanted for requirement in group))


if __name__ == "__main__":
    main(*sys.argv[1:])
