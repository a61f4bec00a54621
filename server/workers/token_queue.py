"""Where a request's tokens wait for whoever turns them into text."""

import asyncio
from dataclasses import dataclass

from medusa_core.engine.outputs import FinishReason
from server.errors import ApiError


@dataclass(frozen=True, slots=True)
class Finished:
    """The request ended by itself, or was cut short with what it had."""

    reason: FinishReason


@dataclass(frozen=True, slots=True)
class Failed:
    """The request ended with an error the client is to see."""

    error: ApiError


End = Finished | Failed


class Mailbox:
    """Tokens and one end, from the event loop's callbacks to one reader on the same loop.

    The first tokens are handed out at once, further ones in batches at least `interval` seconds apart, and
    the end at once with what is left. Where a step takes 3 ms, a chunk, its JSON, two system calls and the
    client's own work for each step would cost a tenth of the speed; nobody sees 8 ms.
    """

    __slots__ = ("_end", "_interval", "_not_before", "_timer", "_tokens", "_waiter")

    def __init__(self, interval: float = 0.0) -> None:
        self._interval = interval
        self._not_before = 0.0  # the loop's time
        self._tokens: list[int] = []
        self._end: End | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    def put(self, token_ids: tuple[int, ...]) -> None:
        """Add tokens; after the end they are dropped, since nobody may see them."""
        if token_ids and self._end is None:
            self._tokens.extend(token_ids)
            if self._waiter is not None:
                self._wake_in_time()

    def close(self, end: End) -> bool:
        """Set the one end there is; False if there was one already."""
        if self._end is not None:
            return False
        self._end = end
        self._wake()
        return True

    async def take(self) -> tuple[list[int], End | None]:
        """All tokens not yet taken, and the end if it has come. Waits until there is either."""
        loop = asyncio.get_running_loop()
        while self._end is None and not (self._tokens and loop.time() >= self._not_before):
            self._waiter = loop.create_future()
            if self._tokens:
                self._wake_in_time()
            try:
                await self._waiter
            finally:
                self._waiter = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._not_before = loop.time() + self._interval
        tokens, self._tokens = self._tokens, []
        return tokens, self._end

    def _wake_in_time(self) -> None:
        loop = asyncio.get_running_loop()
        if loop.time() >= self._not_before:
            self._wake()
        elif self._timer is None:
            self._timer = loop.call_at(self._not_before, self._wake)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
