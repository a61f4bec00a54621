"""JSON files: read strictly, written so that a reader never sees half of one."""

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from medusa_core.errors import CheckpointError, MedusaError


def read_json(path: Path, error: type[MedusaError] = CheckpointError) -> dict[str, Any]:
    """A JSON object. Raises `error`."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as reason:
        raise error(f"cannot read {path}: {reason}") from reason
    if not isinstance(value, dict):
        raise error(f"{path} is not a JSON object")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write indented JSON, replacing the file atomically."""
    text = json.dumps(value, indent=2) + "\n"
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def replace_file(target: Path, write: Callable[[Path], object]) -> None:
    """Write beside the target, then rename over it."""
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=target.name, suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o644)  # mkstemp's 0600 would hide the file from a server of another user
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
