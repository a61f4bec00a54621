"""Trains Medusa-2 on the demo model and compares its backbone before and after (Medusa paper §2.2.2).

    python benchmarks/medusa_2.py --data dialogues.jsonl --held-out others.jsonl --json medusa_2.json

Two runs: two-stage, with the shipped Medusa-1 heads in place of stage one's, and direct joint training, which
the recipe avoids: fresh heads, one learning rate, unweighted losses. Prints the backbone's held-out loss.
`benchmarks/heads.py --train` makes the two-stage run only.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from medusa_core.config import EMBEDDED_MODEL
from medusa_core.files import read_json
from medusa_core.machine import machine_facts
from medusa_core.model.backbone import load_backbone
from medusa_core.text.tokenizer import load_chat_tokenizer
from medusa_core.training.data import load_examples

ROOT = Path(__file__).parents[1]
RUNS = ROOT / "runs" / "heads"  # git-ignored
CACHE = RUNS / "medusa-2"
MEDUSA = Path(sys.executable).with_name("medusa")
SEED_DIALOGUES = 600
STEPS = 800
RATE = "5e-4"  # the paper's for LoRA; heads learn at four times that


def main(
    data: Annotated[list[Path] | None, typer.Option(help="Training dialogues; repeatable.")] = None,
    held_out: Annotated[Path | None, typer.Option(help="Dialogues that no training saw.")] = None,
    steps: Annotated[int, typer.Option(min=1)] = STEPS,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Train both ways on the same dialogues and compare."""
    files = data or own_dialogues()
    runs = {"two-stage": CACHE, "direct": RUNS / "medusa-2-direct"}
    figures: dict[str, Any] = {name: train(name, files, out, steps) for name, out in runs.items()}
    if held_out is not None:
        losses = {"before": held_out_loss(EMBEDDED_MODEL, held_out)}
        losses |= {name: held_out_loss(out, held_out) for name, out in runs.items()}
        figures["held_out"] = {"file": str(held_out), "nats_per_assistant_token": losses}
    figures["machine"] = machine_facts()
    print(json.dumps(figures, indent=2))
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def train_medusa_2(data: list[Path]) -> None:
    """The two-stage set, calibrated on its training dialogues, in `CACHE`; nothing if it is there already."""
    if (CACHE / "calibration.json").is_file():
        return
    files = data or own_dialogues()
    train("two-stage", files, CACHE, STEPS)
    medusa("calibrate", "--model", CACHE, "--heads", CACHE, "--prompts", files[0], "--limit", 200)


def train(joint: str, data: list[Path], out: Path, steps: int) -> dict[str, Any]:
    """Figures of one run's report; trains only if there is none yet."""
    report = out / "training.json"
    if not report.is_file():
        heads = EMBEDDED_MODEL / "medusa-1"
        num_heads = read_json(heads / "config.json")["medusa_num_heads"]
        start = ("--heads", heads) if joint == "two-stage" else ()
        files = [part for file in data for part in ("--data", file)]
        medusa(
            *("train", "--recipe", "medusa-2", "--joint", joint, "--model", EMBEDDED_MODEL, "--out", out),
            *("--num-heads", num_heads, *start, *files, "--max-steps", steps, "--learning-rate", RATE),
        )
    result = read_json(report)["report"]
    names = ("steps", "seconds", "tokens", "backbone_before", "backbone_after", "evaluation")
    return {name: result[name] for name in names}


@torch.inference_mode()
def held_out_loss(model: Path, dialogues: Path) -> float:
    """The backbone's cross-entropy in nats per assistant token, in float32."""
    chat = load_chat_tokenizer(model)
    backbone = load_backbone(model, dtype=torch.float32, device=torch.device("cpu"))
    total, count = 0.0, 0
    for example in load_examples((dialogues,), chat, sequence_length=backbone.max_positions):
        ids = example.input_ids.long()
        log_probs = backbone.model(input_ids=ids[None], use_cache=False).logits[0, :-1].log_softmax(-1)
        wanted = log_probs.gather(1, ids[1:, None])[:, 0][example.is_target[1:]]
        total -= float(wanted.sum())
        count += len(wanted)
    return total / count


def own_dialogues() -> list[Path]:
    """Dialogues of the demo model with composed users, if none are given."""
    RUNS.mkdir(parents=True, exist_ok=True)
    seeds, answered = RUNS / "seeds.jsonl", RUNS / "dialogues.jsonl"
    script = ROOT / "examples" / "own_model" / "seed_prompts.py"
    run(sys.executable, script, "--count", SEED_DIALOGUES, "--seed", 0, "--out", seeds)
    medusa("distill", "--model", EMBEDDED_MODEL, "--data", seeds, "--out", answered, "--max-tokens", 96)
    return [answered]


def medusa(*words: str | int | Path) -> None:
    """Run the command line of this environment."""
    run(MEDUSA, *words)


def run(*words: str | int | Path) -> None:
    """Run a command; its failure ends the script."""
    command = [str(word) for word in words]
    print("$", *command, flush=True)
    status = subprocess.run(command, check=False).returncode
    if status != 0:
        raise SystemExit(status)


if __name__ == "__main__":
    typer.run(main)
