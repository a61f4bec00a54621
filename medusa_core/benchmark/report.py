"""Figures and table of `medusa bench`, computed from runs. All times in seconds."""

from collections.abc import Sequence
from statistics import fmean, median, median_low
from typing import Any

from rich.table import Table

from medusa_core.benchmark.compare import Identity
from medusa_core.benchmark.runs import Run
from medusa_core.engine.outputs import StepStats
from medusa_core.sampling_params import SpeculationMode

PromptRuns = Sequence[Sequence[Run]]  # [prompt][repeat]
PHASES = ("propose", "verify", "commit")


def rates(runs: PromptRuns, prompt_lengths: Sequence[int]) -> dict[str, float | None]:
    """Decode and prefill rates: the median over prompts of each prompt's median over repeats.

    `overall_tokens_per_second` is all tokens over all seconds, so long answers weigh more.
    """
    per_prompt = [_median([run.tokens_per_second for run in repeats]) for repeats in runs]
    flat = [run for repeats in runs for run in repeats]
    decoded, seconds = sum(run.decoded_tokens for run in flat), sum(run.decode_seconds for run in flat)
    prefill = [median(run.prefill_seconds for run in repeats) for repeats in runs]
    return {
        "tokens_per_second": _median(per_prompt),
        "overall_tokens_per_second": decoded / seconds if seconds > 0 else None,
        "prefill_seconds": median(prefill),
        "prefill_tokens_per_second": median(
            length / taken for length, taken in zip(prompt_lengths, prefill, strict=True)
        ),
    }


def step_seconds(runs: PromptRuns) -> float | None:
    """Median over runs of a decode step's wall time, time between steps included.

    A run without steps (transformers' `generate`) counts one token a step.
    """
    flat = [run for repeats in runs for run in repeats if run.decoded_tokens > 0]
    return _median([run.decode_seconds / (len(run.steps) or run.decoded_tokens) for run in flat])


def speculation_figures(runs: PromptRuns) -> dict[str, Any]:
    """What the draft tree gained and what it cost.

    `acceptance_length`: tokens per decode step. `acceptance_by_head[k]`: share of the steps with drafts of
    head k in which one was accepted. `phases`: seconds per step, `other` the rest of a step's wall time.
    """
    stepped = _stepped(runs)
    steps = [step for run in stepped for step in run.steps]
    phases = {name: _median([_phase(run, name) for run in stepped]) for name in PHASES}
    other = [
        run.decode_seconds / len(run.steps) - sum(_phase(run, name) for name in PHASES) for run in stepped
    ]
    speculating = sum(step.mode is not SpeculationMode.OFF for step in steps)
    return {
        "acceptance_length": sum(r.decoded_tokens for r in stepped) / len(steps) if steps else None,
        "phases": phases | {"other": _median(other)},
        "acceptance_by_head": _acceptance_by_head(steps),
        "tree_nodes": median_low([step.tree_nodes for step in steps]) if steps else None,
        "speculating_share": speculating / len(steps) if steps else None,
    }


def identity_figures(identity: Identity) -> dict[str, Any]:
    """`first_divergence_margin`: the widest of all differing prompts; even that should be a near-tie."""
    widest = max(identity.margins, default=None)
    return {"same": identity.same, "of": identity.of, "first_divergence_margin": widest}


def ratio(figures: dict[str, Any], reference: dict[str, Any]) -> float | None:
    """Ratio of the median decode rates; None if either is unknown."""
    own, other = figures["tokens_per_second"], reference["tokens_per_second"]
    return own / other if own and other else None


def _stepped(runs: PromptRuns) -> list[Run]:
    return [run for repeats in runs for run in repeats if run.steps and run.decoded_tokens > 0]


def _phase(run: Run, name: str) -> float:
    return fmean(getattr(step, f"{name}_seconds") for step in run.steps)


def _acceptance_by_head(steps: Sequence[StepStats]) -> list[float]:
    shares: list[float] = []
    for head in range(max((len(step.drafted) for step in steps), default=0)):
        tried = [s for s in steps if len(s.drafted) > head and s.drafted[head] > 0]
        hits = sum(step.accepted[head] for step in tried)
        shares.append(hits / len(tried) if tried else 0.0)
    return shares


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def make_table(report: dict[str, Any]) -> Table:
    """The report as a table for the terminal."""
    columns = [("baseline", report["baseline"]), ("medusa", report["medusa"])]
    if report["hf_generate"] is not None:
        columns.append(("hf generate", report["hf_generate"]))
    table = Table(title=_title(report), caption=_caption(report), caption_justify="left")
    table.add_column()
    for name, _ in columns:
        table.add_column(name, justify="right")
    for label, key, scale, places in (
        ("decode tokens/s", "tokens_per_second", 1.0, 1),
        ("decode tokens/s, all prompts together", "overall_tokens_per_second", 1.0, 1),
        ("step, ms", "step_seconds", 1e3, 2),
        ("tokens per step", "acceptance_length", 1.0, 2),
        ("tree nodes", "tree_nodes", 1.0, 0),
        ("prefill, ms", "prefill_seconds", 1e3, 1),
        ("prefill tokens/s", "prefill_tokens_per_second", 1.0, 0),
    ):
        table.add_row(label, *(_number(figures.get(key), scale, places) for _, figures in columns))
    for name, seconds in report["medusa"]["phases"].items():
        row = ["", _number(seconds, 1e3, 2)] + [""] * (len(columns) - 2)
        table.add_row(f"  {name}, ms a step", *row)
    return table


def _number(value: float | None, scale: float, places: int) -> str:
    return "" if value is None else f"{value * scale:,.{places}f}"


def _title(report: dict[str, Any]) -> str:
    config = report["config"]
    return (
        f"{config['model']} · {config['dtype']} · {config['device']} · temperature {config['temperature']:g}"
    )


def _caption(report: dict[str, Any]) -> str:
    speedup = report["speedup"]
    lines = [f"speedup over the baseline: {speedup:.2f}x" if speedup else "nothing was decoded"]
    heads = ", ".join(f"{share:.2f}" for share in report["medusa"]["acceptance_by_head"])
    lines.append(f"acceptance by head: {heads or 'no drafts'}")
    lines.append("same tokens as the baseline: " + _identity_line(report["identical"]))
    if report["hf_generate"] is not None and report["hf_generate"]["identical"] is not None:
        lines.append("hf generate, same tokens: " + _identity_line(report["hf_generate"]["identical"]))
    return "\n".join(lines)


def _identity_line(identical: dict[str, Any]) -> str:
    line = f"{identical['same']} of {identical['of']}"
    margin = identical["first_divergence_margin"]
    return line if margin is None else f"{line}, widest margin where they part {margin:.3g}"
