"""The decode step of design §4 on tensors: propose -> verify -> accept -> commit.

Shapes: B slots (one for now), T tree nodes, S cached tokens, D tree depth, K heads, E hidden, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from medusa_core.draft.dynamic import DraftTree, root_tree
from medusa_core.draft.source import Speculator
from medusa_core.engine.acceptance import Accepted, longest_path, match_drafts, typical_drafts
from medusa_core.engine.sampling import decide_tokens, draw_tokens, gumbel_noise, process_logits
from medusa_core.engine.timing import phase_timer
from medusa_core.model.backbone import Backbone, BackboneOutput
from medusa_core.model.kv_cache import SlotCache
from medusa_core.sampling_params import SamplingParams, SpeculationMode


@dataclass(frozen=True, slots=True)
class DecodeState:
    """A sequence between steps: the root [B], decided but not cached, and what led to it.

    `unread_BTE`: hidden states of the last committed tokens. Where draft heads have a cache of their own,
    these are all that they have not read; else the last one is enough.
    """

    roots_B: Tensor
    unread_BTE: Tensor


@dataclass(frozen=True, slots=True)
class StepResult:
    """Accepted drafts and the newly decided token, in order, and what they cost (seconds)."""

    state: DecodeState
    token_ids: list[int]
    drafted: tuple[int, ...]
    accepted: int
    tree_nodes: int
    propose_seconds: float
    verify_seconds: float
    commit_seconds: float

    @property
    def seconds(self) -> float:
        return self.propose_seconds + self.verify_seconds + self.commit_seconds


def prefill_chunk(backbone: Backbone, cache: SlotCache, token_ids: list[int]) -> BackboneOutput:
    """Run and commit prompt tokens; returns hidden states and the last token's logits [1, 1, V]."""
    count, start = len(token_ids), cache.length
    tokens = torch.tensor([token_ids], device=backbone.device)
    positions = torch.arange(start, start + count, device=backbone.device)[None]
    causal = torch.ones(1, count, count, dtype=torch.bool, device=backbone.device).tril()
    mask = additive_mask(start, causal, backbone.dtype)
    output = backbone.forward(tokens, positions, mask, cache, logits_from=count - 1)
    cache.append(count)
    return output


def first_state(
    output: BackboneOutput, params: SamplingParams, position: int, token_ids_V: Tensor
) -> tuple[DecodeState, int]:
    """Decide the first root, the token at `position`, from the last row of prefill's last chunk."""
    noise = None if params.is_greedy else gumbel_noise(params.known_seed, [position], token_ids_V)
    root = decide_tokens(output.logits_BTV[:, -1], params, noise)
    return DecodeState(root, output.hidden_BTE), int(root)


def decode_step(
    backbone: Backbone,
    cache: SlotCache,
    state: DecodeState,
    params: SamplingParams,
    speculator: Speculator | None,
    token_ids_V: Tensor,
) -> StepResult:
    """One step of one slot. No `speculator` is ordinary decoding: a tree of one node, no head call."""
    timer = phase_timer(backbone.device)
    timer.mark()
    depth = speculator.max_depth if speculator else 0
    noise = None
    if not params.is_greedy:
        first = cache.length + 1  # the root stands at position n: the next undecided one is n + 1
        noise = gumbel_noise(params.known_seed, range(first, first + depth + 1), token_ids_V)
    tree = _propose(speculator, cache, state, params, noise) if speculator else root_tree(state.roots_B)
    timer.mark()
    output = _verify(backbone, cache, tree)
    timer.mark()
    accepted, targets_BT = _accept(tree, output.logits_BTV, params, noise)
    rows = torch.arange(tree.tokens_BT.shape[0], device=backbone.device)
    roots_B = targets_BT[rows, accepted.leaf_B]
    path, tokens, drafted = _to_host(tree, accepted, roots_B)
    cache.commit(path)
    is_read = speculator is not None or params.speculation.mode is SpeculationMode.OFF
    unread = _unread(cache, output, path, None if is_read else state.unread_BTE)
    timer.mark()
    propose_seconds, verify_seconds, commit_seconds = timer.seconds()
    return StepResult(
        state=DecodeState(roots_B, unread),
        token_ids=tokens,
        drafted=drafted,
        accepted=len(path) - 1,
        tree_nodes=tree.tokens_BT.shape[1],
        propose_seconds=propose_seconds,
        verify_seconds=verify_seconds,
        commit_seconds=commit_seconds,
    )


def additive_mask(cached: int, visible_BTT: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, 1, T, S+T]: 0 on every cached token and where `visible`, the dtype's minimum elsewhere."""
    slots, nodes, _ = visible_BTT.shape
    mask = torch.zeros(slots, 1, nodes, cached + nodes, dtype=dtype, device=visible_BTT.device)
    if nodes > 1:
        mask[:, 0, :, cached:].masked_fill_(~visible_BTT, torch.finfo(dtype).min)
    return mask


def _propose(
    speculator: Speculator,
    cache: SlotCache,
    state: DecodeState,
    params: SamplingParams,
    noise: Tensor | None,
) -> DraftTree:
    hidden_BE = speculator.heads.read(state.unread_BTE, cache.follower)
    return speculator.propose(hidden_BE, state.roots_B, params.temperature, noise)


def _unread(cache: SlotCache, output: BackboneOutput, path: list[int], before: Tensor | None) -> Tensor:
    """Hidden states the heads have not read after this step committed `path`, those `before` it included."""
    if cache.follower is None:
        return output.hidden_BTE[:, path[-1] : path[-1] + 1]
    committed = output.hidden_BTE[:, path]
    return committed if before is None else torch.cat([before, committed], dim=1)


def _verify(backbone: Backbone, cache: SlotCache, tree: DraftTree) -> BackboneOutput:
    mask = additive_mask(cache.length, tree.ancestors_BTT, backbone.dtype)
    return backbone.forward(tree.tokens_BT, tree.depths_BT + cache.length, mask, cache)


def _accept(
    tree: DraftTree, logits_BTV: Tensor, params: SamplingParams, noise: Tensor | None
) -> tuple[Accepted, Tensor]:
    """The accepted path and every node's own next token [B, T]."""
    node_noise = None if noise is None else noise[tree.depths_BT]
    speculation = params.speculation
    if speculation.mode is SpeculationMode.TYPICAL and not params.is_greedy:
        processed = process_logits(logits_BTV, params)
        targets = draw_tokens(processed, params.temperature, node_noise)
        log_probs = (processed / params.temperature).log_softmax(dim=-1)
        right, scores = typical_drafts(
            tree.tokens_BT, tree.parents_BT, log_probs, speculation.epsilon, speculation.delta
        )
        return longest_path(right, tree.ancestors_BTT, tree.depths_BT, tree.max_depth, scores), targets
    flat_noise = None if node_noise is None else node_noise.flatten(0, 1)
    targets = decide_tokens(logits_BTV.flatten(0, 1), params, flat_noise).view_as(tree.tokens_BT)
    right = match_drafts(tree.tokens_BT, tree.parents_BT, targets)
    return longest_path(right, tree.ancestors_BTT, tree.depths_BT, tree.max_depth), targets


def _to_host(
    tree: DraftTree, accepted: Accepted, next_roots_B: Tensor
) -> tuple[list[int], list[int], tuple[int, ...]]:
    """Path, decided tokens and drafted nodes per head of the one slot, in a single transfer."""
    width = tree.max_depth + 1
    on_path = tree.tokens_BT.gather(1, accepted.path_BD)
    packed = torch.cat(
        [accepted.path_BD, on_path, accepted.count_B[:, None], next_roots_B[:, None], tree.depths_BT], dim=1
    )
    row: list[int] = packed[0].tolist()
    count, next_root = row[2 * width : 2 * width + 2]
    depths = row[2 * width + 2 :]
    tokens = [*row[width + 1 : width + 1 + count], next_root]
    return row[: count + 1], tokens, tuple(depths.count(d) for d in range(1, tree.max_depth + 1))
