"""Gain of coupled drafting: tokens per step with and without the target's noise in the drafts.

    python benchmarks/drafting.py --prompts held_out.jsonl --limit 60 --json drafting.json

Both give the same answers in different numbers of steps, so one run each is exact.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from medusa_core.config import EMBEDDED_MODEL, EngineConfig
from medusa_core.draft import coupling
from medusa_core.engine.engine import Engine
from medusa_core.machine import machine_facts
from medusa_core.sampling_params import SamplingParams
from medusa_core.text.prompts import DEFAULT_PROMPTS, Prompt, load_prompts

TEMPERATURES = (0.3, 0.7, 1.0)
COUPLED = coupling.NOISE_WEIGHT


def acceptance_length(
    engine: Engine, prompts: Sequence[Prompt], temperature: float, max_tokens: int
) -> float:
    """Mean tokens per decode step over all prompts."""
    tokens = steps = 0
    for seed, prompt in enumerate(prompts):
        params = SamplingParams(temperature=temperature, max_tokens=max_tokens, seed=seed)
        for output in engine.steps(prompt.messages, params):
            if output.stats and not output.stats.is_prefill:
                tokens += len(output.token_ids) + (output.stop_token_id is not None)
                steps += 1
    return tokens / steps


def main(
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
    prompts: Annotated[Path, typer.Option(help="JSONL of objects with `messages`.")] = DEFAULT_PROMPTS,
    limit: Annotated[int, typer.Option(min=1)] = 60,
    max_tokens: Annotated[int, typer.Option(min=2)] = 96,
    tree_nodes: Annotated[int, typer.Option(min=2, max=64)] = 16,
    model: str = str(EMBEDDED_MODEL),
    heads: str | None = None,
) -> None:
    """Measure each temperature coupled and uncoupled."""
    config = EngineConfig(dtype="float32", measure=False, tree_nodes=tree_nodes)
    engine = Engine.from_pretrained(model, heads=heads, config=config)
    chosen = load_prompts(prompts, limit)
    rows = []
    for temperature in TEMPERATURES:
        row: dict[str, float] = {"temperature": temperature}
        for name, weight in (("uncoupled", 0.0), ("coupled", COUPLED)):
            coupling.NOISE_WEIGHT = weight
            row[name] = round(acceptance_length(engine, chosen, temperature, max_tokens), 4)
        row["gain"] = round(row["coupled"] / row["uncoupled"] - 1, 4)
        rows.append(row)
    result = {"machine": machine_facts(), "tree_nodes": tree_nodes, "prompts": len(chosen), "rows": rows}
    print(json.dumps(result, indent=2))
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
