"""Weight files in folders and on the Hub: safetensors, `.pt` and `.bin`, sharded or not."""

import contextlib
import pickle  # for the name of an error alone  # nosec B403
import struct
import zipfile
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from medusa_core.errors import CheckpointError, first_line
from medusa_core.files import read_json

MODEL_FILES = ("model.safetensors", "pytorch_model.bin")  # each before its index, as transformers chooses
INDEX_SUFFIX = ".index.json"
# What torch's restricted unpickler raises on damaged files, found by flipping bytes; none is documented.
UNPICKLING_FAILURES = (
    *(pickle.UnpicklingError, struct.error, EOFError, RuntimeError, ValueError, LookupError, AssertionError),
    *(TypeError, AttributeError, ArithmeticError, MemoryError),
)


@dataclass(frozen=True, slots=True)
class Repository:
    """A local folder or a Hub repository, whose files are downloaded one by one when fetched."""

    name: str
    folder: Path | None

    @classmethod
    def at(cls, name: str | Path) -> "Repository":
        """An existing folder is local and needs no network; else it must look like a Hub name."""
        path = Path(name).expanduser()
        if path.is_dir():
            return cls(str(name), path)
        if path.exists() or path.is_absolute() or str(name).startswith(".") or len(path.parts) > 2:
            raise CheckpointError(f"no heads at {name}: not a directory or weight file")
        return cls(str(name), None)

    def fetch(self, filename: str) -> Path | None:
        """The file's local path, or None if the repository has no such file."""
        folder = self.folder
        if folder is None:
            try:
                # Rather than one file's own download: it knows the repository's list of files, so that a
                # missing file differs from a missing network, and goes on from the cache without one.
                folder = Path(snapshot_download(self.name, allow_patterns=[filename, "config.json"]))
            except (HfHubHTTPError, HFValidationError, OSError) as error:
                raise CheckpointError(
                    f"{self.name} is no directory, and no Hub download: {first_line(error)}"
                ) from error
        path = folder / filename
        return path if path.is_file() else None


def read_tensors(path: Path, wanted: Container[str] | None = None) -> dict[str, Tensor]:
    """The wanted tensors (None: all) of one `.safetensors`, `.pt` or `.bin` file, on the CPU.

    Raises `CheckpointError`.
    """
    if path.suffix != ".safetensors":
        return {key: value for key, value in _unpickle(path).items() if wanted is None or key in wanted}
    with _safetensors(path) as file:
        keys = [key for key in file.keys() if wanted is None or key in wanted]  # noqa: SIM118
        return {key: file.get_tensor(key) for key in keys}


def read_shards(repository: Repository, places: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors of these keys, each from the file that an index names for it; no other file is read."""
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(places.values())):
        shard = repository.fetch(name)
        if shard is None:
            raise CheckpointError(f"{repository.name} lacks {name}, which its index names")
        tensors |= read_tensors(shard, places)
    missing = places.keys() - tensors.keys()
    if missing:
        raise CheckpointError(f"{repository.name} lacks {min(missing)}, which its index names")
    return tensors


def model_keys(repository: Repository) -> dict[str, str]:
    """Every key of a model's weights and the file that holds it; empty without a model."""
    for name in MODEL_FILES:
        path = repository.fetch(name)
        if path is not None:
            return dict.fromkeys(_file_keys(path), name)
        index = repository.fetch(name + INDEX_SUFFIX)
        if index is not None:
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise CheckpointError(f"{index} has no weight_map")
            shards = {str(key): str(file) for key, file in weight_map.items()}
            for shard in shards.values():
                if Path(shard).name != shard:  # else an index could point anywhere on this machine
                    raise CheckpointError(f"{index} names {shard}, which is no file beside it")
            return shards
    return {}


def describe_files(model: str | Path) -> str:
    """Size and number of a model's weight files, for the log."""
    folder = Path(model).expanduser()
    if not folder.is_dir():
        config = try_to_load_from_cache(str(model), "config.json")
        folder = Path(config).parent if isinstance(config, str) else folder
    found = [[*folder.glob(name.replace(".", "*."))] for name in MODEL_FILES]  # shards too
    sizes = [path.stat().st_size for path in next(filter(None, found), [])]
    if not sizes:
        return "not downloaded yet"
    return f"{sum(sizes) / 2**30:.2f} GiB in {len(sizes)} file{'s' if len(sizes) > 1 else ''}"


def _file_keys(path: Path) -> list[str]:
    if path.suffix != ".safetensors":
        return list(_unpickle(path))
    with _safetensors(path) as file:
        return list(file.keys())


@contextlib.contextmanager
def _safetensors(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error


def _unpickle(path: Path) -> dict[str, Tensor]:
    """A pickled state dict, tensors only. Memory-mapped, so that a shard's other weights are not read."""
    try:
        # The restricted unpickler refuses everything but tensors and plain containers: no code runs.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    except UNPICKLING_FAILURES as error:
        raise CheckpointError(f"cannot read {path} as plain tensors: {first_line(error)}") from error
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise CheckpointError(f"{path} is not a dictionary of named tensors")
    return state
