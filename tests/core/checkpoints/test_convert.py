"""`medusa convert`: what the other servers load, and whole models with heads."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from medusa_core.checkpoints.conversion import read_base
from medusa_core.checkpoints.export import convert_heads
from medusa_core.checkpoints.head_files import read_heads
from medusa_core.checkpoints.reading import load_heads
from medusa_core.checkpoints.writing import save_full_model, save_heads
from medusa_core.cli.main import app
from medusa_core.config import EngineConfig
from medusa_core.draft.accuracy import default_calibration, load_calibration, save_calibration
from medusa_core.draft.hydra import HydraHeads, HydraShape
from medusa_core.draft.medusa import MedusaHeads
from medusa_core.draft.prefix import PrefixLayer, prefix_config
from medusa_core.errors import CheckpointError
from medusa_core.loading.loader import load_parts

HIDDEN, VOCAB = 64, 320
FLOAT32 = EngineConfig(dtype="float32", device="cpu", measure=False)
IDS = torch.tensor([7, 300, 2, 40])

Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def lm_head(tiny_model_dir: Path) -> Tensor:
    return load_file(tiny_model_dir / "model.safetensors")["lm_head.weight"]


def heads_like(
    lm_head: Tensor,
    num_layers: int = 1,
    *,
    shared: bool = False,
    token_map: Tensor | None = None,
    rows: int = VOCAB,
) -> MedusaHeads:
    heads = MedusaHeads.new(
        hidden_size=HIDDEN,
        vocab_size=rows if token_map is None else len(token_map),
        num_heads=3,
        num_layers=num_layers,
        lm_head_weight=lm_head,
        shared=shared,
        token_map=token_map,
    )
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return heads.eval()


def saved(heads: MedusaHeads | HydraHeads, folder: Path, base_model: str = "someone/backbone") -> Path:
    save_heads(heads, folder, base_model=base_model)
    return folder


def check_same(path: Path, heads: MedusaHeads, lm_head: Tensor) -> MedusaHeads:
    """What was converted drafts as the original does."""
    loaded = load_heads(path, hidden_size=HIDDEN, vocab_size=VOCAB, lm_head_weight=lm_head)
    hidden = torch.randn(2, HIDDEN, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(loaded.draft_logits(hidden), heads.draft_logits(hidden))
    return loaded


def config_of(folder: Path) -> dict[str, object]:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("num_layers", [1, 2])
def test_vllm(tmp_path: Path, lm_head: Tensor, num_layers: int) -> None:
    heads = heads_like(lm_head, num_layers)
    convert_heads(saved(heads, tmp_path / "heads"), tmp_path / "out", "vllm")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert len(tensors) == 3 * (2 * num_layers + 1)
    assert torch.equal(tensors["blocks.2.layers.0.bias"], heads.block_biases[0][2])
    assert torch.equal(tensors["lm_heads.1.weight"], heads.output_weight(1))
    assert config_of(tmp_path / "out") == {
        "architectures": ["MedusaModel"],
        "model_type": "medusa",
        "hidden_size": HIDDEN,
        "vocab_size": VOCAB,
        "num_heads": 3,
        "num_hidden_layers": num_layers,
        "max_paths": 64,
        "topk": 10,
        "truncated_vocab_size": None,
        "original_lm_head": False,
        "medusa_fc_bias": True,
        "torch_dtype": "float32",
        "base_model_name_or_path": "someone/backbone",
    }
    check_same(tmp_path / "out", heads, lm_head)


def test_vllms_config_has_no_further_keys_it_takes_for_counts(tmp_path: Path, lm_head: Tensor) -> None:
    """Its loader renames every key with "num" and "heads" or "layers" in it."""
    convert_heads(saved(heads_like(lm_head), tmp_path / "heads"), tmp_path / "out", "vllm")
    counts = [key for key in config_of(tmp_path / "out") if "num" in key]
    assert counts == ["num_heads", "num_hidden_layers"]


def test_vllm_without_biases_stays_without(tmp_path: Path) -> None:
    tensors = {"blocks.0.layers.0.weight": torch.randn(4, 4), "lm_heads.0.weight": torch.randn(6, 4)}
    save_file(tensors, tmp_path / "model.safetensors")
    convert_heads(tmp_path, tmp_path / "out", "vllm")
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == tensors.keys()
    assert config_of(tmp_path / "out")["medusa_fc_bias"] is False


@pytest.mark.parametrize("token_map", [None, IDS])
def test_vllm_holds_the_backbones_output_layer_once(
    tmp_path: Path, tiny_model_dir: Path, lm_head: Tensor, token_map: Tensor | None
) -> None:
    heads = heads_like(lm_head, shared=True, token_map=token_map)
    source = saved(heads, tmp_path / "heads")
    with pytest.raises(CheckpointError, match="give --model"):
        convert_heads(source, tmp_path / "out", "vllm")
    convert_heads(source, tmp_path / "out", "vllm", model=str(tiny_model_dir))
    tensors, config = load_file(tmp_path / "out" / "model.safetensors"), config_of(tmp_path / "out")
    known = torch.arange(VOCAB) if token_map is None else token_map
    assert [key for key in tensors if key.startswith("lm_heads")] == ["lm_heads.0.weight"]
    assert tensors["lm_heads.0.weight"].shape == lm_head.shape
    assert torch.equal(tensors["lm_heads.0.weight"][known], lm_head[known])
    assert config["original_lm_head"] is True
    assert config["truncated_vocab_size"] is None
    assert config["vocab_size"] == VOCAB
    assert check_same(tmp_path / "out", heads, lm_head).is_shared


@pytest.mark.parametrize("token_map", [IDS, None])
def test_vllm_gets_whole_output_layers_of_short_ones(
    tmp_path: Path, tiny_model_dir: Path, lm_head: Tensor, token_map: Tensor | None
) -> None:
    """It refuses short ones, and token maps that shorten them."""
    heads = heads_like(lm_head, token_map=token_map, rows=300)
    source = saved(heads, tmp_path / "heads")
    convert_heads(source, tmp_path / "out", "vllm", model=str(tiny_model_dir))
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    known = torch.arange(300) if token_map is None else token_map
    hidden = torch.randn(500, HIDDEN, generator=torch.Generator().manual_seed(2))
    for head in range(3):
        whole = tensors[f"lm_heads.{head}.weight"]
        assert whole.shape == (VOCAB, HIDDEN)
        assert torch.equal(whole[known], heads.output_weight(head))
        assert torch.isin((hidden @ whole.T).argmax(-1), known).all()  # no padding is ever drafted
    convert_heads(tmp_path / "out", tmp_path / "again", "vllm")  # that file names the vocabulary itself
    for folder in ("out", "again"):
        config = config_of(tmp_path / folder)
        assert (config["vocab_size"], config["truncated_vocab_size"]) == (VOCAB, None)
        assert config["original_lm_head"] is False
        loaded = check_same(tmp_path / folder, heads, lm_head)
        assert (loaded.token_map is None) is (token_map is None)


def test_vllm_must_know_the_vocabulary_of_mapped_heads(tmp_path: Path, lm_head: Tensor) -> None:
    source = saved(heads_like(lm_head, token_map=IDS), tmp_path / "heads")
    with pytest.raises(CheckpointError, match="vLLM must know the whole vocabulary: give --model"):
        convert_heads(source, tmp_path / "out", "vllm")


def test_vllm_ignores_maps_of_everything_so_rows_are_put_in_order(tmp_path: Path) -> None:
    order = torch.tensor([2, 0, 3, 1])
    output = torch.randn(4, 6)
    tensors = {
        "0.0.linear.weight": torch.randn(6, 6),
        "0.0.linear.bias": torch.randn(6),
        "0.1.weight": output,
        "token_map": order,
    }
    save_file(tensors, tmp_path / "medusa_lm_head.safetensors")
    (tmp_path / "config.json").write_text('{"vocab_size": 4, "truncated_vocab_size": 4}')
    convert_heads(tmp_path, tmp_path / "out", "vllm")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert "token_map" not in written
    assert torch.equal(written["lm_heads.0.weight"][order], output)
    assert config_of(tmp_path / "out")["truncated_vocab_size"] is None


@pytest.mark.parametrize("shared", [False, True])
def test_tgi(tmp_path: Path, lm_head: Tensor, shared: bool) -> None:
    heads = heads_like(lm_head, shared=shared)
    convert_heads(saved(heads, tmp_path / "heads"), tmp_path / "out", "tgi")
    tensors, config = load_file(tmp_path / "out" / "medusa_lm_head.safetensors"), config_of(tmp_path / "out")
    assert ("2.1.weight" in tensors) is not shared
    assert "architectures" not in config
    assert config["base_model_name_or_path"] == "someone/backbone"
    assert (config["medusa_num_heads"], config["medusa_num_layers"]) == (3, 1)
    check_same(tmp_path / "out", heads, lm_head)


def test_tgi_takes_shared_heads_of_several_layers_only_with_outputs(
    tmp_path: Path, tiny_model_dir: Path, lm_head: Tensor
) -> None:
    heads = heads_like(lm_head, 2, shared=True)
    source = saved(heads, tmp_path / "heads")
    with pytest.raises(CheckpointError, match="of one layer only, these have 2: with --model"):
        convert_heads(source, tmp_path / "out", "tgi")
    convert_heads(source, tmp_path / "out", "tgi", model=str(tiny_model_dir))
    assert not check_same(tmp_path / "out", heads, lm_head).is_shared


def test_tgi_from_vllms_single_output_layer(tmp_path: Path, tiny_model_dir: Path, lm_head: Tensor) -> None:
    heads = heads_like(lm_head, shared=True)
    model = str(tiny_model_dir)
    convert_heads(saved(heads, tmp_path / "heads"), tmp_path / "vllm", "vllm", model=model)
    convert_heads(tmp_path / "vllm", tmp_path / "v2", "tgi", model=model)
    assert config_of(tmp_path / "v2")["version"] == "2"
    convert_heads(tmp_path / "vllm", tmp_path / "v1", "tgi")
    assert "version" not in config_of(tmp_path / "v1")
    for folder in ("v1", "v2"):
        check_same(tmp_path / folder, heads, lm_head)


def test_what_a_target_cannot_express_is_refused(
    tmp_path: Path, lm_head: Tensor, tiny_model_dir: Path
) -> None:
    mapped = saved(heads_like(lm_head, token_map=IDS), tmp_path / "mapped")
    with pytest.raises(CheckpointError, match="has a token map, which TGI does not know"):
        convert_heads(mapped, tmp_path / "out", "tgi")
    shape = HydraShape(num_heads=2, num_layers=1, hidden_size=HIDDEN, vocab_size=VOCAB)
    hydra = saved(HydraHeads(shape, embed=lambda ids: ids), tmp_path / "hydra")
    for target, name in (("tgi", "TGI"), ("vllm", "vLLM")):
        with pytest.raises(CheckpointError, match=f"holds Hydra heads, which {name} cannot run"):
            convert_heads(hydra, tmp_path / "out", target)
    nameless = saved(heads_like(lm_head), tmp_path / "nameless")
    (nameless / "config.json").unlink()
    with pytest.raises(CheckpointError, match="does not say which model it is for"):
        convert_heads(nameless, tmp_path / "out", "tgi")
    convert_heads(nameless, tmp_path / "out", "tgi", model=str(tiny_model_dir))
    assert config_of(tmp_path / "out")["base_model_name_or_path"] == str(tiny_model_dir)


def test_heads_of_another_model_are_refused(tmp_path: Path, tiny_model_dir: Path) -> None:
    small = MedusaHeads(num_heads=1, num_layers=1, hidden_size=8, vocab_size=5)
    with pytest.raises(CheckpointError, match="hidden size 8, the backbone's hidden size is 64"):
        convert_heads(saved(small, tmp_path / "small"), tmp_path / "o", "tgi", model=str(tiny_model_dir))
    wide = MedusaHeads(num_heads=1, num_layers=1, hidden_size=HIDDEN, vocab_size=VOCAB + 1)
    with pytest.raises(CheckpointError, match="vocabulary of 321, that of .* is 320"):
        convert_heads(saved(wide, tmp_path / "wide"), tmp_path / "o", "tgi", model=str(tiny_model_dir))


def test_nothing_is_overwritten(tmp_path: Path, lm_head: Tensor, tiny_model_dir: Path) -> None:
    source = saved(heads_like(lm_head), tmp_path / "heads")
    model = tmp_path / "model"
    shutil.copytree(tiny_model_dir, model)
    before = (model / "model.safetensors").read_bytes()
    for out in (model, source, source / "config.json"):
        with pytest.raises(CheckpointError, match="is not an empty directory: name a new one"):
            convert_heads(source, out, "vllm")
    assert (model / "model.safetensors").read_bytes() == before
    with pytest.raises(CheckpointError, match="cannot write to .*Not a directory"):
        convert_heads(source, source / "config.json" / "below", "safetensors")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_pickles_become_safetensors_in_their_own_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"0.0.linear.weight": torch.randn(6, 6), "0.0.linear.bias": torch.randn(6)}
    tensors = {key: tensor.to(dtype) for key, tensor in (tensors | {"0.1.weight": torch.randn(9, 6)}).items()}
    torch.save(tensors, tmp_path / "medusa_lm_head.pt")
    save_calibration(default_calibration(1), tmp_path)
    convert_heads(tmp_path, tmp_path / "out", "safetensors")
    written = load_file(tmp_path / "out" / "medusa_lm_head.safetensors")
    assert {key: tensor.dtype for key, tensor in written.items()} == dict.fromkeys(tensors, dtype)
    assert all(torch.equal(written[key], tensors[key]) for key in tensors)
    assert load_calibration(tmp_path / "out") == default_calibration(1)


def test_hydra_pickles_become_safetensors(tmp_path: Path) -> None:
    config = LlamaConfig(hidden_size=8, intermediate_size=12, num_attention_heads=2, vocab_size=1)
    shape = HydraShape(num_heads=2, num_layers=3, hidden_size=8, vocab_size=5)
    prefix = PrefixLayer(prefix_config(config))
    source = saved(HydraHeads(shape, embed=lambda ids: ids, prefix=prefix), tmp_path / "source")
    tensors = load_file(source / "hydra_lm_head.safetensors")
    (source / "hydra_lm_head.safetensors").unlink()
    torch.save(tensors | {"input_embed_fn.weight": torch.ones(5, 8)}, source / "hydra_lm_head.pt")
    convert_heads(source, tmp_path / "out", "safetensors")
    written = load_file(tmp_path / "out" / "hydra_lm_head.safetensors")
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[key], tensors[key]) for key in tensors)


@pytest.mark.parametrize("tied", [False, True])
def test_the_base_models_output_layer_is_found(tmp_path: Path, tied: bool) -> None:
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=20,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            tie_word_embeddings=tied,
        )
    )
    model.save_pretrained(tmp_path, max_shard_size="1KB")  # sharded
    base = read_base(tmp_path)
    assert (base.name, base.hidden_size) == (str(tmp_path), 8)
    assert torch.equal(base.lm_head_weight, model.lm_head.weight)


def test_the_output_layer_of_gpt2_is_its_embedding(tmp_path: Path) -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=16))
    model.save_pretrained(tmp_path)
    assert torch.equal(read_base(tmp_path).lm_head_weight, model.transformer.wte.weight)


def test_base_models_that_do_not_serve(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot read the config of") as caught:
        read_base(tmp_path / "missing")
    assert "\n" not in str(caught.value)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": 8}')  # of 32 heads
    with pytest.raises(CheckpointError, match="cannot read the config of") as caught:
        read_base(tmp_path)
    assert "\n" not in str(caught.value)
    (tmp_path / "config.json").write_text(
        '{"model_type": "llama", "hidden_size": 8, "num_attention_heads": 2}'
    )
    with pytest.raises(CheckpointError, match="no output layer under a known name"):
        read_base(tmp_path)
    save_file({"lm_head.weight": torch.ones(5, 7)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="is not an output layer for hidden size 8"):
        read_base(tmp_path)


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("shards", ["5GB", "50KB"])
@pytest.mark.parametrize("shared", [False, True])
def test_whole_models_with_heads(
    tmp_path: Path, tiny_model_dir: Path, lm_head: Tensor, shards: str, shared: bool, num_layers: int
) -> None:
    """Format C as `--recipe medusa-2` writes it: transformers reads the model, we read both."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)  # tuned
    heads = heads_like(lm_head, num_layers, shared=shared)
    folder = save_full_model(model, heads, tmp_path / "tuned", max_shard_size=shards)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (tiny_model_dir / name).exists():
            shutil.copy(tiny_model_dir / name, folder)
    assert (folder / "model.safetensors.index.json").exists() is (shards == "50KB")
    assert len(read_heads(folder).tensors) == 3 * (2 * num_layers + (not shared))
    config = config_of(folder)
    assert (config["medusa_num_heads"], config["medusa_num_layers"]) == (3, num_layers)
    parts = load_parts(folder, None, FLOAT32)
    assert parts.heads_name == str(folder)
    for key, parameter in parts.backbone.model.state_dict().items():
        assert torch.equal(parameter, model.state_dict()[key]), key
    assert isinstance(parts.heads, MedusaHeads)
    hidden = torch.randn(2, HIDDEN, generator=torch.Generator().manual_seed(1))
    assert torch.equal(parts.heads.draft_logits(hidden), heads.draft_logits(hidden))


def test_a_model_saved_again_in_another_size_leaves_nothing_stale(
    tmp_path: Path, tiny_model_dir: Path, lm_head: Tensor
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    for number, size in enumerate(("5GB", "50KB", "100KB", "5GB")):
        with torch.no_grad():
            model.model.norm.weight.fill_(number)
        save_full_model(model, heads_like(lm_head), tmp_path, max_shard_size=size)
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(again.model.norm.weight, model.model.norm.weight)
        check_same(tmp_path, heads_like(lm_head), lm_head)
    assert [path.name for path in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]


def test_whole_models_keep_their_tokenizer_and_convert(
    tmp_path: Path, tiny_model_dir: Path, lm_head: Tensor, dialogue_tokenizer
) -> None:
    heads = heads_like(lm_head)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    folder = save_full_model(model, heads, tmp_path / "tuned", tokenizer=dialogue_tokenizer)
    assert load_parts(folder, None, FLOAT32).chat.vocab_size == VOCAB
    convert_heads(folder, tmp_path / "out", "tgi")
    assert config_of(tmp_path / "out")["base_model_name_or_path"] == str(folder)  # they fit no other
    check_same(tmp_path / "out", heads, lm_head)


def test_the_command(tmp_path: Path, tiny_model_dir: Path, lm_head: Tensor) -> None:
    source = saved(heads_like(lm_head, shared=True), tmp_path / "heads")
    arguments = [
        "convert",
        str(source),
        str(tmp_path / "out"),
        "--to",
        "vllm",
        "--model",
        str(tiny_model_dir),
    ]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert result.output == f"3 heads, layers: 1, a shared output layer: {tmp_path / 'out'}\n"
    assert (tmp_path / "out" / "model.safetensors").is_file()
    result = CliRunner().invoke(app, [*arguments[:4], "onnx"])
    assert result.exit_code == 2
    assert "'onnx' is not one of" in result.output
