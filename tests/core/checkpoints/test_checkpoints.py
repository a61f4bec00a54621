"""Every published Medusa layout with its quirks: read, found and written."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from medusa_core.checkpoints.head_files import find_heads, read_heads
from medusa_core.checkpoints.reading import load_heads
from medusa_core.checkpoints.writing import save_heads
from medusa_core.draft.medusa import MedusaHeads
from medusa_core.errors import CheckpointError

HIDDEN, VOCAB = 8, 11

Tensors = dict[str, Tensor]


def head_tensors(
    num_heads: int = 5, num_layers: int = 1, *, output: bool = True, rows: int = VOCAB
) -> Tensors:
    """Random tensors under format A's keys, or B's without `output`."""
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for head in range(num_heads):
        for layer in range(num_layers):
            tensors[f"{head}.{layer}.linear.weight"] = torch.randn(HIDDEN, HIDDEN, generator=generator)
            tensors[f"{head}.{layer}.linear.bias"] = torch.randn(HIDDEN, generator=generator)
        if output:
            tensors[f"{head}.{num_layers}.weight"] = torch.randn(rows, HIDDEN, generator=generator)
    return tensors


def load(path: str | Path, lm_head_weight: Tensor | None = None) -> MedusaHeads:
    return load_heads(path, hidden_size=HIDDEN, vocab_size=VOCAB, lm_head_weight=lm_head_weight)


def check_equal(heads: MedusaHeads, tensors: Tensors) -> None:
    """Every tensor of the file is where the stacked parameters keep it."""
    for key, tensor in tensors.items():
        head, layer, *rest = key.split(".")
        if rest == ["weight"]:
            assert torch.equal(heads.output_weight(int(head)), tensor), key
        elif rest == ["linear", "weight"]:
            assert torch.equal(heads.block_weights[int(layer)][int(head)], tensor), key
        else:
            assert torch.equal(heads.block_biases[int(layer)][int(head)], tensor), key


def write_pt(folder: Path, tensors: object) -> Path:
    torch.save(tensors, folder / "medusa_lm_head.pt")
    return folder


def write_safetensors(folder: Path, tensors: Tensors) -> Path:
    save_file(tensors, folder / "medusa_lm_head.safetensors")
    return folder


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("write", [write_pt, write_safetensors])
def test_format_a(tmp_path: Path, write: Callable[[Path, Tensors], Path], num_layers: int) -> None:
    tensors = head_tensors(num_layers=num_layers)
    heads = load(write(tmp_path, tensors))
    assert (heads.num_heads, heads.num_layers, heads.vocab_size) == (5, num_layers, VOCAB)
    check_equal(heads, tensors)
    assert not any(parameter.requires_grad for parameter in heads.parameters())


def test_a_file_is_as_good_as_its_directory(tmp_path: Path) -> None:
    tensors = head_tensors()
    write_pt(tmp_path, tensors)
    check_equal(load(tmp_path / "medusa_lm_head.pt"), tensors)


def test_legacy_pickle_without_zip(tmp_path: Path) -> None:
    tensors = head_tensors()
    torch.save(tensors, tmp_path / "medusa_lm_head.pt", _use_new_zipfile_serialization=False)
    check_equal(load(tmp_path), tensors)


def test_published_config_with_the_wrong_head_count(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """medusa-vicuna's config.json says 2 heads; its file holds 5."""
    (tmp_path / "config.json").write_text(json.dumps({"medusa_num_heads": 2, "medusa_num_layers": 1}))
    with caplog.at_level("INFO"):
        heads = load(write_pt(tmp_path, head_tensors(5)))
    assert heads.num_heads == 5
    assert "config.json says 2 heads, the file holds 5" in caplog.text


def test_published_blocks_tied_by_list_multiplication(tmp_path: Path) -> None:
    """The reference's layers are one module: its file has their keys several times over one storage."""
    tensors = head_tensors(num_heads=2, num_layers=3)
    for head in range(2):
        for layer in (1, 2):
            for part in ("weight", "bias"):
                tensors[f"{head}.{layer}.linear.{part}"] = tensors[f"{head}.0.linear.{part}"]
    heads = load(write_pt(tmp_path, tensors))
    assert heads.num_layers == 3
    check_equal(heads, tensors)


@pytest.mark.parametrize("num_layers", [1, 2])
def test_format_b_uses_the_backbones_output_layer(tmp_path: Path, num_layers: int) -> None:
    lm_head = torch.randn(VOCAB + 2, HIDDEN)
    tensors = head_tensors(3, num_layers, output=False)
    heads = load(write_safetensors(tmp_path, tensors), lm_head)
    assert heads.is_shared
    assert (heads.num_heads, heads.num_layers, heads.vocab_size) == (3, num_layers, VOCAB)
    assert heads.output_weight(0).data_ptr() == lm_head.data_ptr()
    check_equal(heads, tensors)


def test_format_b_without_the_backbone(tmp_path: Path) -> None:
    write_safetensors(tmp_path, head_tensors(output=False))
    with pytest.raises(CheckpointError, match="share the backbone's output layer"):
        load(tmp_path)


def full_model(folder: Path, tensors: Tensors, *, sharded: bool, safetensors: bool) -> Path:
    """Format C: heads among a whole model's weights."""
    heads = {f"medusa_head.{key}": tensor for key, tensor in tensors.items()}
    backbone = {
        "model.embed_tokens.weight": torch.randn(VOCAB, HIDDEN),
        "lm_head.weight": torch.randn(VOCAB, HIDDEN),
    }
    suffix, stem = ("safetensors", "model") if safetensors else ("bin", "pytorch_model")
    if sharded:
        keys = list(heads)
        half = len(keys) // 2
        shards = [
            backbone | {key: heads[key] for key in keys[:half]},
            {key: heads[key] for key in keys[half:]},
        ]
    else:
        shards = [backbone | heads]
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = f"{stem}-{number:05d}-of-{len(shards):05d}.{suffix}" if sharded else f"{stem}.{suffix}"
        if safetensors:
            save_file(shard, folder / name)
        else:
            torch.save(shard, folder / name)
        weight_map |= dict.fromkeys(shard, name)
    if sharded:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "medusa_num_heads": 5}))
    return folder


@pytest.mark.parametrize("safetensors", [True, False])
@pytest.mark.parametrize("sharded", [True, False])
def test_format_c(tmp_path: Path, sharded: bool, safetensors: bool) -> None:
    tensors = head_tensors()
    full_model(tmp_path, tensors, sharded=sharded, safetensors=safetensors)
    check_equal(load(tmp_path), tensors)
    assert sorted(read_heads(tmp_path).tensors) == sorted(f"medusa_head.{key}" for key in tensors)
    assert find_heads(tmp_path) == tmp_path


def test_format_c_reads_no_shard_without_heads(tmp_path: Path) -> None:
    full_model(tmp_path, head_tensors(), sharded=True, safetensors=False)
    index_path = tmp_path / "pytorch_model.bin.index.json"
    index = json.loads(index_path.read_text())
    index["weight_map"]["model.norm.weight"] = "pytorch_model-00009-of-00009.bin"  # which is not there
    index_path.write_text(json.dumps(index))
    assert load(tmp_path).num_heads == 5


def test_format_c_with_a_missing_shard(tmp_path: Path) -> None:
    full_model(tmp_path, head_tensors(), sharded=True, safetensors=True)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="lacks model-00002-of-00002.safetensors"):
        load(tmp_path)


def test_find_heads(tmp_path: Path) -> None:
    assert find_heads(tmp_path) is None
    assert find_heads(tmp_path / "nothing") is None
    save_file({"model.norm.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    assert find_heads(tmp_path) is None
    beside = tmp_path / "medusa-1"
    beside.mkdir()
    assert find_heads(tmp_path) is None
    write_safetensors(beside, head_tensors())
    assert find_heads(tmp_path) == beside


@pytest.mark.parametrize("shared", [False, True])
def test_saved_heads_load_equal(tmp_path: Path, shared: bool) -> None:
    lm_head = torch.randn(VOCAB, HIDDEN)
    source = tmp_path / "source"
    source.mkdir()
    heads = load(write_safetensors(source, head_tensors(3, 2, output=not shared)), lm_head)
    save_heads(heads, tmp_path / "saved", base_model="someone/backbone")
    loaded = load(tmp_path / "saved", lm_head)
    assert loaded.is_shared is shared
    for (name, own), (_, other) in zip(heads.named_parameters(), loaded.named_parameters(), strict=True):
        assert torch.equal(own, other), name
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config == {
        "base_model_name_or_path": "someone/backbone",
        "medusa_num_heads": 3,
        "medusa_num_layers": 2,
        "hidden_size": HIDDEN,
        "vocab_size": VOCAB,
        **({"version": "2"} if shared else {}),
    }


def test_saved_keys_are_format_a(tmp_path: Path) -> None:
    tensors = head_tensors()
    save_heads(load(write_pt(tmp_path, tensors)), tmp_path, base_model="b")
    written = load_file(tmp_path / "medusa_lm_head.safetensors")
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[key], tensors[key]) for key in tensors)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    heads = load(write_pt(tmp_path, head_tensors()))
    save_heads(heads, tmp_path, base_model="b")
    before = (tmp_path / "medusa_lm_head.safetensors").read_bytes()
    unserializable = MedusaHeads(num_heads=1, num_layers=1, hidden_size=2, vocab_size=2, device="meta")
    with pytest.raises(NotImplementedError):
        save_heads(unserializable, tmp_path, base_model="b")
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").mkdir()  # renaming a file over it fails
    with pytest.raises(OSError, match="config.json"):
        save_heads(heads, tmp_path, base_model="b")
    assert (tmp_path / "medusa_lm_head.safetensors").read_bytes() == before
    assert not list(tmp_path.glob("*.tmp"))


def test_dtype_is_converted(tmp_path: Path) -> None:
    tensors = {key: tensor.half() for key, tensor in head_tensors().items()}
    heads = load_heads(
        write_pt(tmp_path, tensors), hidden_size=HIDDEN, vocab_size=VOCAB, dtype=torch.bfloat16, device="cpu"
    )
    assert {parameter.dtype for parameter in heads.parameters()} == {torch.bfloat16}
    assert torch.equal(heads.output_weight(0), tensors["0.1.weight"].bfloat16())


def test_padded_heads_lose_their_padding(tmp_path: Path) -> None:
    """Heads trained on a padded backbone have rows for tokens that do not exist."""
    write_pt(tmp_path, head_tensors(rows=VOCAB + 5))
    heads = load(tmp_path, torch.randn(VOCAB + 5, HIDDEN))
    assert heads.vocab_size == VOCAB
    assert heads.draft_logits(torch.randn(1, HIDDEN)).shape == (1, 5, VOCAB)


def test_heads_may_have_fewer_rows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_pt(tmp_path, head_tensors(rows=VOCAB - 3))
    assert load(tmp_path).vocab_size == VOCAB - 3
    assert "only the first 8 of 11 tokens" in caplog.text


def test_hub_names_without_a_network(offline_hub: Path) -> None:
    with pytest.raises(CheckpointError, match="someone/heads is no directory, and no Hub download") as caught:
        load("someone/heads")
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match="no such--name"):
        load("no such--name")


def test_cached_hub_heads_need_no_network(offline_hub: Path) -> None:
    snapshot = offline_hub / "models--someone--heads" / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    refs = offline_hub / "models--someone--heads" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0123abcd")
    tensors = head_tensors()
    write_pt(snapshot, tensors)
    check_equal(load("someone/heads"), tensors)


@pytest.fixture
def offline_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hub cache, and no network to fill it from."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path
