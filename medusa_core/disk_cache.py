"""A folder for what takes long to find out and stays true on this machine: step times, compiled programs.

Everything in it can be deleted at any time. Without a folder that can be written, nothing is remembered and
everything else works.
"""

import hashlib
import json
import logging
import os
from functools import cache
from pathlib import Path
from typing import Any

from medusa_core.errors import MedusaError
from medusa_core.files import read_json, write_json

logger = logging.getLogger(__name__)

VARIABLE = "MEDUSA_CACHE_DIR"
KEY_DIGITS = 16


def cache_folder() -> Path | None:
    """The folder, made if it is missing: $MEDUSA_CACHE_DIR, else medusa in $XDG_CACHE_HOME or ~/.cache.

    None where it cannot be written, as in a read-only container.
    """
    named, base = os.environ.get(VARIABLE), os.environ.get("XDG_CACHE_HOME")
    return _usable(named or str(Path(base or "~/.cache") / "medusa"))


def key_of(**facts: Any) -> str:
    """A short name for facts of any kind that JSON or `str` can write; it is another if one of them is."""
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:KEY_DIGITS]


def load_json(name: str) -> dict[str, Any] | None:
    """What was stored under a name; None if nothing was, or it cannot be read."""
    folder = cache_folder()
    if folder is None or not (folder / f"{name}.json").exists():
        return None
    try:
        return read_json(folder / f"{name}.json")
    except MedusaError as error:
        logger.info("ignored a damaged file of the cache: %s", error)
        return None


def store_json(name: str, value: dict[str, Any]) -> None:
    """Store under a name, whole or not at all; of two processes at once the last one's value stays."""
    folder = cache_folder()
    if folder is None:
        return
    try:
        write_json(folder / f"{name}.json", value)
    except OSError as error:
        logger.info("could not write to the cache: %s", error)


@cache  # which also logs a refusal once only
def _usable(folder: str) -> Path | None:
    try:
        path = Path(folder).expanduser()
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.access(path, os.W_OK | os.X_OK):
            return path
        reason = "it cannot be written"
    except (OSError, RuntimeError) as error:  # a user without a home is a RuntimeError
        reason = str(error)
    logger.info(
        "no cache in %s (%s): each start measures anew; %s can name a folder", folder, reason, VARIABLE
    )
    return None
