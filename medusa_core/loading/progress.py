"""Progress of loading an engine: current step, tensors read, bytes downloaded; to the log and a callback."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sized
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name
from transformers.utils import logging as transformers_logging

logger = logging.getLogger(__name__)

WATCH_SECONDS = 10.0
WEIGHTS_BAR = "Loading weights"  # the description of transformers' own progress bar
GIB = 2**30

OnStage = Callable[[str], None]
"""Called with the step that begins; from another thread during a download."""


class LoadProgress:
    """Reports each step of loading: one line of the log and one call of `on_stage`."""

    def __init__(self, on_stage: OnStage | None = None) -> None:
        self._on_stage = on_stage
        self._lock = threading.Lock()

    def enter(self, text: str) -> None:
        with self._lock:
            logger.info("%s", text)
            if self._on_stage is not None:
                self._on_stage(text)

    @contextlib.contextmanager
    def counting_weights(self) -> Iterator[None]:
        """Report every `WATCH_SECONDS` how many tensors transformers has read, in place of its own bar."""

        def hook(bar: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            is_weights = kwargs.get("desc") == WEIGHTS_BAR and args and isinstance(args[0], Sized)
            return self._counted(args[0]) if is_weights else bar(*args, **kwargs)

        previous = transformers_logging.set_tqdm_hook(hook)
        try:
            yield
        finally:
            transformers_logging.set_tqdm_hook(previous)

    def _counted(self, tensors: Any) -> Iterator[Any]:
        reported = time.monotonic()
        for number, tensor in enumerate(tensors):
            yield tensor
            if time.monotonic() - reported >= WATCH_SECONDS:
                reported = time.monotonic()
                self.enter(f"{number + 1} of {len(tensors)} tensors read")

    @contextlib.contextmanager
    def downloading(self, name: str | Path) -> Iterator[None]:
        """Report every `WATCH_SECONDS` how much of a Hub repository is downloaded, while that grows."""
        folder = _hub_folder(name)
        if folder is None:
            yield
            return
        done = threading.Event()
        watch = threading.Thread(
            target=self._watch, args=(str(name), folder, done), name="download-watch", daemon=True
        )
        watch.start()
        try:
            yield
        finally:
            done.set()
            watch.join()

    def _watch(self, name: str, folder: Path, done: threading.Event) -> None:
        known = _size(folder)
        while not done.wait(WATCH_SECONDS):
            size = _size(folder)
            if size > known:
                self.enter(f"downloading {name}: {size / GIB:.2f} GiB so far")
            known = size


def _hub_folder(name: str | Path) -> Path | None:
    """The cache folder of a Hub repository; None if `name` cannot be one."""
    path = Path(name).expanduser()
    if path.exists() or path.is_absolute() or len(path.parts) > 2 or str(name).startswith("."):
        return None
    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=str(name), repo_type="model") / "blobs"


def _size(folder: Path) -> int:
    """Bytes of all files, unfinished ones included, which may be renamed at any moment."""
    size = 0
    for path in folder.glob("*"):
        with contextlib.suppress(OSError):
            size += path.stat().st_size
    return size
