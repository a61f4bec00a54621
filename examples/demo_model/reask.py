"""Let the backbone answer the users of the training dialogues: text in which draft heads will really work.

Each dialogue's user turns are kept and asked again one by one, answered by the model at its default sampling
(multi-turn re-asking, Medusa paper §2.3.2). A dialogue ends before an answer that does not end by itself.
"""

import argparse
import json
import random
from pathlib import Path

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

Messages = list[dict[str, str]]


@torch.inference_mode()
def answer(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, chats: list[Messages], max_tokens: int
) -> list[str | None]:
    """One answer per chat; None where it had to be cut off."""
    rendered = [tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in chats]
    batch = tokenizer(rendered, return_tensors="pt", padding=True, add_special_tokens=False)
    out = model.generate(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=max_tokens
    )
    answers: list[str | None] = []
    for row in out[:, batch["input_ids"].shape[1] :].tolist():
        end = row.index(4) if 4 in row else None
        answers.append(tokenizer.decode(row[:end]).strip() if end else None)
    return answers


def reask(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    dialogues: list[Messages],
    turns: int,
    max_tokens: int,
) -> list[Messages]:
    """The dialogues with the model's own answers, at most `turns` of them."""
    done: list[Messages] = []
    open_chats = [([], [m for m in d if m["role"] != "assistant"]) for d in dialogues]
    for _ in range(turns):
        for chat, waiting in open_chats:
            while waiting and (not chat or chat[-1]["role"] != "user"):
                chat.append(waiting.pop(0))
        open_chats = [(chat, waiting) for chat, waiting in open_chats if chat[-1]["role"] == "user"]
        if not open_chats:
            break
        answers = answer(model, tokenizer, [chat for chat, _ in open_chats], max_tokens)
        going_on = []
        for (chat, waiting), text in zip(open_chats, answers, strict=True):
            if text:
                chat.append({"role": "assistant", "content": text})
                (going_on if waiting else done).append((chat, waiting) if waiting else chat)
            elif len(chat) > 2:
                done.append(chat[:-1])
        open_chats = going_on
    return [*done, *(chat for chat, _ in open_chats)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="train.jsonl of prepare_data.py")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dialogues", type=int, default=6000)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.model, padding_side="left")
    model = LlamaForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16).eval()
    with args.data.open(encoding="utf-8") as file:
        rows = [json.loads(line)["messages"] for line in file]
    chosen = random.Random(args.seed).sample(rows, min(args.dialogues, len(rows)))
    with args.out.open("w", encoding="utf-8") as file:
        for start in range(0, len(chosen), args.batch):
            batch = chosen[start : start + args.batch]
            for messages in reask(model, tokenizer, batch, args.turns, args.max_tokens):
                file.write(json.dumps({"messages": messages}) + "\n")
            file.flush()


if __name__ == "__main__":
    main()
