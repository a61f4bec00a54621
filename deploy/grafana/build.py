"""Write dashboards/*.json from boards/*.py: `python deploy/grafana/build.py`, and commit both.

Grafana reads the JSON; a test says when it is not what the boards make.
"""

import json
import sys
from pathlib import Path

from boards import latency, service, speedup

BOARDS = {"speedup": speedup.board, "latency": latency.board, "service": service.board}
DASHBOARDS = Path(__file__).parent / "dashboards"


def main() -> None:
    """Write to the folder named on the command line, or to where Grafana reads them."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else DASHBOARDS
    for name, board in BOARDS.items():
        text = json.dumps(board(), indent=2, ensure_ascii=False)
        (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
