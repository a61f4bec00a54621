"""Token for token in float32: greedy Medusa = baseline = transformers' `generate`; sampled Medusa = baseline.

    python benchmarks/exactness.py --prompts held_out.jsonl --limit 200 --json exactness.json

Every prompt is answered greedily by the baseline, by transformers and with each tree, then sampled at
T = 0.8, top-p 0.95 and at T = 1.0 by the baseline and with each tree; with every shipped set of heads and
with random ones of the same kinds.
"""

import copy
import json
import random
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import PreTrainedModel

from medusa_core.benchmark.bench import machine_facts
from medusa_core.benchmark.runs import engine_runner, hf_runner
from medusa_core.config import EMBEDDED_MODEL, EngineConfig
from medusa_core.engine.engine import Engine
from medusa_core.loading.loader import load_parts
from medusa_core.sampling_params import SamplingParams, SpeculationMode, SpeculationParams
from medusa_core.text.prompts import DEFAULT_PROMPTS, load_prompts

SAMPLING = {"greedy": (0.0, 1.0), "T=0.8 top_p=0.95": (0.8, 0.95), "T=1.0": (1.0, 1.0)}
SETS = ("medusa-1", "hydra", "hydra++")
OFF = SpeculationParams(mode=SpeculationMode.OFF)


def random_tree_file(folder: Path, seed: int, depth: int) -> Path:
    """A random prefix-closed tree of 24 nodes as a file."""
    rng = random.Random(seed)
    paths: set[tuple[int, ...]] = {()}
    while len(paths) < 24:
        parent = rng.choice(sorted(paths))
        if len(parent) < depth:
            paths.add((*parent, rng.randrange(6)))
    file = folder / "random-tree.json"
    file.write_text(json.dumps([list(path) for path in sorted(paths) if path]))
    return file


def engines(model: str, sets: list[str], tree_file: Path) -> Iterator[tuple[str, Engine]]:
    """Engines by what drafts: each set of heads, trained and random, with "static" grown or random."""
    config = EngineConfig(dtype="float32", measure=False, tree_nodes=16)
    random_static = replace(config, static_tree=str(tree_file))
    backbone: PreTrainedModel | None = None
    for name in sets:
        parts = load_parts(model, name, config)
        if backbone is None:
            backbone = parts.backbone.model  # one for all: only the heads differ
        noise = random_copy(parts.heads)
        own = (parts.heads, parts.calibration)
        yield f"{name}", Engine.from_parts(backbone, parts.chat, own[0], config, own[1])
        yield f"{name}, random tree", Engine.from_parts(backbone, parts.chat, own[0], random_static, own[1])
        yield f"random {name}", Engine.from_parts(backbone, parts.chat, noise, config)
        yield (
            f"random {name}, random tree",
            Engine.from_parts(backbone, parts.chat, noise, random_static),
        )


def random_copy(heads: Any) -> Any:
    """Heads of the same kind and shape that know nothing."""
    torch.manual_seed(0)
    noise = copy.deepcopy(heads)
    for parameter in noise.parameters():
        parameter.data = 0.05 * torch.randn_like(parameter)
    return noise


def trees_of(name: str) -> tuple[str, ...]:
    return ("static",) if name.endswith("random tree") else ("dynamic", "static")


def check_prompt(
    by_name: dict[str, Engine], ids: list[int], max_tokens: int, seed: int, tally: dict[str, list[int]]
) -> None:
    """Answer one prompt in every way and count which answers equal the baseline's."""
    reference = next(iter(by_name.values()))
    for label, (temperature, top_p) in SAMPLING.items():
        params = SamplingParams(
            max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed, speculation=OFF
        )
        baseline = engine_runner(reference)(ids, params).token_ids
        answers = {
            f"{label}: {name}, {tree}": engine_runner(engine)(
                ids, replace(params, speculation=SpeculationParams(tree=tree))
            ).token_ids
            for name, engine in by_name.items()
            for tree in trees_of(name)
        }
        if temperature == 0.0:
            answers[f"{label}: transformers generate"] = hf_runner(reference)(ids, params).token_ids
        for key, tokens in answers.items():
            same, of = tally.setdefault(key, [0, 0])
            tally[key] = [same + (tokens == baseline), of + 1]


def main(
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
    prompts: Annotated[Path, typer.Option(help="JSONL of objects with `messages`.")] = DEFAULT_PROMPTS,
    limit: Annotated[int, typer.Option(min=1)] = 200,
    max_tokens: Annotated[int, typer.Option(min=2)] = 48,
    model: str = str(EMBEDDED_MODEL),
    heads: Annotated[list[str] | None, typer.Option(help="Sets of heads; repeatable.")] = None,
) -> None:
    """Compare all answers; exit code 1 if any differs."""
    tally: dict[str, list[int]] = {}
    with tempfile.TemporaryDirectory() as folder:
        by_name = dict(engines(model, heads or list(SETS), random_tree_file(Path(folder), 5, 4)))
    chat = next(iter(by_name.values())).chat
    for seed, prompt in enumerate(load_prompts(prompts, limit)):
        check_prompt(by_name, chat.render(prompt.messages), max_tokens, seed, tally)
    result: dict[str, Any] = {"machine": machine_facts(), "identical": tally, "max_tokens": max_tokens}
    print(json.dumps(tally, indent=2))
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if any(same != of for same, of in tally.values()):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
