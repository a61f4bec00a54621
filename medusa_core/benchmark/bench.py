"""`medusa bench` as a function: prompts and an engine in, the report out."""

import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from medusa_core.benchmark import report
from medusa_core.benchmark.compare import Variant, compare_tokens, interleave
from medusa_core.benchmark.runs import engine_runner, hf_runner
from medusa_core.engine.engine import Engine
from medusa_core.errors import ConfigError, DataError, TokenizerError
from medusa_core.sampling_params import DraftSourceName, SamplingParams, SpeculationMode, SpeculationParams
from medusa_core.text.prompts import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchSettings:
    """What to measure. `seed` is the first prompt's; the others count up from it."""

    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 128
    mode: SpeculationMode = SpeculationMode.EXACT
    source: DraftSourceName = DraftSourceName.HEADS
    tree: str = "dynamic"
    seed: int = 0
    repeats: int = 1
    compare_hf: bool = False

    def __post_init__(self) -> None:
        if self.mode is SpeculationMode.OFF:
            raise ConfigError("mode must be exact or typical: the baseline without speculation always runs")
        if self.repeats < 1:
            raise ConfigError(f"repeats must be at least 1, not {self.repeats}")
        self.sampling()  # refuses what is out of range before a model is loaded

    def sampling(self) -> SamplingParams:
        """The sampling of every run, speculation aside."""
        return SamplingParams(
            max_tokens=self.max_tokens, temperature=self.temperature, top_p=self.top_p, seed=self.seed
        )


def run_bench(
    engine: Engine,
    prompts: Sequence[Prompt],
    settings: BenchSettings,
    *,
    warn: Callable[[str], None],
    on_prompt: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Measure and report, in the form `medusa bench --json` writes.

    Prompts that leave no room for `max_tokens` are skipped with a warning. Raises `DataError` if none is left
    or the chat template refuses one, `ConfigError` if the engine has no heads.
    """
    if engine.info.num_heads == 0:
        raise ConfigError("bench compares with draft heads, and this model has none: give --heads")
    params = settings.sampling()
    prompt_ids = fitting_prompts(engine, prompts, settings.max_tokens, warn)
    speculation = SpeculationParams(mode=settings.mode, source=settings.source, tree=settings.tree)
    ours = engine_runner(engine)
    variants = [Variant("baseline", ours), Variant("medusa", ours, speculation)]
    if settings.compare_hf:
        variants.append(Variant("hf_generate", hf_runner(engine)))
    runs = interleave(variants, prompt_ids, params, repeats=settings.repeats, on_prompt=on_prompt)
    lengths = [len(ids) for ids in prompt_ids]
    baseline, medusa = (report.rates(runs[name], lengths) for name in ("baseline", "medusa"))
    identity = compare_tokens(runs["baseline"], runs["medusa"], prompt_ids, params, engine.backbone)
    hf: dict[str, Any] | None = None
    if settings.compare_hf:
        hf = dict(report.rates(runs["hf_generate"], lengths))
        hf |= {"step_seconds": report.step_seconds(runs["hf_generate"]), "identical": None}
        if params.is_greedy:  # sampled, each has a generator of its own
            other = compare_tokens(runs["baseline"], runs["hf_generate"], prompt_ids, params, engine.backbone)
            hf["identical"] = report.identity_figures(other)
    return {
        "baseline": baseline | {"step_seconds": report.step_seconds(runs["baseline"])},
        "medusa": medusa
        | {"step_seconds": report.step_seconds(runs["medusa"])}
        | report.speculation_figures(runs["medusa"]),
        "hf_generate": hf,
        "speedup": report.ratio(medusa, baseline),
        "identical": report.identity_figures(identity),
        "prompts": len(prompt_ids),
        "skipped_prompts": len(prompts) - len(prompt_ids),
        "tokens": sum(len(repeats[0].token_ids) for repeats in runs["baseline"]),
        "config": asdict(settings) | engine_facts(engine) | machine_facts(),
    }


def fitting_prompts(
    engine: Engine, prompts: Sequence[Prompt], max_tokens: int, warn: Callable[[str], None]
) -> list[list[int]]:
    """Token ids of the prompts that leave room for `max_tokens` in the context."""
    context = engine.info.context_length
    fitting: list[list[int]] = []
    for prompt in prompts:
        try:
            ids = engine.chat_tokenizer.render(prompt.messages)
        except TokenizerError as error:
            raise DataError(f"{prompt.origin}: {error}") from error
        if len(ids) + max_tokens <= context:
            fitting.append(ids)
        else:
            warn(
                f"{prompt.origin}: skipped, since its {len(ids)} tokens and {max_tokens} new ones do not fit "
                f"a context of {context}"
            )
    if not fitting:
        raise DataError(f"no prompt leaves room for {max_tokens} new tokens in a context of {context}")
    return fitting


def engine_facts(engine: Engine) -> dict[str, Any]:
    """What was measured."""
    info = engine.info
    return {
        "model": info.model,
        "heads": info.heads,
        "num_heads": info.num_heads,
        "parameters": info.parameters,
        "dtype": info.dtype,
        "device": info.device,
    }


def machine_facts() -> dict[str, Any]:
    """Where it was measured."""
    return {
        "machine": _cpu_name(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def _cpu_name() -> str:
    """The processor's name as Linux tells it; the architecture elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
