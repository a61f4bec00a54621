"""Makes a backbone trainable (medusa-2): LoRA adapters or all weights, and merging them afterwards.

Trainable weights are float32, whatever dtype the matrix products use.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from medusa_core.errors import ConfigError
from medusa_core.training.config import TrainConfig, Tune

ADAPTER_FOLDER = "adapter"


@dataclass(frozen=True, slots=True)
class Tuned:
    """What `prepare` made of a backbone.

    `original`: a context in which it is as it was (LoRA). `save_adapter` writes the adapters alone (LoRA).
    `merged` makes it a plain model again, in place.
    """

    merged: Callable[[torch.dtype], PreTrainedModel]
    original: Callable[[], AbstractContextManager[None]] | None = None
    save_adapter: Callable[[Path], None] | None = None


def prepare(model: PreTrainedModel, config: TrainConfig) -> Tuned:
    """Make the backbone trainable in place, as the configuration says. Raises `ConfigError` without peft."""
    if config.gradient_checkpointing:
        # The name since 5.2x; older versions have the second only, newer ones warn of it.
        enable = (
            getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        )
        enable({"use_reentrant": False})
    if config.tune == Tune.FULL:
        model.float().requires_grad_(True)
        return Tuned(partial(_cast, model))
    return _with_adapters(model, config)


def _with_adapters(model: PreTrainedModel, config: TrainConfig) -> Tuned:
    """LoRA on every linear layer but the output layer, which losses are computed with as a plain matrix."""
    if find_spec("peft") is None:
        raise ConfigError('tune lora needs peft: pip install "medusa-serve[train]", or choose tune full')
    from peft import LoraConfig, get_peft_model

    output = model.get_output_embeddings()
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not output
    ]
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]  # peft divides by the rank: floats do
        lora_dropout=config.lora_dropout,
        target_modules=names,
    )
    with warnings.catch_warnings():  # peft asks transformers for an attribute by its former name
        warnings.simplefilter("ignore", FutureWarning)
        adapted = get_peft_model(model, lora)  # adapters in float32, inside `model` itself

    @contextmanager
    def original() -> Iterator[None]:
        was_training = model.training
        model.eval()
        try:
            with adapted.disable_adapter():
                yield
        finally:
            model.train(was_training)

    def merged(dtype: torch.dtype) -> PreTrainedModel:
        adapted.float()  # a sum of small steps: rounded once, at the end
        plain = adapted.merge_and_unload()
        assert isinstance(plain, PreTrainedModel)
        return _cast(plain, dtype)

    return Tuned(merged, original, lambda folder: adapted.save_pretrained(str(folder)))


def _cast(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    nn.Module.to(model, dtype=dtype)
    model.config.dtype = dtype
    return model.eval().requires_grad_(False)
