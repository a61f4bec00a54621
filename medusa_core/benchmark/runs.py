"""Timed runs of one prompt, by our engine or by transformers' `generate` on the same weights."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from medusa_core.engine.engine import Engine
from medusa_core.engine.outputs import FinishReason, StepStats
from medusa_core.errors import RequestError
from medusa_core.sampling_params import SamplingParams

Runner = Callable[[Sequence[int], SamplingParams], "Run"]


@dataclass(frozen=True, slots=True)
class Run:
    """One generation. `token_ids`: all generated tokens, a stop token included.

    `prefill_seconds` last to the first token, `decode_seconds` from there to the last one, so they cover
    `decoded_tokens`. `steps`: the decode steps, of our engine only.
    """

    token_ids: tuple[int, ...]
    prefill_seconds: float
    decode_seconds: float
    steps: tuple[StepStats, ...] = ()

    @property
    def decoded_tokens(self) -> int:
        return len(self.token_ids) - 1

    @property
    def tokens_per_second(self) -> float | None:
        """Decode rate; None with a single token."""
        return self.decoded_tokens / self.decode_seconds if self.decoded_tokens > 0 else None


def engine_runner(engine: Engine) -> Runner:
    """A runner of `engine.steps`, timed from outside, so that time between steps counts."""

    def run(prompt_ids: Sequence[int], params: SamplingParams) -> Run:
        tokens: list[int] = []
        steps: list[StepStats] = []
        start = time.perf_counter()
        first = last = 0.0
        for output in engine.steps(prompt_ids, params):
            if output.finish_reason is FinishReason.ERROR:
                raise RequestError(f"a benchmark request failed: {output.error}")
            tokens.extend(output.token_ids)
            if output.stop_token_id is not None:
                tokens.append(output.stop_token_id)
            if output.stats is not None and not output.stats.is_prefill:
                steps.append(output.stats)
            last = time.perf_counter()
            if tokens and not first:
                first = last
        return Run(tuple(tokens), first - start, last - first, tuple(steps))

    return run


def hf_runner(engine: Engine) -> Runner:
    """A runner of transformers' `generate`, with its default cache, on the engine's own weights.

    Timed as tokens reach a streamer (about 1 µs a token), so its set-up and tear-down do not count as
    decoding.
    """
    model = engine.backbone.model
    eos_ids = sorted(engine.chat_tokenizer.eos_token_ids)
    padding = list(range(engine.backbone.vocab_size, len(model.get_output_embeddings().weight)))

    def run(prompt_ids: Sequence[int], params: SamplingParams) -> Run:
        input_ids = torch.tensor([list(prompt_ids)], device=engine.backbone.device)
        clock = _Clock()
        torch.manual_seed(params.known_seed % 2**63)
        start = time.perf_counter()
        sequences = model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            generation_config=_generation_config(params, eos_ids, padding),
            streamer=clock,
        )
        times = clock.times[1:]
        tokens = tuple(int(token) for token in sequences[0, len(prompt_ids) :])
        return Run(tokens, times[0] - start, times[-1] - times[0])

    return run


class _Clock(BaseStreamer):  # type: ignore[no-untyped-call, misc, unused-ignore]
    """Records when each token arrives; `generate` puts the prompt first."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing to flush."""


def _generation_config(params: SamplingParams, eos_ids: list[int], padding: list[int]) -> GenerationConfig:
    """A configuration with every value set: `generate` takes missing ones from the model's own."""
    stops = [] if params.ignore_eos else eos_ids
    return GenerationConfig(
        do_sample=not params.is_greedy,
        temperature=1.0 if params.is_greedy else params.temperature,
        top_p=params.top_p,
        top_k=50 if params.is_greedy else params.top_k,  # its default: greedy warns of any other
        min_p=params.min_p or None,
        repetition_penalty=1.0,
        num_beams=1,
        max_new_tokens=params.max_tokens,
        eos_token_id=[*stops, *params.stop_token_ids] or None,
        suppress_tokens=padding or None,  # a padded vocabulary's extra ids, as our engine does
        pad_token_id=eos_ids[0] if eos_ids else 0,
    )
