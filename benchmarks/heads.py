"""Compares every kind of draft heads on held-out dialogues: acceptance length, speedup, identity.

    python benchmarks/heads.py --prompts held_out.jsonl --limit 100 --json heads.json
    python benchmarks/heads.py --prompts held_out.jsonl --limit 8 --inflate 1b --json heads_1b.json

One row per kind and sampling: greedy, T = 0.7 exact, T = 0.7 typical. All trees but the chain have the same
number of nodes. Trees and temperatures come from each set's calibration.json, made from other dialogues. A
dialogue is cut before a random one of its answers, since the last are mostly goodbyes of a few tokens.

Acceptance length (tokens per decode step) and identity come from a float32 run. The speedup over the same
backbone without speculation comes from an interleaved run in the default dtype (bfloat16 if inflated), as do
the figures of typical acceptance, which is not lossless.

medusa-2 has a backbone of its own, so it is not shipped; `--train` makes it (benchmarks/medusa_2.py), without
it there is no such row.
"""

import json
import platform
import random
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from medusa_2 import CACHE, train_medusa_2
from rich.console import Console
from rich.table import Table

from medusa_core.benchmark import report
from medusa_core.benchmark.bench import fitting_prompts
from medusa_core.benchmark.compare import Variant, compare_tokens, interleave
from medusa_core.benchmark.inflate import inflate_model
from medusa_core.benchmark.inflated import SHAPES, inflate_heads
from medusa_core.benchmark.runs import Run, engine_runner
from medusa_core.config import EMBEDDED_MODEL, EngineConfig
from medusa_core.engine.engine import Engine
from medusa_core.loading.devices import resolve_device, resolve_dtype
from medusa_core.loading.loader import load_parts
from medusa_core.machine import machine_facts
from medusa_core.sampling_params import SamplingParams, SpeculationMode, SpeculationParams
from medusa_core.text.prompts import DEFAULT_PROMPTS, Prompt, load_prompts

SAMPLINGS = {
    "greedy": (0.0, SpeculationMode.EXACT),
    "exact": (0.7, SpeculationMode.EXACT),
    "typical": (0.7, SpeculationMode.TYPICAL),
}
SEED = 0  # of the cuts and the sampling
MAX_TOKENS = 128
SHIPPED = ("medusa-1", "hydra", "hydra++")


@dataclass(frozen=True)
class Contender:
    """A row's name, its heads, their tree, and the model they belong to."""

    name: str
    heads: str
    tree: str
    model: Path = EMBEDDED_MODEL
    is_chain: bool = False


@dataclass(frozen=True)
class Side:
    """A contender, its engine, and the name of the runs it is compared with."""

    contender: Contender
    engine: Engine
    baseline: str


Runs = dict[str, list[list[Run]]]


def main(
    prompts: Annotated[Path, typer.Option(help="JSONL of objects with `messages`.")] = DEFAULT_PROMPTS,
    limit: Annotated[int | None, typer.Option(min=1, help="Use at most so many prompts.")] = None,
    inflate: Annotated[str | None, typer.Option(help="Measure at this shape: 1b.")] = None,
    nodes: Annotated[int, typer.Option(min=2, help="Tree nodes, root included.")] = 16,
    repeats: Annotated[int, typer.Option(min=1, help="Of the timed run.")] = 1,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
    train: Annotated[bool, typer.Option("--train", help="Make the sets that are not shipped.")] = False,
    data: Annotated[
        list[Path] | None, typer.Option(help="Dialogues for --train; else the demo model makes some.")
    ] = None,
) -> None:
    """Measure all, print the table, write the details."""
    if inflate is not None and inflate not in SHAPES:
        raise typer.BadParameter(f"--inflate must be one of {', '.join(SHAPES)}")
    if train:
        train_medusa_2(data or [])
    chosen = cut_at_random(load_prompts(prompts, limit))
    contenders = list(present())
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        exact = build_sides(contenders, nodes, "float32", inflate, Path(folder))
        ids = fitting_prompts(exact[0].engine, chosen, MAX_TOKENS, print)
        figures = {
            name: judge(exact, ids, name, run_all(exact, ids, name, 1))
            for name, (_, mode) in SAMPLINGS.items()
            if mode is SpeculationMode.EXACT
        }
        del exact
        timed = build_sides(contenders, nodes, "bfloat16" if inflate else "auto", inflate, Path(folder))
        for name in SAMPLINGS:
            runs = run_all(timed, ids, name, repeats)
            own = figures.get(name) or judge(timed, ids, name, runs)
            rows += [row(side, name, nodes, own[side.contender.name], runs, ids) for side in timed]
    result = {
        "rows": rows,
        "shape": inflate or "demo",
        "prompts": {"file": str(prompts), "count": len(ids), "max_tokens": MAX_TOKENS, "seed": SEED},
        "machine": machine_facts() | {"system": platform.platform()},
    }
    Console(width=120).print(table(result))
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def present() -> Iterator[Contender]:
    """The rows whose heads exist."""
    if (EMBEDDED_MODEL / "medusa-1").is_dir():
        yield Contender("medusa-1/chain", "medusa-1", "static", is_chain=True)
        yield Contender("medusa-1/static", "medusa-1", "static")
        yield Contender("medusa-1/dynamic", "medusa-1", "dynamic")
    if CACHE.is_dir():
        yield Contender("medusa-2", str(CACHE), "dynamic", CACHE)
    for name in SHIPPED[1:]:
        if (EMBEDDED_MODEL / name).is_dir():
            yield Contender(name, name, "dynamic")


def cut_at_random(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Each dialogue up to a random one of its users' turns."""
    rng = random.Random(SEED)
    cut = []
    for prompt in prompts:
        ends = [i for i, message in enumerate(prompt.messages) if message["role"] == "user"]
        last = rng.choice(ends) if ends else len(prompt.messages) - 1
        cut.append(replace(prompt, messages=prompt.messages[: last + 1]))
    return cut


def build_sides(
    contenders: Sequence[Contender], nodes: int, dtype: str, inflate: str | None, folder: Path
) -> list[Side]:
    """An engine per contender; those of one model share its weights where it is inflated."""
    config = EngineConfig(dtype=dtype, measure=False, tree_nodes=nodes)
    models: dict[Path, Any] = {}
    sides = []
    for contender in contenders:
        own = replace(config, static_tree=chain_file(contender, folder)) if contender.is_chain else config
        baseline = f"baseline of {contender.model.name}"
        if inflate is None:
            engine = Engine.from_pretrained(contender.model, heads=contender.heads, config=own)
        else:
            engine = inflated(contender, own, inflate, models)
        sides.append(Side(contender, engine, baseline))
    return sides


def inflated(contender: Contender, config: EngineConfig, shape: str, models: dict[Path, Any]) -> Engine:
    """The contender's engine at the inflated shape; `models` keeps the padded backbones."""
    parts = load_parts(contender.model, contender.heads, replace(config, dtype="float32"))
    if contender.model not in models:
        dtype = resolve_dtype(config.dtype, resolve_device(config.device), contender.model)
        models[contender.model] = inflate_model(parts.backbone.model, SHAPES[shape], dtype=dtype)
    big = models[contender.model]
    assert parts.heads is not None
    return Engine.from_parts(big, parts.chat, inflate_heads(parts.heads, big), config, parts.calibration)


def chain_file(contender: Contender, folder: Path) -> str:
    """A tree file with the chain of every head's best token."""
    parts = load_parts(contender.model, contender.heads, EngineConfig(dtype="float32", measure=False))
    assert parts.heads is not None
    file = folder / "chain.json"
    file.write_text(json.dumps([[0] * depth for depth in range(1, parts.heads.num_heads + 1)]))
    return str(file)


def sampling(name: str) -> SamplingParams:
    return SamplingParams(temperature=SAMPLINGS[name][0], max_tokens=MAX_TOKENS, seed=SEED)


def run_all(sides: Sequence[Side], ids: list[list[int]], name: str, repeats: int) -> Runs:
    """All contenders and their baselines, interleaved prompt by prompt."""
    variants = {side.baseline: Variant(side.baseline, engine_runner(side.engine)) for side in sides}
    for side in sides:
        speculation = SpeculationParams(mode=SAMPLINGS[name][1], tree=side.contender.tree)
        own = side.contender.name
        variants[own] = Variant(own, engine_runner(side.engine), speculation)
    return interleave(list(variants.values()), ids, sampling(name), repeats=repeats)


def judge(sides: Sequence[Side], ids: list[list[int]], name: str, runs: Runs) -> dict[str, dict[str, Any]]:
    """Acceptance of each contender, and identity with its baseline."""
    figures = {}
    for side in sides:
        own = side.contender.name
        identity = compare_tokens(runs[side.baseline], runs[own], ids, sampling(name), side.engine.backbone)
        speculation = report.speculation_figures(runs[own])
        figures[own] = {
            "acceptance_length": speculation["acceptance_length"],
            "acceptance_by_head": speculation["acceptance_by_head"],
            "identical": report.identity_figures(identity),
        }
    return figures


def row(
    side: Side, name: str, nodes: int, judged: dict[str, Any], runs: Runs, ids: list[list[int]]
) -> dict[str, Any]:
    """One row: judged and timed figures."""
    contender, (temperature, mode) = side.contender, SAMPLINGS[name]
    lengths = [len(prompt) for prompt in ids]
    own, baseline = (report.rates(runs[key], lengths) for key in (contender.name, side.baseline))
    overall = (own["overall_tokens_per_second"], baseline["overall_tokens_per_second"])
    return {
        "name": contender.name,
        "sampling": name,
        "temperature": temperature,
        "lossless": mode is SpeculationMode.EXACT,
        "num_heads": side.engine.info.num_heads,
        "nodes": side.engine.info.num_heads + 1 if contender.is_chain else nodes,
        **judged,
        "speedup": report.ratio(own, baseline),
        "overall_speedup": overall[0] / overall[1] if overall[0] and overall[1] else None,
        "tokens_per_second": own["tokens_per_second"],
        "baseline_tokens_per_second": baseline["tokens_per_second"],
        "step_seconds": report.step_seconds(runs[contender.name]),
        "baseline_step_seconds": report.step_seconds(runs[side.baseline]),
        "phases": report.speculation_figures(runs[contender.name])["phases"],
        "dtype": side.engine.info.dtype,
    }


def table(result: dict[str, Any]) -> Table:
    """The rows as a table for the terminal."""
    shown = Table(title=f"{result['shape']} shape, {result['prompts']['count']} dialogues")
    for name in (
        "heads",
        "nodes",
        "sampling",
        "tokens/step",
        "speedup",
        "propose ms",
        "verify ms",
        "identical",
    ):
        shown.add_column(name, justify="left" if name in ("heads", "sampling") else "right")
    for row in result["rows"]:
        same = f"{row['identical']['same']}/{row['identical']['of']}" if row["lossless"] else "not lossless"
        shown.add_row(
            row["name"],
            str(row["nodes"]),
            row["sampling"],
            f"{row['acceptance_length']:.2f}",
            f"{row['speedup']:.2f}",
            *(f"{1e3 * row['phases'][phase]:.2f}" for phase in ("propose", "verify")),
            same,
        )
    return shown


if __name__ == "__main__":
    typer.run(main)
