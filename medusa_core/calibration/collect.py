"""Collects what heads predict: the model answers prompts, then one teacher-forced pass over each answer.

Shapes: N positions, K heads, V vocabulary.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from medusa_core.draft.coupling import DrawNoise, couple
from medusa_core.draft.heads import DraftHeads, ParallelHeads, SequentialHeads
from medusa_core.engine.engine import Engine
from medusa_core.engine.outputs import FinishReason
from medusa_core.engine.sampling import gumbel_noise
from medusa_core.errors import CapacityError, DataError, RequestError
from medusa_core.sampling_params import SamplingParams

Messages = Sequence[Mapping[str, str]]
CHUNK_POSITIONS = 256  # positions whose K x V scores are in memory at once


@dataclass(frozen=True, slots=True)
class Answer:
    """A prompt, the model's continuation, and the sampling it was drawn with."""

    prompt_ids: list[int]
    answer_ids: list[int]
    params: SamplingParams


@dataclass(frozen=True, slots=True)
class Observed:
    """A chunk of positions of an answer.

    `hidden_NE`: the heads' input; `roots_N`: the next tokens; `targets_NK`: the tokens after those, which the
    heads should rank first (-1 beyond the answer's end). `scores_NKV`: the heads' scores on the true path, as
    drafting uses them: coupled with the draw's noise at temperature > 0. `rows_NK`: the targets' rows in
    `scores_NKV`, V if the heads do not know the token. `start`: the first position's place in the answer.
    """

    hidden_NE: Tensor
    roots_N: Tensor
    scores_NKV: Tensor
    targets_NK: Tensor
    rows_NK: Tensor
    start: int


def answer_prompts(engine: Engine, prompts: Sequence[Messages], params: SamplingParams) -> Iterator[Answer]:
    """The model's answer to each prompt; prompts too long for the context are skipped."""
    for seed, messages in enumerate(prompts):
        seeded = replace(params, seed=params.known_seed + seed)
        try:
            prompt_ids = engine.chat_tokenizer.render(messages)
            outputs = list(engine.steps(prompt_ids, seeded))
        except CapacityError:
            raise  # the engine serves other requests
        except RequestError:
            continue
        if outputs[-1].finish_reason is FinishReason.ERROR:
            raise DataError(f"the model fails on a prompt: {outputs[-1].error}")
        tokens = [token for output in outputs for token in output.token_ids]
        if outputs[-1].stop_token_id is not None:
            # The model decided it, so heads should predict it.
            tokens.append(outputs[-1].stop_token_id)
        if len(tokens) > 1:
            yield Answer(prompt_ids, tokens, seeded)


@torch.inference_mode()
def observe(engine: Engine, answer: Answer) -> Iterator[Observed]:
    """Observe every position of the answer at which at least one head has a target."""
    assert engine.heads is not None
    heads, device = engine.heads, engine.backbone.device
    ids = [*answer.prompt_ids, *answer.answer_ids]
    hidden_SE = heads.contextualize(_hidden_states(engine, ids[:-2])[None])[0]
    first = len(answer.prompt_ids) - 1  # its hidden state gives the answer's first token, the first root
    padded = torch.tensor([*ids, *[-1] * heads.num_heads], device=device)
    for start in range(first, len(ids) - 2, CHUNK_POSITIONS):
        stop = min(start + CHUNK_POSITIONS, len(ids) - 2)
        # After each position: its root, then the K targets.
        behind = padded[start + 1 : stop + 1 + heads.num_heads].unfold(0, heads.num_heads + 1, 1)
        logits = _true_path_logits(heads, hidden_SE[start:stop], behind.clamp(min=0))
        yield Observed(
            hidden_NE=hidden_SE[start:stop],
            roots_N=behind[:, 0],
            scores_NKV=_coupled(heads, logits, answer.params, start, engine.backbone.vocab_size),
            targets_NK=behind[:, 1:],
            rows_NK=_rows(heads, behind[:, 1:], engine.backbone.vocab_size),
            start=start - first,
        )


def _true_path_logits(heads: DraftHeads, hidden_NE: Tensor, behind_NJ: Tensor) -> Tensor:
    """Logits [N, K, V]; heads that see the path get the tokens of the answer."""
    if not isinstance(heads, SequentialHeads):
        assert isinstance(heads, ParallelHeads)
        return heads.draft_logits(hidden_NE)
    levels = [
        heads.level_logits(level, hidden_NE, behind_NJ[:, None, : level + 1])
        for level in range(heads.num_heads)
    ]
    return torch.cat(levels, dim=1)


def _coupled(
    heads: DraftHeads, logits_NKV: Tensor, params: SamplingParams, start: int, vocab_size: int
) -> Tensor:
    """Scores [N, K, V] of the positions from `start` on, each with the noise of the draws after its root."""
    if params.is_greedy:
        return logits_NKV.float()
    count, num_heads = logits_NKV.shape[:2]
    token_ids = torch.arange(vocab_size, device=logits_NKV.device)
    noise = gumbel_noise(params.known_seed, range(start + 2, start + 1 + count + num_heads), token_ids)
    noise_NKV = noise.unfold(0, num_heads, 1).transpose(1, 2)  # each position's own K rows
    temperature = torch.tensor([params.temperature], device=logits_NKV.device)
    return couple(logits_NKV, DrawNoise(temperature, noise_NKV), heads.token_map)


def _rows(heads: DraftHeads, targets_NK: Tensor, vocab_size: int) -> Tensor:
    """Rows [N, K] of token ids in the heads' logits; V for tokens they do not know, -1 for -1."""
    token_map = heads.token_map
    if token_map is None:
        return targets_NK.clamp(max=heads.vocab_size)
    rows = torch.full((vocab_size,), heads.vocab_size, device=targets_NK.device)
    rows[token_map] = torch.arange(heads.vocab_size, device=targets_NK.device)
    return torch.where(targets_NK < 0, -1, rows[targets_NK.clamp(min=0)])


def _hidden_states(engine: Engine, ids: list[int]) -> Tensor:
    """Hidden states [S, E] of a sequence, by the engine's prefill in a separate cache."""
    cache = engine.backbone.new_cache(1, len(ids))
    rows = cache.rows((0,))
    size = engine.config.prefill_chunk
    parts = [
        engine.backbone.prefill(ids[start : start + size], rows).hidden_BTE[0]
        for start in range(0, len(ids), size)
    ]
    return torch.cat(parts)
