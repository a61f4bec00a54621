"""Runs variants interleaved over prompts and compares their tokens."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from medusa_core.benchmark.runs import Run, Runner
from medusa_core.draft.draft_tree import root_tree
from medusa_core.engine.logits_processors import LogitsChain, NodePaths
from medusa_core.engine.sampling import gumbel_noise
from medusa_core.model.backbone import Backbone
from medusa_core.sampling_params import MAX_SEED, SamplingParams, SpeculationMode, SpeculationParams

WARMUP_TOKENS = 8
BASELINE = SpeculationParams(mode=SpeculationMode.OFF)


@dataclass(frozen=True, slots=True)
class Variant:
    """A runner and the speculation to run it with."""

    name: str
    runner: Runner
    speculation: SpeculationParams = BASELINE


@dataclass(frozen=True, slots=True)
class Identity:
    """How many prompts gave the same tokens, and how near a tie the others were.

    `margins`: for each differing prompt the gap between the reference's two best logits (with the position's
    noise at temperature > 0) at the first token that differs.
    """

    same: int
    of: int
    margins: tuple[float, ...]


def interleave(
    variants: Sequence[Variant],
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    *,
    repeats: int = 1,
    on_prompt: Callable[[], None] = lambda: None,
) -> dict[str, list[list[Run]]]:
    """Runs [variant][prompt][repeat]. Per prompt the variants alternate, in a rotating order.

    So machine drift and warm caches affect all alike. Each variant first warms up on a few tokens of the
    first prompt. Prompt i is sampled with seed `params.seed` + i.
    """
    warmup = replace(params, max_tokens=min(WARMUP_TOKENS, params.max_tokens or WARMUP_TOKENS))
    for variant in variants:
        variant.runner(prompts[0], replace(warmup, speculation=variant.speculation))
    runs: dict[str, list[list[Run]]] = {v.name: [[] for _ in prompts] for v in variants}
    turn = 0
    for index, prompt in enumerate(prompts):
        own = prompt_params(params, index)
        for _ in range(repeats):
            for offset in range(len(variants)):
                variant = variants[(turn + offset) % len(variants)]
                run = variant.runner(prompt, replace(own, speculation=variant.speculation))
                runs[variant.name][index].append(run)
            turn += 1
        on_prompt()
    return runs


def compare_tokens(
    reference: Sequence[Sequence[Run]],
    other: Sequence[Sequence[Run]],
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    backbone: Backbone,
) -> Identity:
    """Compare the first run of every prompt, token by token."""
    margins: list[float] = []
    for index, prompt in enumerate(prompts):
        left, right = reference[index][0].token_ids, other[index][0].token_ids
        if left != right:
            common = _common_length(left, right)
            own = prompt_params(params, index)
            margins.append(decision_margin(backbone, [*prompt, *left[:common]], own))
    return Identity(same=len(prompts) - len(margins), of=len(prompts), margins=tuple(margins))


@torch.inference_mode()
def decision_margin(backbone: Backbone, token_ids: Sequence[int], params: SamplingParams) -> float:
    """Gap between the two best candidates for the token after `token_ids`, in units of logits."""
    ids = torch.tensor([list(token_ids)], device=backbone.device)
    logits = backbone.model(input_ids=ids, use_cache=False).logits[:, -1, : backbone.vocab_size].float()
    scores = logits
    if not params.is_greedy:
        vocabulary = torch.arange(backbone.vocab_size, device=backbone.device)
        noise = gumbel_noise(params.known_seed, [len(token_ids)], vocabulary)
        root = root_tree(torch.tensor(token_ids[-1:], device=backbone.device))
        paths = NodePaths(token_ids, root, 0)
        scores = LogitsChain.of(params).process(logits, paths) + params.temperature * noise
        if int(torch.isfinite(scores).sum()) < 2:  # one candidate left: the filter, not the draw, was the tie
            scores = logits
    best = scores[0].topk(2).values
    return float(best[0] - best[1])


def prompt_params(params: SamplingParams, index: int) -> SamplingParams:
    """The parameters with the prompt's own seed."""
    return replace(params, seed=(params.known_seed + index) % (MAX_SEED + 1))


def _common_length(left: Sequence[int], right: Sequence[int]) -> int:
    pairs = enumerate(zip(left, right, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(left), len(right)))
