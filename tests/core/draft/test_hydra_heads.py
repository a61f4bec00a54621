"""Hydra heads and their trees against slow per-path references, and the prefix layer's cache, in float32."""

import math
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import GemmaConfig, GemmaForCausalLM

from medusa_core.draft.accuracy import default_calibration
from medusa_core.draft.coupling import DrawNoise, LevelScores
from medusa_core.draft.draft_tree import DraftTree
from medusa_core.draft.head_drafter import make_drafter
from medusa_core.draft.heads import DraftHeads, TrainingBatch
from medusa_core.draft.hydra import HydraHeads, HydraShape
from medusa_core.draft.levels import DynamicLevelDrafter
from medusa_core.draft.prefix import PrefixLayer, prefix_config
from medusa_core.draft.static import StaticLevelDrafter
from medusa_core.draft.tree import grow_tree, load_tree
from medusa_core.engine.sampling import gumbel_noise
from medusa_core.model.backbone import Backbone
from medusa_core.model.kv_cache import KVCache
from medusa_core.sampling_params import SamplingParams
from tests.core.conftest import BuildEngine, add, decode, new_hydra_heads, randomize, speculate
from tests.core.stepping import Stepper, head_source

CPU = torch.device("cpu")
TAUS = (0.7, 1.0, 1.4, 2.0)


def reference_logits(
    heads: HydraHeads, embed: Callable[[Tensor], Tensor], hidden_E: Tensor, path: list[int]
) -> Tensor:
    """One head on one path, straight from the formula."""
    level = len(path) - 1
    inputs = torch.cat([hidden_E, *(embed(torch.tensor(token)) for token in path)])
    linear, through = heads.first_weights[level]
    bias_linear, bias_through = heads.first_biases[level]
    x = through @ inputs + bias_through + functional.silu(linear @ inputs + bias_linear)
    for weight, bias in zip(heads.block_weights, heads.block_biases, strict=True):
        x = x + functional.silu(weight[level] @ x + bias[level])
    logits = heads.output_weight(level) @ x
    return logits if heads.output_bias is None else logits + heads.output_bias[level]


@pytest.fixture(params=["hydra", "hydra++"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def heads(kind: str, heads_that_know: Callable[[str], HydraHeads]) -> HydraHeads:
    return heads_that_know(kind)


@pytest.fixture
def hidden_BE() -> Tensor:
    return torch.randn(2, 64, generator=torch.Generator().manual_seed(1))


ROOTS = torch.tensor([17, 4])


@torch.inference_mode()
def slow_dynamic_tree(
    heads: HydraHeads,
    embed: Callable[[Tensor], Tensor],
    hidden_E: Tensor,
    root: int,
    nodes: int,
    noise: Tensor | None,
) -> set[tuple[int, ...]]:
    """Level by level, one path at a time.

    Of each level as many are kept as the tree has room for below a chain, and two for five of them expanded.
    """
    found: list[tuple[float, tuple[int, ...]]] = []
    level: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    for depth in range(min(heads.num_heads, nodes - 1)):
        below = []
        room = nodes - 1 - depth
        for joint, path in level[: max(1, (room + 1) * 2 // 5)]:
            scores = reference_logits(heads, embed, hidden_E, [root, *path])
            if noise is not None:
                scores = scores + 0.8 * 0.9 * noise[depth]
            log_probs = (scores / TAUS[depth]).log_softmax(-1)
            best = log_probs.topk(room)
            pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
            below += [(joint + value, (*path, token)) for value, token in pairs]
        level = sorted(below, reverse=True)[:room]
        found += level
    return {path for _, path in sorted(found, reverse=True)[: nodes - 1]}


def paths_of(tokens: list[int], parents: list[int]) -> list[tuple[int, ...]]:
    paths: list[tuple[int, ...]] = [()]
    for node in range(1, len(tokens)):
        assert parents[node] < node
        paths.append((*paths[parents[node]], tokens[node]))
    return paths


@pytest.mark.parametrize("nodes", [2, 7, 16, 40])
@pytest.mark.parametrize("coupled", [False, True])
@torch.inference_mode()
def test_dynamic_proposal_equals_the_slow_one(
    heads: HydraHeads, tiny_backbone: Backbone, hidden_BE: Tensor, nodes: int, coupled: bool
) -> None:
    noise = gumbel_noise(3, range(9, 13), torch.arange(320)).expand(2, -1, -1) if coupled else None
    drafter = DynamicLevelDrafter(nodes, heads.num_heads, heads.vocab_size, CPU)
    draw_noise = None if noise is None else DrawNoise(torch.tensor([0.9]), noise)
    tensors = drafter(LevelScores(heads, hidden_BE, draw_noise), ROOTS, torch.tensor([TAUS]))
    tree = DraftTree(*tensors, drafter.max_depth)
    assert drafter.size == tree.tokens_BT.shape[1] == nodes
    for slot in range(2):
        tokens, parents = tree.tokens_BT[slot].tolist(), tree.parents_BT[slot].tolist()
        paths = paths_of(tokens, parents)
        expected = slow_dynamic_tree(
            heads,
            tiny_backbone.embed,
            hidden_BE[slot],
            int(ROOTS[slot]),
            nodes,
            None if noise is None else noise[slot],
        )
        assert tokens[0] == ROOTS[slot]
        assert set(paths[1:]) == expected
        assert tree.depths_BT[slot].tolist() == [len(path) for path in paths]
        for node, path in enumerate(paths):
            above = {other for other, p in enumerate(paths) if p == path[: len(p)]}
            assert set(tree.ancestors_BTT[slot, node].nonzero()[:, 0].tolist()) == above


@pytest.mark.parametrize("nodes", [2, 7, 16, 40])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 1e30])
@torch.inference_mode()
def test_heads_that_overflow_still_give_a_tree(
    tiny_backbone: Backbone, hidden_BE: Tensor, value: float, nodes: int
) -> None:
    """Prefix-closed and of the right size: else a wrong token could be accepted."""
    heads = randomize(new_hydra_heads(tiny_backbone, num_layers=1, with_prefix=False))
    assert heads.output_bias is not None
    heads.output_bias[0, 7] = value
    heads.output_bias[1] = value
    heads.output_bias[3, ::2] = value
    tree = make_drafter(heads, nodes, CPU).draft(hidden_BE, ROOTS, TAUS, 0.0, None)
    assert tree.tokens_BT.shape == (2, nodes)
    for slot in range(2):
        parents = tree.parents_BT[slot].tolist()
        paths = paths_of(tree.tokens_BT[slot].tolist(), parents)
        assert len(set(paths)) == nodes
        assert tree.depths_BT[slot].tolist() == [len(path) for path in paths]
        for node, path in enumerate(paths):
            above = {other for other, p in enumerate(paths) if p == path[: len(p)]}
            assert set(tree.ancestors_BTT[slot, node].nonzero()[:, 0].tolist()) == above


@pytest.mark.parametrize("name", ["mc_sim_7b_63", "grown"])
@torch.inference_mode()
def test_static_proposal_equals_the_slow_one(
    heads: HydraHeads, tiny_backbone: Backbone, hidden_BE: Tensor, name: str
) -> None:
    tree = grow_tree(default_calibration(4).accuracies, 16) if name == "grown" else load_tree(name)
    tensors = StaticLevelDrafter(tree, CPU)(LevelScores(heads, hidden_BE, None), ROOTS, torch.tensor([TAUS]))
    drafted = DraftTree(*tensors, tree.depth)
    for slot in range(2):
        tokens: dict[tuple[int, ...], int] = {}
        for rank_path in tree.paths:
            path = [int(ROOTS[slot]), *(tokens[rank_path[:n]] for n in range(1, len(rank_path)))]
            logits = reference_logits(heads, tiny_backbone.embed, hidden_BE[slot], path)
            tokens[rank_path] = int(logits.topk(rank_path[-1] + 1).indices[-1])
        assert drafted.tokens_BT[slot].tolist() == [int(ROOTS[slot]), *tokens.values()]
    assert drafted.parents_BT[0].tolist() == list(tree.parents)


@torch.inference_mode()
def test_training_features_are_what_drafting_computes(heads: HydraHeads, tiny_backbone: Backbone) -> None:
    """Teacher forcing on a sequence = asking level by level along its own tokens."""
    tokens_BS = torch.randint(5, 320, (2, 12), generator=torch.Generator().manual_seed(2))
    hidden_BSE = tiny_backbone.model.base_model(tokens_BS).last_hidden_state
    source_KN = torch.tensor([[0, 5, 12 + 6]] * 4)
    features_KNE = heads.features(TrainingBatch(hidden_BSE, tokens_BS), source_KN)
    seen_NE = heads.contextualize(hidden_BSE).flatten(0, 1)[source_KN[0]]
    for level in range(4):
        behind = source_KN[0][:, None] + 1 + torch.arange(level + 1)
        expected = heads.level_logits(level, seen_NE, tokens_BS.flatten()[behind][:, None])[:, 0]
        got = features_KNE[level] @ heads.output_weight(level).T + heads.output_bias_KV[level]
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_new_heads_say_what_the_backbone_says(tiny_backbone: Backbone, hidden_BE: Tensor) -> None:
    heads = new_hydra_heads(tiny_backbone, num_layers=3, with_prefix=False)
    logits = heads.level_logits(1, hidden_BE, torch.tensor([[[5, 6]], [[7, 8]]]))[:, 0]
    torch.testing.assert_close(logits, hidden_BE @ tiny_backbone.lm_head_weight.T)
    prefix = PrefixLayer.new(prefix_config(tiny_backbone.config), hidden_rms=2.0)
    hidden = torch.randn(1, 5, 64)
    scaled = hidden * 2.0 / hidden.square().mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(prefix(hidden), scaled, atol=1e-3, rtol=1e-3)


def test_dropout_is_for_training_only(tiny_backbone: Backbone) -> None:
    heads = new_hydra_heads(tiny_backbone, num_layers=2, with_prefix=False)
    heads.dropout = 0.5
    tokens = torch.randint(5, 320, (1, 8))
    batch = TrainingBatch(torch.randn(1, 8, 64), tokens)
    source = torch.tensor([[1, 2]] * 4)
    heads.train()
    assert not torch.equal(heads.features(batch, source), heads.features(batch, source))
    heads.eval()
    assert torch.equal(heads.features(batch, source), heads.features(batch, source))


def draft_cache(heads: HydraHeads, *, slots: int, capacity: int) -> KVCache:
    assert heads.cache_shape is not None
    return KVCache(heads.cache_shape, slots=slots, capacity=capacity, dtype=torch.float32, device=CPU)


@torch.inference_mode()
def test_prefix_cache_after_random_reads_and_truncates(tiny_backbone: Backbone) -> None:
    """100 of them, two slots at a time with counts of their own: as a recomputation from scratch."""
    heads = randomize(new_hydra_heads(tiny_backbone, num_layers=1, with_prefix=True))
    cache = draft_cache(heads, slots=3, capacity=80)
    rng = random.Random(4)
    generator = torch.Generator().manual_seed(4)
    hidden = [torch.zeros(1, 0, 64) for _ in range(3)]
    truncated = 0
    for _ in range(100):
        slots = tuple(rng.sample(range(3), 2))
        for slot in slots:
            if cache.lengths[slot] > 60 or rng.random() < 0.25:
                keep = rng.randrange(cache.lengths[slot] + 1)
                cache.truncate(slot, keep)
                hidden[slot] = hidden[slot][:, :keep]
                truncated += 1
        counts = [rng.randrange(1, 6) for _ in slots]
        new = torch.randn(2, max(counts), 64, generator=generator)
        got = heads.read(new, counts, cache.rows(slots))
        for row, (slot, count) in enumerate(zip(slots, counts, strict=True)):
            hidden[slot] = torch.cat([hidden[slot], new[row : row + 1, :count]], dim=1)
            length = cache.lengths[slot]
            assert length == hidden[slot].shape[1]
            expected = heads.contextualize(hidden[slot])[0, -1]
            torch.testing.assert_close(got[row], expected, atol=1e-4, rtol=1e-4)
            fresh = draft_cache(heads, slots=1, capacity=80)
            heads.read(hidden[slot], [length], fresh.rows((0,)))
            torch.testing.assert_close(
                cache.storage_L2BHCD[:, :, slot, :, :length],
                fresh.storage_L2BHCD[:, :, 0, :, :length],
                atol=1e-4,
                rtol=1e-4,
            )
    assert truncated > 10


@torch.inference_mode()
def test_heads_catch_up_after_steps_without_speculation(
    tiny_backbone: Backbone, heads_that_know: Callable[[str], DraftHeads], tiny_prompts: list[list[int]]
) -> None:
    """Plain steps leave hidden states unread; the next draft is that of heads that see the whole sequence."""
    heads = heads_that_know("hydra++")
    source = head_source(heads, slots=1, capacity=200)
    stepper = Stepper(tiny_backbone, tiny_backbone.new_cache(1, 200), source)
    sequence = stepper.start(tiny_prompts[2], SamplingParams(temperature=0.0))
    assert source.draft_cache is not None
    for turn in range(12):
        stepper.step([sequence], [12 if turn % 4 == 3 else 1])
        if turn % 4 == 2:
            assert source.draft_cache.lengths[0] < stepper.cache.lengths[0] - 2
    drafted = stepper.propose([sequence], [12])
    assert source.draft_cache.lengths == stepper.cache.lengths
    committed = torch.tensor([sequence.token_ids[:-1]])
    hidden = tiny_backbone.model.base_model(committed).last_hidden_state
    root, taus = torch.tensor([sequence.root]), (1.0,) * 4
    expected = make_drafter(heads, 12, CPU).draft(heads.contextualize(hidden)[:, -1], root, taus, 0.0, None)
    assert torch.equal(drafted.tokens_BT, expected.tokens_BT)


def test_requests_without_speculation_cost_the_heads_nothing(
    build_engine: BuildEngine, heads_that_know: Callable[[str], DraftHeads], tiny_prompts: list[list[int]]
) -> None:
    engine = build_engine(heads_that_know("hydra++"), prefill_chunk=4)
    off = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, speculation=speculate("off"))
    add(engine, "off", [*tiny_prompts[0], *range(20, 40)], off)
    assert engine.head_source is not None
    assert engine.head_source.draft_cache is not None
    while engine.has_work:
        engine.step()
        assert engine.head_source.draft_cache.lengths == [0]


def test_scaled_embeddings_and_grouped_queries(tiny_chat: object, tiny_prompts: list[list[int]]) -> None:
    """Gemma scales its embeddings; the heads see them as the backbone does."""
    torch.manual_seed(0)
    config = GemmaConfig(
        vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=1, head_dim=16, bos_token_id=0, eos_token_id=4, pad_token_id=0,
    )  # fmt: skip
    backbone = Backbone(GemmaForCausalLM(config))
    heads = new_hydra_heads(backbone, num_layers=1, with_prefix=True)
    assert heads.cache_shape is not None
    assert (heads.cache_shape.num_kv_heads, heads.cache_shape.head_dim) == (1, 16)
    randomize(heads)
    source = head_source(heads, slots=1, capacity=120)
    prompt = tiny_prompts[1]
    for temperature in (0.0, 0.9):
        params = SamplingParams(temperature=temperature, seed=2)
        answers = []
        for nodes in (1, 10):
            stepper = Stepper(backbone, backbone.new_cache(1, 120), source)
            sequence = stepper.start(prompt, params)
            while len(sequence.token_ids) < len(prompt) + 20:
                stepper.step([sequence], [nodes])
            answers.append(sequence.token_ids[: len(prompt) + 20])
        assert answers[0] == answers[1]


@torch.inference_mode()
def test_a_reduced_vocabulary_drafts_mapped_tokens(
    tiny_backbone: Backbone, build_engine: BuildEngine, tiny_prompts: list[list[int]]
) -> None:
    token_map = torch.randperm(320, generator=torch.Generator().manual_seed(3))[:50]
    shape = HydraShape(num_heads=4, num_layers=1, hidden_size=64, vocab_size=50)
    heads = HydraHeads.new(
        shape, lm_head_weight=tiny_backbone.lm_head_weight, embed=tiny_backbone.embed, token_map=token_map
    )
    noise = gumbel_noise(3, range(9, 13), torch.arange(320))[None]
    drafter = make_drafter(heads, 12, CPU)
    tree = drafter.draft(torch.randn(1, 64), ROOTS[:1], TAUS, 0.7, noise)
    assert set(tree.tokens_BT[0, 1:].tolist()) <= set(token_map.tolist())
    best = (
        heads.level_logits(0, torch.ones(1, 64), ROOTS[:1, None, None])[0, 0]
        + 0.8 * 0.7 * noise[0, 0, token_map]
    ).argmax()
    first = make_drafter(heads, 2, CPU).draft(torch.ones(1, 64), ROOTS[:1], TAUS, 0.7, noise)
    assert first.tokens_BT[0, 1] == token_map[best]
    engine = build_engine(heads)
    params = {"temperature": 0.8, "seed": 1, "max_tokens": 24, "ignore_eos": True}
    for prompt in tiny_prompts[:5]:
        plain = decode(engine, prompt, SamplingParams(**params, speculation=speculate("off")))
        assert decode(engine, prompt, SamplingParams(**params)).token_ids == plain.token_ids
