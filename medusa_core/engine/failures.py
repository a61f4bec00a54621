"""How a request ends whose step failed."""

import logging

import torch

from medusa_core.engine.outputs import FinishReason, StepOutput

logger = logging.getLogger(__name__)

# torch's CPU allocator; oneDNN, whose own buffers may be what finds no room.
CPU_OUT_OF_MEMORY = (
    "can't allocate memory",
    "not enough memory",
    "could not create a memory",
    "std::bad_alloc",
)


def failed(request_id: str, error: Exception) -> StepOutput:
    """The last output of a request whose step failed; the error goes to the log as well."""
    logger.error("request %s failed", request_id, exc_info=error, extra={"completion_id": request_id})
    out_of_memory = is_out_of_memory(error)
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


def is_out_of_memory(error: Exception) -> bool:
    """Whether host or device had no room; torch has an exception of its own for CUDA only."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in CPU_OUT_OF_MEMORY)
