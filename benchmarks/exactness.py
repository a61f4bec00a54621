"""Token for token: exact speculation = no speculation = transformers' `generate`, for every draft source.

    python benchmarks/exactness.py --prompts held_out.jsonl --json exactness.json

No answer may differ: prompts are answered greedily, at T = 0.8 with top-p 0.95, and at 1.0, without
speculation and with every shipped set of heads, trained or random, in dynamic trees of several sizes and of
one that follows the machine's speed, in grown and random trees, with n-grams alone and with both sources in
one tree. What differs is listed with its margin. `--dtype bfloat16` answers in what is served by default
(transformers' own answers, which round elsewhere, are compared in float32 only); `--load 2` keeps two cores
busy meanwhile. A JSON file keeps a table for each.
"""

import contextlib
import copy
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from medusa_core.benchmark.compare import decision_margin
from medusa_core.benchmark.runs import engine_runner, hf_runner
from medusa_core.config import EMBEDDED_MODEL, EngineConfig
from medusa_core.engine.engine import Engine
from medusa_core.loading.loader import load_parts
from medusa_core.machine import machine_facts
from medusa_core.sampling_params import DraftSourceName, SamplingParams, SpeculationMode, SpeculationParams
from medusa_core.text.prompts import load_prompts

NODES = (4, 8, 32, 64)  # besides 16
SAMPLING = {"greedy": (0.0, 1.0), "T=0.8 top_p=0.95": (0.8, 0.95), "T=1.0": (1.0, 1.0)}
SETS = ("medusa-1", "hydra", "hydra++")
OFF = SpeculationParams(mode=SpeculationMode.OFF)
QUOTING = Path(__file__).parent / "quoting_prompts.jsonl"  # edits and repetitions, which n-grams draft well
GREEDY_REFERENCE = "transformers generate"


@dataclass(frozen=True)
class Way:
    """One way to answer: an engine and what it is asked to speculate with."""

    name: str
    engine: Engine
    speculation: SpeculationParams


@dataclass
class Row:
    """How many answers of one way equal those without speculation; the margins of those that do not."""

    same: int = 0
    of: int = 0
    margins: tuple[float, ...] = ()


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


def ways(model: str, sets: list[str], config: EngineConfig, tree_file: Path) -> Iterator[Way]:
    """Every set of heads, trained and random; only heads differ, the backbone is one for all."""
    backbone: Any = None
    for name in sets:
        parts = load_parts(model, name, config)
        backbone = backbone or parts.backbone.model
        yield from ways_of_set(name, backbone, model, config, tree_file)
    parts = load_parts(model, sets[0], config)
    ngrams = Engine.from_parts(backbone, parts.chat, parts.heads, config, parts.calibration)
    yield Way("n-grams", ngrams, SpeculationParams(source=DraftSourceName.NGRAM))


def ways_of_set(name: str, backbone: Any, model: str, config: EngineConfig, tree_file: Path) -> Iterator[Way]:
    """Trees of several kinds and sizes, and heads that know nothing."""

    def engine(**changes: Any) -> Engine:
        parts = load_parts(model, name, config)  # an engine packs its heads: they are its own
        own = replace(config, **changes)
        return Engine.from_parts(backbone, parts.chat, parts.heads, own, parts.calibration)

    parts, both = load_parts(model, name, config), SpeculationParams(source=DraftSourceName.BOTH)
    usual = engine()
    noise = Engine.from_parts(backbone, parts.chat, random_copy(parts.heads), config)
    yield Way(f"{name}, dynamic tree", usual, SpeculationParams())
    for nodes in NODES:
        yield Way(f"{name}, dynamic tree of {nodes}", engine(tree_nodes=nodes), SpeculationParams())
    yield Way(f"{name}, measured size", engine(measure=True, tree_nodes=None), SpeculationParams())
    yield Way(f"{name}, grown tree", usual, SpeculationParams(tree="static"))
    random_tree = engine(static_tree=str(tree_file))
    yield Way(f"{name}, random tree", random_tree, SpeculationParams(tree="static"))
    yield Way(f"{name} and n-grams", usual, both)
    yield Way(f"random {name}, dynamic tree", noise, SpeculationParams())
    yield Way(f"random {name} and n-grams", noise, both)


def random_copy(heads: Any) -> Any:
    """Heads of the same kind and shape that know nothing."""
    torch.manual_seed(0)
    noise = copy.deepcopy(heads)
    for parameter in noise.parameters():
        parameter.data = 0.05 * torch.randn_like(parameter)
    return noise


def check_prompt(
    all_ways: list[Way], ids: list[int], max_tokens: int, seed: int, table: dict[str, Row]
) -> None:
    """Answer one prompt in every way and count which answers equal those without speculation."""
    reference = all_ways[0].engine
    for label, (temperature, top_p) in SAMPLING.items():
        params = SamplingParams(
            max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed, speculation=OFF
        )
        plain = engine_runner(reference)(ids, params).token_ids
        answers = {
            way.name: engine_runner(way.engine)(ids, replace(params, speculation=way.speculation)).token_ids
            for way in all_ways
        }
        if temperature == 0.0 and reference.backbone.dtype == torch.float32:
            answers[GREEDY_REFERENCE] = hf_runner(reference)(ids, params).token_ids
        for name, tokens in answers.items():
            row = table.setdefault(f"{label}: {name}", Row())
            row.of += 1
            row.same += tokens == plain
            if tokens != plain:
                common = next(i for i, (a, b) in enumerate(zip(plain, tokens, strict=False)) if a != b)
                margin = decision_margin(reference.backbone, [*ids, *plain[:common]], params)
                row.margins = (*row.margins, round(margin, 4))


@contextlib.contextmanager
def busy_cores(count: int) -> Iterator[None]:
    """That many processes that only compute, until the end of the block."""
    command = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(command) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def main(  # noqa: PLR0913 - typer reads options off the signature
    json_file: Annotated[Path | None, typer.Option("--json", help="Written or added to.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="JSONL of objects with `messages`.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Of them, beside the prompts that quote.")] = 100,
    max_tokens: Annotated[int, typer.Option(min=2)] = 48,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    compiled: Annotated[str, typer.Option("--compile", help="on or off.")] = "on",
    load: Annotated[int, typer.Option(min=0, help="Processes that keep cores busy.")] = 0,
    model: str = str(EMBEDDED_MODEL),
    heads: Annotated[list[str] | None, typer.Option(help="Sets of heads; repeatable.")] = None,
) -> None:
    """Compare all answers; exit code 1 if any differs."""
    config = EngineConfig(dtype=dtype, measure=False, tree_nodes=16, compile=compiled)
    chosen = [*load_prompts(*([prompts] if prompts else []), limit=limit), *load_prompts(QUOTING)]
    with tempfile.TemporaryDirectory() as folder:
        all_ways = list(ways(model, heads or list(SETS), config, random_tree_file(Path(folder), 5, 4)))
    table: dict[str, Row] = {}
    with busy_cores(load):
        for seed, prompt in enumerate(chosen):
            ids = all_ways[0].engine.chat_tokenizer.render(prompt.messages)
            check_prompt(all_ways, ids, max_tokens, seed, table)
    rows = {name: {"same": row.same, "of": row.of, "margins": row.margins} for name, row in table.items()}
    different = sum(row.of - row.same for row in table.values())
    name = f"{dtype}, compile {compiled}" + (f", {load} busy processes" if load else "")
    print(json.dumps(rows, indent=2))
    print(f"{name}: {different} of {sum(row.of for row in table.values())} answers differ")
    if json_file is not None:
        known = json.loads(json_file.read_text()) if json_file.exists() else {}
        known[name] = {"machine": machine_facts(), "max_tokens": max_tokens, "answers": rows}
        json_file.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    if different:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
