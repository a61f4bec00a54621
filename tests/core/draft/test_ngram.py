"""Drafts from n-grams: votes of earlier places, what is worth drafting, and one budget with heads."""

from collections.abc import Callable

import pytest
import torch

from medusa_core.config import EngineConfig
from medusa_core.draft.draft_tree import Origin
from medusa_core.draft.heads import DraftHeads
from medusa_core.draft.ngram import LEAST_RATE, Draft, NgramSource, SequenceMemory, as_tree, grow
from medusa_core.draft.source import Committed
from medusa_core.engine.engine import Engine
from medusa_core.errors import RequestError, TreeError
from medusa_core.sampling_params import SamplingParams, SpeculationMode
from tests.core.conftest import BuildEngine, add, decode, speculate
from tests.core.draft.test_dynamic import check_topology, paths_of

NOTHING = torch.zeros(1, 1)


def tell(source: NgramSource, token_ids: list[int], root: int | None) -> None:
    source.observe(Committed(0, token_ids, root, NOTHING, [0]))


def told(prompt: list[int], root: int) -> NgramSource:
    source = NgramSource()
    source.start(0)
    tell(source, prompt, root)
    return source


def test_the_longest_match_is_found() -> None:
    memory = SequenceMemory()
    memory.extend([1, 2, 3, 9, 4, 2, 3, 8, 1, 2, 3])
    match = memory.find()
    assert match is not None
    assert (match.length, match.places, match.draft) == (3, [3], 9)  # not what the latest 2 3 was followed by
    memory.extend([7])
    assert memory.find() is None


def test_places_vote_for_paths() -> None:
    #         0  1  2  3  4  5  6  7  8  9  10 11
    tokens = [1, 2, 5, 6, 1, 2, 5, 7, 1, 2, 4, 1, 2]
    drafts = grow(tokens, [2, 6, 10], 6, 1.0)
    assert drafts[0] == Draft(5, 0, 1)  # two of three
    by_path = {}
    for index, draft in enumerate(drafts, start=1):
        by_path[index] = (*by_path.get(draft.parent, ()), draft.token)
    assert {(5,), (4,), (5, 7), (5, 6)} <= set(by_path.values())
    assert grow(tokens, [2, 6, 10], 2, 1.0) == drafts[:1]


def test_a_doubtful_match_drafts_fewer_nodes() -> None:
    tokens = list(range(10, 40)) * 2
    sizes = [len(grow(tokens, [5], 17, rate)) for rate in (0.5, 0.8, 1.0)]
    assert sizes[0] < sizes[1] < sizes[2] == 16


@pytest.mark.parametrize("nodes", [2, 5, 12])
def test_drafts_make_a_tree(nodes: int) -> None:
    tokens = [1, 2, 5, 6, 1, 2, 5, 7, 1, 2, 4, 3, 1, 2, 5, 6, 8]
    drafts = grow(tokens, [2, 6, 10, 14], nodes, 1.0)
    tree = as_tree([drafts], torch.tensor([99]))
    check_topology(tree)
    assert tree.size == len(drafts) + 1 <= nodes
    assert tree.tokens_BT[0, 0] == 99
    assert tree.origins_BT.tolist() == [[Origin.MODEL, *[Origin.NGRAM] * len(drafts)]]
    assert len({*paths_of(tree)}) == len(drafts)


def test_nothing_to_repeat_is_ordinary_decoding() -> None:
    assert told([1, 2, 3, 4], 5).drafts(0, 16) == []
    assert as_tree([[]], torch.tensor([5])).size == 1


def test_forecasts_are_judged_though_nothing_is_drafted() -> None:
    """Two tokens that were followed by something once are no reason to draft, until that proves right."""
    source = told([1, 2, 3, 4, 1], 2)
    assert source.drafts(0, 16) == []
    chance = [7, 8, 9, 10]
    for number in range(6):  # x y comes again and again, each time followed by what followed it before
        for token in (21, 22, 30 + number % 1, chance[number % 4]):
            last = source._memories[0].tokens[-1]
            tell(source, [last], token)
    tell(source, [source._memories[0].tokens[-1]], 21)
    tell(source, [21], 22)
    assert source.drafts(0, 16)[0].token == 30


def test_wrong_forecasts_end_the_drafting_and_others_learn_of_it() -> None:
    source = told([1, 2, 3, 4, 5, 1, 2, 3, 4], 5)
    assert [draft.token for draft in source.drafts(0, 4)] == [1, 2, 3]  # five agreed
    for token in range(50, 90):  # it never comes
        source.start(0)
        tell(source, [1, 2, 3, 4, 5, 1, 2, 3, 4], 5)
        tell(source, [5], token)
    source.start(0)
    tell(source, [1, 2, 3, 4, 5, 1, 2, 3, 4], 5)
    assert source.drafts(0, 16) == []
    assert LEAST_RATE > 0


def test_prompts_in_chunks_and_runs_are_one_sequence() -> None:
    source = NgramSource()
    source.start(0)
    tell(source, [1, 2], None)
    tell(source, [3, 4], 5)
    tell(source, [5, 6, 7], 8)
    tell(source, [8], 9)
    assert source._memories[0].tokens == [1, 2, 3, 4, 5, 6, 7, 8, 9]


QUOTING = [7, 8, 9, 10, 11, 12, 13, 14, 15, 16] * 4


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize(
    ("kind", "source"),
    [("none", "ngram"), *((kind, source) for kind in ("medusa", "hydra++") for source in ("ngram", "both"))],
)
def test_output_is_that_of_ordinary_decoding(
    build_engine: BuildEngine,
    heads_that_know: Callable[[str], DraftHeads],
    tiny_prompts: list[list[int]],
    kind: str,
    temperature: float,
    source: str,
) -> None:
    engine = build_engine(None if kind == "none" else heads_that_know(kind), prefill_chunk=7)
    drafted = 0
    for number, prompt in enumerate([QUOTING, *tiny_prompts[:4], tiny_prompts[3] * 3]):
        params = {"temperature": temperature, "seed": number, "max_tokens": 40, "ignore_eos": True}
        plain = SamplingParams(**params, speculation=speculate("off"))
        drafting = SamplingParams(**params, speculation=speculate(source=source))
        outputs = list(engine.steps(prompt, drafting))
        got = [token for output in outputs for token in output.token_ids]
        assert got == decode(engine, prompt, plain).token_ids
        origins = [extras.origin for output in outputs for extras in output.extras]
        assert len(origins) == len(got)
        assert origins[0] == "model"
        drafted += sum(sum(output.stats.drafted) for output in outputs if output.stats)
    assert drafted > 0 or temperature > 0.0  # random weights do not quote


EDIT = [
    {"role": "user", "content": "Book the Gonville Hotel for 3 people and 2 nights from Saturday."},
    {
        "role": "assistant",
        "content": "Please confirm: You want to book the Gonville Hotel for 3 people from Saturday.",
    },
    {"role": "user", "content": "Make it 4 people. Please confirm: You want to book the Gonville Hotel for"},
]


@pytest.mark.parametrize("temperature", [0.0, 0.5])
@pytest.mark.parametrize("source", ["ngram", "both"])
def test_answers_that_quote_take_fewer_steps(demo_engine: Engine, source: str, temperature: float) -> None:
    """The embedded model on an edit: token for token the same, some of them drafted by n-grams."""
    params = {"temperature": temperature, "seed": 1, "max_tokens": 60, "ignore_eos": True}
    plain = demo_engine.chat(EDIT, SamplingParams(**params, speculation=speculate("off")))
    prompt = [*demo_engine.chat_tokenizer.render(EDIT), *plain.token_ids]  # it has said all of it before
    off = decode(demo_engine, prompt, SamplingParams(**params, speculation=speculate("off")))
    outputs = list(demo_engine.steps(prompt, SamplingParams(**params, speculation=speculate(source=source))))
    assert [token for output in outputs for token in output.token_ids] == off.token_ids
    origins = [extras.origin for output in outputs for extras in output.extras]
    assert origins.count("ngram") > 5


def test_a_model_without_heads_is_sped_up() -> None:
    """Greedy answers of the embedded model end up repeating themselves where nothing stops them."""
    engine = Engine.from_pretrained(heads="none", config=EngineConfig(dtype="float32", measure=False))
    assert engine.info.sources == ("ngram",)
    params = SamplingParams(
        temperature=0.0, max_tokens=200, ignore_eos=True, speculation=speculate(source="ngram")
    )
    outputs = [o for o in engine.steps("Hello", params) if o.stats is not None and not o.stats.is_prefill]
    assert sum(len(output.token_ids) for output in outputs) > 1.5 * len(outputs)
    assert SpeculationMode.EXACT in {output.stats.mode for output in outputs if output.stats}


@pytest.fixture(scope="module")
def demo_engine() -> Engine:
    return Engine.from_pretrained(config=EngineConfig(dtype="float32", measure=False))


@pytest.mark.parametrize(("tree_nodes", "most"), [(None, 16), (1, 1), (4, 4)])
def test_the_setting_of_nodes_holds_for_n_grams_too(
    build_engine: BuildEngine, tree_nodes: int | None, most: int
) -> None:
    engine = build_engine(None, tree_nodes=tree_nodes)
    params = SamplingParams(temperature=0.0, max_tokens=150, speculation=speculate(source="ngram"))
    prompt = [7, 8, 9] * 40
    sizes = {o.stats.tree_nodes for o in engine.steps(prompt, params) if o.stats and not o.stats.is_prefill}
    assert max(sizes) <= most


def check_refused(engine: Engine, error: type[Exception], message: str, **speculation: str) -> None:
    with pytest.raises(error, match=message):
        add(engine, "a", [5, 6], SamplingParams(speculation=speculate(**speculation)))
    assert engine.num_free_slots == 1


def test_what_cannot_be_drafted_is_refused(build_engine: BuildEngine, trained_heads: DraftHeads) -> None:
    without = build_engine(None)
    check_refused(without, RequestError, "no draft heads for source 'both'; use 'ngram'", source="both")
    engine = build_engine(trained_heads)
    assert engine.info.sources == ("heads", "ngram", "both")
    for source in ("ngram", "both"):
        check_refused(engine, TreeError, "leave the tree at 'dynamic'", source=source, tree="static")
