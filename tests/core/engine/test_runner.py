"""A step decides nothing on the host: it runs on the meta device, where there are no values to look at."""

import copy
from collections.abc import Callable

import pytest
import torch

from medusa_core.draft.draft_tree import root_tree
from medusa_core.draft.heads import DraftHeads
from medusa_core.draft.source import Committed
from medusa_core.engine.batch import make_batch
from medusa_core.engine.runner import EagerRunner
from medusa_core.engine.sequence import Sequence
from medusa_core.model.backbone import Backbone
from medusa_core.request import Request
from medusa_core.sampling_params import SamplingParams
from tests.core.conftest import speculate
from tests.core.stepping import head_source

META = torch.device("meta")
SAMPLING = (
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.8, seed=1),
    SamplingParams(temperature=0.8, seed=1, top_p=0.9, top_k=40, min_p=0.05),
    SamplingParams(temperature=0.8, seed=1, top_p=0.9, speculation=speculate("typical")),
    SamplingParams(temperature=0.0, speculation=speculate(tree="mc_sim_7b_63")),
)


@pytest.fixture(scope="module")
def meta_backbone(tiny_backbone: Backbone) -> Backbone:
    """The tiny backbone without its values; what it found out about the model it knows already."""
    backbone = copy.copy(tiny_backbone)
    backbone.model = copy.deepcopy(tiny_backbone.model).to(META)
    backbone.device = META
    return backbone


def sequence_in(slot: int, params: SamplingParams) -> Sequence:
    request = Request(request_id="a", prompt_ids=[5, 6, 7], params=params)
    sequence = Sequence(request=request, slot=slot, stop_ids=frozenset(), max_total=200, num_cached=3)
    sequence.token_ids.append(8)
    return sequence


@pytest.mark.parametrize("params", SAMPLING, ids=str)
@pytest.mark.parametrize("kind", ["none", "medusa", "hydra", "hydra++"])
@torch.inference_mode()
def test_no_value_is_looked_at(
    meta_backbone: Backbone,
    heads_that_know: Callable[[str], DraftHeads],
    kind: str,
    params: SamplingParams,
) -> None:
    """Propose, verify, accept and commit of two rows, up to the step's one transfer."""
    cache = meta_backbone.new_cache(2, 200)
    sequences = [sequence_in(slot, params) for slot in range(2)]
    for sequence in sequences:
        cache.advance(sequence.slot, sequence.num_cached)
    vocabulary = torch.arange(meta_backbone.vocab_size, device=META)
    runner = EagerRunner(meta_backbone, cache)
    if kind == "none":
        batch = make_batch(sequences, [1, 1], 0, vocabulary)
        tree = root_tree(batch.roots_B)
    else:
        heads = copy.deepcopy(heads_that_know(kind)).to(META)  # type: ignore[attr-defined]
        heads._borrowed = (meta_backbone.embed,)
        source = head_source(heads, slots=2, capacity=200, device=META)
        for sequence in sequences:
            source.start(sequence.slot)
            hidden = torch.zeros(3, meta_backbone.hidden_size, device=META)
            source.observe(Committed(sequence.slot, [5, 6, 7], 8, hidden, range(3)))
        depth = source.max_depth(params.speculation, 12)
        batch = make_batch(sequences, [12, 12], depth, vocabulary)
        tree = source.propose(batch)
    decision = runner.decide(batch, tree, runner.verify(batch, tree))
    assert decision.path_BD.shape == (2, tree.max_depth + 1)
    assert decision.next_roots_B.device == META
    with pytest.raises((RuntimeError, NotImplementedError)):
        decision.count_B.tolist()  # what the test rests on
