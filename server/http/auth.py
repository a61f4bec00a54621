"""API keys. Everything needs one but `/health`, so that a new route is never open by mistake."""

import hashlib
import hmac
import ipaddress
import logging
import stat
from collections.abc import Iterable
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from medusa_core.errors import ConfigError
from server import errors
from server.pipeline.responses import error_response
from server.settings import Settings, split_list

logger = logging.getLogger(__name__)

OPEN_METHODS = ("GET", "HEAD")
OPEN_PATH = "/health"
SHORT_KEY = 16  # characters
MAX_KEYS_FILE = 2**20  # bytes


class KeyRing:
    """The keys that open the server, as SHA-256 digests alone."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = tuple({_digest(key.encode()) for key in keys})

    def accepts(self, key: bytes) -> bool:
        """Takes as long for any key: digests are compared whole, and with every key there is."""
        presented = _digest(key)
        is_known = False
        for digest in self._digests:
            is_known |= hmac.compare_digest(digest, presented)
        return is_known


class RequireKey:
    """Refuses requests without a known `Authorization: Bearer` key with a 401, their body unread."""

    def __init__(self, app: ASGIApp, keys: KeyRing) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or _is_open(scope):
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        keys = _bearer_keys(scope)
        # Two headers are refused: a proxy in front may have checked the other one.
        if len(keys) == 1 and self._keys.accepts(keys[0]):
            await self._app(scope, receive, send)
        else:
            refusal = error_response(errors.bad_key(is_missing=not keys))
            refusal.headers["www-authenticate"] = "Bearer"
            await refusal(scope, receive, send)


def load_keys(settings: Settings) -> KeyRing | None:
    """The keys of both settings, None if there are none; warns if that leaves the server open.

    Raises `ConfigError`, which shows no key.
    """
    keys: list[str] = []
    if settings.api_keys is not None:
        keys += _checked("MEDUSA_API_KEYS", split_list(settings.api_keys.get_secret_value()))
    if settings.api_keys_file is not None:
        keys += _read(settings.api_keys_file)
    if any(len(key) < SHORT_KEY for key in keys):
        logger.warning("an API key has fewer than %d characters and may be guessed", SHORT_KEY)
    if not keys and not _is_loopback(settings.host):
        logger.warning(
            "anybody who reaches %s may use this server; MEDUSA_API_KEYS_FILE would ask for a key",
            settings.host,
        )
    return KeyRing(keys) if keys else None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _read(path: Path) -> list[str]:
    name = f"MEDUSA_API_KEYS_FILE ({path})"
    try:
        mode = path.stat().st_mode
        with path.open("rb") as file:
            content = file.read(MAX_KEYS_FILE + 1)
    except OSError as error:
        raise ConfigError(f"{name} cannot be read: {error.strerror}") from error
    if len(content) > MAX_KEYS_FILE:
        raise ConfigError(f"{name} has more than {MAX_KEYS_FILE} bytes; is it the right file?")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ConfigError(f"{name} is not a text file") from None
    if mode & stat.S_IROTH:
        logger.warning("%s can be read by every user of this machine; chmod 600 it", name)
    lines = [line.strip() for line in text.splitlines()]
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise ConfigError(f"{name} holds no key; one a line is wanted")
    return _checked(name, keys)


def _checked(name: str, keys: Iterable[str]) -> list[str]:
    """Keys a header can carry; else the server would start and let nobody in."""
    checked = list(keys)
    for number, key in enumerate(checked, 1):
        if not key:
            raise ConfigError(f"{name}: key {number} is empty; is there a comma too many?")
        if not (key.isascii() and key.isprintable()) or " " in key or "," in key:
            raise ConfigError(f"{name}: key {number} must be printable ASCII without spaces or commas")
    return checked


def _is_open(scope: Scope) -> bool:
    if scope["type"] != "http":
        return False
    # The path as routes see it. Only the server's own configuration sets a root path, never a request.
    path = scope["path"].removeprefix(scope.get("root_path", ""))
    return path == OPEN_PATH and scope["method"] in OPEN_METHODS


def _bearer_keys(scope: Scope) -> list[bytes]:
    """What each `Authorization` header presents; empty where it is of another scheme."""
    keys = []
    for value in Headers(scope=scope).getlist("authorization"):
        scheme, _, key = value.partition(" ")
        keys.append(key.strip(" ").encode("latin-1") if scheme.lower() == "bearer" else b"")
    return keys


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
