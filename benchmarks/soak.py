"""Mixed clients against a real server whose worker is killed, stopped and hindered all the while.

    python benchmarks/soak.py --minutes 20 --seed 1 --json soak.json

The server is `medusa serve` with the embedded model. Clients of many classes ask it at once (see
`benchmarks/chaos/clients.py`): well-behaved ones, some that leave, read slowly or never, send what is no
request, ask for too much, or come in bursts above the queue limit. A worker dies about once a minute. The run
fails if

- a request has no end (no response, no [DONE], neither finish reason nor error) or one it must not have,
- an error is not in OpenAI's shape, or shows paths or traces,
- the same seed gives another text, streamed or not, with speculation or without, from whichever worker,
- a worker that hangs is not replaced, one that only hiccups is, or one dies by itself,
- more requests lose their worker than it had in its slots,
- `GET /health` takes longer than 3 s,
- anything is left: running or waiting requests, descriptors, threads, children; or memory grows by 1 MiB a
  minute or more after the warm-up; or a slot cannot be used,
- SIGTERM does not let what was accepted finish, and end the server with 0.

The exit code is 1 then. In the last part of the run no fault comes, so that one worker lives long enough to
see its memory.
"""

import asyncio
import json
from pathlib import Path
from typing import Annotated

import typer
from chaos.report import summary
from chaos.soak import SoakSettings, soak


def main(
    minutes: Annotated[float, typer.Option(min=0.1)] = 20.0,
    seed: int = 1,
    concurrency: Annotated[int, typer.Option(min=1, help="Clients at once.")] = 10,
    slots: Annotated[int, typer.Option(min=1)] = 3,
    queue_limit: Annotated[int, typer.Option(min=1)] = 12,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Print and write the report; exit code 1 if anything failed."""
    settings = SoakSettings(
        seconds=60.0 * minutes, seed=seed, concurrency=concurrency, slots=slots, queue_limit=queue_limit
    )
    report = asyncio.run(soak(settings))
    print(summary(report))
    if json_file is not None:
        json_file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if report["failures"]:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
