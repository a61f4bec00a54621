"""Times real decode steps in a free slot, from which the tree's size is chosen; remembers them on disk."""

import logging
from typing import Any

import torch
from torch import nn

from medusa_core import __version__
from medusa_core.disk_cache import key_of, load_json, store_json
from medusa_core.draft.head_source import HeadSource
from medusa_core.draft.heads import DraftHeads
from medusa_core.draft.source import Committed
from medusa_core.draft.tree_size import TREE_SIZES
from medusa_core.engine.batch import make_batch
from medusa_core.engine.runner import Runner
from medusa_core.engine.sequence import Sequence
from medusa_core.engine.step import decode_step
from medusa_core.engine.step_times import StepTimes, measure_step_times, still_hold
from medusa_core.engine.timing import phase_timer
from medusa_core.machine import machine_facts
from medusa_core.model.backbone import Backbone
from medusa_core.model.kv_cache import KVCache
from medusa_core.request import Request
from medusa_core.sampling_params import SamplingParams

logger = logging.getLogger(__name__)


class StepTimer:
    """Runs greedy steps over zeroed context: what they decide is nonsense, what they cost is not."""

    def __init__(
        self, runner: Runner, cache: KVCache, backbone: Backbone, source: HeadSource | None, step_name: str
    ) -> None:
        """`step_name`: which implementation `runner` is; times of another are not taken for its own."""
        self._runner, self._cache, self._backbone, self._source = runner, cache, backbone, source
        self._step_name = step_name
        self._vocabulary_V = torch.arange(backbone.vocab_size, device=backbone.device)
        self._request = Request(
            request_id="measure", prompt_ids=[0], params=SamplingParams(temperature=0.0, seed=0)
        )

    @torch.inference_mode()
    def measure(self, max_context: int) -> StepTimes:
        """Every context, and every tree size where there are heads to fill trees.

        Those of an earlier start are taken as they are, unless steps take another time now.
        """
        depth = self._source.heads.num_heads if self._source else 0  # the deepest drafts need positions too
        room = max_context - depth
        name = f"step-times-{key_of(**self._facts(max_context))}"
        times = StepTimes.from_json(load_json(name) or {})
        if times is not None and still_hold(times, self.seconds, room):
            origin = "from an earlier start"
        else:
            origin = "measured" if times is None else "measured anew, as those of an earlier start are off"
            times = measure_step_times(self.seconds, room, TREE_SIZES if self._source else ())
            store_json(name, times.to_json())
        logger.info("step times (ms), %s: %s", origin, {n: round(1e3 * t, 2) for n, t in times.trees.items()})
        return times

    def _facts(self, max_context: int) -> dict[str, Any]:
        """All that a step's time depends on."""
        backbone, heads = self._backbone, self._source.heads if self._source else None
        config = backbone.config.to_dict()
        config.pop("_name_or_path", None)  # a model that was moved is the same
        return {
            "version": __version__,
            "model": config,
            "vocab_size": backbone.vocab_size,
            "dtype": backbone.dtype,
            "device": backbone.device,
            "heads": None if heads is None else _shape_facts(heads),
            "step": self._step_name,
            "context": max_context,
            "machine": machine_facts(backbone.device),
        }

    def seconds(self, nodes: int, context: int) -> float:
        """One step over `context` cached tokens; `nodes` 1 is ordinary decoding."""
        slot, _ = self._cache.acquire(())
        try:
            self._cache.advance(slot, context)
            sequence = Sequence(
                request=self._request,
                slot=slot,
                stop_ids=frozenset(),
                max_total=context + nodes,
                num_cached=context,
            )
            source, depth = None, 0
            if self._source is not None and nodes > 1:
                source, depth = self._source, self._prepare(slot, nodes, context)
            timer = phase_timer(self._backbone.device)
            timer.mark()
            batch = make_batch([sequence], [nodes], depth, self._vocabulary_V)
            return decode_step(self._runner, batch, source, timer).seconds
        finally:
            self._cache.release(slot)

    def _prepare(self, slot: int, nodes: int, context: int) -> int:
        """Have the heads know of all of the context but its last token; returns the depth of their tree."""
        assert self._source is not None
        backbone = self._backbone
        hidden = torch.zeros(1, backbone.hidden_size, dtype=backbone.dtype, device=backbone.device)
        self._source.start(slot)
        self._source.assume_read(slot, context - 1)
        self._source.observe(Committed(slot, [0], 0, hidden, [0]))
        return self._source.max_depth(self._request.params.speculation, nodes)


def _shape_facts(heads: DraftHeads) -> dict[str, Any]:
    """The heads' kind and the shapes of their weights."""
    weights = heads.named_parameters() if isinstance(heads, nn.Module) else ()
    shapes = {name: list(weight.shape) for name, weight in weights}
    return {"kind": type(heads).__name__, "num_heads": heads.num_heads, "weights": shapes}
