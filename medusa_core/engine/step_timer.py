"""Times real decode steps in a free slot, from which the tree's size is chosen."""

import logging

import torch

from medusa_core.draft.factory import SpeculatorFactory
from medusa_core.engine.step import DecodeState, decode_step
from medusa_core.engine.step_times import TREE_SIZES, StepTimes, measure_step_times
from medusa_core.model.backbone import Backbone
from medusa_core.model.kv_cache import KVCache
from medusa_core.sampling_params import SamplingParams

logger = logging.getLogger(__name__)


class StepTimer:
    """Runs greedy steps over zeroed context: what they decide is nonsense, what they cost is not."""

    def __init__(self, backbone: Backbone, cache: KVCache, speculation: SpeculatorFactory | None) -> None:
        self._backbone, self._cache, self._speculation = backbone, cache, speculation
        self._token_ids = torch.arange(backbone.vocab_size, device=backbone.device)
        self._params = SamplingParams(temperature=0.0)

    @torch.inference_mode()
    def measure(self, max_context: int) -> StepTimes:
        """Every context, and every tree size where there are heads to fill trees."""
        if self._speculation is None:
            times = measure_step_times(self.seconds, max_context, ())
        else:  # the deepest drafts need positions too
            room = max_context - self._speculation.heads.num_heads
            times = measure_step_times(self.seconds, room, TREE_SIZES)
        logger.info("step times (ms): %s", {n: round(1e3 * t, 2) for n, t in times.trees.items()})
        return times

    def seconds(self, nodes: int, context: int) -> float:
        """One step over `context` cached tokens; `nodes` 1 is ordinary decoding."""
        backbone, slot = self._backbone, self._cache.acquire()
        try:
            cache = self._cache.slots[slot]
            cache.append(context)
            if cache.follower is not None:
                cache.follower.append(context - 1)
            hidden = torch.zeros(1, 1, backbone.hidden_size, dtype=backbone.dtype, device=backbone.device)
            state = DecodeState(self._token_ids[:1], hidden)
            speculator = self._speculation.speculator(self._params, nodes) if self._speculation else None
            return decode_step(backbone, cache, state, self._params, speculator, self._token_ids).seconds
        finally:
            self._cache.release(slot)
