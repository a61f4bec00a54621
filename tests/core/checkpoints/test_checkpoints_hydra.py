"""Hydra heads on disk: the published modules' own files, with their quirks, and ours."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

from medusa_core.checkpoints.head_files import find_heads
from medusa_core.checkpoints.reading import load_heads
from medusa_core.checkpoints.writing import save_heads
from medusa_core.draft.hydra import HydraHeads
from medusa_core.errors import CheckpointError

HIDDEN, VOCAB, HEADS = 8, 11, 3
CONFIG = LlamaConfig(
    vocab_size=VOCAB,
    hidden_size=HIDDEN,
    intermediate_size=12,
    num_hidden_layers=4,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=64,
)

Tensors = dict[str, Tensor]


class Block(nn.Module):
    """The published block: R x + SiLU(W x), where R is the identity unless the width shrinks."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, HIDDEN)
        self.res_connection = nn.Linear(width, HIDDEN) if width > HIDDEN else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.res_connection(x) + nn.functional.silu(self.linear(x))


class PublishedHydra(nn.Module):
    """Module tree of the published heads, so that its state dict has their keys.

    Blocks after the first are one module several times; with a prefix layer, dropout modules shift the
    positions; the embedding is the backbone's own.
    """

    def __init__(self, num_layers: int, embedding: nn.Embedding, *, prefix: bool) -> None:
        super().__init__()
        self.input_embed_fn = embedding
        drop = [nn.Dropout(0.2)] if prefix else []
        if prefix:
            self.prefix_embeding_layer = LlamaModel(
                LlamaConfig(**CONFIG.to_dict() | {"num_hidden_layers": 1})
            )
        self.hydra_mlp = nn.ModuleList(
            nn.Sequential(*drop, Block((head + 2) * HIDDEN), *[*drop, Block(HIDDEN)] * (num_layers - 1))
            for head in range(HEADS)
        )
        outputs = [nn.Linear(HIDDEN, VOCAB) for _ in range(HEADS)]
        self.hydra_lm_head = nn.ModuleList(
            nn.Sequential(*drop, output) if prefix else output for output in outputs
        )

    def logits(self, head: int, hidden: Tensor, path: Tensor) -> Tensor:
        inputs = torch.cat([hidden, self.input_embed_fn(path).flatten()])
        return self.hydra_lm_head[head](self.hydra_mlp[head](inputs))


def published(num_layers: int = 4, *, prefix: bool = True, seed: int = 5) -> PublishedHydra:
    torch.manual_seed(seed)
    return PublishedHydra(num_layers, nn.Embedding(VOCAB, HIDDEN), prefix=prefix).eval()


def published_config(module: PublishedHydra, **changes: object) -> dict[str, object]:
    return {
        "base_model_name_or_path": "someone/backbone",
        "grounded_heads": True,
        "hidden_state_offset": 0,
        "hydra_head_arch": "prefix-mlp" if hasattr(module, "prefix_embeding_layer") else "mlp",
        "hydra_num_heads": 4,  # wrong on purpose: there are 3
        "hydra_num_layers": 4,
    } | changes


def write(folder: Path, module: PublishedHydra, **config: object) -> Path:
    folder.mkdir(exist_ok=True)
    torch.save(module.state_dict(), folder / "hydra_lm_head.pt")
    (folder / "config.json").write_text(json.dumps(published_config(module, **config)))
    return folder


def load(path: str | Path, module: PublishedHydra, **rest: object) -> HydraHeads:
    arguments = {"hidden_size": HIDDEN, "vocab_size": VOCAB, "backbone_config": CONFIG} | rest
    heads = load_heads(path, embed=lambda ids: module.input_embed_fn(ids), **arguments)
    assert isinstance(heads, HydraHeads)
    return heads


def check_logits(heads: HydraHeads, module: PublishedHydra) -> None:
    """Every head's logits after a path are those of the published module."""
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(HIDDEN, generator=generator)
    for head in range(HEADS):
        paths = torch.randint(0, VOCAB, (2, head + 1), generator=generator)
        logits = heads.level_logits(head, hidden[None], paths[None])[0]
        for row, path in zip(logits, paths, strict=True):
            expected = module.logits(head, hidden, path)[: heads.vocab_size]
            torch.testing.assert_close(row, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("num_layers", [1, 2, 4])
def test_published_files_compute_what_the_published_module_does(
    tmp_path: Path, num_layers: int, prefix: bool
) -> None:
    module = published(num_layers, prefix=prefix)
    heads = load(write(tmp_path, module), module)
    assert (heads.num_heads, heads.num_layers, heads.vocab_size) == (HEADS, num_layers, VOCAB)
    assert (heads.prefix is not None) is prefix
    check_logits(heads, module)
    assert not any(parameter.requires_grad for parameter in heads.parameters())


def test_the_prefix_layer_is_the_published_one(tmp_path: Path) -> None:
    module = published()
    heads = load(write(tmp_path, module), module)
    hidden = torch.randn(1, 9, HIDDEN, generator=torch.Generator().manual_seed(1))
    expected = module.prefix_embeding_layer(inputs_embeds=hidden, use_cache=False).last_hidden_state
    torch.testing.assert_close(heads.contextualize(hidden), expected, rtol=1e-5, atol=1e-5)


def test_sixteen_bits_leave_the_rotary_angles_exact(tmp_path: Path) -> None:
    module = published()
    heads = load(write(tmp_path, module), module, dtype=torch.bfloat16)
    assert heads.prefix is not None
    assert {parameter.dtype for parameter in heads.parameters()} == {torch.bfloat16}
    theirs = module.prefix_embeding_layer.rotary_emb.inv_freq
    assert torch.equal(heads.prefix.model.rotary_emb.inv_freq, theirs)


def test_positions_behind_dropout_are_in_the_file() -> None:
    """The fixture has the quirks it is meant to have."""
    keys = set(published().state_dict())
    assert {"hydra_mlp.0.7.linear.weight", "hydra_mlp.2.1.res_connection.bias"} <= keys
    assert {
        "hydra_lm_head.2.1.bias",
        "input_embed_fn.weight",
        "prefix_embeding_layer.embed_tokens.weight",
    } <= keys
    assert "hydra_mlp.0.0.linear.weight" not in keys


def test_aliased_embeddings_do_not_overwrite_the_backbones(tmp_path: Path) -> None:
    """The reference's own loader does: its file holds the embedding, and the attention kinds the lm_head."""
    module = published()
    saved = {key: tensor.bfloat16() for key, tensor in module.state_dict().items()}
    saved |= {
        "input_embed_fn.weight": torch.full((VOCAB, HIDDEN), 7.0),
        "lm_head.weight": torch.full((VOCAB, HIDDEN), 8.0),
        "prefix_embeding_layer.layers.0.self_attn.rotary_emb.inv_freq": torch.full((2,), 9.0),
    }
    write(tmp_path, module)
    torch.save(saved, tmp_path / "hydra_lm_head.pt")
    backbone_rows = torch.randn(VOCAB, HIDDEN)
    embedding_before, rows_before = module.input_embed_fn.weight.clone(), backbone_rows.clone()
    heads = load(tmp_path, module, lm_head_weight=backbone_rows)
    assert torch.equal(module.input_embed_fn.weight, embedding_before)
    assert torch.equal(backbone_rows, rows_before)
    assert not any(
        len(p.flatten()) and p.flatten()[0] in (7.0, 8.0, 9.0) for p in heads.state_dict().values()
    )
    assert not any("embed" in name for name, _ in heads.named_parameters())


def test_tied_blocks_become_distinct_layers(tmp_path: Path) -> None:
    module = published(3, prefix=False)
    heads = load(write(tmp_path, module), module)
    first, second = heads.block_weights
    assert torch.equal(first, second)
    assert first.data_ptr() != second.data_ptr()


def test_the_wrong_head_count_of_config_json_is_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module = published()
    with caplog.at_level("INFO"):
        load(write(tmp_path, module), module)
    assert "config.json says 4 heads, the file holds 3" in caplog.text


def test_rows_of_padding_are_dropped_with_their_biases(tmp_path: Path) -> None:
    module = published(2, prefix=False)
    heads = load(
        write(tmp_path, module), module, vocab_size=VOCAB - 2, lm_head_weight=torch.zeros(VOCAB, HIDDEN)
    )
    assert heads.vocab_size == VOCAB - 2
    assert heads.output_bias_KV is not None
    assert heads.output_bias_KV.shape == (HEADS, VOCAB - 2)
    check_logits(heads, module)


@pytest.mark.parametrize("prefix", [False, True])
def test_saved_heads_load_equal(tmp_path: Path, prefix: bool) -> None:
    module = published(3, prefix=prefix)
    heads = load(write(tmp_path / "published", module), module)
    save_heads(heads, tmp_path / "saved", base_model="someone/backbone")
    loaded = load(tmp_path / "saved", module)
    names = dict(heads.named_parameters())
    assert names.keys() == dict(loaded.named_parameters()).keys()
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, names[name]), name
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config == published_config(
        module, hydra_num_heads=HEADS, hydra_num_layers=3, hidden_size=HIDDEN, vocab_size=VOCAB
    )


@pytest.mark.parametrize("prefix", [False, True])
def test_the_published_module_takes_what_we_write(tmp_path: Path, prefix: bool) -> None:
    module = published(2, prefix=prefix)
    save_heads(load(write(tmp_path, module), module), tmp_path / "saved", base_model="b")
    written = load_file(tmp_path / "saved" / "hydra_lm_head.safetensors")
    other = published(2, prefix=prefix, seed=6)
    missing, unexpected = other.load_state_dict(written, strict=False)
    assert unexpected == []
    assert set(missing) <= {"input_embed_fn.weight", "prefix_embeding_layer.embed_tokens.weight"}
    path, hidden = torch.tensor([3, 4]), torch.ones(HIDDEN)
    other.input_embed_fn = module.input_embed_fn
    torch.testing.assert_close(other.logits(1, hidden, path), module.logits(1, hidden, path))


@pytest.mark.parametrize("token_map", [None, torch.tensor([7, 2, 9])])
def test_a_shared_output_layer_is_not_written(tmp_path: Path, token_map: Tensor | None) -> None:
    module = published(2, prefix=False)
    lm_head = torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(4))
    tensors = {key: t for key, t in module.state_dict().items() if key.startswith("hydra_mlp.")}
    if token_map is not None:
        tensors["token_map"] = token_map
    save_file(
        {key: tensor.clone() for key, tensor in tensors.items()}, tmp_path / "hydra_lm_head.safetensors"
    )
    with pytest.raises(CheckpointError, match="share the backbone's output layer, which was not given"):
        load(tmp_path, module)
    heads = load(tmp_path, module, lm_head_weight=lm_head)
    assert heads.is_shared
    assert torch.equal(heads.output_weight(0), lm_head if token_map is None else lm_head[token_map])
    save_heads(heads, tmp_path / "saved", base_model="b")
    assert load_file(tmp_path / "saved" / "hydra_lm_head.safetensors").keys() == tensors.keys()
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["version"] == "2"
    again = load(tmp_path / "saved", module, lm_head_weight=lm_head)
    assert torch.equal(again.block_weights[0], heads.block_weights[0])
    assert (again.token_map is None) is (token_map is None)


@pytest.mark.parametrize(
    ("config", "keys", "message"),
    [
        ({"hydra_head_arch": "cross-attn"}, {}, "architecture cross-attn: only mlp and prefix-mlp"),
        ({"hydra_head_arch": "eagle-attn"}, {}, "architecture eagle-attn"),
        ({}, {"cross_attn.q_proj.weight": torch.ones(1)}, "architecture cross-attn"),
        ({}, {"attn.self_attn.q_proj.weight": torch.ones(1)}, "architecture eagle-attn"),
        ({}, {"fc.weight": torch.ones(1)}, "architecture eagle-attn"),
        ({"grounded_heads": False}, {}, "grounded_heads false"),
        ({"hidden_state_offset": 1}, {}, "hidden_state_offset 1"),
    ],
)
def test_other_architectures_are_refused_by_name(
    tmp_path: Path, config: dict[str, object], keys: Tensors, message: str
) -> None:
    module = published(1, prefix=False)
    write(tmp_path, module, **config)
    torch.save(module.state_dict() | keys, tmp_path / "hydra_lm_head.pt")
    with pytest.raises(CheckpointError, match=rf"hydra_lm_head\.pt holds Hydra heads .*{message}"):
        load(tmp_path, module)


def test_a_prefix_layer_that_is_promised_must_be_there(tmp_path: Path) -> None:
    module = published(1, prefix=False)
    with pytest.raises(CheckpointError, match=r"lacks prefix_embeding_layer\.\*"):
        load(write(tmp_path, module, hydra_head_arch="prefix-mlp"), module)


def test_a_prefix_layer_of_another_backbone_is_refused(tmp_path: Path) -> None:
    module = published(1)
    other = LlamaConfig(**CONFIG.to_dict() | {"num_key_value_heads": 2})
    message = (
        r"prefix_embeding_layer\.layers\.0\.self_attn\.k_proj\.weight has shape \[4, 8\], expected \[8, 8\]"
    )
    with pytest.raises(CheckpointError, match=message):
        load(write(tmp_path, module), module, backbone_config=other)


def only(tensors: Tensors, *prefixes: str) -> Tensors:
    return {key: tensor for key, tensor in tensors.items() if key.startswith(prefixes)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: only(t, "hydra_lm_head."), "holds no Hydra heads"),
        (
            lambda t: {k.replace(".1.linear", ".2.linear"): v for k, v in t.items()},
            "has gaps between its heads",
        ),
        (
            lambda t: {k.replace("mlp.2.", "mlp.999999999."): v for k, v in t.items()},
            "has gaps between its heads",
        ),
        (lambda t: only(t, "hydra_mlp.0", "hydra_lm_head"), r"unexpected hydra_lm_head\.1\.bias"),
        (lambda t: t | {"hydra_lm_head.0.weight": torch.ones(0, HIDDEN)}, "has a vocabulary of 0"),
        (lambda t: t | {"hydra_lm_head.1.bias": torch.ones(3)}, r"hydra_lm_head\.1\.bias has shape \[3\]"),
        (lambda t: t | {"token_map": torch.tensor([1, 2])}, r"token_map has 2 ids, .* has 11 rows"),
        (
            lambda t: t | {"token_map": torch.arange(VOCAB) + 1},
            "token_map names token 11, the backbone has 11",
        ),
        (lambda t: t | {"token_map": torch.tensor([1.5])}, "token_map is torch.float32, not an integer type"),
    ],
)
def test_broken_hydra_files_are_refused(
    tmp_path: Path, change: Callable[[Tensors], Tensors], message: str
) -> None:
    module = published(2, prefix=False)
    write(tmp_path, module)
    torch.save(change(dict(module.state_dict())), tmp_path / "hydra_lm_head.pt")
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path, module)


def test_what_hydra_heads_need_of_the_backbone_must_be_given(tmp_path: Path) -> None:
    module = published(1)
    write(tmp_path, module)
    with pytest.raises(CheckpointError, match="need the backbone's embedding"):
        load_heads(tmp_path, hidden_size=HIDDEN, vocab_size=VOCAB, backbone_config=CONFIG)
    with pytest.raises(CheckpointError, match="needs the backbone's config"):
        load(tmp_path, module, backbone_config=None)
    with pytest.raises(CheckpointError, match="hidden size 8, the backbone's hidden size is 16"):
        load(tmp_path, module, hidden_size=16)


def test_which_file_counts_where_two_kinds_lie_together(tmp_path: Path) -> None:
    """The config is that of the last one written."""
    module = published(1, prefix=False)
    write(tmp_path, module)
    save_file({"0.0.linear.weight": torch.zeros(2, 2)}, tmp_path / "medusa_lm_head.safetensors")
    load(tmp_path, module)
    (tmp_path / "config.json").write_text("{}")
    message = r"holds hydra_lm_head\.pt and medusa_lm_head\.safetensors: name the file that is meant"
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path, module)
    load(tmp_path / "hydra_lm_head.pt", module)


def test_sets_beside_a_model_in_their_order(tmp_path: Path) -> None:
    module = published(1, prefix=False)
    for name in ("medusa-1", "hydra++", "hydra", "heads"):
        write(tmp_path / name, module)
        assert find_heads(tmp_path) == tmp_path / name
