"""From a step's result to the `StepOutput` that leaves the engine."""

from collections.abc import Sequence as SequenceOf
from dataclasses import replace

from medusa_core.draft.draft_tree import Origin
from medusa_core.engine.outputs import StepOutput, StepStats, TokenExtras
from medusa_core.engine.sequence import Sequence, cut_run
from medusa_core.engine.step import RowResult, StepResult
from medusa_core.sampling_params import SpeculationMode

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
