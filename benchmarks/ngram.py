"""N-gram drafts without heads: what answers gain that quote their prompt, what others lose.

    python benchmarks/ngram.py --json benchmarks/results/ngram.json

Quoting: 20 dialogues that end in an edit or in a request to repeat. Chat: dialogue openings, or `--prompts`.
With and without n-grams alternate prompt by prompt on one engine without heads; times of a prompt are the
fastest of its runs, and a ratio is that of all prompts' times together.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from medusa_core.benchmark.compare import Variant, interleave
from medusa_core.benchmark.inflated import SHAPES, inflated_engine
from medusa_core.benchmark.runs import Run, engine_runner
from medusa_core.config import EMBEDDED_MODEL, EngineConfig
from medusa_core.engine.engine import Engine
from medusa_core.machine import machine_facts
from medusa_core.sampling_params import DraftSourceName, SamplingParams, SpeculationMode, SpeculationParams
from medusa_core.text.prompts import DEFAULT_PROMPTS, Prompt, load_prompts

QUOTING = Path(__file__).parent / "quoting_prompts.jsonl"


def measure(
    engine: Engine, prompts: Sequence[Prompt], temperature: float, max_tokens: int, repeats: int
) -> dict[str, Any]:
    """Tokens per step with n-grams, and decoding time without over with them."""
    run = engine_runner(engine)
    variants = [
        Variant("off", run, SpeculationParams(mode=SpeculationMode.OFF)),
        Variant("ngram", run, SpeculationParams(source=DraftSourceName.NGRAM)),
    ]
    params = SamplingParams(temperature=temperature, max_tokens=max_tokens, seed=0)
    ids = [engine.chat_tokenizer.render(prompt.messages) for prompt in prompts]
    runs = interleave(variants, ids, params, repeats=repeats)
    firsts = [of_prompt[0] for of_prompt in runs["ngram"]]
    tokens, steps = sum(r.decoded_tokens for r in firsts), sum(len(r.steps) for r in firsts)
    return {
        "prompts": len(prompts),
        "decoded_tokens": tokens,
        "tokens_per_step": round(tokens / steps, 3),
        "speedup": round(fastest(runs["off"]) / fastest(runs["ngram"]), 3),
    }


def fastest(runs: Sequence[Sequence[Run]]) -> float:
    """Seconds of decoding, of each prompt the least."""
    return sum(min(run.decode_seconds for run in of_prompt) for of_prompt in runs)


def main(
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
    prompts: Annotated[Path, typer.Option(help="Plain chat: JSONL of `messages`.")] = DEFAULT_PROMPTS,
    limit: Annotated[int, typer.Option(min=1)] = 40,
    max_tokens: Annotated[int, typer.Option(min=2)] = 96,
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    inflate: Annotated[str | None, typer.Option(help="1b: at the 1.2 B shape.")] = None,
    model: str = str(EMBEDDED_MODEL),
) -> None:
    """Measure both kinds of prompts, greedy and at T = 0.7."""
    config = EngineConfig()
    if inflate is None:
        engine = Engine.from_pretrained(model, heads="none", config=config)
    else:
        engine = inflated_engine(model, "none", config, SHAPES[inflate])
    kinds = {"quoting": load_prompts(QUOTING), "chat": load_prompts(prompts, limit)}
    result: dict[str, Any] = {
        "machine": machine_facts(),
        "dtype": engine.info.dtype,
        "shape": inflate or "demo",
    }
    for kind, chosen in kinds.items():
        for name, temperature in (("greedy", 0.0), ("T=0.7", 0.7)):
            result[f"{kind}, {name}"] = measure(engine, chosen, temperature, max_tokens, repeats)
    print(json.dumps(result, indent=2))
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
