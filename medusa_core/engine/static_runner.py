"""Runs a step by programs of static shapes, each compiled or as it is.

Shapes: B rows, T tree nodes, D tree depth, W columns, V vocabulary, E hidden size.
"""

from functools import lru_cache

import torch
from torch import Tensor

from medusa_core.draft.draft_tree import DraftTree, pad_tree
from medusa_core.engine.accept_program import AcceptProgram
from medusa_core.engine.batch import Batch
from medusa_core.engine.logits_processors import LogitsChain
from medusa_core.engine.noise_program import NoiseProgram
from medusa_core.engine.runner import EagerRunner
from medusa_core.engine.sampling import NoiseOfKeys
from medusa_core.model.backbone import Backbone, BackboneOutput
from medusa_core.model.kv_cache import KVCache
from medusa_core.model.static_rows import bucket
from medusa_core.model.verify_program import VerifyProgram
from medusa_core.programs.program import MIN_NODES
from medusa_core.programs.sizes import padded_size
from medusa_core.programs.switch import Switch
from medusa_core.sampling_params import SamplingParams


class StaticRunner:
    """Every row's numbers are the same in any of its sizes: see `medusa_core.model.tree_attention`."""

    def __init__(self, backbone: Backbone, cache: KVCache) -> None:
        """The backbone's model attends through `tree_attention`."""
        self._eager, self._cache = EagerRunner(backbone, cache), cache
        facts, dtype = backbone.verify_facts, backbone.dtype
        vocab, device = backbone.vocab_size, backbone.device
        self._verify = Switch(VerifyProgram(backbone.model, facts))
        self._greedy = Switch(AcceptProgram(facts.cache, vocab, dtype, sampled=False))
        self._sampled = Switch(AcceptProgram(facts.cache, vocab, dtype, sampled=True))
        self._noise = Switch(NoiseProgram(torch.arange(vocab, device=device)))
        self._columns = torch.arange(cache.capacity, device=device)

    @property
    def programs(self) -> tuple[Switch, ...]:
        """What can be compiled, the most useful first."""
        return (self._verify, self._noise, self._sampled, self._greedy)

    @property
    def noise(self) -> NoiseOfKeys | None:
        return self._draw

    def _draw(self, keys_BP: Tensor) -> Tensor:
        return self._noise(keys_BP)[0]

    def fit(self, tree: DraftTree) -> DraftTree:
        if tree.size == 1:
            return _root_alone(tree.tokens_BT)
        return pad_tree(tree, padded_size(tree.size))

    def verify(self, batch: Batch, tree: DraftTree) -> BackboneOutput:
        longest = max(self._cache.lengths[slot] for slot in batch.slots)
        width = bucket(longest + tree.size, self._cache.capacity - 1)
        hidden_BTE, logits_BTV = self._verify(
            tree.tokens_BT,
            tree.depths_BT,
            tree.ancestors_BTT,
            batch.slots_B,
            batch.lengths_B,
            self._columns[:width],
            self._cache.storage_L2BHCD,
        )
        return BackboneOutput(hidden_BTE, logits_BTV)

    def accept(self, batch: Batch, tree: DraftTree, output: BackboneOutput) -> list[list[int]]:
        if not all(map(_can_take, batch.params, batch.chains)):
            return self._eager.accept(batch, tree, output)
        inputs = [
            output.logits_BTV,
            tree.tokens_BT,
            tree.depths_BT,
            tree.parents_BT,
            tree.ancestors_BTT,
            tree.origins_BT,
            batch.slots_B,
            batch.lengths_B,
            batch.places_D[: tree.max_depth + 1],
            self._cache.storage_L2BHCD,
        ]
        noise_BPV = batch.draft_noise(tree.max_depth)
        if batch.sampling_B4 is None or noise_BPV is None:
            (packed_BX,) = self._greedy(*inputs)
        else:
            (packed_BX,) = self._sampled(*inputs, batch.sampling_B4, noise_BPV)
        rows: list[list[int]] = packed_BX.tolist()
        if any(row[-1] for row in rows):  # a filter must look at the whole vocabulary
            return self._eager.accept(batch, tree, output)
        return [row[:-1] for row in rows]


def _can_take(params: SamplingParams, chain: LogitsChain) -> bool:
    """Whether the accept program decides such rows: it knows no processors but filters."""
    return len(chain.filters) == len(chain.processors) and AcceptProgram.can_take(params)


def _root_alone(roots_B1: Tensor) -> DraftTree:
    """Ordinary decoding: the root and padding, of depth 1 as programs want it."""
    tokens_BT = roots_B1.expand(-1, MIN_NODES).contiguous()
    zeros_BT, itself_BTT = _constants(len(roots_B1), roots_B1.device)
    return DraftTree(tokens_BT, zeros_BT, zeros_BT, itself_BTT, zeros_BT, 1)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _constants(rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    zeros_BT = torch.zeros(rows, MIN_NODES, dtype=torch.long, device=device)
    itself = torch.eye(MIN_NODES, dtype=torch.bool, device=device)
    return zeros_BT, itself.expand(rows, -1, -1).contiguous()
