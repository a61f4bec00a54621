"""Rows into examples: which tokens are targets, what is skipped, what is fatal."""

import gzip
import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from medusa_core.errors import DataError
from medusa_core.text.tokenizer import ChatTokenizer, load_chat_tokenizer
from medusa_core.training.batches import Collator, ExampleDataset
from medusa_core.training.data import NO_TARGET, Example, load_examples, split_examples
from medusa_core.training.hf_trainer import LengthGroupedSampler

DIALOGUE = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi you"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "No"},
]


@pytest.fixture
def chat(tiny_model_dir: Path) -> ChatTokenizer:
    return load_chat_tokenizer(tiny_model_dir)


def write_rows(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def target_text(example: Example, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The targets, each unbroken run of them as one string."""
    runs: list[list[int]] = [[]]
    for token, is_target in zip(example.input_ids.tolist(), example.is_target.tolist(), strict=True):
        if is_target:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


def test_targets_of_a_hand_written_dialogue(tmp_path: Path, chat: ChatTokenizer) -> None:
    path = write_rows(tmp_path / "d.jsonl", {"messages": DIALOGUE})
    (example,) = load_examples([path], chat, sequence_length=512)
    tokens = chat.tokenizer.convert_ids_to_tokens(example.input_ids.tolist())
    marked = [(token, bool(mark)) for token, mark in zip(tokens, example.is_target, strict=True)]
    byte_pairs = chat.tokenizer.tokenize

    def words(text: str, mark: bool) -> list[tuple[str, bool]]:
        return [(token, mark) for token in byte_pairs(text)]

    assert marked == [
        ("<|system|>", False),
        *words("Be kind.", False),
        ("<|end|>", False),
        ("<|user|>", False),
        *words("Hello", False),
        ("<|end|>", False),
        ("<|assistant|>", False),
        *words("Hi you", True),
        ("<|end|>", True),
        ("<|user|>", False),
        *words("Bye", False),
        ("<|end|>", False),
        ("<|assistant|>", False),
        *words("No", True),
        ("<|end|>", True),
    ]


def test_template_text_after_the_end_of_turn_is_no_target(tmp_path: Path, chat: ChatTokenizer) -> None:
    """ChatML writes a line break after the end-of-turn token, which the model never has to generate."""
    chat.tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    path = write_rows(tmp_path / "d.jsonl", {"messages": DIALOGUE})
    (example,) = load_examples([path], chat, sequence_length=512)
    assert target_text(example, chat.tokenizer) == ["Hi you<|end|>", "No<|end|>"]


def test_template_without_special_tokens(tmp_path: Path, chat: ChatTokenizer) -> None:
    """Vicuna's kind of template: roles are plain text, turns merge with what stands before them."""
    chat.tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role | upper }}: {{ m.content }}"
        "{{ '<|end|>' if m.role == 'assistant' }} {% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    )
    path = write_rows(tmp_path / "d.jsonl", {"messages": DIALOGUE})
    (example,) = load_examples([path], chat, sequence_length=512)
    assert [text.strip() for text in target_text(example, chat.tokenizer)] == ["Hi you<|end|>", "No<|end|>"]


def test_template_that_rewrites_earlier_turns(tmp_path: Path, chat: ChatTokenizer) -> None:
    """Reasoning templates drop all thoughts but the last: each turn is trained as it was spoken."""
    chat.tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>"
        "{% if m.role == 'assistant' and loop.last %}[thought]{% endif %}{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    path = write_rows(tmp_path / "d.jsonl", {"messages": DIALOGUE})
    first, second = load_examples([path], chat, sequence_length=512)
    assert target_text(first, chat.tokenizer) == ["[thought]Hi you<|end|>"]
    assert target_text(second, chat.tokenizer) == ["[thought]No<|end|>"]
    assert "Hi you" in chat.tokenizer.decode(second.input_ids)


def test_sharegpt_rows_equal_chat_rows(tmp_path: Path, chat: ChatTokenizer) -> None:
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    turns = [{"from": names[m["role"]], "value": m["content"]} for m in DIALOGUE]
    path = write_rows(tmp_path / "d.jsonl", {"messages": DIALOGUE}, {"id": "x", "conversations": turns})
    first, second = load_examples([path], chat, sequence_length=512)
    assert first.input_ids.tolist() == second.input_ids.tolist()
    assert first.is_target.tolist() == second.is_target.tolist()


def test_opening_words_are_no_target(tmp_path: Path, chat: ChatTokenizer) -> None:
    opening = {"role": "assistant", "content": "Welcome"}
    path = write_rows(tmp_path / "d.jsonl", {"messages": [opening, *DIALOGUE[1:3]]})
    (example,) = load_examples([path], chat, sequence_length=512)
    assert target_text(example, chat.tokenizer) == ["Hi you<|end|>"]
    assert "Welcome" in chat.tokenizer.decode(example.input_ids)


def test_gzip_and_several_files_in_order(tmp_path: Path, chat: ChatTokenizer) -> None:
    plain = write_rows(tmp_path / "a.jsonl", {"messages": DIALOGUE})
    packed = tmp_path / "b.jsonl.gz"
    with gzip.open(packed, "wt", encoding="utf-8") as file:
        file.write(json.dumps({"messages": DIALOGUE[1:3]}) + "\n\n")
    lengths = [len(e.input_ids) for e in load_examples([plain, packed], chat, sequence_length=512)]
    assert len(lengths) == 2
    assert lengths[0] > lengths[1]


def test_long_dialogues_are_cut(tmp_path: Path, chat: ChatTokenizer) -> None:
    path = write_rows(tmp_path / "d.jsonl", {"messages": DIALOGUE})
    (whole,) = load_examples([path], chat, sequence_length=512)
    first_target = whole.is_target.tolist().index(True)
    (cut,) = load_examples([path], chat, sequence_length=first_target + 2)
    assert cut.input_ids.tolist() == whole.input_ids[: first_target + 2].tolist()
    with pytest.raises(DataError, match="no usable dialogue"):  # only the turn's first token is left: a root
        load_examples([path], chat, sequence_length=first_target + 1)


BAD_ROWS = {
    "not json": ("{", "not JSON"),
    "not an object": ("[1]", "not a JSON object"),
    "no messages": ('{"text": "a"}', "neither messages nor conversations"),
    "empty": ('{"messages": []}', "no list, or an empty one"),
    "no list": ('{"messages": "hi"}', "no list, or an empty one"),
    "message no object": ('{"messages": ["hi"]}', "message 1 lacks a string role or content"),
    "content no string": (
        '{"messages": [{"role": "user", "content": [1]}]}',
        "message 1 lacks a string role or content",
    ),
    "unknown speaker": ('{"conversations": [{"from": "bird", "value": "a"}]}', "message 1 is from 'bird'"),
    "nobody answers": (
        '{"messages": [{"role": "user", "content": "a"}]}',
        "no assistant message that answers",
    ),
    "only opening words": (
        '{"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "a"}]}',
        "no assistant message that answers",
    ),
    "refused by the template": (
        '{"messages": [{"role": "tool", "content": "a"}, {"role": "assistant", "content": "b"}]}',
        "unknown role: tool",
    ),
    "half a surrogate": (
        '{"messages": [{"role": "user", "content": "\\ud800"}, {"role": "assistant", "content": "a"}]}',
        "half a surrogate pair",
    ),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows_are_reported_by_line(
    tmp_path: Path, chat: ChatTokenizer, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    line, reason = BAD_ROWS[name]
    good = json.dumps({"messages": DIALOGUE})
    path = tmp_path / "d.jsonl"
    path.write_text(f"{good}\n{line}\n{good}\n", encoding="utf-8")
    assert len(load_examples([path], chat, sequence_length=512)) == 2
    assert f"{path}:2 skipped: " in caplog.text
    assert reason in caplog.text
    with pytest.raises(DataError, match=f"d.jsonl:2: .*{reason}"):
        load_examples([path], chat, sequence_length=512, strict=True)


def test_a_template_whose_prompt_is_not_its_rendering(tmp_path: Path, chat: ChatTokenizer) -> None:
    chat.tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>Sure: {% endif %}"
    )
    path = write_rows(tmp_path / "d.jsonl", {"messages": DIALOGUE})
    with pytest.raises(DataError, match="generation prompt is not how it renders"):
        load_examples([path], chat, sequence_length=512, strict=True)


def test_many_bad_rows_are_counted_not_listed(
    tmp_path: Path, chat: ChatTokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_rows(tmp_path / "d.jsonl", {"messages": DIALOGUE}, *[{}] * 50)
    load_examples([path], chat, sequence_length=512)
    assert len(caplog.records) == 21
    assert "50 rows skipped" in caplog.text


def test_unusable_files(tmp_path: Path, chat: ChatTokenizer) -> None:
    with pytest.raises(DataError, match="cannot read .*missing.jsonl"):
        load_examples([tmp_path / "missing.jsonl"], chat, sequence_length=512)
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="cannot read .*binary.jsonl"):
        load_examples([tmp_path / "binary.jsonl"], chat, sequence_length=512)
    (tmp_path / "no.jsonl.gz").write_bytes(b"plain text")
    with pytest.raises(DataError, match="cannot read .*no.jsonl.gz"):
        load_examples([tmp_path / "no.jsonl.gz"], chat, sequence_length=512)
    with pytest.raises(DataError, match="no usable dialogue in .*empty.jsonl"):
        load_examples([write_rows(tmp_path / "empty.jsonl")], chat, sequence_length=512)


def test_batches_are_padded_right(tmp_path: Path, chat: ChatTokenizer) -> None:
    path = write_rows(tmp_path / "d.jsonl", {"messages": DIALOGUE}, {"messages": DIALOGUE[1:3]})
    examples = load_examples([path], chat, sequence_length=512)
    dataset, collator = ExampleDataset(examples), Collator()
    batch = collator([dataset[0], dataset[1]])
    longer, shorter = (len(example.input_ids) for example in examples)
    assert batch["input_ids"].shape == batch["labels"].shape == (2, longer)
    assert batch["input_ids"][1, :shorter].tolist() == examples[1].input_ids.tolist()
    assert (batch["labels"][1, shorter:] == NO_TARGET).all()
    kept = batch["labels"] != NO_TARGET
    assert kept[0].tolist() == examples[0].is_target.tolist()
    assert (batch["labels"] == batch["input_ids"])[kept].all()
    assert collator.tokens == longer + shorter


def test_split_keeps_everything_once(tmp_path: Path, chat: ChatTokenizer) -> None:
    path = write_rows(tmp_path / "d.jsonl", *[{"messages": DIALOGUE}] * 10)
    examples = load_examples([path], chat, sequence_length=512)
    training, held_out = split_examples(examples, 0.2, seed=1)
    assert (len(training), len(held_out)) == (8, 2)
    assert {id(e) for e in training + held_out} == {id(e) for e in examples}
    again = split_examples(examples, 0.2, seed=1)
    assert [id(e) for e in again[1]] == [id(e) for e in held_out]
    assert [len(part) for part in split_examples(examples, 0.0, seed=1)] == [10, 0]
    assert [len(part) for part in split_examples(examples, 0.001, seed=1)] == [9, 1]
    assert [len(part) for part in split_examples(examples[:1], 0.5, seed=1)] == [1, 0]


def test_sampler_visits_all_and_groups_lengths() -> None:
    lengths = [1 + (i * 37) % 101 for i in range(1003)]
    sampler = LengthGroupedSampler(lengths, batch_size=8, seed=3)
    order = list(sampler)
    assert sorted(order) == list(range(1003))
    assert len(sampler) == 1003
    batches = [order[i : i + 8] for i in range(0, len(order), 8)]
    spread = max(max(lengths[i] for i in batch) - min(lengths[i] for i in batch) for batch in batches)
    assert spread <= 5
    assert [len(batch) for batch in batches[:-1]] == [8] * (len(batches) - 1)
    longest_first = [lengths[batch[0]] for batch in batches[:20]]
    assert longest_first != sorted(longest_first)


def test_sampler_order_depends_on_seed_and_epoch_alone() -> None:
    lengths = list(range(100))
    sampler = LengthGroupedSampler(lengths, batch_size=4, seed=3)
    first = list(sampler)
    assert list(LengthGroupedSampler(lengths, batch_size=4, seed=3)) == first
    assert list(LengthGroupedSampler(lengths, batch_size=4, seed=4)) != first
    sampler.set_epoch(1)
    assert list(sampler) != first
    sampler.set_epoch(0)
    assert list(sampler) == first
