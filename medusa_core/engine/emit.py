"""From a step's result, or its failure, to the `StepOutput` that leaves the engine."""

import logging
from collections.abc import Sequence as SequenceOf
from dataclasses import replace

import torch

from medusa_core.draft.draft_tree import Origin
from medusa_core.engine.outputs import FinishReason, StepOutput, StepStats, TokenExtras
from medusa_core.engine.sequence import Sequence, cut_run
from medusa_core.engine.step import RowResult, StepResult
from medusa_core.sampling_params import SpeculationMode

logger = logging.getLogger(__name__)

# torch's CPU allocator; oneDNN, whose own buffers may be what finds no room.
CPU_OUT_OF_MEMORY = (
    "can't allocate memory",
    "not enough memory",
    "could not create a memory",
    "std::bad_alloc",
)
EXTRAS = {origin: TokenExtras(origin.name.lower()) for origin in Origin}


def emit(
    sequence: Sequence,
    token_ids: list[int],
    origins: SequenceOf[Origin],
    stats: StepStats,
    baseline_per_token: float = 0.0,
) -> StepOutput:
    """Cut the run at its first stop and book what is left.

    Ordinary decoding would have decided just that, the stop token included: that many times
    `baseline_per_token` (seconds) is the step's baseline.
    """
    cut = cut_run(token_ids, sequence.stop_ids, sequence.budget)
    sequence.num_generated += len(cut.token_ids)
    decided = len(cut.token_ids) + (cut.stop_token_id is not None)
    return StepOutput(
        request_id=sequence.request_id,
        token_ids=cut.token_ids,
        extras=tuple(EXTRAS[origin] for origin in origins[: len(cut.token_ids)]),
        stats=replace(stats, baseline_seconds=decided * baseline_per_token),
        finish_reason=cut.finish_reason,
        stop_token_id=cut.stop_token_id,
    )


def decode_stats(result: StepResult, row: RowResult, mode: SpeculationMode) -> StepStats:
    """What a decode step cost and which drafts it accepted."""
    return StepStats(
        mode=mode,
        is_prefill=False,
        seconds=result.seconds,
        propose_seconds=result.propose_seconds,
        verify_seconds=result.verify_seconds,
        commit_seconds=result.commit_seconds,
        tree_nodes=result.tree_nodes,
        drafted=row.drafted,
        accepted=tuple(int(depth < row.accepted) for depth in range(len(row.drafted))),
    )


def failed(request_id: str, error: Exception) -> StepOutput:
    """The last output of a request whose step failed; the error goes to the log as well."""
    logger.error("request %s failed", request_id, exc_info=error, extra={"completion_id": request_id})
    out_of_memory = _is_out_of_memory(error)
    if out_of_memory and torch.cuda.is_available():
        # What other requests freed lies in blocks of sizes this one could not use.
        torch.cuda.empty_cache()
    return StepOutput(
        request_id=request_id,
        token_ids=(),
        finish_reason=FinishReason.ERROR,
        error=f"{type(error).__name__}: {error}",
        out_of_memory=out_of_memory,
    )


def _is_out_of_memory(error: Exception) -> bool:
    """Whether host or device had no room; torch has an exception of its own for CUDA only."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in CPU_OUT_OF_MEMORY)
