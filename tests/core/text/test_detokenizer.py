"""Incremental detokenization and stop strings against plain whole-text references."""

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from medusa_core.text.detokenizer import REPLACEMENT, IncrementalDetokenizer, StopMatcher
from medusa_core.text.tokenizer import load_chat_tokenizer

EMOJI = "\U0001f600"
texts = st.text(st.one_of(st.sampled_from(f"ab é你{EMOJI}  \n"), st.characters(codec="utf-8")), max_size=40)


def chunked(items, cuts):
    """`items` cut at the positions `cuts`."""
    edges = [0, *sorted(min(cut, len(items)) for cut in cuts), len(items)]
    return [items[a:b] for a, b in itertools.pairwise(edges)]


def detokenize(tokenizer, chunks):
    detokenizer = IncrementalDetokenizer(tokenizer)
    return [*(detokenizer.push(chunk) for chunk in chunks), detokenizer.flush()]


@pytest.fixture(scope="module")
def sentencepiece_tokenizer(vicuna_layout_dir: Path) -> PreTrainedTokenizerFast:
    return load_chat_tokenizer(vicuna_layout_dir).tokenizer


cut_lists = st.lists(st.integers(0, 120), max_size=30)


@given(ids=st.lists(st.integers(0, 319), max_size=60), cuts=cut_lists)
def test_byte_level_pieces_make_the_whole_for_any_ids(dialogue_tokenizer, ids, cuts):
    pieces = detokenize(dialogue_tokenizer, chunked(ids, cuts))
    assert "".join(pieces) == dialogue_tokenizer.decode(ids, skip_special_tokens=True)


@given(text=texts, cuts=cut_lists, cut_off=st.integers(0, 6))
def test_byte_level_emits_no_broken_character_before_the_flush(dialogue_tokenizer, text, cuts, cut_off):
    ids = dialogue_tokenizer.encode(text.replace(REPLACEMENT, ""))
    pieces = detokenize(dialogue_tokenizer, chunked(ids[: len(ids) - cut_off], cuts))
    assert not any(REPLACEMENT in piece for piece in pieces[:-1])


@given(text=texts, cuts=cut_lists, special_at=st.integers(0, 40))
def test_sentencepiece_pieces_make_the_whole(sentencepiece_tokenizer, text, cuts, special_at):
    ids = sentencepiece_tokenizer.encode(text)
    ids = [*ids[:special_at], 2, 1, *ids[special_at:]]
    pieces = detokenize(sentencepiece_tokenizer, chunked(ids, cuts))
    assert "".join(pieces) == sentencepiece_tokenizer.decode(ids, skip_special_tokens=True)


def test_sentencepiece_keeps_the_space_after_a_skipped_token(sentencepiece_tokenizer):
    hello, world = (sentencepiece_tokenizer.encode(w, add_special_tokens=False) for w in ("help", "town"))
    assert "".join(detokenize(sentencepiece_tokenizer, [hello, [2], world])) == "help town"


def test_broken_byte_fallback_run_keeps_what_was_returned(sentencepiece_tokenizer):
    byte = {
        value: sentencepiece_tokenizer.convert_tokens_to_ids(f"<0x{value:02X}>") for value in (0xC3, 0xA9)
    }
    letter = sentencepiece_tokenizer.convert_tokens_to_ids("a")
    pieces = detokenize(sentencepiece_tokenizer, [[byte[0xC3], byte[0xA9]], [byte[0xC3]], [letter]])
    assert pieces == ["é", "", f"{REPLACEMENT}a", ""]


def test_a_character_arrives_with_its_last_byte(dialogue_tokenizer):
    ids = dialogue_tokenizer.encode(EMOJI)
    assert len(ids) == 4
    assert detokenize(dialogue_tokenizer, [[i] for i in ids]) == ["", "", "", EMOJI, ""]


def test_finished_text_is_not_held_for_an_unfinished_character(dialogue_tokenizer):
    ids = dialogue_tokenizer.encode(f"ab{EMOJI}")
    assert detokenize(dialogue_tokenizer, [ids[:-1]]) == ["ab", REPLACEMENT]


def test_endless_broken_bytes_are_let_go_and_the_window_stays_small(dialogue_tokenizer):
    broken = dialogue_tokenizer.encode(EMOJI)[1]  # a continuation byte: never the start of anything
    detokenizer = IncrementalDetokenizer(dialogue_tokenizer)
    emitted = "".join(detokenizer.push([broken]) for _ in range(200))
    assert len(emitted) >= 190
    assert len(detokenizer._window) < 10
    assert emitted + detokenizer.flush() == REPLACEMENT * 200


def test_ids_outside_the_vocabulary_have_no_text(dialogue_tokenizer):
    assert "".join(detokenize(dialogue_tokenizer, [[5000], dialogue_tokenizer.encode("ok"), [320]])) == "ok"


def naive_stop(text, stops):
    """Read character by character; over as soon as the text so far ends with a stop string."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)], True
    return text, False


@given(
    text=st.text("abc", max_size=30),
    stops=st.lists(st.text("abc", min_size=1, max_size=5), max_size=4),
    cuts=st.lists(st.integers(0, 30), max_size=12),
)
def test_stop_matcher_equals_reading_character_by_character(text, stops, cuts):
    matcher = StopMatcher(stops)
    pieces = [matcher.push(chunk) for chunk in chunked(text, cuts)]
    expected, hit = naive_stop(text, stops)
    assert matcher.is_hit == hit
    assert "".join(pieces) + matcher.flush() == expected


@given(text=st.text("abc", max_size=20), stops=st.lists(st.text("abc", min_size=1, max_size=5), max_size=4))
def test_only_a_possible_beginning_is_held_back(text, stops):
    matcher = StopMatcher(stops)
    emitted = ""
    for character in text:
        emitted += matcher.push(character)
        if matcher.is_hit:
            return
    held = matcher.flush()
    assert emitted + held == text
    assert not held or any(stop.startswith(held) and stop != held for stop in stops)


def test_nothing_follows_a_hit():
    matcher = StopMatcher(["END"])
    assert (matcher.push("an answer E"), matcher.is_hit) == ("an answer ", False)
    assert (matcher.push("ND and more"), matcher.is_hit) == ("", True)
    assert (matcher.push("more"), matcher.is_hit) == ("", True)
    assert matcher.flush() == ""
