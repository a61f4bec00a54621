"""A processor sees each node's own path: the processed row of a node is that of ordinary decoding."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from medusa_core.draft.draft_tree import root_tree
from medusa_core.draft.heads import DraftHeads
from medusa_core.draft.ngram import Draft, as_tree
from medusa_core.engine.logits_processors import NodePaths
from medusa_core.model.backbone import Backbone
from medusa_core.sampling_params import SamplingParams
from tests.core.stepping import Stepper, head_source

CPU = torch.device("cpu")


@dataclass(frozen=True)
class NoRepeats:
    """Forbids every token that stands anywhere before: the strongest dependence on a path there is."""

    vocab_size: int

    def process(self, logits_NV: Tensor, paths: NodePaths) -> Tensor:
        seen = torch.zeros(self.vocab_size, dtype=torch.bool)
        seen[list(paths.history)] = True
        seen_NV = seen.repeat(len(logits_NV), 1).scatter(1, paths.path_tokens_NJ, True)
        return logits_NV.masked_fill(seen_NV, -torch.inf)


def test_paths_of_nodes() -> None:
    drafts = [Draft(7, 0, 1), Draft(8, 1, 2), Draft(9, 0, 1), Draft(6, 2, 3)]
    paths = NodePaths((1, 2, 5), as_tree([drafts], torch.tensor([5])), 0)
    assert paths.depths_N.tolist() == [0, 1, 2, 1, 3]
    ends = [
        row[: depth + 1] for row, depth in zip(paths.path_tokens_NJ.tolist(), paths.depths_N, strict=True)
    ]
    assert ends == [[5], [5, 7], [5, 7, 8], [5, 9], [5, 7, 8, 6]]
    assert NodePaths((1, 6), root_tree(torch.tensor([5, 6])), 1).path_tokens_NJ.tolist() == [[6]]


def test_a_path_dependent_processor_is_exact_under_speculation(
    tiny_backbone: Backbone, trained_heads: DraftHeads, tiny_prompts: list[list[int]]
) -> None:
    processor = NoRepeats(tiny_backbone.vocab_size)
    source = head_source(trained_heads)
    accepted = 0
    for number, prompt in enumerate(tiny_prompts[:12]):
        params = SamplingParams(temperature=0.9 * (number % 2), seed=number, top_p=0.9)
        answers = []
        for nodes in (1, 16):
            stepper = Stepper(tiny_backbone, tiny_backbone.new_cache(1, 200), source)
            sequence = stepper.start(prompt, params)
            sequence.chain = replace(sequence.chain, processors=(processor, *sequence.chain.processors))
            while len(sequence.token_ids) < len(prompt) + 30:
                result = stepper.step([sequence], [nodes])
                accepted += result.rows[0].accepted
            answers.append(sequence.token_ids[: len(prompt) + 30])
        assert answers[0] == answers[1]
        behind = answers[0][len(prompt) + 1 :]
        assert len({*behind}) == len(behind)
    assert accepted > 20
