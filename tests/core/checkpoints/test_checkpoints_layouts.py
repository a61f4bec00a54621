"""Layouts D and E with their quirks, token maps, and what every layout refuses by name."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaModel

from medusa_core.checkpoints.head_files import find_heads
from medusa_core.checkpoints.reading import load_heads
from medusa_core.checkpoints.writing import save_heads
from medusa_core.draft.medusa import MedusaHeads
from medusa_core.errors import CheckpointError

HIDDEN, VOCAB = 8, 11
PREFIX_CONFIG = LlamaConfig(
    vocab_size=1, hidden_size=HIDDEN, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2
)

Tensors = dict[str, Tensor]


def linear(out: int = HIDDEN, width: int = HIDDEN, *, bias: bool = True) -> Tensors:
    return {"weight": torch.randn(out, width)} | ({"bias": torch.randn(out)} if bias else {})


def joined(prefix: str, tensors: Tensors) -> Tensors:
    return {f"{prefix}.{key}": tensor for key, tensor in tensors.items()}


def vllm_tensors(num_heads: int = 3, num_layers: int = 2, *, bias: bool = True, outputs: int = 3) -> Tensors:
    tensors: Tensors = {}
    for head in range(num_heads):
        for layer in range(num_layers):
            tensors |= joined(f"blocks.{head}.layers.{layer}", linear(bias=bias))
    for head in range(outputs):
        tensors[f"lm_heads.{head}.weight"] = torch.randn(VOCAB, HIDDEN)
    return tensors


def plain_tensors(
    prefix: str = "", num_heads: int = 3, num_layers: int = 2, *, output: bool = True
) -> Tensors:
    """Layout A; with a prefix C or E, without output layers B."""
    tensors: Tensors = {}
    for head in range(num_heads):
        for layer in range(num_layers):
            tensors |= joined(f"{prefix}{head}.{layer}.linear", linear())
        if output:
            tensors[f"{prefix}{head}.{num_layers}.weight"] = torch.randn(VOCAB, HIDDEN)
    return tensors


def hydra_tensors(*, prefix: bool) -> Tensors:
    tensors: Tensors = {"input_embed_fn.weight": torch.randn(VOCAB, HIDDEN)}
    step, inner = (2, ".1") if prefix else (1, "")
    for head in range(3):
        first = f"hydra_mlp.{head}.{step - 1}"
        for module in ("linear", "res_connection"):
            tensors |= joined(f"{first}.{module}", linear(HIDDEN, (head + 2) * HIDDEN))
        tensors |= joined(f"hydra_mlp.{head}.{2 * step - 1}.linear", linear())
        tensors |= joined(f"hydra_lm_head.{head}{inner}", linear(VOCAB))
    if prefix:
        tensors |= joined("prefix_embeding_layer", dict(LlamaModel(PREFIX_CONFIG).state_dict()))
    return tensors


@dataclass(frozen=True)
class Layout:
    """How one layout is stored, one of its weights, and a key that does not belong."""

    stem: str
    tensors: Callable[[], Tensors]
    victim: str
    extra: str
    beside: Tensors = field(default_factory=dict)

    def write(self, folder: Path, tensors: dict[str, object], suffix: str) -> Path:
        stem = "pytorch_model" if (self.stem, suffix) == ("model", ".bin") else self.stem
        path = folder / f"{stem}{suffix}"
        if suffix == ".safetensors":
            save_file(tensors | self.beside, path)
        else:
            torch.save(tensors | self.beside, path)
        return folder

    @property
    def pickled(self) -> str:
        return ".bin" if self.stem == "model" else ".pt"


BACKBONE = {"model.norm.weight": torch.ones(HIDDEN)}
LAYOUTS = {
    "A": Layout("medusa_lm_head", plain_tensors, "1.0.linear.weight", "0.0.linear.scale"),
    "B": Layout("medusa_lm_head", lambda: plain_tensors(output=False), "1.0.linear.bias", "0.0.norm.weight"),
    "C": Layout(
        *("model", lambda: plain_tensors("medusa_head."), "medusa_head.1.2.weight", "medusa_head.0.x"),
        BACKBONE,
    ),
    "D": Layout("model", vllm_tensors, "blocks.1.layers.0.weight", "blocks.0.layers.0.scale"),
    "E": Layout(
        *("model", lambda: plain_tensors("medusa_heads."), "medusa_heads.1.0.linear.weight"),
        *("medusa_heads.0.0.linear.pre_quant_scale", BACKBONE),
    ),
    "F": Layout(
        *("hydra_lm_head", lambda: hydra_tensors(prefix=False)),
        *("hydra_mlp.2.0.res_connection.weight", "hydra_mlp.0.0.norm.weight"),
    ),
    "F with prefix": Layout(
        *("hydra_lm_head", lambda: hydra_tensors(prefix=True)),
        *("prefix_embeding_layer.layers.0.mlp.up_proj.weight", "prefix_embeding_layer.layers.1.x"),
    ),
}
BACKBONE_ROWS = torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(8))
EMBEDDING = torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(9))


def load(path: Path, lm_head_weight: Tensor | None = BACKBONE_ROWS, vocab_size: int = VOCAB) -> MedusaHeads:
    return load_heads(
        path,
        hidden_size=HIDDEN,
        vocab_size=vocab_size,
        lm_head_weight=lm_head_weight,
        embed=lambda ids: EMBEDDING[ids],
        backbone_config=PREFIX_CONFIG,
    )


def write_vllm(folder: Path, tensors: Tensors, **config: object) -> Path:
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"architectures": ["MedusaModel"]} | config))
    return folder


@pytest.mark.parametrize("suffix", [".safetensors", "pickled"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_round_trips(tmp_path: Path, name: str, suffix: str) -> None:
    """Read, written in our layout for the kind, and read again: the same parameters."""
    layout = LAYOUTS[name]
    heads = load(layout.write(tmp_path, layout.tensors(), suffix.replace("pickled", layout.pickled)))
    assert (heads.num_heads, heads.num_layers) == (3, 2)
    save_heads(heads, tmp_path / "saved", base_model="b")
    again = dict(load(tmp_path / "saved").named_parameters())
    assert again.keys() == dict(heads.named_parameters()).keys()
    for key, parameter in heads.named_parameters():
        assert torch.equal(parameter, again[key]), key
        assert parameter.abs().sum() > 0, key


BREAKAGES: dict[str, tuple[Callable[[Tensors, Layout], None], str]] = {
    "missing": (lambda t, layout: t.__delitem__(layout.victim), r"missing {victim}"),
    "extra": (
        lambda t, layout: t.update({layout.extra: torch.ones(2)}),
        r"unexpected {extra}|{extra} has no",
    ),
    "shape": (lambda t, layout: t.update({layout.victim: torch.ones(3, 2)}), r"{victim} has shape \[3, 2\]"),
    "rank": (lambda t, layout: t.update({layout.victim: torch.tensor(1.0)}), r"{victim} has shape \[\]"),
    "dtype": (
        lambda t, layout: t.update({layout.victim: t[layout.victim].to(torch.int8)}),
        r"{victim} is torch\.int8, not a float type",
    ),
}


@pytest.mark.parametrize("breakage", BREAKAGES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_broken_files_of_every_layout_are_refused_by_name(tmp_path: Path, name: str, breakage: str) -> None:
    layout, (breaks, message) = LAYOUTS[name], BREAKAGES[breakage]
    tensors = layout.tensors()
    breaks(tensors, layout)
    layout.write(tmp_path, tensors, ".safetensors")
    names = {key: getattr(layout, key).replace(".", r"\.") for key in ("victim", "extra")}
    with pytest.raises(CheckpointError, match=message.format(**names)) as caught:
        load(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("kind", ["sparse", "meta", "list"])
def test_what_is_no_dense_tensor_is_refused_by_name(tmp_path: Path, name: str, kind: str) -> None:
    layout = LAYOUTS[name]
    tensors = layout.tensors()
    weight = tensors[layout.victim]
    tensors[layout.victim] = {"sparse": weight.to_sparse(), "meta": weight.to("meta"), "list": [1.0]}[kind]
    layout.write(tmp_path, tensors, layout.pickled)
    with pytest.raises(CheckpointError, match=layout.victim.replace(".", r"\.") + " is not a dense tensor"):
        load(tmp_path)


class Attack:
    """Unpickles by touching a file."""

    def __init__(self, target: Path) -> None:
        self._target = target

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self._target,)


@pytest.mark.parametrize("name", LAYOUTS)
def test_code_in_a_pickle_of_any_layout_does_not_run(tmp_path: Path, name: str) -> None:
    layout, proof = LAYOUTS[name], tmp_path / "executed"
    layout.write(tmp_path, layout.tensors() | {layout.victim: Attack(proof)}, layout.pickled)
    with pytest.raises(CheckpointError, match=r"cannot read .*(\.pt|\.bin) as plain tensors"):
        load(tmp_path)
    with pytest.raises(CheckpointError, match="as plain tensors"):
        load(next(tmp_path.glob(f"*{layout.pickled}")))
    assert not proof.exists()


def test_vllms_optional_prefix(tmp_path: Path) -> None:
    tensors = vllm_tensors()
    prefixed = {f"medusa_heads.{key}": tensor for key, tensor in tensors.items()}
    heads = load(write_vllm(tmp_path, prefixed))
    assert torch.equal(heads.block_weights[1][2], tensors["blocks.2.layers.1.weight"])
    assert torch.equal(heads.output_weight(1), tensors["lm_heads.1.weight"])


def test_a_key_with_and_without_the_prefix_is_refused(tmp_path: Path) -> None:
    tensors = vllm_tensors() | {"medusa_heads.lm_heads.1.weight": torch.randn(VOCAB, HIDDEN)}
    message = r"medusa_heads\.lm_heads\.1\.weight is there with its prefix and without"
    with pytest.raises(CheckpointError, match=message):
        load(write_vllm(tmp_path, tensors))


def test_vllms_missing_biases_are_zeros(tmp_path: Path) -> None:
    """`medusa_fc_bias` is false by default there, and the best-known file has none."""
    heads = load(write_vllm(tmp_path, vllm_tensors(bias=False)))
    assert all(torch.equal(bias, torch.zeros(3, HIDDEN)) for bias in heads.block_biases)
    tensors = vllm_tensors(bias=False) | {"blocks.0.layers.0.bias": torch.ones(HIDDEN)}
    with pytest.raises(CheckpointError, match=r"missing blocks\.0\.layers\.1\.bias"):
        load(write_vllm(tmp_path, tensors))


def test_one_output_layer_that_is_the_backbones_is_shared(tmp_path: Path) -> None:
    tensors = vllm_tensors(outputs=1)
    write_vllm(tmp_path, tensors | {"lm_heads.0.weight": BACKBONE_ROWS}, original_lm_head=True)
    heads = load(tmp_path)
    assert heads.is_shared
    assert torch.equal(heads.output_weight(2), BACKBONE_ROWS)


@pytest.mark.parametrize("lm_head_weight", [None, BACKBONE_ROWS])
def test_one_output_layer_of_its_own_serves_every_head(tmp_path: Path, lm_head_weight: Tensor | None) -> None:
    tensors = vllm_tensors(outputs=1)
    heads = load(write_vllm(tmp_path, tensors), lm_head_weight)
    assert not heads.is_shared
    assert all(torch.equal(heads.output_weight(head), tensors["lm_heads.0.weight"]) for head in range(3))


def test_logit_scale_becomes_part_of_the_output_layers(tmp_path: Path) -> None:
    tensors = vllm_tensors()
    heads = load(write_vllm(tmp_path, tensors, logit_scale=0.5, num_heads=3))
    assert torch.equal(heads.output_weight(1), tensors["lm_heads.1.weight"] * 0.5)
    for scale in (0, "big", True, [1.0]):
        with pytest.raises(CheckpointError, match="logit_scale in config.json"):
            load(write_vllm(tmp_path, tensors, logit_scale=scale))


def test_vllms_head_count_is_compared(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        load(write_vllm(tmp_path, vllm_tensors(), num_heads=5))
    assert "config.json says 5 heads, the file holds 3" in caplog.text


IDS = torch.tensor([9, 0, 4])


def mapped(rows: int = 3, **more: Tensor) -> Tensors:
    outputs = {f"lm_heads.{head}.weight": torch.randn(rows, HIDDEN) for head in range(3)}
    return vllm_tensors() | outputs | {"token_map": IDS} | more


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_token_map(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = mapped(token_map=IDS.to(dtype))
    heads = load(write_vllm(tmp_path, tensors, truncated_vocab_size=3, vocab_size=VOCAB))
    assert heads.vocab_size == 3
    assert heads.token_map is not None
    assert heads.token_map.dtype == torch.int64
    assert heads.token_map.tolist() == [9, 0, 4]
    assert torch.equal(heads.output_weight(1), tensors["lm_heads.1.weight"])
    save_heads(heads, tmp_path / "saved", base_model="b")
    again = load(tmp_path / "saved")
    assert again.token_map is not None
    assert again.token_map.tolist() == [9, 0, 4]
    assert torch.equal(again.output_weight(1), tensors["lm_heads.1.weight"])


def test_token_map_takes_its_rows_of_whole_output_layers(tmp_path: Path) -> None:
    """vLLM cuts those it finds whole."""
    tensors = mapped(rows=VOCAB)
    heads = load(write_vllm(tmp_path, tensors))
    assert torch.equal(heads.output_weight(2), tensors["lm_heads.2.weight"][IDS])


def test_token_map_of_a_shared_output_layer(tmp_path: Path) -> None:
    tensors = vllm_tensors(outputs=1) | {"lm_heads.0.weight": BACKBONE_ROWS[IDS], "token_map": IDS}
    heads = load(write_vllm(tmp_path, tensors))
    assert heads.is_shared
    assert torch.equal(heads.output_weight(0), BACKBONE_ROWS[IDS])
    save_heads(heads, tmp_path / "saved", base_model="b")
    again = load(tmp_path / "saved")
    assert again.is_shared
    assert torch.equal(again.output_weight(0), BACKBONE_ROWS[IDS])


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.tensor([1, 2, VOCAB]), "token_map names token 11, the backbone has 11 tokens"),
        (torch.tensor([1, -1, 2]), "token_map holds -1, which is no token id"),
        (torch.tensor([4, 2, 4]), "token_map names token 4 2 times"),
        (torch.tensor([1.0, 2.0, 3.0]), r"token_map is torch\.float32, not an integer type"),
        (torch.tensor([True, False, True]), r"token_map is torch\.bool, not an integer type"),
        (torch.tensor([[1, 2, 3]]), r"token_map has shape \[1, 3\], expected one token id per row"),
        (torch.tensor([], dtype=torch.long), r"token_map has shape \[0\]"),
        (torch.tensor([1, 5]), r"token_map has 2 ids up to 5, lm_heads\.0\.weight has 3 rows"),
        (torch.tensor([1, 2, 3, 4]), r"token_map has 4 ids up to 4, lm_heads\.0\.weight has 3 rows"),
    ],
)
def test_broken_token_maps_are_refused(tmp_path: Path, ids: Tensor, message: str) -> None:
    write_vllm(tmp_path, mapped(token_map=ids))
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


@pytest.mark.parametrize("alone", [True, False])
def test_modelopt_fp8_weights_are_dequantized(tmp_path: Path, alone: bool) -> None:
    """A scale a tensor or a scale a row; the scales of activations have no use here."""
    tensors = plain_tensors("medusa_heads.")
    expected = {}
    for number, key in enumerate([key for key in tensors if key.endswith("weight")]):
        scale = torch.rand(HIDDEN if "linear" in key else VOCAB) + 0.1 if number % 2 else torch.tensor(0.25)
        quantized = (tensors[key] / scale.reshape(-1, 1)).to(torch.float8_e4m3fn)
        expected[key] = quantized.float() * scale.reshape(-1, 1)
        tensors |= {
            key: quantized,
            key.replace("weight", "weight_scale"): scale,
            key.replace("weight", "input_scale"): torch.tensor(0.01),
        }
    save_file(tensors | ({} if alone else BACKBONE), tmp_path / "model.safetensors")
    heads = load(tmp_path)
    assert torch.equal(heads.block_weights[1][2], expected["medusa_heads.2.1.linear.weight"])
    assert torch.equal(heads.output_weight(1), expected["medusa_heads.1.2.weight"])
    assert find_heads(tmp_path) == tmp_path


FP8 = torch.ones(HIDDEN, HIDDEN).to(torch.float8_e4m3fn)
BLOCK = "medusa_heads.0.0.linear"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": FP8}, "weight is torch.float8_e4m3fn and lacks its weight_scale"),
        ({"weight_scale": torch.tensor(1.0)}, "weight is torch.float32 with a weight_scale; only fp8"),
        (
            {"weight": torch.ones(HIDDEN, HIDDEN, dtype=torch.uint8), "weight_scale": torch.tensor(1.0)},
            "weight is torch.uint8 with a weight_scale; only fp8",
        ),
        ({"weight": FP8, "weight_scale": torch.ones(HIDDEN, 2)}, r"weight_scale of shape \[8, 2\]; only one"),
        ({"weight": FP8, "weight_scale": torch.tensor(float("nan"))}, "not positive and finite"),
        ({"weight": FP8, "weight_scale": torch.tensor(-1.0)}, "not positive and finite"),
        ({"weight": FP8, "weight_scale": torch.tensor(1)}, "weight_scale is torch.int64, not a float type"),
        ({"norm.input_scale": torch.tensor(1.0)}, r"norm\.input_scale has no .*norm\.weight"),
    ],
)
def test_other_quantization_is_refused_by_name(tmp_path: Path, changes: Tensors, message: str) -> None:
    tensors = plain_tensors("medusa_heads.") | joined(BLOCK, changes)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"medusa_heads\.0\.0\.linear.*{message}"):
        load(tmp_path)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_an_index_that_names_too_much(tmp_path: Path, suffix: str) -> None:
    layout = LAYOUTS["C"]
    layout.write(tmp_path, layout.tensors(), suffix)
    stem = "model" if suffix == ".safetensors" else "pytorch_model"
    (tmp_path / f"{stem}{suffix}").rename(tmp_path / f"shard{suffix}")
    weight_map = dict.fromkeys([*layout.tensors(), "medusa_head.3.0.linear.bias"], f"shard{suffix}")
    (tmp_path / f"{stem}{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    message = r"lacks medusa_head\.3\.0\.linear\.bias, which its index names"
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


def test_an_index_that_points_elsewhere(tmp_path: Path) -> None:
    layout, folder = LAYOUTS["C"], tmp_path / "model"
    folder.mkdir()
    layout.write(tmp_path, layout.tensors(), ".safetensors")
    for place in ("../model.safetensors", str(tmp_path / "model.safetensors")):
        weight_map = dict.fromkeys(layout.tensors(), place)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(CheckpointError, match="which is no file beside it"):
            load(folder)
