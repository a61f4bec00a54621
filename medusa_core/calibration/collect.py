"""What the heads guessed and what the model said: one teacher-forced pass over its own answers.

Shapes: N positions, K heads, V vocabulary.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from medusa_core.decoding.drafting import couple
from medusa_core.decoding.step import prefill_chunk
from medusa_core.engine import Engine
from medusa_core.errors import CapacityError, DataError, RequestError
from medusa_core.request import FinishReason, SamplingParams
from medusa_core.sampling import gumbel_noise

Messages = Sequence[Mapping[str, str]]
CHUNK_POSITIONS = 256  # positions whose K x V scores exist at once


@dataclass(frozen=True, slots=True)
class Answer:
    """A prompt and the model's own continuation, with the sampling that made it."""

    prompt_ids: list[int]
    answer_ids: list[int]
    params: SamplingParams


@dataclass(frozen=True, slots=True)
class Observed:
    """A chunk of positions: the heads' scores [N, K, V] and the tokens [N, K] they should have ranked first.

    `start`: place of the first of them in the answer.
    Scores are what drafting uses: coupled with the draw's noise at temperature > 0. Target -1: no such token.
    """

    scores_NKV: Tensor
    targets_NK: Tensor
    start: int


def answer_prompts(engine: Engine, prompts: Sequence[Messages], params: SamplingParams) -> Iterator[Answer]:
    """Let the model answer each prompt; those too long for the context are left out."""
    for seed, messages in enumerate(prompts):
        seeded = replace(params, seed=params.seed + seed)
        try:
            prompt_ids = engine.chat.render(messages)
            outputs = list(engine.generate(prompt_ids, seeded))
        except CapacityError:
            raise  # the engine is busy with something else
        except RequestError:
            continue
        if outputs[-1].finish_reason is FinishReason.ERROR:
            raise DataError(f"the model fails on a prompt: {outputs[-1].error}")
        tokens = [token for output in outputs for token in output.token_ids]
        if outputs[-1].stop_token_id is not None:
            # The model decided it, so the heads should have guessed it.
            tokens.append(outputs[-1].stop_token_id)
        if len(tokens) > 1:
            yield Answer(prompt_ids, tokens, seeded)


@torch.inference_mode()
def observe(engine: Engine, answer: Answer) -> Iterator[Observed]:
    """The heads' scores at every position of the answer from which at least one draft can be judged."""
    if engine.heads is None:
        raise DataError("there are no draft heads to calibrate")
    heads, backbone = engine.heads, engine.backbone
    ids = [*answer.prompt_ids, *answer.answer_ids]
    hidden = _hidden_states(engine, ids[:-2])
    first = len(answer.prompt_ids) - 1  # its hidden state decides the answer's first token, the first root
    token_ids = torch.arange(heads.vocab_size, device=backbone.device)
    padded = torch.tensor([*ids, *[-1] * heads.num_heads], device=backbone.device)
    for start in range(first, len(ids) - 2, CHUNK_POSITIONS):
        stop = min(start + CHUNK_POSITIONS, len(ids) - 2)
        logits = heads.draft_logits(hidden[start:stop])
        scores = logits.float()
        if not answer.params.is_greedy:
            noise = gumbel_noise(answer.params.seed, range(start + 2, stop + 1 + heads.num_heads), token_ids)
            windows = [noise[i : i + heads.num_heads] for i in range(stop - start)]
            scores = torch.stack(
                [
                    couple(row[None], answer.params.temperature, window)[0]
                    for row, window in zip(logits, windows, strict=True)
                ]
            )
        targets = padded[start + 2 : stop + 1 + heads.num_heads].unfold(0, heads.num_heads, 1)
        yield Observed(scores, targets, start - first)


def _hidden_states(engine: Engine, ids: list[int]) -> Tensor:
    """Hidden states [S, E] of a whole sequence, through the engine's own prefill in a cache of its own."""
    cache = engine.backbone.new_cache(1, len(ids))
    slot = cache.slots[cache.acquire()]
    size = engine.config.prefill_chunk
    parts = [
        prefill_chunk(engine.backbone, slot, ids[start : start + size]).hidden_BTE[0]
        for start in range(0, len(ids), size)
    ]
    return torch.cat(parts)
