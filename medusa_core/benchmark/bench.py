"""`medusa bench`: runs an engine with and without speculation on prompts and reports figures."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from medusa_core.benchmark import report
from medusa_core.benchmark.compare import Variant, compare_tokens, interleave
from medusa_core.benchmark.runs import engine_runner, hf_runner
from medusa_core.benchmark.settings import BenchSettings
from medusa_core.engine.engine import Engine
from medusa_core.errors import ConfigError, DataError, TokenizerError
from medusa_core.machine import machine_facts
from medusa_core.sampling_params import SpeculationParams
from medusa_core.text.prompts import Prompt


def run_bench(
    engine: Engine,
    prompts: Sequence[Prompt],
    settings: BenchSettings,
    *,
    warn: Callable[[str], None],
    on_prompt: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """The report that `medusa bench --json` writes.

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
    figures: dict[str, dict[str, Any]] = {
        name: report.rates(own, lengths) | {"step_seconds": report.step_seconds(own)}
        for name, own in runs.items()
    }

    def identical(name: str) -> dict[str, Any]:
        identity = compare_tokens(runs["baseline"], runs[name], prompt_ids, params, engine.backbone)
        return report.identity_figures(identity)

    hf = figures.get("hf_generate")
    if hf is not None:  # sampled, each draws from a generator of its own
        hf["identical"] = identical("hf_generate") if params.is_greedy else None
    return {
        "baseline": figures["baseline"],
        "medusa": figures["medusa"] | report.speculation_figures(runs["medusa"]),
        "hf_generate": hf,
        "speedup": report.ratio(figures["medusa"], figures["baseline"]),
        "identical": identical("medusa"),
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
    """The measured engine, for reports."""
    names = ("model", "heads", "num_heads", "parameters", "dtype", "device")
    return {name: getattr(engine.info, name) for name in names}
