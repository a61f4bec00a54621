"""The queue of a request's step outputs, between the scheduler and whoever turns tokens into text."""

import asyncio

from medusa_core.engine.outputs import FinishReason, StepOutput
from server.errors import ApiError

End = FinishReason | ApiError
"""How a request ended: by itself or cut short with what it had, or with an error the client is to see."""


class TokenQueue:
    """Outputs with tokens and one end, from the event loop's callbacks to one reader on the same loop.

    The first tokens are handed out at once, further ones in batches at least `interval` seconds apart, and
    the end at once with what is left. Where a step takes 3 ms, a chunk, its JSON, two system calls and the
    client's own work for each step would cost a tenth of the speed; nobody sees 8 ms.
    """

    __slots__ = ("_end", "_interval", "_not_before", "_outputs", "_timer", "_waiter")

    def __init__(self, interval: float = 0.0) -> None:
        self._interval = interval
        self._not_before = 0.0  # the loop's time
        self._outputs: list[StepOutput] = []
        self._end: End | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    def put(self, output: StepOutput) -> None:
        """Add a step's tokens, if it has any; after the end they are dropped, since nobody may see them."""
        if output.token_ids and self._end is None:
            self._outputs.append(output)
            if self._waiter is not None:
                self._wake_in_time()

    def close(self, end: End) -> None:
        """Set the one end there is: the first."""
        if self._end is None:
            self._end = end
            self._wake()

    async def take(self) -> tuple[list[StepOutput], End | None]:
        """All outputs not yet taken, and the end if it has come. Waits until there is either."""
        loop = asyncio.get_running_loop()
        while self._end is None and not (self._outputs and loop.time() >= self._not_before):
            self._waiter = loop.create_future()
            if self._outputs:
                self._wake_in_time()
            try:
                await self._waiter
            finally:
                self._waiter = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._not_before = loop.time() + self._interval
        outputs, self._outputs = self._outputs, []
        return outputs, self._end

    def _wake_in_time(self) -> None:
        loop = asyncio.get_running_loop()
        if loop.time() >= self._not_before:
            self._wake()
        elif self._timer is None:
            self._timer = loop.call_at(self._not_before, self._wake)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
