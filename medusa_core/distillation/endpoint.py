"""Answers from an OpenAI-compatible server, with retries."""

import asyncio
import logging
import random
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from medusa_core.distillation.answers import Messages, Reply, RowError
from medusa_core.distillation.settings import DistillSettings, EndpointSettings
from medusa_core.errors import ConfigError

RETRIED = frozenset({408, 409, 425, 429})  # and all from 500 on
HOPELESS = frozenset({401, 403, 404})  # key, permission, address or model name: every row would fail
COMPLETE = frozenset({"stop", "eos_token", "stop_sequence"})  # OpenAI's; TGI's own names
LONGEST_BACKOFF = 60.0
LONGEST_RETRY_AFTER = 600.0
SHOWN_CHARACTERS = 200

logger = logging.getLogger(__name__)


class _RetryError(Exception):
    """A failure worth retrying, after `delay` seconds if the server named them."""

    def __init__(self, reason: str, delay: float | None = None) -> None:
        super().__init__(reason)
        self.delay = delay


class EndpointAnswerer:
    """Asks a server through the caller's connection pool."""

    def __init__(
        self, client: httpx.AsyncClient, endpoint: EndpointSettings, settings: DistillSettings
    ) -> None:
        self._client, self._endpoint = client, endpoint
        self._body: dict[str, Any] = {
            "model": endpoint.model,
            "temperature": settings.temperature,
            "max_tokens": settings.max_tokens,
        }
        if settings.top_p is not None:
            self._body["top_p"] = settings.top_p

    async def answer(self, messages: Messages, seed: int) -> Reply:
        body = {**self._body, "messages": list(messages), "seed": seed}
        for attempt in range(self._endpoint.attempts):
            try:
                return await self._ask(body)
            except _RetryError as error:
                reason, delay = str(error), error.delay
            if attempt + 1 < self._endpoint.attempts:
                seconds = self._wait(attempt, delay)
                logger.debug("%s; again in %.1f s", reason, seconds)
                await asyncio.sleep(seconds)
        raise RowError(f"{reason} ({self._endpoint.attempts} attempts)")

    async def _ask(self, body: dict[str, Any]) -> Reply:
        try:
            response = await self._client.post("chat/completions", json=body)
        except httpx.RequestError as error:
            raise _RetryError(f"{type(error).__name__}: {error}".rstrip(": ")) from error
        if response.status_code == httpx.codes.OK:
            return _reply(response)
        reason = _reason(response)
        if response.status_code in HOPELESS:
            raise ConfigError(f"{self._endpoint.url} refuses requests: {reason}")
        if response.status_code in RETRIED or response.status_code >= httpx.codes.INTERNAL_SERVER_ERROR:
            raise _RetryError(reason, retry_after(response.headers.get("retry-after")))
        if _is_too_long(response):
            return Reply("", cut=reason)
        raise RowError(reason)

    def _wait(self, attempt: int, asked: float | None) -> float:
        """Seconds to wait: exponential, with jitter so that requests refused together spread out."""
        longest = min(LONGEST_BACKOFF, self._endpoint.retry_delay * 2.0**attempt)
        seconds = longest * random.uniform(0.5, 1.0)  # jitter is no secret  # nosec B311
        if asked is None:
            return seconds
        if asked > LONGEST_RETRY_AFTER:
            raise RowError(f"the server asks to wait {asked:.0f} s, more than {LONGEST_RETRY_AFTER:.0f}")
        return max(asked, seconds)


def open_client(endpoint: EndpointSettings, concurrency: int) -> httpx.AsyncClient:
    """A client with the endpoint as base URL. Raises `ConfigError` if that is invalid."""
    headers = {"authorization": f"Bearer {endpoint.api_key}"} if endpoint.api_key else {}
    limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
    try:
        return httpx.AsyncClient(
            base_url=endpoint.url, headers=headers, timeout=endpoint.timeout, limits=limits
        )
    except httpx.InvalidURL as error:
        raise ConfigError(f"endpoint {endpoint.url!r}: {error}") from error


def retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header (number or HTTP date, RFC 9110 §10.2.3); None if unreadable."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            moment = parsedate_to_datetime(value)
        except ValueError:
            return None
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=UTC)
        seconds = (moment - datetime.now(UTC)).total_seconds()
    return max(0.0, seconds) if seconds == seconds else None


def _reply(response: httpx.Response) -> Reply:
    try:
        data = response.json()
        choice = data["choices"][0]
        text, reason = choice["message"].get("content") or "", choice["finish_reason"]
        tokens = (data.get("usage") or {}).get("completion_tokens") or 0
        if not isinstance(text, str) or not isinstance(tokens, int):
            raise TypeError("its content or usage has another type")
        text.encode()
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise _RetryError(f"the answer is no chat completion: {error!r}") from error
    return Reply(text, None if reason in COMPLETE else str(reason), tokens)


def _reason(response: httpx.Response) -> str:
    """Status and the server's message, in one line."""
    message: Any = response.text
    try:
        data = response.json()
        error = data.get("error", data)
        message = error if isinstance(error, str) else error.get("message", message)
    except (ValueError, AttributeError, RecursionError):
        pass  # no JSON: use the plain text
    words = " ".join(str(message).split())[:SHOWN_CHARACTERS]
    return f"HTTP {response.status_code}: {words}" if words else f"HTTP {response.status_code}"


def _is_too_long(response: httpx.Response) -> bool:
    """Whether the conversation is longer than the context: a 400 from OpenAI and vLLM."""
    if response.status_code not in (400, 413, 422):
        return False
    text = response.text.lower()
    return "context_length_exceeded" in text or "maximum context length" in text
