"""Speculation never changes an answer: float32, token for token ("lossless by construction")."""

import functools
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from medusa_core.draft.heads import DraftHeads
from medusa_core.draft.tree import Tree, make_tree
from medusa_core.engine.outputs import FinishReason
from medusa_core.model.backbone import Backbone
from medusa_core.sampling_params import SamplingParams
from tests.core.conftest import BuildEngine, Decoded, add, decode, heads_of_kind, randomize, speculate

Plain = Callable[[list[int], SamplingParams], Decoded]
TREES = ("dynamic", "static", "mc_sim_7b_63")
SAMPLING = (
    {"temperature": 0.8, "top_p": 0.95},
    {"temperature": 1.0},
    {"temperature": 1.0, "top_k": 20, "min_p": 0.02},
)


def random_tree(seed: int, nodes: int, depth: int) -> Tree:
    rng = random.Random(seed)
    paths: set[tuple[int, ...]] = {()}
    while len(paths) < nodes:
        parent = rng.choice(sorted(paths))
        if len(parent) < depth:
            paths.add((*parent, rng.randrange(6)))
    return make_tree(f"random-{seed}", paths - {()})


KINDS = ("medusa", "hydra", "hydra++")


@pytest.fixture(params=KINDS)
def trained_heads(request: pytest.FixtureRequest, heads_that_know: Callable[[str], DraftHeads]) -> DraftHeads:
    return heads_that_know(request.param)


@pytest.fixture(params=[(kind, state) for kind in KINDS for state in ("random", "trained")])
def heads(
    request: pytest.FixtureRequest,
    tiny_backbone: Backbone,
    heads_that_know: Callable[[str], DraftHeads],
) -> DraftHeads:
    kind, state = request.param
    return heads_that_know(kind) if state == "trained" else randomize(heads_of_kind(kind, tiny_backbone))


PLAIN = speculate("off")


def in_parts(few: int, all_of_them: int) -> list[object]:
    """The first few prompts for every run of the tests, the rest for whole ones."""
    return [slice(0, few), pytest.param(slice(few, all_of_them), marks=pytest.mark.slow)]


@pytest.fixture(scope="session")
def reference(tiny_backbone: Backbone) -> Callable[[tuple[int, ...]], list[int]]:
    """What transformers itself generates greedily."""

    @functools.cache
    def generate(prompt: tuple[int, ...]) -> list[int]:
        ids = torch.tensor([prompt])
        tokens: list[int] = tiny_backbone.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=24,
            temperature=None,
            top_p=None,
        )[0, len(prompt) :].tolist()
        return tokens

    return generate


@pytest.mark.parametrize("part", in_parts(60, 200), ids=str)
def test_greedy_equals_baseline_and_transformers(
    build_engine: BuildEngine,
    tiny_prompts: list[list[int]],
    trained_heads: DraftHeads,
    plain: Plain,
    reference: Callable[[tuple[int, ...]], list[int]],
    part: slice,
) -> None:
    engine = build_engine(trained_heads)
    longest = 0
    for number, prompt in enumerate(tiny_prompts[part]):
        params = SamplingParams(temperature=0.0, max_tokens=24, speculation=PLAIN)
        baseline = plain(prompt, params)
        tree = speculate(tree=TREES[number % len(TREES)])
        medusa = decode(engine, prompt, replace(params, speculation=tree))
        expected = list(reference(tuple(prompt)))
        if expected[-1] in engine.chat_tokenizer.eos_token_ids:
            expected.pop()
        assert medusa.token_ids == baseline.token_ids == expected
        assert (medusa.finish_reason, medusa.stop_token_id) == (
            baseline.finish_reason,
            baseline.stop_token_id,
        )
        longest = max(longest, *(len(run) for run in medusa.runs))
    assert longest == 5  # the heads do get whole paths accepted: the test exercises commits


def test_heads_that_are_turned_off_change_nothing(
    build_engine: BuildEngine, tiny_prompts: list[list[int]], trained_heads: DraftHeads, plain: Plain
) -> None:
    engine = build_engine(trained_heads)
    for seed, prompt in enumerate(tiny_prompts[:20]):
        params = SamplingParams(temperature=0.5 * (seed % 3), seed=seed, max_tokens=24, speculation=PLAIN)
        assert decode(engine, prompt, params) == plain(prompt, params)


@pytest.mark.parametrize("part", in_parts(6, 20), ids=str)
@pytest.mark.parametrize("sampling", SAMPLING, ids=str)
@pytest.mark.parametrize("tree", TREES)
def test_sampled_equals_baseline_of_the_same_seed(
    build_engine: BuildEngine,
    tiny_prompts: list[list[int]],
    heads: DraftHeads,
    plain: Plain,
    tree: str,
    sampling: dict,
    part: slice,
) -> None:
    engine = build_engine(heads)
    texts = set()
    for seed in range(20)[part]:
        prompt = tiny_prompts[seed]
        params = SamplingParams(max_tokens=24, seed=seed * 2**50, speculation=PLAIN, **sampling)
        baseline = plain(prompt, params)
        medusa = decode(engine, prompt, replace(params, speculation=speculate(tree=tree)))
        assert medusa.token_ids == baseline.token_ids
        assert medusa.finish_reason == baseline.finish_reason
        texts.add(tuple(medusa.token_ids))
    assert len(texts) == len(range(20)[part])


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 6))])
def test_random_trees(
    build_engine: BuildEngine,
    tiny_prompts: list[list[int]],
    heads: DraftHeads,
    plain: Plain,
    seed: int,
    tmp_path: Path,
) -> None:
    tree = random_tree(seed, nodes=4 + 5 * seed, depth=4)
    file = tmp_path / "tree.json"
    file.write_text(str([list(path) for path in tree.paths]))
    engine = build_engine(heads, static_tree=str(file))
    for number, prompt in enumerate(tiny_prompts[100:108]):
        for sampling in ({"temperature": 0.0}, {"temperature": 0.9, "seed": number}):
            params = SamplingParams(max_tokens=20, speculation=PLAIN, **sampling)
            medusa = decode(engine, prompt, replace(params, speculation=speculate(tree="static")))
            assert medusa.token_ids == plain(prompt, params).token_ids


@pytest.mark.slow
def test_token_zero_among_the_predicted(build_engine: BuildEngine, trained_heads: DraftHeads) -> None:
    """The reference pads short paths with token 0 and accepts the padding."""
    engine = build_engine(trained_heads, tree_nodes=12)
    model = engine.backbone.model
    weight = model.lm_head.weight
    saved = weight.detach().clone()
    # The likeliest token of this model's answers trades rows with token 0: it is now predicted all the time.
    prompt = [17, 230, 99, 45]
    params = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True, speculation=speculate("off"))
    tokens = decode(engine, prompt, params).token_ids
    common = max(set(tokens), key=tokens.count)
    swap = torch.arange(weight.shape[0])
    swap[0], swap[common] = common, 0
    try:
        with torch.no_grad():
            weight.copy_(saved[swap])
        seen = 0
        for seed in range(12):
            for tree in TREES:
                sampling = {"temperature": 0.0 if seed == 0 else 0.7, "seed": seed, "max_tokens": 40}
                off = SamplingParams(**sampling, ignore_eos=True, speculation=speculate("off"))
                on = SamplingParams(**sampling, ignore_eos=True, speculation=speculate(tree=tree))
                baseline = decode(engine, prompt, off).token_ids
                assert decode(engine, prompt, on).token_ids == baseline
                seen += baseline.count(0)
        assert seen > 0
    finally:
        with torch.no_grad():
            weight.copy_(saved)


def test_max_tokens_at_every_offset_of_a_run(
    build_engine: BuildEngine, tiny_prompts: list[list[int]], trained_heads: DraftHeads
) -> None:
    engine = build_engine(trained_heads)
    prompt = tiny_prompts[3]
    whole = decode(engine, prompt, SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True))
    assert max(len(run) for run in whole.runs) >= 4
    for budget in range(1, 31):
        params = SamplingParams(temperature=0.0, max_tokens=budget, ignore_eos=True)
        cut = decode(engine, prompt, params)
        assert cut.token_ids == whole.token_ids[:budget]
        assert cut.finish_reason is FinishReason.LENGTH


def test_stop_token_at_every_offset_of_a_run(
    build_engine: BuildEngine, tiny_prompts: list[list[int]], trained_heads: DraftHeads
) -> None:
    engine = build_engine(trained_heads)
    prompt = tiny_prompts[5]
    whole = decode(engine, prompt, SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True))
    inside_a_run = 0
    for stop in set(whole.token_ids):
        params = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True, stop_token_ids=(stop,))
        cut = decode(engine, prompt, params)
        assert cut.token_ids == whole.token_ids[: whole.token_ids.index(stop)]
        assert (cut.finish_reason, cut.stop_token_id) == (FinishReason.STOP, stop)
        inside_a_run += len(cut.runs[-1]) > 0
    assert inside_a_run > 0


@pytest.mark.slow
def test_eos_inside_an_accepted_run(
    build_engine: BuildEngine, tiny_prompts: list[list[int]], trained_heads: DraftHeads
) -> None:
    """Token 4 ends the answer although the tree accepted tokens behind it."""
    engine = build_engine(trained_heads)
    ended = 0
    for seed, prompt in enumerate(tiny_prompts[:40]):
        params = {"temperature": 1.3, "seed": seed, "max_tokens": 60}
        free = decode(engine, prompt, SamplingParams(**params, ignore_eos=True))
        held = decode(engine, prompt, SamplingParams(**params))
        stops = [i for i, token in enumerate(free.token_ids) if token in (0, 4)]
        expected = free.token_ids[: stops[0]] if stops else free.token_ids
        assert held.token_ids == expected
        ended += held.finish_reason is FinishReason.STOP
    assert ended > 0


@pytest.mark.parametrize("prompt_length", [50, 58, 60, 61, 62, 63])
def test_context_end(build_engine: BuildEngine, trained_heads: DraftHeads, prompt_length: int) -> None:
    engine = build_engine(trained_heads, max_length=64)
    prompt = [5 + 7 * i % 300 for i in range(prompt_length)]
    for tree in TREES:
        off = SamplingParams(temperature=0.0, ignore_eos=True, speculation=speculate("off"))
        on = SamplingParams(temperature=0.0, ignore_eos=True, speculation=speculate(tree=tree))
        baseline, medusa = decode(engine, prompt, off), decode(engine, prompt, on)
        assert medusa.token_ids == baseline.token_ids
        assert len(medusa.token_ids) == 64 - prompt_length
        assert medusa.finish_reason is FinishReason.LENGTH


def test_output_does_not_depend_on_slots_or_company(
    build_engine: BuildEngine, tiny_prompts: list[list[int]], trained_heads: DraftHeads
) -> None:
    alone = build_engine(trained_heads)
    together = build_engine(trained_heads, slots=4, prefill_chunk=5)
    params = [SamplingParams(temperature=0.9 * (i % 2), seed=i, max_tokens=20) for i in range(12)]
    expected = {str(i): decode(alone, tiny_prompts[i], p).token_ids for i, p in enumerate(params)}
    waiting = [(str(i), tiny_prompts[i], p) for i, p in enumerate(params)]
    got: dict[str, list[int]] = {}
    while waiting or together.has_work:
        while waiting and together.num_free_slots:
            add(together, *waiting.pop())
        for output in together.step():
            got.setdefault(output.request_id, []).extend(output.token_ids)
    assert got == expected


def test_coupling_changes_only_the_hit_rate(
    build_engine: BuildEngine,
    tiny_prompts: list[list[int]],
    trained_heads: DraftHeads,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = build_engine(trained_heads)
    params = SamplingParams(temperature=1.0, seed=11, max_tokens=40, ignore_eos=True)
    coupled = [decode(engine, p, params).token_ids for p in tiny_prompts[:5]]
    monkeypatch.setattr("medusa_core.draft.coupling.NOISE_WEIGHT", 0.0)
    assert [decode(engine, p, params).token_ids for p in tiny_prompts[:5]] == coupled
