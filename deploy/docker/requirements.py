"""Prints what pyproject.toml requires: python requirements.py pyproject.toml > requirements.txt

So that an image gets its packages before its code, in a layer of their own. Standard library only.
"""

import sys
import tomllib
from pathlib import Path


def main(pyproject: str) -> None:
    """The project's own dependencies, one a line; extras are for developers."""
    project = tomllib.loads(Path(pyproject).read_text(encoding="utf-8"))["project"]
    sys.stdout.write("\n".join(project["dependencies"]) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
