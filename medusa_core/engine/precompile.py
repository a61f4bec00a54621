"""Process that compiles an engine's programs into the cache folder, started by a serving engine."""

import json
import logging
import os
import sys

from medusa_core.config import EngineConfig
from medusa_core.errors import MedusaError

logger = logging.getLogger(__name__)

NICENESS = 19


def main() -> int:
    """The one argument is JSON: model, heads or null, and the fields of an `EngineConfig`."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s compiler: %(message)s")
    model, heads, fields = json.loads(sys.argv[1])
    _step_back()
    from medusa_core.engine.engine import Engine  # slow to import, hence at low priority

    try:
        Engine.from_pretrained(model, heads=heads, config=EngineConfig(**fields))
    except MedusaError as error:
        logger.error("%s", error)
        return 1
    return 0


def _step_back() -> None:
    """Run when nobody else wants to."""
    os.nice(NICENESS)
    if hasattr(os, "SCHED_IDLE"):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


if __name__ == "__main__":
    sys.exit(main())
