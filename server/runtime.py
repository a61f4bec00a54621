"""The parts of a running server, and its life: starting, serving, draining, stopped."""

import asyncio
import hashlib
import logging
import time
from dataclasses import asdict, replace
from pathlib import Path

import msgspec

from medusa_core.errors import ConfigError, MedusaError
from medusa_core.model_info import ModelInfo
from medusa_core.sampling_params import DraftSourceName
from medusa_core.text.tokenizer import ChatTokenizer, load_chat_tokenizer
from server import errors
from server.observability.metrics import ServerMetrics
from server.observability.timeline import MAX_MARKS
from server.observability.tracing import build_tracing
from server.pipeline.executor import DaemonExecutor
from server.pipeline.prompts import PromptBuilder
from server.settings import Settings
from server.workers.pool import WorkerPool
from server.workers.scheduler import Scheduler
from server.workers.worker import WorkerConfig

logger = logging.getLogger(__name__)


class Runtime:
    """Owns scheduler, workers and the loaded model. Lives on one event loop."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.model_name = settings.model_name  # once: it depends on what lies on disk
        self.created = int(time.time())
        self.metrics = ServerMetrics(self.model_name)
        self.tracing = build_tracing(settings, self.model_name)
        self.scheduler = Scheduler(
            queue_limit=settings.queue_limit,
            request_timeout=settings.request_timeout,
            metrics=self.metrics,
            max_marks=0 if self.tracing is None else MAX_MARKS,
        )
        self.prompts: PromptBuilder | None = None  # with the model's description, once it has loaded
        self.fingerprint = ""
        self.start_error: MedusaError | None = None
        self.is_draining = False
        self.is_drained = False
        self._executor = DaemonExecutor("prompts")
        self._tasks: set[asyncio.Task[None]] = set()
        self.pool = WorkerPool(
            [
                WorkerConfig(
                    model=settings.model,
                    heads=settings.heads,
                    engine=settings.engine_config(device),
                    log_level=settings.log_level,
                    log_format=settings.log_format,
                    num_workers=len(settings.devices),
                )
                for device in settings.devices
            ],
            settings,
            self.scheduler,
            self.metrics,
        )
        self.metrics.watch_workers(
            is_ready=lambda: self.why_not_ready() is None,
            states=self.pool.count_states,
            slots=lambda: self.pool.num_slots,
        )

    def start(self) -> None:
        """Begin loading; meanwhile the server answers, and refuses requests with a 503."""
        self._spawn(self._load())

    def why_not_ready(self) -> str | None:
        """None if a request would be served now; else a reason without paths, for whoever may ask."""
        reason = self._why_not_ready()
        # Heads first: they may lie below the model.
        for path, name in ((self.settings.heads, "the heads"), (self.settings.model, self.model_name)):
            if reason is not None and path is not None and Path(path).is_absolute():
                reason = reason.replace(path, name)
        return reason

    def _why_not_ready(self) -> str | None:
        if self.start_error is not None:
            return str(self.start_error)
        if self.is_draining:
            return "the server is shutting down"
        reason = self.pool.why_not_ready()
        if reason is None and self.prompts is None:
            return "the tokenizer is loading"
        return reason

    def require_prompts(self) -> PromptBuilder:
        """What prepares requests. Raises a 503 `ApiError` while the model loads and during a drain."""
        if self.is_draining:
            raise _shutting_down()
        if self.prompts is None:
            raise errors.unavailable("The model is loading.", "model_loading")
        return self.prompts

    def start_drain(self) -> None:
        """Refuse new requests; `is_drained` follows once the accepted ones have ended or the time is up."""
        if not self.is_draining:
            self.is_draining = True
            self._spawn(self._drain())

    def end_requests(self) -> None:
        """End what was accepted, waiting and running, with an error."""
        self.scheduler.fail_all(_shutting_down())

    async def stop(self) -> None:
        """End whatever is left: requests with an error, workers politely."""
        self.is_draining = True
        self.end_requests()
        for task in self._tasks:
            task.cancel()
        await self.pool.stop()
        self._executor.shutdown()
        if self.tracing is not None:
            await asyncio.to_thread(self.tracing.stop)

    def _spawn(self, coroutine: "asyncio._CoroutineLike[None]") -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)  # the loop itself holds tasks only weakly
        task.add_done_callback(self._tasks.discard)

    async def _load(self) -> None:
        started = time.monotonic()
        try:
            loop = asyncio.get_running_loop()
            chat, info = await asyncio.gather(
                loop.run_in_executor(
                    self._executor, load_chat_tokenizer, self.settings.model, self.settings.chat_template
                ),
                self.pool.start(),
            )
            self._open(chat, info)
        except MedusaError as error:
            self.start_error = error
            return
        except Exception as error:  # a library's own, about files it cannot make sense of
            logger.debug("the tokenizer could not be loaded", exc_info=True)
            what = f"the tokenizer of {self.settings.model}"
            self.start_error = MedusaError(f"cannot load {what}: {type(error).__name__}: {error}")
            return
        logger.info(
            "ready after %.1f s: %s",
            time.monotonic() - started,
            summary(self.model_name, info),
            extra={"model_info": asdict(info)},
        )

    def _open(self, chat: ChatTokenizer, info: ModelInfo) -> None:
        """Take requests from here on."""
        source = self.settings.speculation_source
        if source is not DraftSourceName.HEADS and source not in info.sources:
            raise ConfigError(
                f"MEDUSA_SPECULATION_SOURCE (--speculation-source) is {source}, but this model has no such "
                "draft source"
            )
        self.fingerprint = fingerprint(info)
        self.metrics.describe_model(info)
        self.prompts = PromptBuilder(chat=chat, info=info, settings=self.settings, executor=self._executor)

    async def _drain(self) -> None:
        timeout = self.settings.drain_timeout
        logger.info(
            "draining: %d running, %d waiting", self.scheduler.num_running, self.scheduler.num_waiting
        )
        try:
            await asyncio.wait_for(self.scheduler.wait_idle(), timeout)
        except TimeoutError:
            logger.warning("requests are left after %g s and end with an error", timeout)
            self.end_requests()
        self.is_drained = True


def _shutting_down() -> errors.ApiError:
    return errors.unavailable("The server is shutting down.", "shutting_down")


def fingerprint(info: ModelInfo) -> str:
    """Names what decides the answers. Speeds, which differ between starts, do not."""
    digest = hashlib.sha256(msgspec.json.encode(replace(info, expected_speedup=None, tree_choice=None)))
    return "fp_" + digest.hexdigest()[:12]


def summary(name: str, info: ModelInfo) -> str:
    """One line for people."""
    heads = f"{info.num_heads} heads of {info.heads}" if info.heads else "no draft heads"
    parts = [
        f"{name} with {heads}",
        f"{info.dtype} on {info.device}",
        f"tree of {info.tree_nodes} nodes" if info.tree_nodes > 1 else _no_tree(info),
        f"{info.slots} slot" + ("" if info.slots == 1 else "s"),
    ]
    if info.expected_speedup is not None:
        parts.append(f"about {info.expected_speedup:.1f}x plain decoding expected")
    return ", ".join(parts)


def _no_tree(info: ModelInfo) -> str:
    return "no draft tree" if info.tree_choice is None else f"no draft tree ({info.tree_choice})"
