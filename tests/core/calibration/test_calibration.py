"""Calibration against slow references, and against what the engine then really does."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from medusa_core.calibration.calibrate import CalibrationSettings, calibrate, destination
from medusa_core.calibration.collect import Answer, Observed, answer_prompts, observe
from medusa_core.calibration.measure import (
    TAU_GRID,
    LengthMeter,
    RankCounter,
    TauFitter,
    length_meters,
)
from medusa_core.checkpoints.writing import save_heads
from medusa_core.config import EngineConfig
from medusa_core.draft.accuracy import HeadCalibration, load_calibration, save_calibration
from medusa_core.draft.coupling import NOISE_WEIGHT
from medusa_core.draft.head_drafter import make_drafter
from medusa_core.draft.heads import DraftHeads, last_of_each
from medusa_core.draft.medusa import MedusaHeads
from medusa_core.draft.tree import make_tree
from medusa_core.draft.tree_size import TREE_SIZES
from medusa_core.engine.engine import Engine
from medusa_core.engine.sampling import gumbel_noise
from medusa_core.errors import CapacityError, ConfigError, DataError
from medusa_core.model.kv_cache import CacheRows, CacheShape
from medusa_core.sampling_params import SamplingParams
from medusa_core.text.prompts import Prompt
from medusa_core.text.tokenizer import ChatTokenizer
from tests.core.conftest import BuildEngine, add, decode, speculate

CPU = torch.device("cpu")
GREEDY = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True, seed=0)
WORDS = (
    "cheap restaurant",
    "table for two",
    "Italian food",
    "thank you",
    "seven in the evening",
    "center of town",
)
PROMPTS = [Prompt(({"role": "user", "content": text},), text) for text in WORDS]


@pytest.fixture(scope="module")
def answers(trained_heads: MedusaHeads, tiny_model_dir: Path, tiny_prompts: list[list[int]]) -> list[Answer]:
    """Half of them learned by the heads, half never seen."""
    config = EngineConfig(dtype="float32", measure=False)
    engine = Engine.from_pretrained(tiny_model_dir, heads="none", config=config)
    return [
        Answer(prompt, decode(engine, prompt, GREEDY).token_ids, GREEDY) for prompt in tiny_prompts[74:86]
    ]


@pytest.fixture
def engine(build_engine: BuildEngine, trained_heads: MedusaHeads) -> Engine:
    return build_engine(trained_heads)


def test_observed_positions_are_those_of_plain_decoding(
    engine: Engine, answers: list[Answer], trained_heads: MedusaHeads
) -> None:
    """Row i: the scores a step that begins after i + 1 answer tokens sees, and the tokens it should find."""
    answer = answers[0]
    (observed,) = observe(engine, answer)
    assert observed.start == 0
    assert observed.scores_NKV.shape == (39, 4, 320)
    ids = [*answer.prompt_ids, *answer.answer_ids]
    hidden = engine.backbone.model.base_model(torch.tensor([ids])).last_hidden_state[0]
    for row in range(39):
        position = len(answer.prompt_ids) - 1 + row
        expected = trained_heads.draft_logits(hidden[position : position + 1])[0]
        torch.testing.assert_close(observed.scores_NKV[row], expected, atol=1e-4, rtol=1e-4)
        rest = answer.answer_ids[row + 1 : row + 5]
        assert observed.targets_NK[row].tolist() == [*rest, *[-1] * (4 - len(rest))]


def test_sampled_scores_carry_the_noise_of_their_positions(
    engine: Engine, tiny_prompts: list[list[int]]
) -> None:
    params = SamplingParams(temperature=0.8, seed=5, max_tokens=20, ignore_eos=True)
    prompt = tiny_prompts[3]
    tokens = decode(engine, prompt, params).token_ids
    (sampled,) = observe(engine, Answer(prompt, tokens, params))
    (plain,) = observe(engine, Answer(prompt, tokens, GREEDY))
    vocabulary = torch.arange(320)
    for row in (0, 7, 17):
        # Head k guesses the token at answer place row + 1 + k; the answer begins behind the prompt.
        noise = gumbel_noise(5, [len(prompt) + row + 1 + k for k in range(4)], vocabulary)
        expected = plain.scores_NKV[row] + NOISE_WEIGHT * 0.8 * noise
        torch.testing.assert_close(sampled.scores_NKV[row], expected)


def test_chunks_change_nothing(
    engine: Engine, answers: list[Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    (whole,) = observe(engine, answers[1])
    monkeypatch.setattr("medusa_core.calibration.collect.CHUNK_POSITIONS", 7)
    chunks = list(observe(engine, answers[1]))
    assert [chunk.start for chunk in chunks] == [0, 7, 14, 21, 28, 35]
    torch.testing.assert_close(
        torch.cat([c.scores_NKV for c in chunks]), whole.scores_NKV, atol=1e-5, rtol=1e-5
    )
    assert torch.equal(torch.cat([c.targets_NK for c in chunks]), whole.targets_NK)


class ScriptedHeads:
    """Parallel heads whose "hidden state" is what they are to say, flattened."""

    def __init__(self, num_heads: int, vocab_size: int) -> None:
        self.num_heads, self.vocab_size = num_heads, vocab_size
        self.token_map: Tensor | None = None
        self.cache_shape: CacheShape | None = None

    def read(self, hidden_BUE: Tensor, counts: Sequence[int], cache: CacheRows | None) -> Tensor:
        return last_of_each(hidden_BUE, counts)

    def contextualize(self, hidden_BSE: Tensor) -> Tensor:
        return hidden_BSE

    def draft_logits(self, hidden_BE: Tensor) -> Tensor:
        return hidden_BE.unflatten(1, (self.num_heads, self.vocab_size))


def seen(scores: Tensor, targets: Tensor) -> Observed:
    """What scripted heads with these scores would be seen to do."""
    roots = torch.zeros(len(scores), dtype=torch.long)
    return Observed(scores.flatten(1), roots, scores, targets, targets.clamp(max=scores.shape[-1]), 0)


def made_up(count: int, seed: int, heads: int = 3, vocab: int = 20) -> Observed:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(count, heads, vocab, generator=generator)
    targets = torch.randint(
        0, vocab + 3, (count, heads), generator=generator
    )  # some beyond the heads' tokens
    for late in range(heads):  # the answer's end
        targets[count - 1 - late, late + 1 :] = -1
    return seen(scores, targets)


def test_rank_counts_equal_a_slow_count() -> None:
    counter = RankCounter(3, 6)
    hits = [[0] * 6 for _ in range(3)]
    counts = [0, 0, 0]
    for seed, length in enumerate((5, 30, 400)):
        observed = made_up(length, seed)
        counter.add(observed)
        for scores, targets in zip(observed.scores_NKV.tolist(), observed.targets_NK.tolist(), strict=True):
            for head in range(3):
                if targets[head] < 0:
                    continue
                counts[head] += 1
                ranking = sorted(range(20), key=lambda token, row=scores[head]: -row[token])
                if targets[head] in ranking[:6]:
                    hits[head][ranking.index(targets[head])] += 1
    assert counter.counts_K.tolist() == counts
    assert counts[0] > counts[1] > counts[2]  # later heads see fewer positions
    expected = [[hit / counts[head] for hit in hits[head]] for head in range(3)]
    for row, wanted in zip(counter.accuracies(), expected, strict=True):
        assert row == pytest.approx(wanted, abs=1e-6)


def test_taus_have_the_least_loss_on_the_grid() -> None:
    fitter = TauFitter(3)
    losses = [[0.0] * len(TAU_GRID) for _ in range(3)]
    for seed, sharpness in enumerate((0.5, 1.0)):
        observed = made_up(300, seed)
        observed = seen(observed.scores_NKV * sharpness, observed.targets_NK)
        fitter.add(observed)
        for scores, targets in zip(observed.scores_NKV.tolist(), observed.targets_NK.tolist(), strict=True):
            for head in range(3):
                if not 0 <= targets[head] < 20:
                    continue
                for place, tau in enumerate(TAU_GRID):
                    total = sum(math.exp(score / tau) for score in scores[head])
                    losses[head][place] -= scores[head][targets[head]] / tau - math.log(total)
    best = [TAU_GRID[row.index(min(row))] for row in losses]
    assert fitter.taus() == tuple(best)


def test_taus_undo_a_wrong_confidence() -> None:
    """Targets drawn from softmax(score / 1.8): that is what comes out, for any head."""
    generator = torch.Generator().manual_seed(0)
    scores = 3 * torch.randn(6000, 2, 20, generator=generator)
    targets = torch.multinomial((scores / 1.8).softmax(dim=-1).flatten(0, 1), 1, generator=generator)
    fitter = TauFitter(2)
    fitter.add(seen(scores, targets.view(6000, 2)))
    assert fitter.taus() == pytest.approx((1.8, 1.8), rel=0.07)  # the grid's step is 12 %


def test_a_head_of_which_nothing_was_seen_keeps_its_scores() -> None:
    fitter = TauFitter(2)
    observed = made_up(50, 0, heads=2)
    fitter.add(seen(observed.scores_NKV, torch.tensor([[3, -1]]).expand(50, 2)))
    assert fitter.taus()[1] == 1.0
    assert TauFitter(2).taus() == (1.0, 1.0)


def test_lengths_are_walked_in_steps() -> None:
    """By hand: a chain of two guesses; a long run jumps over the positions behind it."""
    heads = ScriptedHeads(2, 4)
    chain = make_drafter(heads, make_tree("chain", [[0], [0, 0]]), CPU)
    scores = torch.zeros(8, 2, 4)
    scores[..., 1] = 1.0  # both heads always guess token 1
    answer = [1, 1, 2, 1, 1, 1, 2, 1, 1]
    targets = torch.tensor([[answer[i], answer[i + 1]] for i in range(8)])
    meter = LengthMeter(chain, (1.0, 1.0))
    meter.add(seen(scores, targets))
    # From 0: 1, 1 and then 2, three tokens; from 3: 1, 1 and then 1; from 6: nothing, the 2; from 7: 1, 1.
    assert (meter.steps, meter.mean) == (4, (3 + 3 + 1 + 3) / 4)
    targets[7, 1] = -1  # the last step is now cut short: not counted
    again = LengthMeter(chain, (1.0, 1.0))
    again.add(seen(scores, targets))
    assert (again.steps, again.mean) == (3, round(7 / 3, 4))


@pytest.mark.slow
@pytest.mark.parametrize("heads_kind", ["medusa", "hydra", "hydra++"])
def test_expected_lengths_are_what_the_engine_gets(
    build_engine: BuildEngine,
    heads_that_know: Callable[[str], DraftHeads],
    answers: list[Answer],
    heads_kind: str,
) -> None:
    heads = heads_that_know(heads_kind)
    engine = build_engine(heads)
    counter, fitter = RankCounter(4, 64), TauFitter(4)
    seen = [observed for answer in answers for observed in observe(engine, answer)]
    for observed in seen:
        counter.add(observed)
        fitter.add(observed)
    calibration = HeadCalibration(accuracies=counter.accuracies(), temperatures={0.0: fitter.taus()})
    meters = length_meters(heads, calibration.accuracies, fitter.taus(), [8, 24], CPU)
    for kind in meters:
        for nodes, meter in meters[kind].items():
            for observed in seen:
                meter.add(observed)
            calibrated = build_engine(heads, tree_nodes=nodes, calibration=calibration)
            tokens, steps = measured_lengths(calibrated, answers, kind)
            assert meter.steps == steps
            assert meter.mean == pytest.approx(tokens / steps, abs=1e-4)
            assert meter.mean > 1.4


def measured_lengths(engine: Engine, answers: list[Answer], kind: str) -> tuple[int, int]:
    """Tokens and steps of whole steps within the 40 tokens that were calibrated on."""
    tokens = steps = 0
    for answer in answers:
        # Beyond them, so that no step in question is cut.
        params = SamplingParams(
            temperature=0.0, max_tokens=48, ignore_eos=True, speculation=speculate(tree=kind)
        )
        decided = 1
        for run in decode(engine, answer.prompt_ids, params).runs[1:]:
            if decided + 4 <= 40:
                tokens += len(run)
                steps += 1
            decided += len(run)
    return tokens, steps


def test_answers_are_the_models_own(engine: Engine) -> None:
    params = SamplingParams(temperature=0.9, seed=40, max_tokens=12)
    messages = [prompt.messages for prompt in PROMPTS]
    answers = list(answer_prompts(engine, [*messages, [{"role": "user", "content": "x " * 600}]], params))
    assert 0 < len(answers) <= len(PROMPTS)  # the one that is too long is left out
    assert {answer.params.seed for answer in answers} <= set(range(40, 46))
    for answer in answers:
        outputs = list(engine.steps(answer.prompt_ids, answer.params))
        tokens = [token for output in outputs for token in output.token_ids]
        stop = outputs[-1].stop_token_id
        assert answer.answer_ids == tokens + ([] if stop is None else [stop])


def test_end_to_end(
    tiny_model_dir: Path, tmp_path: Path, trained_heads: MedusaHeads, tiny_prompts: list[list[int]]
) -> None:
    save_heads(trained_heads, tmp_path, base_model=str(tiny_model_dir))
    config = EngineConfig(dtype="float32", max_length=256)
    engine = Engine.from_pretrained(tiny_model_dir, heads=tmp_path, config=config)
    said: list[str] = []
    settings = CalibrationSettings(max_tokens=16, temperatures=(0.5, 1.0), seed=1)
    result = calibrate(engine, PROMPTS, settings, said.append)
    assert said[0] == "answering greedily"
    assert said[-1] == "answering at temperature 1"
    assert result.num_heads == 4
    assert result.counts[0] > result.counts[3] > 0
    assert set(result.temperatures) == {0.0, 0.5, 1.0}
    assert set(result.expected["static"]) == set(result.expected["dynamic"]) == set(TREE_SIZES)
    assert all(1.0 <= length <= 5.0 for row in result.expected.values() for length in row.values())
    assert set(result.step_seconds) == {1, *TREE_SIZES}
    assert result.tree_nodes in result.step_seconds
    save_calibration(result, destination(str(tmp_path)))
    assert load_calibration(tmp_path) == result
    again = Engine.from_pretrained(tiny_model_dir, heads=tmp_path, config=config)
    assert again.head_source is not None
    assert again.head_source.calibration == result
    prompt = tiny_prompts[3]
    on = SamplingParams(temperature=1.0, seed=3, max_tokens=16)
    off = SamplingParams(temperature=1.0, seed=3, max_tokens=16, speculation=speculate("off"))
    assert decode(again, prompt, on).token_ids == decode(again, prompt, off).token_ids


def test_answers_too_short_for_lengths_leave_them_to_be_estimated(
    build_engine: BuildEngine, trained_heads: MedusaHeads, tiny_chat: ChatTokenizer
) -> None:
    """Four tokens hold no whole step of four heads: no length is measured, and none is invented."""
    longest = max(len(tiny_chat.render(prompt.messages)) for prompt in PROMPTS)
    engine = build_engine(trained_heads, max_length=longest + 4)
    prompts = [p for p in PROMPTS if len(tiny_chat.render(p.messages)) == longest]
    result = calibrate(engine, prompts, CalibrationSettings(temperatures=()), lambda text: None)
    assert result.counts == (3, 2, 1, 0)
    assert result.temperatures[0.0][3] == 1.0
    assert result.expected == {"static": {}, "dynamic": {}}
    assert result.tree_nodes is None  # this engine measured no step times


def test_what_cannot_be_calibrated(build_engine: BuildEngine, engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no draft heads to calibrate: give --heads"):
        calibrate(build_engine(None), PROMPTS, CalibrationSettings(), lambda text: None)
    too_long = [Prompt(({"role": "user", "content": "x " * 600},), "here")]
    with pytest.raises(DataError, match="no prompt got an answer of two tokens or more"):
        calibrate(engine, too_long, CalibrationSettings(), lambda text: None)
    add(engine, "running", [5], GREEDY)
    with pytest.raises(CapacityError, match="idle engine"):
        calibrate(engine, PROMPTS, CalibrationSettings(), lambda text: None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperatures": (0.0,)}, "temperatures must be above 0 and at most 2"),
        ({"temperatures": (0.5, 2.1)}, "temperatures must be above 0"),
        ({"temperatures": (float("nan"),)}, "temperatures must be above 0"),
        ({"max_tokens": 7}, "max_tokens must be at least 8, not 7"),
    ],
)
def test_settings_out_of_range(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CalibrationSettings(**settings)


def test_where_the_file_goes(tmp_path: Path) -> None:
    file = tmp_path / "medusa_lm_head.pt"
    file.write_bytes(b"")
    assert destination(str(tmp_path)) == destination(str(file)) == tmp_path
    assert destination("org/heads", tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert (tmp_path / "a" / "b").is_dir()
    with pytest.raises(DataError, match="no draft heads"):
        destination(None, tmp_path)
    with pytest.raises(DataError, match="the heads org/heads are not local: give --out"):
        destination("org/heads")
    with pytest.raises(DataError, match="cannot make the directory .*: Not a directory"):
        destination(str(tmp_path), file / "below")
