"""`medusa distill`: re-asks seed dialogues concurrently, turn by turn, and writes them to a journal."""

import asyncio
import hashlib
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from medusa_core.distillation.answers import Answerer, RowError
from medusa_core.distillation.journal import Journal
from medusa_core.distillation.seeds import Message, SeedDialogue, Seeds, digest
from medusa_core.distillation.settings import DistillSettings
from medusa_core.errors import DataError
from medusa_core.status_bar import StatusBar

REPORTED_ROWS = 20
LOG_SECONDS = 30.0
SEED_BYTES = 8
SEED_MASK = 2**63 - 1  # OpenAI's seed is a signed 64-bit number
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


class DistillProgress:
    """Shows a report as it grows."""

    def __init__(self, bar: StatusBar) -> None:
        self._bar = bar
        self._started = self._logged = time.monotonic()

    def show(self, report: DistillReport) -> None:
        """Update the bar or the log after a seed row."""
        now = time.monotonic()
        rate = report.tokens / max(now - self._started, 1e-9)
        status = f"{report.answers} answers · {rate:.0f} tokens/s · {report.failed} failed"
        self._bar.show(total=report.total, completed=report.handled, status=status)
        if self._bar.disable and (now - self._logged >= LOG_SECONDS or report.handled == report.total):
            self._logged = now
            logger.info("%d of %d dialogues · %s", report.handled, report.total, status)


@dataclass(frozen=True, slots=True)
class Reasked:
    """`messages` end with a complete answer, or are empty. `cut`: why turns are missing, None if none are."""

    messages: tuple[Message, ...]
    answers: int
    tokens: int
    cut: str | None = None


def settings_record(settings: DistillSettings, answered_by: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that a resumed run must share with the run that began the file."""
    return {
        "format": 1,
        "data": digest(settings.data),
        "answered_by": dict(answered_by),
        **{name: getattr(settings, name) for name in ("temperature", "top_p", "max_tokens", "turns", "seed")},
    }


class Distillation:
    """One run over the seeds that are not in the journal yet."""

    def __init__(
        self,
        seeds: Seeds,
        journal: Journal,
        answerer: Answerer,
        settings: DistillSettings,
        progress: DistillProgress,
    ) -> None:
        self._answerer, self._journal, self._settings = answerer, journal, settings
        self._progress = progress
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
            self._progress.show(self.report)

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


async def reask(dialogue: SeedDialogue, answerer: Answerer, settings: DistillSettings) -> Reasked:
    """Multi-turn re-asking (Medusa paper §2.3.2), up to the first answer the model does not end itself.

    That answer, its question and all that follows are left out: heads must not learn to go on where the model
    was cut off. An empty answer ends the dialogue too. Raises what the answerer raises.
    """
    messages: tuple[Message, ...] = ()
    tokens = 0
    groups = dialogue.groups[: settings.turns]
    for turn, group in enumerate(groups):
        asked = messages + group
        reply = await answerer.answer(asked, answer_seed(settings.seed, dialogue.row, turn))
        cut = reply.cut if reply.text.strip() or reply.cut else "empty answer"
        if cut is not None:
            return Reasked(messages, turn, tokens, cut)
        tokens += reply.tokens
        messages = (*asked, {"role": "assistant", "content": reply.text})
    return Reasked(messages, len(groups), tokens)


def answer_seed(seed: int, row: int, turn: int) -> int:
    """63 bits from run, row and turn alone, so that order and resuming do not change an answer."""
    digest = hashlib.blake2b(f"{seed}/{row}/{turn}".encode(), digest_size=SEED_BYTES).digest()
    return int.from_bytes(digest) & SEED_MASK
