"""`medusa distill`: re-asks seed dialogues concurrently and writes them to a journal."""

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from medusa_core.distillation.answers import Answerer, RowError
from medusa_core.distillation.dialogue import reask
from medusa_core.distillation.journal import Journal
from medusa_core.distillation.seeds import SeedDialogue, Seeds, digest
from medusa_core.distillation.settings import DistillSettings
from medusa_core.errors import DataError

REPORTED_ROWS = 20
FAILURES_IN_A_ROW = 10  # or `concurrency`, if that is more

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class DistillReport:
    """Counts of seed rows by outcome, and of this run's answers and tokens.

    `finished`: in the file before this run. `shortened` (among `written`): an answer that did not end, or an
    empty one, cut off the rest.
    """

    total: int = 0
    finished: int = 0
    bad: int = 0
    written: int = 0
    shortened: int = 0
    dropped: int = 0
    failed: int = 0
    answers: int = 0
    tokens: int = 0

    @property
    def handled(self) -> int:
        return self.finished + self.written + self.dropped + self.failed


Watch = Callable[[DistillReport], None]


def settings_record(settings: DistillSettings, answered_by: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that a resumed run must share with the run that began the file."""
    return {
        "format": 1,
        "data": digest(settings.data),
        "answered_by": dict(answered_by),
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "max_tokens": settings.max_tokens,
        "turns": settings.turns,
        "seed": settings.seed,
    }


class Distillation:
    """One run over the seeds that are not in the journal yet."""

    def __init__(
        self, seeds: Seeds, journal: Journal, answerer: Answerer, settings: DistillSettings, watch: Watch
    ) -> None:
        self._answerer, self._journal, self._settings, self._watch = answerer, journal, settings, watch
        self._waiting = [d for d in seeds.dialogues if d.row not in journal.done]
        total = len(seeds.dialogues)
        self.report = DistillReport(total=total, finished=total - len(self._waiting), bad=seeds.bad_rows)
        self._failures_in_a_row = 0

    async def run(self) -> DistillReport:
        """Raises `DataError` after too many failures in a row, else what the answerer raises; rows stay."""
        rows = iter(self._waiting)
        tasks = [asyncio.create_task(self._work(rows)) for _ in range(self._settings.concurrency)]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return self.report

    async def _work(self, rows: Iterator[SeedDialogue]) -> None:
        for dialogue in rows:
            try:
                await self._one(dialogue)
            except RowError as error:
                self._fail(dialogue, error)
            else:
                self._failures_in_a_row = 0
            self._watch(self.report)

    async def _one(self, dialogue: SeedDialogue) -> None:
        result = await reask(dialogue, self._answerer, self._settings)
        report = self.report
        report.answers += result.answers
        report.tokens += result.tokens
        if result.messages:
            self._journal.add(dialogue.row, result.messages)
            report.written += 1
            report.shortened += result.cut is not None
        else:
            self._journal.drop(dialogue.row, str(result.cut))
            report.dropped += 1

    def _fail(self, dialogue: SeedDialogue, error: RowError) -> None:
        self.report.failed += 1
        self._failures_in_a_row += 1
        if self.report.failed <= REPORTED_ROWS:
            logger.warning("%s failed: %s", dialogue.origin, error)
        if self._failures_in_a_row >= max(FAILURES_IN_A_ROW, self._settings.concurrency):
            raise DataError(
                f"stopped after {self._failures_in_a_row} failures in a row, the last: {error}; "
                "the same command goes on from here"
            )
