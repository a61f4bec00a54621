"""The engine's slots: who gets one, whose turn it is, and how every request ends."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from medusa_core.draft.heads import ParallelHeads
from medusa_core.draft.medusa import MedusaHeads
from medusa_core.engine import adaptive_size
from medusa_core.engine.engine import Engine
from medusa_core.engine.outputs import FinishReason, StepOutput
from medusa_core.errors import CapacityError, ConfigError, RequestError, TreeError
from medusa_core.model.backbone import Backbone
from medusa_core.model.kv_cache import CacheRows, CacheShape
from medusa_core.model_info import ModelInfo
from medusa_core.sampling_params import SamplingParams, SpeculationMode
from medusa_core.text.tokenizer import ChatTokenizer
from tests.core.conftest import BuildEngine, add, decode, new_heads, speculate

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
PUBLISHED = "mc_sim_7b_63"


class TroubledHeads:
    """Real heads that raise from their n-th call on."""

    def __init__(self, heads: ParallelHeads, error: BaseException, good_calls: int) -> None:
        self._heads, self._error, self.good_calls = heads, error, good_calls

    @property
    def num_heads(self) -> int:
        return self._heads.num_heads

    @property
    def vocab_size(self) -> int:
        return self._heads.vocab_size

    @property
    def token_map(self) -> Tensor | None:
        return self._heads.token_map

    @property
    def cache_shape(self) -> CacheShape | None:
        return self._heads.cache_shape

    def read(self, hidden_BUE: Tensor, counts: Sequence[int], cache: CacheRows | None) -> Tensor:
        return self._heads.read(hidden_BUE, counts, cache)

    def contextualize(self, hidden_BSE: Tensor) -> Tensor:
        return self._heads.contextualize(hidden_BSE)

    def draft_logits(self, hidden_BE: Tensor) -> Tensor:
        if self.good_calls == 0:
            raise self._error
        self.good_calls -= 1
        return self._heads.draft_logits(hidden_BE)


def run(engine: Engine) -> dict[str, list[StepOutput]]:
    outputs: dict[str, list[StepOutput]] = {}
    while engine.has_work:
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
    return outputs


def tokens_of(outputs: list[StepOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def test_requests_take_turns(build_engine: BuildEngine, trained_heads: MedusaHeads) -> None:
    engine = build_engine(trained_heads, slots=3)
    for name in "abc":
        add(engine, name, [10, 20, 30], GREEDY)
    assert (engine.num_free_slots, engine.has_work) == (0, True)
    turns = [engine.step()[0].request_id for _ in range(6)]
    assert turns == [*"abcabc"]
    assert engine.abort("b")
    assert engine.num_free_slots == 1
    assert [engine.step()[0].request_id for _ in range(2)] == [*"ac"]
    add(engine, "d", [7], GREEDY)
    assert [engine.step()[0].request_id for _ in range(3)] == [*"acd"]


def test_an_aborted_request_says_no_more(build_engine: BuildEngine, trained_heads: MedusaHeads) -> None:
    engine = build_engine(trained_heads)
    expected = decode(engine, [5, 6, 7], GREEDY).token_ids
    add(engine, "a", [10, 20, 30], GREEDY)
    engine.step()
    assert engine.abort("a")
    assert not engine.abort("a")
    assert (engine.has_work, engine.num_free_slots, engine.step()) == (False, 1, [])
    assert decode(engine, [5, 6, 7], GREEDY).token_ids == expected


BAD_REQUESTS = {
    "empty": ([], {}, RequestError, "the prompt is empty"),
    "too long": ([9] * 64, {}, RequestError, "the prompt has 64 tokens; at most 63 leave room for an answer"),
    "negative id": ([9, -1], {}, RequestError, "ids must be between 0 and 319"),
    "id too large": ([320], {}, RequestError, "ids must be between 0 and 319"),
    "huge id": ([2**70], {}, RequestError, "ids must be between 0 and 319"),
    "fraction": ([9, 1.0], {}, RequestError, "ids must be whole numbers: 'float'"),
    "text": (["9"], {}, RequestError, "ids must be whole numbers: 'str'"),
    "duplicate": ([9], {"request_id": "running"}, RequestError, "'running' is already running"),
    "unknown tree": ([9], {"tree": "nosuch"}, TreeError, "'nosuch'; choose one of dynamic, static, mc_sim"),
    "a file": ([9], {"tree": "/etc/passwd"}, TreeError, "no draft tree '/etc/passwd'"),
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_refused_requests_change_nothing(
    build_engine: BuildEngine, random_heads: MedusaHeads, case: str
) -> None:
    prompt, how, error, message = BAD_REQUESTS[case]
    engine = build_engine(random_heads, slots=2, max_length=64)
    add(engine, "running", [5, 6], GREEDY)
    params = SamplingParams(temperature=0.0, speculation=speculate(tree=how.get("tree", "dynamic")))
    with pytest.raises(error, match=message):
        add(engine, how.get("request_id", "new"), prompt, params)
    assert engine.num_free_slots == 1
    assert list(run(engine)) == ["running"]


def test_capacity(build_engine: BuildEngine, random_heads: MedusaHeads) -> None:
    engine = build_engine(random_heads, slots=2)
    add(engine, "a", [5], GREEDY)
    add(engine, "b", [5], GREEDY)
    with pytest.raises(CapacityError, match="all 2 slots are taken"):
        add(engine, "c", [5], GREEDY)
    assert set(run(engine)) == {"a", "b"}
    assert engine.num_free_slots == 2


def test_a_prompt_may_leave_room_for_one_token(build_engine: BuildEngine, random_heads: MedusaHeads) -> None:
    engine = build_engine(random_heads, max_length=64)
    answer = decode(engine, [9] * 63, SamplingParams(temperature=0.0, ignore_eos=True))
    assert (len(answer.token_ids), answer.finish_reason) == (1, FinishReason.LENGTH)


def allocation_error(allocate: Callable[[], object]) -> Exception:
    """What an allocation beyond all memory really raises."""
    try:
        allocate()
    except (RuntimeError, MemoryError) as error:
        return error
    raise AssertionError("there was room")


OUT_OF_MEMORY = (
    torch.OutOfMemoryError("CUDA out of memory"),
    allocation_error(lambda: torch.empty(2**55)),
    allocation_error(lambda: bytearray(2**60)),
)
FAILURES = (RuntimeError("out of luck"), IndexError("beyond"), *OUT_OF_MEMORY)


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
def test_a_failing_request_fails_alone(
    build_engine: BuildEngine, trained_heads: MedusaHeads, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    healthy = build_engine(trained_heads)
    expected = decode(healthy, [30, 40, 50], GREEDY).token_ids
    engine = build_engine(TroubledHeads(trained_heads, error, good_calls=1), slots=2)
    add(engine, "bad", [10, 20], GREEDY)
    add(
        engine,
        "good",
        [30, 40, 50],
        SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, speculation=speculate("off")),
    )
    outputs = run(engine)
    last = outputs["bad"][-1]
    assert last.finish_reason is FinishReason.ERROR
    assert last.error == f"{type(error).__name__}: {error}"
    assert (last.token_ids, last.stats) == ((), None)
    assert last.out_of_memory == (error in OUT_OF_MEMORY)
    assert [output.finish_reason for output in outputs["bad"][:-1]] == [None] * (len(outputs["bad"]) - 1)
    assert tokens_of(outputs["good"]) == expected
    assert engine.num_free_slots == 2
    assert "request bad failed" in caplog.text
    # Its slot serves the next request as if nothing had been.
    engine.heads.good_calls = 1000  # type: ignore[union-attr]
    assert decode(engine, [30, 40, 50], GREEDY).token_ids == expected


@pytest.mark.parametrize("error", [KeyboardInterrupt(), torch.AcceleratorError("the device is lost")])
def test_what_escapes_a_step_frees_the_slot(
    build_engine: BuildEngine, trained_heads: MedusaHeads, error: BaseException
) -> None:
    heads = TroubledHeads(trained_heads, error, good_calls=0)
    engine = build_engine(heads, slots=2)
    add(engine, "interrupted", [10, 20], GREEDY)
    add(engine, "other", [30, 40, 50], GREEDY)
    with pytest.raises(type(error)):
        run(engine)
    assert engine.num_free_slots == 1
    heads.good_calls = 1000
    outputs = run(engine)
    assert list(outputs) == ["other"]
    assert engine.num_free_slots == 2
    heads.good_calls = 0
    with pytest.raises(type(error)):
        list(engine.steps([10, 20], GREEDY))
    assert (engine.num_free_slots, engine.has_work) == (2, False)


def test_generate_takes_text_ids_and_messages(
    build_engine: BuildEngine, random_heads: MedusaHeads, tiny_chat: ChatTokenizer
) -> None:
    engine = build_engine(random_heads)
    messages = [{"role": "user", "content": "a table for two"}]
    for prompt, ids in (
        ("a table for two", tiny_chat.encode("a table for two")),
        (messages, tiny_chat.render(messages)),
        (np.array([7, 8, 9]), [7, 8, 9]),
        (torch.tensor([7, 8, 9]), [7, 8, 9]),
        ((7, 8, 9), [7, 8, 9]),
    ):
        assert tokens_of(list(engine.steps(prompt, GREEDY))) == decode(engine, ids, GREEDY).token_ids
    with pytest.raises(RequestError, match="not a mixture"):
        next(engine.steps([*messages, 7], GREEDY))  # type: ignore[list-item]
    with pytest.raises(RequestError, match="the prompt is empty"):
        next(engine.steps([], GREEDY))


def test_generate_needs_an_idle_engine(build_engine: BuildEngine, random_heads: MedusaHeads) -> None:
    engine = build_engine(random_heads, slots=2)
    running = engine.steps([5, 6], GREEDY)
    next(running)
    with pytest.raises(CapacityError, match="needs an idle engine"):
        next(engine.steps([5, 6], GREEDY))
    assert engine.num_free_slots == 1  # the refused call took nothing away from the running one
    running.close()
    assert (engine.num_free_slots, engine.has_work) == (2, False)


def test_default_params_are_the_models(build_engine: BuildEngine, random_heads: MedusaHeads) -> None:
    engine = build_engine(random_heads)
    assert engine.default_params() == SamplingParams(temperature=0.3, top_p=0.95)
    [first], [second] = (engine.generate([[5, 6]], params) for params in (None, engine.default_params()))
    assert first.seed != second.seed  # fresh ones, as neither names one
    again = SamplingParams(temperature=0.3, top_p=0.95, seed=first.seed)
    assert list(first.token_ids) == decode(engine, [5, 6], again).token_ids


def test_info(build_engine: BuildEngine, random_heads: MedusaHeads, tiny_backbone: Backbone) -> None:
    engine = build_engine(random_heads, slots=3, max_length=100)
    info = engine.info
    assert isinstance(info, ModelInfo)
    assert (info.num_heads, info.heads, info.slots, info.tree_nodes) == (4, "MedusaHeads", 3, 16)
    assert (info.context_length, info.vocab_size) == (100, 320)
    assert (info.dtype, info.device) == ("float32", "cpu")
    assert info.trees[:3] == ("dynamic", "static", PUBLISHED)
    assert len(info.trees) == 11
    assert info.parameters == sum(p.numel() for p in tiny_backbone.model.parameters())


def test_context_length(build_engine: BuildEngine) -> None:
    assert build_engine(None).context_length == 512  # the model's
    assert build_engine(None, max_length=100).context_length == 100
    with pytest.raises(ConfigError, match="max_length 513 is beyond the model's 512 positions"):
        build_engine(None, max_length=513)


def test_engine_without_heads(build_engine: BuildEngine) -> None:
    engine = build_engine(None, tree_nodes=None)
    info = engine.info
    assert (info.heads, info.num_heads, info.trees, info.tree_nodes) == (None, 0, (), 1)
    for tree in ("dynamic", "static"):
        outputs = list(engine.steps([5, 6], SamplingParams(max_tokens=5, speculation=speculate(tree=tree))))
        assert [output.stats.mode for output in outputs if output.stats] == [SpeculationMode.OFF] * len(
            outputs
        )
    with pytest.raises(TreeError, match=f"no draft heads to fill tree '{PUBLISHED}'"):
        add(engine, "a", [5], SamplingParams(speculation=speculate(tree=PUBLISHED)))
    with pytest.raises(ConfigError, match=f"static_tree '{PUBLISHED}' is set, but there are no draft heads"):
        build_engine(None, static_tree=PUBLISHED)


def test_heads_shallower_than_a_published_tree(build_engine: BuildEngine, tiny_backbone: Backbone) -> None:
    engine = build_engine(new_heads(tiny_backbone, 3))
    assert engine.info.trees == ("dynamic", "static", "vicuna_33b_stage1")
    with pytest.raises(
        TreeError, match=f"no draft tree '{PUBLISHED}'; choose one of dynamic, static, vicuna"
    ):
        add(engine, "a", [5], SamplingParams(speculation=speculate(tree=PUBLISHED)))
    for tree in engine.info.trees:
        params = SamplingParams(temperature=0.0, max_tokens=12, speculation=speculate(tree=tree))
        assert decode(engine, [5, 6], params).token_ids
    with pytest.raises(TreeError, match=f"'{PUBLISHED}' is 4 deep, but there are only 3 draft heads"):
        build_engine(new_heads(tiny_backbone, 3), static_tree=PUBLISHED)


def padded(backbone: Backbone, rows: int = 32) -> LlamaForCausalLM:
    """The tiny model with rows no token belongs to, one of which always has the largest logit."""
    config = type(backbone.model.config)(**backbone.model.config.to_dict() | {"vocab_size": 320 + rows})
    model = LlamaForCausalLM(config)
    half = 20 * torch.randn(rows // 2, 64, generator=torch.Generator().manual_seed(0))
    extra = torch.cat([half, -half])
    state = {
        name: torch.cat([weight, extra])
        if name in ("lm_head.weight", "model.embed_tokens.weight")
        else weight
        for name, weight in backbone.model.state_dict().items()
    }
    model.load_state_dict(state)
    return model


def test_ids_beyond_the_tokenizer_are_never_produced(
    build_engine: BuildEngine,
    tiny_backbone: Backbone,
    trained_heads: MedusaHeads,
    tiny_prompts: list[list[int]],
) -> None:
    model = padded(tiny_backbone)
    logits = model(torch.tensor([tiny_prompts[0] + tiny_prompts[1]])).logits
    assert int(logits.argmax(dim=-1).min()) >= 320
    plain, wide = build_engine(trained_heads), build_engine(trained_heads, model=model)
    assert wide.info.vocab_size == 320
    for number, prompt in enumerate(tiny_prompts[:10]):
        for temperature in (0.0, 1.0):
            for mode in ("exact", "typical", "off"):
                params = SamplingParams(
                    temperature=temperature, seed=number, max_tokens=16, speculation=speculate(mode)
                )
                assert decode(wide, prompt, params) == decode(plain, prompt, params)
    with pytest.raises(RequestError, match="between 0 and 319"):
        add(wide, "a", [330], GREEDY)


def test_prefill_stats(build_engine: BuildEngine, random_heads: MedusaHeads) -> None:
    engine = build_engine(random_heads, prefill_chunk=4)
    outputs = list(engine.steps(list(range(5, 15)), GREEDY))
    stats = [output.stats for output in outputs[:3]]
    assert [s.prompt_tokens for s in stats if s] == [4, 4, 2]
    assert all(s and s.is_prefill and s.seconds > 0 and s.tree_nodes == 1 for s in stats)
    assert [len(output.token_ids) for output in outputs[:3]] == [0, 0, 1]
    assert not any(output.stats.is_prefill for output in outputs[3:] if output.stats)


@pytest.mark.parametrize(("tree", "nodes"), [("dynamic", 16), ("static", 16), (PUBLISHED, 64)])
def test_decode_stats(
    build_engine: BuildEngine,
    trained_heads: MedusaHeads,
    tiny_prompts: list[list[int]],
    tree: str,
    nodes: int,
) -> None:
    engine = build_engine(trained_heads)
    params = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True, speculation=speculate(tree=tree))
    steps = [o for o in engine.steps(tiny_prompts[3], params) if o.stats and not o.stats.is_prefill]
    for output in steps[:-1]:  # the last may be cut
        stats = output.stats
        assert stats is not None
        assert stats.mode is SpeculationMode.EXACT
        assert stats.tree_nodes == nodes
        assert len(stats.drafted) <= 4
        assert sum(stats.drafted) == nodes - 1
        assert sum(stats.accepted) == len(output.token_ids) - 1
        assert list(stats.accepted) == sorted(stats.accepted, reverse=True)
        phases = stats.propose_seconds + stats.verify_seconds + stats.commit_seconds
        assert stats.seconds == pytest.approx(phases)
        assert min(stats.propose_seconds, stats.verify_seconds, stats.commit_seconds) > 0
        assert (stats.baseline_seconds, stats.prompt_tokens) == (0.0, 0)  # nothing was measured
    assert max(len(output.token_ids) for output in steps) >= 4


def test_speculation_off_is_a_tree_of_one_node_and_no_head_call(
    build_engine: BuildEngine, trained_heads: MedusaHeads
) -> None:
    engine = build_engine(TroubledHeads(trained_heads, AssertionError("heads were called"), good_calls=0))
    params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True, speculation=speculate("off"))
    outputs = list(engine.steps([5, 6], params))
    assert [len(output.token_ids) for output in outputs] == [1] * 6
    for output in outputs:
        assert output.stats is not None
        assert (output.stats.mode, output.stats.tree_nodes) == (SpeculationMode.OFF, 1)
        assert (output.stats.drafted, output.stats.accepted) == ((), ())


def test_the_last_token_of_a_budget_is_not_speculated(
    build_engine: BuildEngine, trained_heads: MedusaHeads
) -> None:
    engine = build_engine(trained_heads)
    outputs = list(engine.steps([5, 6], SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)))
    assert [output.stats.mode for output in outputs if output.stats] == [
        SpeculationMode.EXACT,
        SpeculationMode.OFF,
    ]


def test_measured_step_times_give_a_baseline(
    build_engine: BuildEngine, tiny_backbone: Backbone, trained_heads: MedusaHeads
) -> None:
    """Also with few heads and a context in which the largest measured tree only just fits."""
    engine = build_engine(new_heads(tiny_backbone, 2), measure=True, tree_nodes=4, max_length=258, slots=2)
    assert engine.num_free_slots == 2
    assert set(engine.step_times.trees) == {1, 2, 4, 8, 12, 16, 24, 32, 48, 64}
    assert min(engine.step_times.trees.values()) > 0
    outputs = [o for o in engine.steps([5, 6], GREEDY) if o.stats and not o.stats.is_prefill]
    single = engine.step_times.baseline_seconds(0)
    baselines = [output.stats.baseline_seconds for output in outputs if output.stats]
    assert baselines[0] == pytest.approx(single * len(outputs[0].token_ids))
    assert min(baselines) > 0  # from then on corrected by real steps
    assert engine.info.tree_nodes == 4
    chosen = build_engine(trained_heads, measure=True, tree_nodes=None, max_length=64)
    assert chosen.info.tree_nodes in chosen.step_times.trees
    assert engine.info.tree_choice is None  # it was asked for
    assert "ms, one in a plain step of" in str(chosen.info.tree_choice)


@pytest.mark.parametrize("heads", ["random_heads", "trained_heads"])
def test_positions_and_cache_never_run_over(
    build_engine: BuildEngine, request: pytest.FixtureRequest, heads: str
) -> None:
    """Up to the very end of the context, in steps of any length, with the largest tree."""
    engine = build_engine(request.getfixturevalue(heads), max_length=40, tree_nodes=200)
    lengths = []
    for start in range(1, 40, 2):
        params = SamplingParams(temperature=0.0, ignore_eos=True)
        answer = decode(engine, [9 + start] * start, params)
        assert answer.finish_reason is FinishReason.LENGTH
        lengths.append(len(answer.token_ids))
    assert lengths == [40 - start for start in range(1, 40, 2)]


def test_speculation_that_costs_more_than_it_gains_is_turned_off(
    build_engine: BuildEngine, random_heads: MedusaHeads, caplog: pytest.LogCaptureFixture
) -> None:
    engine = build_engine(random_heads, tree_nodes=4, measure=True)

    def answer(mode: str, tree: str = "dynamic") -> list[StepOutput]:
        params = {"temperature": 0.0, "max_tokens": 300, "ignore_eos": True}
        return list(engine.steps([5, 6], SamplingParams(**params, speculation=speculate(mode, tree))))

    expected = tokens_of(answer("off"))
    answers = [answer("exact"), answer("exact")]  # with heads that are never right
    assert [tokens_of(outputs) for outputs in answers] == [expected, expected]
    sizes = [o.stats.tree_nodes for o in answers[0] + answers[1] if o.stats and not o.stats.is_prefill]
    assert sizes[0] == 4
    assert set(sizes) <= {1, 2, 4}
    assert sizes[-50:] == [1] * 50
    assert answers[1][-1].stats is not None
    assert answers[1][-1].stats.mode is SpeculationMode.OFF
    assert "nodes is slower than without" in caplog.text
    # A tree asked for by name is used as it is.
    named = [o.stats.tree_nodes for o in answer("exact", PUBLISHED) if o.stats and not o.stats.is_prefill]
    assert named[0] == 64
    # Greedy answers lost their tree, not those at another temperature.
    warm = list(engine.steps([5, 6], SamplingParams(temperature=0.8, max_tokens=20, ignore_eos=True)))
    assert next(o.stats.tree_nodes for o in warm if o.stats and not o.stats.is_prefill) == 4


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_steps_that_only_learn_times_decide_the_same_tokens(
    build_engine: BuildEngine,
    trained_heads: MedusaHeads,
    monkeypatch: pytest.MonkeyPatch,
    temperature: float,
) -> None:
    monkeypatch.setattr(adaptive_size, "PROBE_STEPS", 3)
    engine = build_engine(trained_heads, tree_nodes=16, measure=True)
    params = SamplingParams(temperature=temperature, max_tokens=120, ignore_eos=True, seed=4)
    outputs = list(engine.steps([5, 6], params))
    sizes = {o.stats.tree_nodes for o in outputs if o.stats and not o.stats.is_prefill}
    assert {1, 2, 4, 8, 12, 16} <= sizes
    off = replace(params, speculation=speculate("off"))
    assert tokens_of(outputs) == tokens_of(list(engine.steps([5, 6], off)))
