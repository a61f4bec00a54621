"""Draws the documentation's charts from the committed results.

python benchmarks/plot_results.py
"""

import json
from pathlib import Path
from typing import Any

from pictures.bars import Bar, Group, draw

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MEDIA = ROOT / "docs" / "media"
HEADS = {
    "medusa-1/chain": "Medusa-1, chain of first guesses",
    "medusa-1/static": "Medusa-1, static tree",
    "medusa-1/dynamic": "Medusa-1, dynamic tree",
    "medusa-2": "Medusa-2, dynamic tree",
    "hydra": "Hydra, dynamic tree",
    "hydra++": "Hydra++, dynamic tree",
}


def main() -> None:
    """Write both charts."""
    for name, picture in (("speedup", speedup_chart()), ("heads", heads_chart())):
        path = MEDIA / f"{name}.svg"
        path.write_text(picture, encoding="utf-8")
        print(path)


def speedup_chart() -> str:
    """Speed with speculation, without it, and of transformers' `generate`, for both shapes."""
    results = load("speed")
    groups = [
        speed_group("1.2 B shape: the demo model padded, same text", results["inflated_1b"]),
        speed_group("Demo model, 7 M parameters", results["demo"]),
    ]
    machine = results["machine"]
    notes = (
        f"Decoding speed against our own engine without speculation (dashed). Greedy, bfloat16, batch 1, "
        f"{machine['threads']} cores of an {machine['machine']}.",
        "Held-out dialogues, runs interleaved in one process; all answers identical. "
        "No GPU has been measured yet.",
    )
    return draw("The same answers, sooner", groups, notes, baseline=1.0)


def speed_group(heading: str, run: dict[str, Any]) -> Group:
    base = run["baseline"]["tokens_per_second"]

    def bar(label: str, key: str, css: str) -> Bar:
        rate = run[key]["tokens_per_second"]
        shown = f"{rate:.1f}" if rate < 100 else f"{rate:.0f}"
        return Bar(label, rate / base, times(rate / base), f"{shown} tokens/s", css)

    steps = run["medusa"]["acceptance_length"]
    return Group(
        heading,
        (
            bar(f"draft tree, {steps:.1f} tokens a step", "medusa", "fast"),
            bar("without speculation", "baseline", "plain"),
            bar("transformers generate", "hf_generate", "other"),
        ),
    )


def heads_chart() -> str:
    """Tokens per step by kind of heads, with the speedup at both shapes."""
    small, large = (
        {row["name"]: row for row in load(name)["rows"] if row["sampling"] == "greedy"}
        for name in ("heads", "heads_1b")
    )
    bars = [
        Bar(
            label,
            small[name]["acceptance_length"],
            f"{small[name]['acceptance_length']:.2f}",
            f"{times(small[name]['speedup'])}, {times(large[name]['speedup'])} at 1.2 B",
            "fast" if name == "hydra" else "plain",
        )
        for name, label in HEADS.items()
    ]
    notes = (
        "Greedy, trees of 16 nodes (chain: 7), six heads of each kind. Bars: tokens per step in float32.",
        "Behind them: speedup in bfloat16. Dashed: without speculation. Hydra is the demo model's default.",
    )
    return draw("Tokens per decode step", [Group("", bars)], notes, baseline=1.0)


def times(ratio: float) -> str:
    return f"{ratio:.2f}\N{MULTIPLICATION SIGN}"


def load(name: str) -> dict[str, Any]:
    results: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return results


if __name__ == "__main__":
    main()
