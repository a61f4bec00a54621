"""The README's speed figures: every comparison on the same held-out prompts, greedy, in one JSON file.

    python benchmarks/speed.py --prompts held_out.jsonl --limit 40 --json speed.json

1. the demo model in its default dtype: Medusa, our baseline and transformers' `generate`;
2. Medusa there against the fastest baseline in any dtype;
3. the model inflated to 1.2 B parameters in bfloat16: as 1.

All run compiled; the first run on a machine compiles for some minutes.
"""

import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from medusa_core.benchmark import report
from medusa_core.benchmark.bench import fitting_prompts, run_bench
from medusa_core.benchmark.compare import Variant, interleave
from medusa_core.benchmark.inflated import SHAPES, inflated_engine
from medusa_core.benchmark.runs import engine_runner
from medusa_core.benchmark.settings import BenchSettings
from medusa_core.config import EMBEDDED_MODEL, EngineConfig
from medusa_core.engine.engine import Engine
from medusa_core.machine import machine_facts
from medusa_core.sampling_params import SpeculationParams
from medusa_core.text.prompts import DEFAULT_PROMPTS, Prompt, load_prompts

DTYPES = ("float32", "bfloat16")


def main(
    json_file: Annotated[Path, typer.Option("--json")],
    prompts: Annotated[Path, typer.Option(help="JSONL of objects with `messages`.")] = DEFAULT_PROMPTS,
    limit: Annotated[int | None, typer.Option(min=1, help="Prompts for the demo model.")] = None,
    inflated_limit: Annotated[int, typer.Option(min=1, help="Prompts for the inflated model.")] = 12,
    max_tokens: Annotated[int, typer.Option(min=2)] = 128,
    repeats: Annotated[int, typer.Option(min=1, help="On the demo model.")] = 3,
    model: str = str(EMBEDDED_MODEL),
    heads: str | None = None,
) -> None:
    """Measure all, print a summary, write the details."""
    chosen = load_prompts(prompts, limit)
    few = load_prompts(prompts, inflated_limit)
    settings = BenchSettings(max_tokens=max_tokens, repeats=repeats, compare_hf=True)
    once = BenchSettings(max_tokens=max_tokens, compare_hf=True)
    demo = Engine.from_pretrained(model, heads=heads, config=EngineConfig(compile="on"))
    figures: dict[str, Any] = {
        "machine": machine_facts() | {"system": platform.platform()},
        "demo": run_bench(demo, chosen, settings, warn=print),
        "fastest_baseline": against_fastest_baseline(demo, model, chosen, settings),
    }
    del demo
    big = inflated_engine(model, heads, EngineConfig(dtype="bfloat16", compile="on"), SHAPES["1b"])
    figures["inflated_1b"] = run_bench(big, few, once, warn=print)
    summary = summarize(figures)
    json_file.write_text(json.dumps({"summary": summary} | figures, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(summary, indent=2))


def against_fastest_baseline(
    demo: Engine, model: str, prompts: Sequence[Prompt], settings: BenchSettings
) -> dict[str, Any]:
    """Medusa in the default dtype and baselines in every dtype, interleaved."""
    baselines = {
        dtype: Engine.from_pretrained(
            model, heads="none", config=EngineConfig(dtype=dtype, compile="on", measure=False)
        )
        for dtype in DTYPES
    }
    variants = [Variant(dtype, engine_runner(engine)) for dtype, engine in baselines.items()]
    variants.append(Variant("medusa", engine_runner(demo), SpeculationParams()))
    ids = fitting_prompts(demo, prompts, settings.max_tokens, print)
    runs = interleave(variants, ids, settings.sampling(), repeats=settings.repeats)
    rates = {name: report.rates(runs[name], [len(i) for i in ids]) for name in runs}
    ratios = {dtype: report.ratio(rates["medusa"], rates[dtype]) for dtype in DTYPES}
    return {"medusa_dtype": demo.info.dtype, "rates": rates, "speedup_over": ratios}


def summarize(figures: dict[str, Any]) -> dict[str, float | None]:
    """The main ratios, each of medians."""
    demo, big = figures["demo"], figures["inflated_1b"]
    over = [ratio for ratio in figures["fastest_baseline"]["speedup_over"].values() if ratio]
    return {
        "inflated_speedup": big["speedup"],
        "inflated_baseline_over_hf": report.ratio(big["baseline"], big["hf_generate"]),
        "demo_speedup": demo["speedup"],
        "demo_speedup_over_fastest_baseline": min(over) if over else None,
        "demo_baseline_over_hf": report.ratio(demo["baseline"], demo["hf_generate"]),
    }


if __name__ == "__main__":
    typer.run(main)
