"""Finds the files of draft heads in a directory, a model or a Hub repository, and reads their tensors."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from medusa_core.checkpoints.medusa_format import (
    HEAD_PREFIX,
    MODELOPT_PREFIX,
    is_vllm_key,
    without_optional_prefix,
)
from medusa_core.checkpoints.weight_files import Repository, model_keys, read_shards, read_tensors
from medusa_core.errors import CheckpointError
from medusa_core.files import read_json

HYDRA_FILES = ("hydra_lm_head.safetensors", "hydra_lm_head.pt")  # in order of preference
HEAD_FILES = ("medusa_lm_head.safetensors", "medusa_lm_head.pt")
WEIGHT_SUFFIXES = (".safetensors", ".pt", ".bin")
# Folders beside a model, the first of which is its default. Hydra++ has the longer runs, but on the demo
# model and at the 1.2 B shape its deeper heads cost more than they gain (benchmarks/heads.py).
SETS = ("heads", "hydra", "hydra++", "medusa-1")
MODEL_PREFIXES = (HEAD_PREFIX, MODELOPT_PREFIX)  # of heads among a whole model's weights
CONFIG_FILE = "config.json"


@dataclass(frozen=True, slots=True)
class HeadFile:
    """The tensors of one set of heads as stored; `source` names them in errors. `config`: {} without one."""

    source: str
    tensors: dict[str, Tensor]
    config: dict[str, Any]


def find_heads(model_dir: Path) -> Path | None:
    """The heads of a local model: the first of the folders `SETS` beside it, or its own; None without any."""
    for folder in (*(model_dir / name for name in SETS), model_dir):
        if folder.is_dir() and holds_heads(folder):
            return folder
    return None


def holds_heads(folder: Path) -> bool:
    """Whether any layout's files or keys are there, unchecked."""
    if any((folder / name).is_file() for name in (*HYDRA_FILES, *HEAD_FILES)):
        return True
    return bool(_heads_among(model_keys(Repository.at(folder))))


def read_heads(path: str | Path) -> HeadFile:
    """All head tensors of a file, a directory or a Hub repository. Raises `CheckpointError`."""
    file = Path(path).expanduser()
    if file.is_file() and file.suffix in WEIGHT_SUFFIXES:
        return _head_file(str(path), read_tensors(file), _config(Repository.at(file.parent)))
    repository = Repository.at(path)
    config = _config(repository)
    found = _find_file(repository, config)
    if found is not None:
        return _head_file(f"{repository.name}/{found.name}", read_tensors(found), config)
    return _read_model(repository, config)


def fetch_beside(path: str | Path, filename: str) -> Path | None:
    """A file that came with the heads at `path`, downloaded from the Hub if they are there."""
    file = Path(path).expanduser()
    return Repository.at(file.parent if file.is_file() else path).fetch(filename)


def _head_file(source: str, tensors: dict[str, Tensor], config: dict[str, Any]) -> HeadFile:
    return HeadFile(source, without_optional_prefix(source, tensors), config)


def _find_file(repository: Repository, config: dict[str, Any]) -> Path | None:
    """The file of heads alone. Of two kinds in one folder, the one that config.json describes."""
    kinds = (HYDRA_FILES, HEAD_FILES)
    found = [path for names in kinds if (path := next(filter(None, map(repository.fetch, names)), None))]
    if len(found) < 2:
        return found[0] if found else None
    claims = ("hydra_num_heads" in config, "medusa_num_heads" in config)
    if claims[0] == claims[1]:
        raise CheckpointError(
            f"{repository.name} holds {found[0].name} and {found[1].name}: name the file that is meant"
        )
    return found[0] if claims[0] else found[1]


def _read_model(repository: Repository, config: dict[str, Any]) -> HeadFile:
    """Heads in a model's files: D, or C and E among its weights; shards without heads are not read."""
    places = _heads_among(model_keys(repository))
    if not places:
        raise CheckpointError(
            f"no heads at {repository.name}: neither {' nor '.join((*HEAD_FILES, *HYDRA_FILES))}, "
            f"nor {HEAD_PREFIX}* among model weights"
        )
    return _head_file(repository.name, read_shards(repository, places), config)


def _heads_among(keys: dict[str, str]) -> dict[str, str]:
    """A model's keys, with their files, that belong to heads."""
    if any(is_vllm_key(key) for key in keys):
        return keys  # such files hold nothing else; any other key must be refused
    for prefix in MODEL_PREFIXES:
        mine = {key: file for key, file in keys.items() if key.startswith(prefix)}
        if mine:
            return mine
    return {}


def _config(repository: Repository) -> dict[str, Any]:
    path = repository.fetch(CONFIG_FILE)
    return {} if path is None else read_json(path)
