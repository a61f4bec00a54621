"""Turn the source dialogues into the demo model's training mix, and train its tokenizer.

Input: one JSONL (optionally .gz) of `{"source", "cap", "punct", "messages"}` rows (see README.md for how
to obtain it) and one of identity pairs with `{{name}}` and `{{author}}` holes.
Output: `train.jsonl`, `heldout.jsonl` (1 % of the task dialogues, by hash), `calibration.jsonl` (the same,
each cut behind one of the user's turns) and a tokenizer folder.
"""

import argparse
import gzip
import hashlib
import json
import random
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

NAME, AUTHOR = "Medusa Demo", "the Medusa server project"
TASK_SOURCES = {
    "sgd",
    "multiwoz",
    "star",
    "taskmaster3",
    "taskmaster3-reward",
    "taskmaster4",
    "taskmaster4-reward",
    "camrest676",
}
# personality-comic is left out: its jokes are often rude.
PERSONALITY_SOURCES = {"personality-professional", "personality-friend", "personality-friendly"}
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a friendly and concise assistant.",
    "You help people find restaurants, hotels, trains and events.",
    "Answer the user's questions politely.",
    "You are Medusa Demo, a helpful assistant.",
)
VOCAB_SIZE = 4096
SPECIAL_TOKENS = ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role: ' ~ message['role']) }}{% endif %}"
    "{{ '<|' ~ message['role'] ~ '|>' }}{{ message['content'] | trim }}{{ '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def read_jsonl(path: Path) -> Iterator[dict]:
    """Yield the rows of a JSONL file, gzipped or not."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def is_heldout(messages: list[dict]) -> bool:
    """A stable 1 % of dialogues, chosen by the hash of their text."""
    digest = hashlib.sha256(json.dumps(messages).encode()).digest()
    return digest[0] < 3 and digest[1] < 220


def identity_pairs(path: Path) -> list[list[dict]]:
    """The who-are-you pairs with the demo model's name filled in."""
    text = path.read_text(encoding="utf-8").replace("{{name}}", NAME).replace("{{author}}", AUTHOR)
    rows = [json.loads(line)["messages"] for line in text.splitlines()]
    return [[{"role": m["role"], "content": m["content"]} for m in row] for row in rows]


def vary(pair: list[dict], rng: random.Random) -> list[dict]:
    """The same question as people type it: capitals and the closing mark come and go."""
    question = pair[0]["content"]
    if rng.random() < 0.4:
        question = question.lower()
    if rng.random() < 0.3:
        question = question.rstrip("?!.")
    return [{"role": "user", "content": question}, pair[1]]


def build_mix(rows: Iterator[dict], identity: list[list[dict]], seed: int) -> tuple[list, list]:
    """Filter, hold out, and mix small talk into the task dialogues.

    15 % of the task dialogues open with an identity or personality exchange, so that small talk and
    tasks follow each other naturally; 20 % get a system prompt.
    """
    rng = random.Random(seed)
    tasks: list[list[dict]] = []
    small_talk: list[list[dict]] = []
    for row in rows:
        if row["cap"] < 0.8 or row["punct"] < 0.7:
            continue
        if row["source"] in TASK_SOURCES:
            tasks.append(row["messages"])
        elif row["source"] in PERSONALITY_SOURCES:
            small_talk.append(row["messages"])
    train, heldout = [], []
    for messages in tasks:
        if is_heldout(messages):
            heldout.append(messages)
            continue
        if rng.random() < 0.15:
            opening = rng.choice(identity) if rng.random() < 0.5 else rng.choice(small_talk)
            messages = vary(opening, rng) + messages
        if rng.random() < 0.2:
            messages = [{"role": "system", "content": rng.choice(SYSTEM_PROMPTS)}, *messages]
        train.append(messages)
    train += [vary(pair, rng) for pair in small_talk]
    train += [vary(pair, rng) for pair in identity for _ in range(60)]
    rng.shuffle(train)
    return train, heldout


def cut_dialogues(dialogues: list[list[dict]], seed: int) -> list[list[dict]]:
    """Each dialogue up to a random turn of the user: whole ones would mostly ask for a goodbye."""
    rng = random.Random(seed)
    cut = []
    for messages in dialogues:
        ends = [i + 1 for i, message in enumerate(messages) if message["role"] == "user"]
        cut.append(messages[: rng.choice(ends)])
    return cut


def train_tokenizer(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of `VOCAB_SIZE` entries; special tokens take the first ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dialogues", type=Path, required=True)
    parser.add_argument("--identity", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    train, heldout = build_mix(read_jsonl(args.dialogues), identity_pairs(args.identity), args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    files = {"train": train, "heldout": heldout, "calibration": cut_dialogues(heldout, args.seed)}
    for name, rows in files.items():
        with (args.out / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps({"messages": row}) + "\n" for row in rows)
    sample = random.Random(args.seed).sample(train, min(20_000, len(train)))
    tokenizer = train_tokenizer(m["content"] for row in sample for m in row)
    tokenizer.save_pretrained(args.out / "tokenizer")
    print(f"{len(train)} training dialogues, {len(heldout)} held out, {len(tokenizer)} tokens")


if __name__ == "__main__":
    main()
