"""*Speedup*, the home board: what speculation gains, and why."""

from boards.dashboard import Line, Row, dashboard
from boards.panels import (
    BLUE,
    GREEN,
    RED,
    SELECTED,
    YELLOW,
    Json,
    Look,
    Query,
    bars,
    colored,
    heatmap,
    rate,
    ratio,
    series,
    share,
    stat,
)

TIMES = "suffix:×"  # noqa: RUF001 - Grafana puts a space before it
SPEEDUP = Look(unit=TIMES, decimals=2, steps=((None, RED), (1, YELLOW), (1.2, GREEN)))
SPECULATING = 'mode!="off"'
PER_SERVER = f"{{{SELECTED}}}"


def board() -> Json:
    return dashboard(
        "medusa-speedup",
        "Medusa / Speedup",
        "What speculative decoding gains, and why.",
        [
            Row("", [_headline(), _figures()]),
            Row("Acceptance", [_lengths(), _heads(), _drafts()]),
            Row("Throughput and cost", [_tokens(), _phases()]),
        ],
    )


def _speedup(window: str) -> str:
    return ratio(
        rate("medusa_baseline_seconds_total", window=window),
        rate("medusa_decode_seconds_total", window=window),
    )


def _headline() -> Line:
    now = stat(
        "Estimated speedup now",
        "What the tokens of the last 5 minutes would have taken without speculation, over what they took. "
        "Step times without speculation are measured once, at start, on an idle machine.",
        [Query(expr=_speedup("5m"), instant=True)],
        SPEEDUP,
        colorMode="background",
        justifyMode="center",
    )
    over_time = series(
        "Estimated speedup over time",
        "Below the line at 1 speculation costs more than it gains. Steps without speculation count as well, "
        "at about 1: the figure is that of the whole traffic.",
        [
            Query(expr=_speedup("$__rate_interval"), legend="all selected"),
            Query(
                expr=f"instance:medusa_estimated_speedup:ratio_rate5m{PER_SERVER}",
                legend="{{instance}} (5 min)",
            ),
        ],
        Look(unit=TIMES, decimals=2, steps=((None, RED), (1, "transparent"))),
        limit=True,
    )
    return Line(9, [(7, now), (17, over_time)])


def _figures() -> Line:
    steps = "medusa_acceptance_length"
    tokens = "medusa_generation_tokens_total"
    saved = " - ".join(
        f"sum(increase(medusa_{name}_seconds_total{PER_SERVER}[$__range]))" for name in ("baseline", "decode")
    )
    length = stat(
        "Tokens per step now",
        "Mean acceptance length of the last 5 minutes; 1 is no gain.",
        [
            Query(
                expr=ratio(rate(f"{steps}_sum", window="5m"), rate(f"{steps}_count", window="5m")),
                instant=True,
            )
        ],
        Look(unit="none", decimals=2, steps=((None, RED), (1.2, YELLOW), (1.5, GREEN))),
    )
    speed = stat(
        "Tokens per second now",
        "Generated tokens of all requests together, mean of the last 5 minutes.",
        [Query(expr=f"{rate(tokens, window='5m')} > 0", instant=True)],
        Look(unit="none", decimals=1, steps=((None, BLUE),)),
    )
    time = stat(
        "Decode time saved",
        "What decoding would have taken in the range shown without speculation, minus what it took.",
        [Query(expr=saved, instant=True)],
        Look(unit="s", decimals=1, low=None, steps=((None, RED), (0, GREEN))),
    )
    total = stat(
        "Tokens generated",
        "In the range shown.",
        [Query(expr=f"sum(increase({tokens}{PER_SERVER}[$__range]))", instant=True)],
        Look(unit="short", decimals=1, steps=((None, BLUE),)),
    )
    return Line(4, [*((4, panel) for panel in (length, speed, time, total)), (8, _served())])


def _served() -> Json:
    legend = "{{model}} · {{num_heads}} heads, {{tree_nodes}} nodes · {{dtype}} on {{device}}"
    return stat(
        "Served",
        "Model, draft heads, tree, arithmetic and device of each server.",
        [Query(expr=f"medusa_model_info{PER_SERVER}", legend=legend, instant=True)],
        Look(unit="none", steps=((None, BLUE),), empty="No server"),
        textMode="name",
    )


def _lengths() -> Line:
    mean = ratio(rate("medusa_acceptance_length_sum"), rate("medusa_acceptance_length_count"))
    past_day = f"instance:medusa_acceptance_length:mean_rate1d{PER_SERVER}"
    spread = heatmap(
        "Acceptance length distribution",
        "Decode steps by the tokens they brought the client; at 1 no draft was right, or none made.",
        "medusa_acceptance_length",
        "none",
    )
    over_time = series(
        "Mean acceptance length",
        "Tokens per decode step, beside the past day's mean, from which the alert MedusaAcceptanceCollapsed "
        "judges.",
        [Query(expr=mean, legend="all selected"), Query(expr=past_day, legend="{{instance}}, past day")],
        Look(unit="none", decimals=2, low=1),
    )
    return Line(9, [(12, spread), (12, over_time)])


def _heads() -> Line:
    about = (
        "Share of speculating steps in which the draft of this head was accepted. Head 0 guesses the token "
        "after next; a head can be right only where all before it were."
    )

    def accepted(window: str) -> str:
        above = rate("medusa_accepted_tokens_total", by="head", window=window)
        below = rate("medusa_decode_steps_total", SPECULATING, window=window)
        return share(above, below)

    look = Look(unit="percentunit", decimals=1, high=1, steps=((None, RED), (0.1, YELLOW), (0.3, GREEN)))
    now = bars(
        "Acceptance by head now",
        about,
        [Query(expr=accepted("5m"), legend="head {{head}}", instant=True)],
        look,
    )
    over_time = series(
        "Acceptance by head", about, [Query(expr=accepted("$__rate_interval"), legend="head {{head}}")], look
    )
    return Line(9, [(8, now), (16, over_time)])


def _drafts() -> Line:
    tokens = "medusa_generation_tokens_total"
    drafts = series(
        "Drafted and accepted tokens",
        "A tree drafts many alternatives for a position, of which at most one can be accepted: the ratio is "
        "low by design, and what counts is the lower line.",
        [
            Query(expr=f"{rate('medusa_drafted_tokens_total')} > 0", legend="drafted"),
            Query(expr=f"{rate('medusa_accepted_tokens_total')} > 0", legend="accepted"),
        ],
        Look(unit="suffix:tok/s", decimals=1),
    )
    modes = series(
        "Share of tokens by mode",
        "The mode a step ran in: exact and typical speculate. off is also what the governor chooses where "
        "speculation does not pay, and the last step of a request.",
        [
            Query(expr=share(rate(tokens, by="mode"), rate(tokens)), legend="{{mode}}"),
        ],
        Look(unit="percentunit", decimals=1, high=1),
        stack="normal",
    )
    return Line(8, [(12, colored(drafts, {"accepted": GREEN, "drafted": BLUE})), (12, modes)])


def _tokens() -> Line:
    generated = series(
        "Generated tokens",
        "Tokens per second of all requests together, by the mode of their steps.",
        [Query(expr=f"{rate('medusa_generation_tokens_total', by='mode')} > 0", legend="{{mode}}")],
        Look(unit="suffix:tok/s", decimals=1),
        stack="normal",
    )
    prompts = series(
        "Prompt tokens and decode steps",
        "Prompt tokens processed, and decode steps, a second.",
        [
            Query(expr=f"{rate('medusa_prompt_tokens_total')} > 0", legend="prompt tokens"),
            Query(expr=f"{rate('medusa_decode_steps_total')} > 0", legend="decode steps"),
        ],
        Look(unit="cps", decimals=1),
    )
    return Line(8, [(12, generated), (12, prompts)])


def _phases() -> Line:
    mean = (
        f"{rate('medusa_step_phase_seconds_sum', by='phase')} / "
        f"({rate('medusa_step_phase_seconds_count', by='phase')} > 0)"
    )
    tail = f"histogram_quantile(0.99, {rate('medusa_step_phase_seconds_bucket', by='phase, le')}) >= 0"
    stacked = series(
        "Step time by phase, mean",
        "propose: the heads draft a tree. verify: one pass of the model. commit: keep what was accepted.",
        [Query(expr=mean, legend="{{phase}}")],
        Look(unit="s"),
        stack="normal",
    )
    slow = series(
        "Step time by phase, p99",
        "The slowest hundredth of the steps. Rising with load on the host: other work is on the device.",
        [Query(expr=tail, legend="{{phase}}")],
        Look(unit="s"),
    )
    return Line(8, [(12, stacked), (12, slow)])
