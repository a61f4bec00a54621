"""Every way a head file can be broken: refused in one line that names the culprit, and no code runs."""

import pickle
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from medusa_core.checkpoints.reading import load_heads
from medusa_core.draft.medusa import MedusaHeads
from medusa_core.errors import CheckpointError

HIDDEN, VOCAB = 8, 11

Tensors = dict[str, Tensor]


def head_tensors(num_heads: int = 5, rows: int = VOCAB) -> Tensors:
    """Random tensors under format A's keys, one layer a head."""
    shapes = {"0.linear.weight": (HIDDEN, HIDDEN), "0.linear.bias": (HIDDEN,), "1.weight": (rows, HIDDEN)}
    return {f"{h}.{key}": torch.randn(shape) for h in range(num_heads) for key, shape in shapes.items()}


def load(path: str | Path, lm_head_weight: Tensor | None = None) -> MedusaHeads:
    return load_heads(path, hidden_size=HIDDEN, vocab_size=VOCAB, lm_head_weight=lm_head_weight)


def write_pt(folder: Path, tensors: object) -> Path:
    torch.save(tensors, folder / "medusa_lm_head.pt")
    return folder


def write_safetensors(folder: Path, tensors: Tensors) -> Path:
    save_file(tensors, folder / "medusa_lm_head.safetensors")
    return folder


def without(key: str) -> Callable[[Tensors], None]:
    def remove(tensors: Tensors) -> None:
        del tensors[key]

    return remove


def with_tensor(key: str, tensor: Tensor) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({key: tensor})


BREAKAGES = {
    "missing bias": (without("3.0.linear.bias"), r"missing 3\.0\.linear\.bias"),
    "missing weight": (without("0.0.linear.weight"), r"missing 0\.0\.linear\.weight"),
    "one output missing": (without("2.1.weight"), r"missing 2\.1\.weight"),
    "unknown key": (with_tensor("0.0.linear.scale", torch.ones(1)), r"unexpected 0\.0\.linear\.scale"),
    "extra layer in one head": (
        with_tensor("0.1.linear.weight", torch.ones(HIDDEN, HIDDEN)),
        r"missing 0\.1\.linear\.bias",
    ),
    "a lone far head": (with_tensor("999999999.0.linear.bias", torch.ones(HIDDEN)), "gaps"),
    "misshapen block": (
        with_tensor("1.0.linear.weight", torch.ones(HIDDEN, 3)),
        r"1\.0\.linear\.weight has shape \[8, 3\]",
    ),
    "misshapen bias": (
        with_tensor("1.0.linear.bias", torch.ones(3)),
        r"1\.0\.linear\.bias has shape \[3\], expected \[8\]",
    ),
    "heads of two vocabularies": (
        with_tensor("4.1.weight", torch.ones(VOCAB - 1, HIDDEN)),
        r"4\.1\.weight has shape \[10, 8\], expected \[11, 8\]",
    ),
    "scalar output": (with_tensor("0.1.weight", torch.tensor(1.0)), r"0\.1\.weight has shape \[\]"),
    "integers": (
        with_tensor("1.0.linear.bias", torch.ones(HIDDEN, dtype=torch.int8)),
        r"1\.0\.linear\.bias is torch\.int8, not a float type",
    ),
    "vLLM layout": (with_tensor("blocks.0.layers.0.weight", torch.ones(1)), "vLLM's own Medusa layout"),
    "Hydra": (with_tensor("hydra_mlp.0.0.linear.weight", torch.ones(1)), "Hydra heads"),
}


@pytest.mark.parametrize("name", BREAKAGES)
@pytest.mark.parametrize("write", [write_pt, write_safetensors])
def test_broken_tensors_are_named(tmp_path: Path, write: Callable[[Path, Tensors], Path], name: str) -> None:
    breakage, message = BREAKAGES[name]
    tensors = head_tensors()
    breakage(tensors)
    with pytest.raises(CheckpointError, match=message):
        load(write(tmp_path, tensors))


def test_sparse_tensors_are_refused(tmp_path: Path) -> None:
    tensors = head_tensors() | {"2.0.linear.bias": torch.ones(HIDDEN).to_sparse()}
    with pytest.raises(CheckpointError, match=r"2\.0\.linear\.bias is not a dense tensor"):
        load(write_pt(tmp_path, tensors))


def test_values_that_are_no_tensors_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"2\.0\.linear\.bias is not a dense tensor"):
        load(write_pt(tmp_path, head_tensors() | {"2.0.linear.bias": [1.0, 2.0]}))


@pytest.mark.parametrize("content", [torch.ones(2), [torch.ones(2)], {1: torch.ones(2)}])
def test_pickles_of_something_else_are_refused(tmp_path: Path, content: object) -> None:
    with pytest.raises(CheckpointError, match="not a dictionary of named tensors"):
        load(write_pt(tmp_path, content))


class Attack:
    """Unpickles by touching a file."""

    def __init__(self, target: Path) -> None:
        self._target = target

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self._target,)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", ["medusa_lm_head.pt", "pytorch_model.bin"])
def test_code_in_a_pickle_does_not_run(tmp_path: Path, name: str, zipped: bool) -> None:
    proof = tmp_path / "executed"
    attack = {"0.0.linear.weight": Attack(proof)}
    if zipped:
        torch.save(attack, tmp_path / name)
    else:
        (tmp_path / name).write_bytes(pickle.dumps(attack, protocol=2))
    with pytest.raises(CheckpointError, match="as plain tensors"):
        load(tmp_path)
    assert not proof.exists()


@pytest.mark.parametrize("name", ["medusa_lm_head.pt", "medusa_lm_head.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04" + bytes(40)])
def test_garbage_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name):
        load(tmp_path)


def test_truncated_files_are_refused(tmp_path: Path) -> None:
    for write, name in ((write_pt, "medusa_lm_head.pt"), (write_safetensors, "medusa_lm_head.safetensors")):
        path = write(tmp_path, head_tensors()) / name
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(CheckpointError, match=name):
            load(path)


@pytest.mark.filterwarnings("ignore:.*pickle protocol:UserWarning")
@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_pickles_are_refused_or_read(tmp_path: Path, zipped: bool) -> None:
    """Whatever byte is wrong, the error is ours, in one line."""
    path = tmp_path / "medusa_lm_head.pt"
    torch.save(head_tensors(1), path, _use_new_zipfile_serialization=zipped)
    good = path.read_bytes()
    generator = random.Random(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(good)
        for _ in range(3):
            damaged[generator.randrange(500)] = generator.randrange(256)
        path.write_bytes(damaged)
        try:
            load(path)
        except CheckpointError as error:
            refused += "\n" not in str(error)
    assert refused > 200


def test_another_hidden_size_names_both(tmp_path: Path) -> None:
    write_pt(tmp_path, head_tensors())
    with pytest.raises(CheckpointError, match="hidden size 8, the backbone's hidden size is 16"):
        load_heads(tmp_path, hidden_size=16, vocab_size=VOCAB)


def test_a_larger_vocabulary_names_both(tmp_path: Path) -> None:
    write_pt(tmp_path, head_tensors(rows=VOCAB + 1))
    with pytest.raises(CheckpointError, match="vocabulary of 12, the backbone's is 11"):
        load(tmp_path, torch.randn(VOCAB, HIDDEN))


def test_no_rows_at_all(tmp_path: Path) -> None:
    write_pt(tmp_path, head_tensors(rows=0))
    with pytest.raises(CheckpointError, match="vocabulary of 0"):
        load(tmp_path)


def test_broken_json(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    for content, message in (("{", "cannot read"), ("[]", "not a JSON object"), ("{}", "no weight_map")):
        index.write_text(content)
        with pytest.raises(CheckpointError, match=message):
            load(tmp_path)


def test_directories_without_heads(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"neither medusa_lm_head\.safetensors nor medusa_lm_head\.pt"):
        load(tmp_path)
    save_file({"lm_head.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"nor medusa_head\.\* among model weights"):
        load(tmp_path)


def test_paths_that_do_not_exist(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing", "./nothing", "../nothing", "a/b/c"):
        with pytest.raises(CheckpointError, match="not a directory or weight file"):
            load(path)
    (tmp_path / "notes.txt").write_text("no heads")
    with pytest.raises(CheckpointError, match="not a directory or weight file"):
        load(tmp_path / "notes.txt")
