"""The library's answers: whole, as a stream, several at once; their counts and their seeds."""

import pytest

from medusa_core import Engine, FinishReason, RequestError, SamplingParams
from medusa_core.draft.heads import DraftHeads
from tests.core.conftest import BuildEngine, add, decode, speculate

GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
MESSAGES = [{"role": "user", "content": "Hello"}]


@pytest.fixture
def engine(build_engine: BuildEngine, trained_heads: DraftHeads) -> Engine:
    return build_engine(trained_heads, slots=2)


def test_chat_and_stream_are_the_same_answer(engine: Engine) -> None:
    answer = engine.chat(MESSAGES, GREEDY)
    ids = engine.chat_tokenizer.render(MESSAGES)
    assert list(answer.token_ids) == decode(engine, ids, GREEDY).token_ids
    assert answer.text == engine.chat_tokenizer.decode(answer.token_ids)
    assert answer.finish_reason is FinishReason.LENGTH
    assert answer.stats.prompt_tokens == len(ids)
    assert answer.stats.tokens == 24
    stream = engine.stream(MESSAGES, GREEDY)
    with pytest.raises(RequestError, match="read the stream to its end"):
        _ = stream.answer
    pieces = list(stream)
    assert "".join(pieces) == answer.text
    assert len(pieces) > 1
    assert stream.answer.token_ids == answer.token_ids


def test_acceptance_length_counts_what_the_reader_gets(engine: Engine, tiny_prompts: list[list[int]]) -> None:
    """The first token is prefill's; 23 are the decode steps'. The heads know this answer."""
    stats = engine.stream(tiny_prompts[0], GREEDY).read().stats
    assert stats.tokens_per_step > 1.5
    assert (stats.tokens, stats.decode_tokens) == (24, 23)
    assert stats.tokens_per_step == 23 / stats.decode_steps
    # At most one token of a step, prefill's included, is the model's own; the last step was cut short.
    assert stats.origins.total() == 24
    assert stats.decode_steps <= stats.origins["model"] <= stats.decode_steps + 1
    assert set(stats.origins) == {"model", "heads"}
    off = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, speculation=speculate("off"))
    plain = engine.chat(MESSAGES, off).stats
    assert (plain.tokens_per_step, plain.decode_steps) == (1.0, 23)


def test_tokens_behind_a_stop_are_no_part_of_it(engine: Engine) -> None:
    whole = engine.chat(MESSAGES, GREEDY)
    place = whole.text.index(whole.text[len(whole.text) // 2 :][:3])
    stop = whole.text[place : place + 3]
    cut = engine.chat(MESSAGES, SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, stop=(stop,)))
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason is FinishReason.STOP
    assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]
    assert cut.stats.tokens == len(cut.token_ids) < 24
    assert cut.stats.decode_tokens == len(cut.token_ids) - 1
    assert engine.num_free_slots == 2


def test_a_closed_stream_frees_its_slot(engine: Engine) -> None:
    with engine.stream(MESSAGES, GREEDY) as stream:
        next(stream)
        assert engine.num_free_slots == 1
    assert (engine.num_free_slots, engine.has_work) == (2, False)
    assert next(stream, None) is None


def test_a_list_of_prompts(engine: Engine, tiny_prompts: list[list[int]]) -> None:
    """More than there are slots; in order, each as alone."""
    answers = engine.generate(tiny_prompts[:5], GREEDY)
    expected = [decode(engine, prompt, GREEDY).token_ids for prompt in tiny_prompts[:5]]
    assert [list(answer.token_ids) for answer in answers] == expected
    assert engine.generate([]) == []
    with pytest.raises(RequestError, match="a list of prompts"):
        engine.generate("Hello")
    with pytest.raises(RequestError, match="the prompt is empty"):
        engine.generate([[5, 6], []], GREEDY)
    assert (engine.num_free_slots, engine.has_work) == (2, False)


def test_seeds(engine: Engine) -> None:
    """None is a fresh one, told with the answer, and repeats it."""
    sampled = SamplingParams(temperature=1.0, max_tokens=16, ignore_eos=True)
    first, second = engine.chat(MESSAGES, sampled), engine.chat(MESSAGES, sampled)
    assert first.seed != second.seed
    again = engine.chat(
        MESSAGES, SamplingParams(temperature=1.0, max_tokens=16, ignore_eos=True, seed=first.seed)
    )
    assert again.token_ids == first.token_ids


def test_a_busy_engine_is_not_for_them(engine: Engine) -> None:
    add(engine, "running", [5, 6], GREEDY)
    for ask in (lambda: engine.chat(MESSAGES, GREEDY), lambda: engine.generate([[5]], GREEDY)):
        with pytest.raises(RequestError, match="an idle engine"):
            ask()
