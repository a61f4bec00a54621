"""Where a request's tokens wait for whoever turns them into text."""

import asyncio
from dataclasses import dataclass

from medusa_core.request import FinishReason
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

    A reader that lags finds everything that has gathered meanwhile in one batch.
    """

    __slots__ = ("_end", "_tokens", "_waiter")

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._end: End | None = None
        self._waiter: asyncio.Future[None] | None = None

    def put(self, token_ids: tuple[int, ...]) -> None:
        """Add tokens; after the end they are dropped, since nobody may see them."""
        if token_ids and self._end is None:
            self._tokens.extend(token_ids)
            self._wake()

    def close(self, end: End) -> bool:
        """Set the one end there is; False if there was one already."""
        if self._end is not None:
            return False
        self._end = end
        self._wake()
        return True

    async def take(self) -> tuple[list[int], End | None]:
        """All tokens not yet taken, and the end if it has come. Waits until there is either."""
        while not self._tokens and self._end is None:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        tokens, self._tokens = self._tokens, []
        return tokens, self._end

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
