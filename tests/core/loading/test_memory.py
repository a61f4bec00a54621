"""Memory computed before loading equals what loading takes; what does not fit is refused with advice."""

import json
import logging
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from medusa_core.checkpoints.writing import save_full_model, save_heads
from medusa_core.config import EngineConfig
from medusa_core.draft.hydra import HydraHeads, HydraShape
from medusa_core.draft.medusa import MedusaHeads
from medusa_core.draft.prefix import PrefixLayer, prefix_config
from medusa_core.engine.engine import Engine
from medusa_core.errors import CheckpointError, ConfigError
from medusa_core.loading import loader
from medusa_core.loading import memory as memory_check
from medusa_core.loading.memory import GIB, MemoryNeed, check_fits
from medusa_core.loading.meta_model import build_meta_backbone, build_meta_heads
from medusa_core.model.backbone import Backbone

CPU = torch.device("cpu")
CONFIG = EngineConfig(dtype="float32", measure=False)


def hydra(backbone: Backbone, *, with_prefix: bool) -> HydraHeads:
    shape = HydraShape(
        num_heads=3, num_layers=2, hidden_size=backbone.hidden_size, vocab_size=backbone.vocab_size
    )
    prefix = PrefixLayer.new(prefix_config(backbone.config)) if with_prefix else None
    return HydraHeads.new(shape, lm_head_weight=backbone.lm_head_weight, embed=backbone.embed, prefix=prefix)


def medusa(backbone: Backbone, *, shared: bool, token_map: torch.Tensor | None = None) -> MedusaHeads:
    return MedusaHeads.new(
        hidden_size=backbone.hidden_size,
        vocab_size=backbone.vocab_size if token_map is None else len(token_map),
        num_heads=3,
        num_layers=2,
        lm_head_weight=backbone.lm_head_weight,
        shared=shared,
        token_map=token_map,
    )


KINDS = {
    "medusa": lambda backbone: medusa(backbone, shared=False),
    "shared output": lambda backbone: medusa(backbone, shared=True),
    "token map": lambda backbone: medusa(backbone, shared=True, token_map=torch.arange(0, 300, 3)),
    "hydra": lambda backbone: hydra(backbone, with_prefix=False),
    "hydra++": lambda backbone: hydra(backbone, with_prefix=True),
}


@pytest.fixture
def needs(monkeypatch: pytest.MonkeyPatch) -> list[MemoryNeed]:
    """What `load_parts` compared with the memory that is free."""
    seen: list[MemoryNeed] = []

    def keep(need: MemoryNeed, *rest: object) -> None:
        seen.append(need)
        check_fits(need, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(memory_check, "check_fits", keep)
    return seen


def memory(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """Address and size of every piece of memory behind real tensors."""
    plain, packed = [], []
    for tensor in tensors:
        (packed if tensor.is_mkldnn else plain).append(tensor)
    storages = [tensor.untyped_storage() for tensor in plain]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    return sizes | {id(tensor): tensor.numel() * tensor.element_size() for tensor in packed}


def taken(engine: Engine) -> tuple[int, int, int]:
    """Bytes of a real engine's weights, heads and cache."""
    model, heads, source = engine.backbone.model, engine.heads, engine.head_source
    weights = memory((*model.parameters(), *model.buffers()))
    own = memory((*heads.parameters(), *heads.buffers())) if heads is not None else {}
    caches = [engine._cache, *([source.draft_cache] if source is not None and source.draft_cache else [])]
    head_bytes = sum(size for address, size in own.items() if address not in weights)
    return sum(weights.values()), head_bytes, sum(memory(cache.storage_L2BHCD for cache in caches).values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_byte_of_weights_heads_and_cache_is_foreseen(
    tiny_model_dir: Path,
    tiny_backbone: Backbone,
    tmp_path: Path,
    needs: list[MemoryNeed],
    kind: str,
    dtype: str,
) -> None:
    save_heads(KINDS[kind](tiny_backbone), tmp_path / "heads", base_model="tiny")
    config = EngineConfig(dtype=dtype, measure=False, slots=3, max_length=77, tree_nodes=90)
    engine = Engine.from_pretrained(tiny_model_dir, heads=tmp_path / "heads", config=config)
    (need,) = needs
    assert (need.weights, need.heads, need.cache) == taken(engine)
    assert need.heads > 0
    assert need.context == 77


def test_without_heads_and_with_tied_weights(tmp_path: Path, tiny_model_dir: Path, needs) -> None:
    config = AutoConfig.from_pretrained(tiny_model_dir, tie_word_embeddings=True)
    shutil.copytree(tiny_model_dir, tmp_path / "tied")
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "tied")
    engine = Engine.from_pretrained(tmp_path / "tied", config=CONFIG)
    assert (needs[0].weights, needs[0].heads, needs[0].cache) == taken(engine)


def test_bin_shards_of_vicunas_layout(vicuna_layout_dir: Path, needs: list[MemoryNeed]) -> None:
    engine = Engine.from_pretrained(vicuna_layout_dir, config=CONFIG)
    assert (needs[0].weights, needs[0].heads, needs[0].cache) == taken(engine)


def test_heads_among_the_weights_of_a_whole_model(
    tiny_model_dir: Path, tiny_backbone: Backbone, tiny_chat, tmp_path: Path, needs: list[MemoryNeed]
) -> None:
    heads = medusa(tiny_backbone, shared=False)
    folder = save_full_model(tiny_backbone.model, heads, tmp_path / "whole", tokenizer=tiny_chat.tokenizer)
    engine = Engine.from_pretrained(folder, config=CONFIG)
    assert engine.heads is not None
    assert (needs[0].weights, needs[0].heads, needs[0].cache) == taken(engine)


def test_too_little_memory_is_refused_before_weights_are_read(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_check, "free_memory", lambda device: 100_000)
    monkeypatch.setattr(loader, "load_backbone", lambda *args, **kwargs: pytest.fail("weights were loaded"))
    with pytest.raises(
        ConfigError, match=r"does not fit the memory of cpu: .* GiB needed \(weights .* missing"
    ):
        Engine.from_pretrained(tiny_model_dir, config=CONFIG)


def test_the_check_can_be_turned_off(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_check, "free_memory", lambda device: 0)
    config = replace(CONFIG, memory_check=False)
    assert Engine.from_pretrained(tiny_model_dir, config=config).num_free_slots == 1


def test_unknown_free_memory_refuses_nothing(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(memory_check, "free_memory", lambda device: None)
    with caplog.at_level(logging.INFO):
        Engine.from_pretrained(tiny_model_dir, config=CONFIG)
    assert "whether it fits the memory of cpu is not known beforehand" in caplog.text


@pytest.mark.parametrize(
    "change", [{"quantization_config": {"quant_method": "gptq", "bits": 4}}, {"model_type": "?"}]
)
def test_unknown_sizes_refuse_nothing(
    tiny_model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, change: dict[str, object]
) -> None:
    config = json.loads((tiny_model_dir / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with caplog.at_level(logging.INFO):
        assert build_meta_backbone(tmp_path, torch.float32) is None
    assert "not known before" in caplog.text


def test_broken_heads_are_reported_before_weights_are_read(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "medusa_lm_head.safetensors").write_bytes(b"no header")
    monkeypatch.setattr(loader, "load_backbone", lambda *args, **kwargs: pytest.fail("weights were loaded"))
    with pytest.raises(CheckpointError, match="medusa_lm_head"):
        Engine.from_pretrained(tiny_model_dir, heads=tmp_path, config=CONFIG)


def test_a_seven_billion_model_is_sized_from_its_config_alone(tmp_path: Path) -> None:
    """No weights are there, and none are made: the numbers of vicuna-7b with five heads, 4096 tokens."""
    LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
    ).save_pretrained(tmp_path)
    meta = build_meta_backbone(tmp_path, torch.float16)
    assert meta is not None
    assert meta.weight_bytes == pytest.approx(2 * 6_738_415_616, rel=1e-6)  # and the rotary tables
    assert meta.cache_shape.bytes_per_token(torch.float16) == 2 * 32 * 4096 * 2


def test_meta_heads_log_nothing_twice(
    tiny_model_dir: Path, tiny_backbone: Backbone, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    heads = MedusaHeads.new(
        hidden_size=64, vocab_size=200, num_heads=2, num_layers=1, lm_head_weight=tiny_backbone.lm_head_weight
    )
    save_heads(heads, tmp_path, base_model="tiny")
    backbone = build_meta_backbone(tiny_model_dir, torch.float32)
    assert backbone is not None
    assert build_meta_heads(tmp_path, backbone, vocab_size=320, dtype=torch.float32).vocab_size == 200
    assert "first 200" not in caplog.text
    Engine.from_pretrained(tiny_model_dir, heads=tmp_path, config=CONFIG)
    assert caplog.text.count("know only the first 200 of 320 tokens") == 1


NEED = MemoryNeed(
    weights=12 * GIB, heads=GIB, headroom=0, per_token=GIB // 1024, slots=2, context=4096, scratch=0
)


def advice(need: MemoryNeed, free: float, dtype: torch.dtype = torch.float16) -> str:
    with pytest.raises(ConfigError) as caught:
        check_fits(need, int(free * GIB), torch.device("cuda:0"), dtype)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_exactly_enough_fits() -> None:
    check_fits(NEED, NEED.total, CPU, torch.float16)
    with pytest.raises(ConfigError):
        check_fits(NEED, NEED.total - 1, CPU, torch.float16)


def test_the_message_names_needed_free_and_missing() -> None:
    text = advice(NEED, 20.5)
    assert "21.0 GiB needed (weights 12.0, heads 1.0, cache 8.0; 2 x 4096 tokens)" in text
    assert "20.5 free, 0.5 missing" in text
    assert "cuda:0" in text


def test_advice_names_only_what_would_do() -> None:
    assert (
        "set MEDUSA_MAX_LENGTH to at most 3840 or MEDUSA_SLOTS to at most 1 or MEDUSA_HEADS to none"
        in advice(NEED, 20.5)
    )
    assert "MEDUSA_HEADS" not in advice(NEED, 19.5)
    assert "MEDUSA_SLOTS" not in advice(NEED, 16)
    assert "MEDUSA_MAX_LENGTH to at most 1536" in advice(NEED, 16)
    assert "choose a smaller model" in advice(NEED, 5)
    assert "MEDUSA_DTYPE to bfloat16" in advice(NEED, 11, torch.float32)
    assert "MEDUSA_DTYPE" not in advice(NEED, 5, torch.float32)


def test_following_the_advice_makes_it_fit(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(CONFIG, slots=8, prefill_chunk=8)
    monkeypatch.setattr(memory_check, "free_memory", lambda device: 2_000_000)
    with pytest.raises(ConfigError, match="MEDUSA_MAX_LENGTH to at most") as caught:
        Engine.from_pretrained(tiny_model_dir, config=config)
    length = int(str(caught.value).split("MEDUSA_MAX_LENGTH to at most ")[1].split()[0])
    engine = Engine.from_pretrained(tiny_model_dir, config=replace(config, max_length=length))
    assert engine.context_length == length
    with pytest.raises(ConfigError):
        Engine.from_pretrained(tiny_model_dir, config=replace(config, max_length=length + 2))
