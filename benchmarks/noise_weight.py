"""How much of the draw's noise coupled drafts should carry: hit rates by weight (`NOISE_WEIGHT` of drafting).

    python benchmarks/noise_weight.py --prompts dialogues.jsonl --limit 150 --temperature 1.0

The model's sampled answers, judged position by position: head k's guess is the argmax of its logits plus
weight * T * noise. Choose the weight on other dialogues than those that speed is measured on.
"""

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from medusa_core.decoding import drafting

from medusa_core.calibration.collect import answer_prompts, observe
from medusa_core.config import EMBEDDED_MODEL, EngineConfig
from medusa_core.engine.engine import Engine
from medusa_core.sampling_params import SamplingParams
from medusa_core.text.prompts import DEFAULT_PROMPTS, load_prompts

WEIGHTS = (0.0, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2)


def main(
    prompts: Annotated[Path, typer.Option(help="JSONL of objects with `messages`.")] = DEFAULT_PROMPTS,
    limit: Annotated[int, typer.Option(min=1)] = 150,
    temperature: Annotated[float, typer.Option(min=0.01)] = 1.0,
    max_tokens: Annotated[int, typer.Option(min=8)] = 96,
    model: str = str(EMBEDDED_MODEL),
    heads: str | None = None,
) -> None:
    """Print the share of positions at which each head's first guess is right, for each weight."""
    config = EngineConfig(dtype="float32", measure=False, tree_nodes=16)
    engine = Engine.from_pretrained(model, heads=heads, config=config)
    assert engine.heads is not None
    params = SamplingParams(temperature=temperature, max_tokens=max_tokens)
    answers = list(answer_prompts(engine, [p.messages for p in load_prompts(prompts, limit)], params))
    for weight in WEIGHTS:
        drafting.NOISE_WEIGHT = weight
        hits, known = torch.zeros(2, engine.heads.num_heads)
        for answer in answers:
            for observed in observe(engine, answer):
                is_known = observed.targets_NK >= 0
                hits += ((observed.scores_NKV.argmax(-1) == observed.targets_NK) & is_known).sum(0)
                known += is_known.sum(0)
        print(json.dumps({"weight": weight, "hit_rates": [round(x, 4) for x in (hits / known).tolist()]}))


if __name__ == "__main__":
    typer.run(main)
