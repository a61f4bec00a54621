"""The seed dialogues of examples/own_model. `make example` runs the whole of it."""

from pathlib import Path

import seed_prompts

from medusa_core.distillation.seeds import load_seeds


def test_seeds_are_dialogues_to_ask(tmp_path: Path) -> None:
    seed_prompts.write_seeds(tmp_path / "a.jsonl", 200, 0)
    seed_prompts.write_seeds(tmp_path / "b.jsonl", 200, 0)
    seed_prompts.write_seeds(tmp_path / "other.jsonl", 200, 1)
    text = (tmp_path / "a.jsonl").read_text()
    assert text == (tmp_path / "b.jsonl").read_text()
    lines, others = set(text.splitlines()), set((tmp_path / "other.jsonl").read_text().splitlines())
    assert len(lines) == 200
    assert len(lines & others) < 10  # held out in earnest
    seeds = load_seeds([tmp_path / "a.jsonl"], strict=True)
    turns = [message["content"] for d in seeds.dialogues for group in d.groups for message in group]
    assert {len(d.groups) for d in seeds.dialogues} == {2, 3}
    assert all(turn[0].isupper() and "{" not in turn for turn in turns)
    assert not [turn for turn in turns if " a a" in turn or " a e" in turn or " a o" in turn]
