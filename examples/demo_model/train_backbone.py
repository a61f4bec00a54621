"""Train the demo backbone: a small Llama, Muon for the matrices and AdamW for the rest.

Resumable: the newest checkpoint in `--out` is continued. The learning rate is constant, then falls
linearly over the last 30 % of `--steps`, so a run can be cut short by resuming it with fewer steps.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

USER_WEIGHT = 0.3  # a user's tokens teach language, but the product is the assistant's


def encode_dialogue(
    messages: list[dict], tokenizer: PreTrainedTokenizerFast
) -> tuple[list[int], list[float]]:
    """Token ids and loss weights of one dialogue in the chat template's format."""
    ids: list[int] = []
    weights: list[float] = []
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    for message in messages:
        role = tokenizer.convert_tokens_to_ids(f"<|{message['role']}|>")
        body = [*tokenizer.encode(message["content"].strip(), add_special_tokens=False), end]
        weight = 1.0 if message["role"] == "assistant" else USER_WEIGHT
        ids += [role, *body]
        weights += [0.0, *[weight] * len(body)]
    return ids, weights


def load_tokens(path: Path, tokenizer: PreTrainedTokenizerFast) -> list[tuple[list[int], list[float]]]:
    with path.open(encoding="utf-8") as file:
        return [encode_dialogue(json.loads(line)["messages"], tokenizer) for line in file]


def pack(dialogues: list, length: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """First-fit whole dialogues into rows of `length`: every row starts where a dialogue starts.

    Returns token ids [N, length] and weights [N, length] (0 where padded).
    """
    order = torch.randperm(len(dialogues), generator=torch.Generator().manual_seed(seed)).tolist()
    open_rows: list[tuple[list[int], list[float]]] = []
    done: list[tuple[list[int], list[float]]] = []
    for index in order:
        ids, weights = dialogues[index]
        ids, weights = ids[:length], weights[:length]
        row = next((r for r in open_rows if len(r[0]) + len(ids) <= length), None)
        if row is None:
            row = ([], [])
            open_rows.append(row)
        row[0].extend(ids)
        row[1].extend(weights)
        if len(open_rows) > 64 or len(row[0]) > length - 16:
            fullest = max(open_rows, key=lambda r: len(r[0]))
            open_rows.remove(fullest)
            done.append(fullest)
    done += open_rows
    tokens = torch.zeros(len(done), length, dtype=torch.int16)
    weights_out = torch.zeros(len(done), length)
    for i, (ids, weights) in enumerate(done):
        tokens[i, : len(ids)] = torch.tensor(ids, dtype=torch.int16)
        weights_out[i, : len(ids)] = torch.tensor(weights)
    shuffle = torch.randperm(len(done), generator=torch.Generator().manual_seed(seed))
    return tokens[shuffle], weights_out[shuffle]


def build_model(vocab_size: int, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=4,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def build_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    muon = torch.optim.Muon(matrices, lr=5e-3, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    return [muon, adamw]


def learning_rate_factor(step: int, steps: int) -> float:
    warmup, decay_from = 100, int(steps * 0.7)
    if step < warmup:
        return (step + 1) / warmup
    return min(1.0, (steps - step) / max(1, steps - decay_from))


def weighted_loss(model: LlamaForCausalLM, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of ids [B, S] weighted by weights [B, S]."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=ids, use_cache=False).logits
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    )
    return (losses * weights[:, 1:].flatten()).sum() / weights[:, 1:].sum()


@torch.inference_mode()
def assistant_loss(model: LlamaForCausalLM, tokens: torch.Tensor, weights: torch.Tensor) -> float:
    """Validation loss in nats per assistant token."""
    model.eval()
    total = count = 0.0
    for ids, weight in zip(tokens.long().split(8), weights.split(8), strict=True):
        mask = (weight == 1.0).float()
        n = mask[:, 1:].sum().item()
        total += weighted_loss(model, ids, mask).item() * n
        count += n
    model.train()
    return total / count


def save(out: Path, step: int, model: LlamaForCausalLM, optimizers: list) -> None:
    """Write the checkpoint beside the old one, then rename: a kill never leaves half a file."""
    state = {"step": step, "model": model.state_dict(), "optim": [o.state_dict() for o in optimizers]}
    torch.save(state, out / "checkpoint.tmp")
    (out / "checkpoint.tmp").rename(out / "checkpoint.pt")


def export(out: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write the model in bfloat16 with tokenizer and generation defaults."""
    target = out / "model"
    state = {k: v.to(torch.bfloat16) for k, v in model.state_dict().items()}
    half = LlamaForCausalLM(model.config).to(torch.bfloat16)
    half.load_state_dict(state)
    half.tie_weights()
    half.generation_config = GenerationConfig(
        do_sample=True, temperature=0.3, top_p=0.95, bos_token_id=0, eos_token_id=[4, 0], pad_token_id=0
    )
    half.save_pretrained(target)
    tokenizer.save_pretrained(target)


def rows_at(
    step: int, steps: int, batch: int, short: tuple, long: tuple
) -> tuple[torch.Tensor, torch.Tensor]:
    """Batch number `step`; the last 12 % of training uses the long rows, a quarter as many at a time."""
    (tokens, weights), size = (short, batch) if step < steps * 0.88 else (long, batch // 4)
    start = step * size % (len(tokens) - size)
    return tokens[start : start + size].long(), weights[start : start + size]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder written by prepare_data.py")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=8, help="rows of 512 tokens a step")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_flush_denormal(True)  # decayed optimizer moments of rare tokens would slow the CPU tenfold
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.data / "tokenizer")
    dialogues = load_tokens(args.data / "train.jsonl", tokenizer)
    short, long = pack(dialogues, 512, args.seed), pack(dialogues, 2048, args.seed + 1)
    heldout = pack(load_tokens(args.data / "heldout.jsonl", tokenizer), 1024, 0)
    print(
        f"{sum(len(d[0]) for d in dialogues)} tokens, {len(short[0])} rows, {len(heldout[0])} held out",
        flush=True,
    )
    model = build_model(len(tokenizer), args.seed)
    optimizers = build_optimizers(model)
    start = 0
    if (args.out / "checkpoint.pt").exists():
        state = torch.load(args.out / "checkpoint.pt", weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optim"], strict=True):
            optimizer.load_state_dict(saved)
        start = state["step"]
    base_rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in build_optimizers(model)]
    model.train()
    train_loss = torch.compile(weighted_loss)  # about 15 % faster on a CPU
    clock, running = time.monotonic(), math.nan
    for step in range(start, args.steps):
        ids, weights = rows_at(step, args.steps, args.batch, short, long)
        factor = learning_rate_factor(step, args.steps)
        for optimizer, rates in zip(optimizers, base_rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
        loss = train_loss(model, ids, weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        running = loss.item() if math.isnan(running) else 0.98 * running + 0.02 * loss.item()
        if (step + 1) % 50 == 0:
            rate = 50 * ids.numel() / (time.monotonic() - clock)
            clock = time.monotonic()
            print(f"step {step + 1} loss {running:.4f} {rate:.0f} tokens/s", flush=True)
        if (step + 1) % 500 == 0 or step + 1 == args.steps:
            save(args.out, step + 1, model, optimizers)
            print(f"held-out assistant loss {assistant_loss(model, *heldout):.4f}", flush=True)
            export(args.out, model, tokenizer)
            clock = time.monotonic()


if __name__ == "__main__":
    main()
