"""Sequences driven step by step below the engine: several of them as the rows of one batch."""

from collections.abc import Sequence as SequenceOf

import torch

from medusa_core.draft.accuracy import default_calibration
from medusa_core.draft.draft_tree import DraftTree
from medusa_core.draft.head_source import HeadSource
from medusa_core.draft.head_trees import HeadTrees
from medusa_core.draft.heads import DraftHeads
from medusa_core.draft.source import Committed, DraftSource
from medusa_core.engine.batch import Batch, make_batch
from medusa_core.engine.runner import EagerRunner
from medusa_core.engine.sequence import Sequence
from medusa_core.engine.step import RowResult, StepResult, decode_step, first_root
from medusa_core.engine.timing import phase_timer
from medusa_core.model.backbone import Backbone
from medusa_core.model.kv_cache import KVCache
from medusa_core.request import Request
from medusa_core.sampling_params import SamplingParams

CPU = torch.device("cpu")


def head_source(
    heads: DraftHeads, slots: int = 1, capacity: int = 300, device: torch.device = CPU
) -> HeadSource:
    """Uncalibrated heads with their memory."""
    shape = heads.cache_shape
    cache = None
    if shape is not None:
        cache = KVCache(shape, slots=slots, capacity=capacity, dtype=torch.float32, device=device)
    return HeadSource(HeadTrees(heads, default_calibration(heads.num_heads), device), cache)


class Stepper:
    """Prefills prompts into slots of a cache and steps any of them together; `source` drafts for all."""

    def __init__(self, backbone: Backbone, cache: KVCache, source: DraftSource | None = None) -> None:
        self.backbone, self.cache, self.source = backbone, cache, source
        self.runner = EagerRunner(backbone, cache)
        self._vocabulary_V = torch.arange(backbone.vocab_size)

    def start(self, prompt_ids: list[int], params: SamplingParams, slot: int = 0) -> Sequence:
        request = Request(request_id=f"slot-{slot}", prompt_ids=prompt_ids, params=params)
        sequence = Sequence(request=request, slot=slot, stop_ids=frozenset(), max_total=10_000)
        if self.source is not None:
            self.source.start(slot)
        with torch.inference_mode():
            output = self.backbone.prefill(prompt_ids, self.cache.rows((slot,)))
            sequence.num_cached = len(prompt_ids)
            root = first_root(sequence, output, self._vocabulary_V)
            sequence.token_ids.append(root)
            if self.source is not None:
                path = range(len(prompt_ids))
                self.source.observe(Committed(slot, prompt_ids, root, output.hidden_BTE[0], path))
        return sequence

    @torch.inference_mode()
    def step(self, sequences: SequenceOf[Sequence], nodes: SequenceOf[int]) -> StepResult:
        """One step of all; what is decided is booked as the engine does."""
        source = self.source if any(n != 1 for n in nodes) else None
        timer = phase_timer(self.backbone.device)
        timer.mark()
        result = decode_step(self.runner, self._batch(sequences, nodes), source, timer)
        for row, sequence in enumerate(sequences):
            self._book(sequence, result.rows[row], result.hidden_BTE[row])
        return result

    def propose(self, sequences: SequenceOf[Sequence], nodes: SequenceOf[int]) -> DraftTree:
        """What the source would draft now."""
        assert self.source is not None
        return self.source.propose(self._batch(sequences, nodes))

    def _batch(self, sequences: SequenceOf[Sequence], nodes: SequenceOf[int]) -> Batch:
        """One node is a root without drafts."""
        depths = [
            self.source.max_depth(sequence.params.speculation, n)
            for sequence, n in zip(sequences, nodes, strict=True)
            if self.source is not None and n != 1
        ]
        return make_batch(sequences, nodes, max(depths, default=0), self._vocabulary_V)

    def _book(self, sequence: Sequence, row: RowResult, hidden_TE: torch.Tensor) -> None:
        committed = [sequence.root, *row.token_ids[:-1]]
        self.cache.advance(sequence.slot, len(row.path))
        sequence.num_cached += len(row.path)
        sequence.token_ids += row.token_ids
        if self.source is not None:
            self.source.observe(Committed(sequence.slot, committed, sequence.root, hidden_TE, row.path))
