"""Records one dialogue with and without speculation, and draws it as an animated terminal.

    python benchmarks/record_demo.py                # some seconds
    python benchmarks/record_demo.py --inflate 1b   # padded to 1.2 B parameters: some minutes
    python benchmarks/record_demo.py --draw-only    # the stored recording again

Greedy. Both sides are recorded several times, alternating; of each answer the fastest one is kept, since
other work on the machine disturbed it least. Texts that differ between the sides are an error.
"""

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from pictures.terminal import draw

from medusa_core import Engine, EngineConfig, SamplingParams, SpeculationMode, SpeculationParams
from medusa_core.benchmark.inflated import SHAPES, inflated_engine
from medusa_core.config import EMBEDDED_MODEL
from medusa_core.machine import machine_facts

ROOT = Path(__file__).parents[1]
QUESTIONS = (
    "I need a cheap restaurant in the centre",
    "What is the phone number?",
    "Thanks! Who are you?",
)
SIDES = {"off": SpeculationMode.OFF, "exact": SpeculationMode.EXACT}
Turn = dict[str, Any]


def main(
    json_file: Annotated[Path, typer.Option("--json")] = ROOT / "benchmarks" / "results" / "recording.json",
    svg: Path = ROOT / "docs" / "media" / "recording.svg",
    repeats: Annotated[int, typer.Option(min=1)] = 30,
    inflate: Annotated[str | None, typer.Option(help="Pad the demo model to this shape: 1b.")] = None,
    draw_only: Annotated[bool, typer.Option("--draw-only")] = False,
) -> None:
    """Record the dialogue (unless told to draw only) and draw it."""
    if not draw_only:
        json_file.write_text(json.dumps(record(repeats, inflate), indent=1) + "\n", encoding="utf-8")
    svg.write_text(draw(json.loads(json_file.read_text(encoding="utf-8"))), encoding="utf-8")
    print(f"{svg}: {svg.stat().st_size / 1024:.0f} KiB")


def record(repeats: int, inflate: str | None) -> dict[str, Any]:
    """Both sides of the dialogue, and what they ran on."""
    config = EngineConfig(dtype="bfloat16")
    if inflate:
        engine = inflated_engine(EMBEDDED_MODEL, None, config, SHAPES[inflate])
    else:
        engine = Engine.from_pretrained(config=config)
    runs: dict[str, list[list[Turn]]] = {side: [] for side in SIDES}
    for number in range(repeats + 1):  # the first warms up
        for side, mode in SIDES.items():
            turns = dialogue(engine, mode)
            if number:
                runs[side].append(turns)
    sides = {
        side: [min(same, key=seconds) for same in zip(*turns, strict=True)] for side, turns in runs.items()
    }
    texts = {side: [turn["text"] for turn in turns] for side, turns in sides.items()}
    if texts["off"] != texts["exact"]:
        raise SystemExit(f"the answers differ: {texts}")
    info = engine.info
    model = {"parameters": info.parameters, "dtype": info.dtype, "tree_nodes": info.tree_nodes}
    return {"machine": machine_facts(), "model": model, "repeats": repeats, "sides": sides}


def dialogue(engine: Engine, mode: SpeculationMode) -> list[Turn]:
    """All questions one after the other, each with the seconds at which pieces of its answer came."""
    messages: list[dict[str, str]] = []
    turns = []
    params = SamplingParams(temperature=0.0, max_tokens=64, speculation=SpeculationParams(mode=mode))
    for question in QUESTIONS:
        messages.append({"role": "user", "content": question})
        start = time.perf_counter()
        stream = engine.stream(messages, params)
        pieces = [[round(time.perf_counter() - start, 4), piece] for piece in stream]
        total = time.perf_counter() - start
        answer = stream.answer
        messages.append({"role": "assistant", "content": answer.text})
        turns.append(
            {
                "question": question,
                "text": answer.text,
                "pieces": pieces,
                "seconds": round(total, 4),
                "tokens": answer.stats.tokens,
                "decode_tokens": answer.stats.decode_tokens,
                "decode_steps": answer.stats.decode_steps,
            }
        )
    return turns


def seconds(turn: Turn) -> float:
    return float(turn["seconds"])


if __name__ == "__main__":
    typer.run(main)
