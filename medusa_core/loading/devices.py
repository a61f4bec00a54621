"""Device and dtype of an engine: resolves "auto" and checks what was asked for."""

import logging
import re
from pathlib import Path

import torch
from transformers import AutoConfig

from medusa_core.errors import ConfigError
from medusa_core.loading.cpu_dtype import fastest_cpu_dtype
from medusa_core.model.backbone import LOADING_FAILURES

logger = logging.getLogger(__name__)

ROOT = Path("/")
DEVICE_NAME = re.compile(r"(cpu|cuda)(:\d{1,2})?")
NATIVE_BF16_FLAGS = ("avx512_bf16", "amx_bf16", "bf16 ")  # Linux /proc/cpuinfo; the last is ARM's


def resolve_device(name: str) -> torch.device:
    """A torch device; "auto" is CUDA if there is one, "auto:N" then CUDA device N."""
    kind, _, index = name.partition(":")
    if kind == "auto" and (index.isdecimal() or name == "auto"):
        _warn_of_unused(is_one_of_several=bool(index))
        if not torch.cuda.is_available():
            return torch.device("cpu")
        name = f"cuda:{index}" if index else "cuda"
    if not DEVICE_NAME.fullmatch(name):
        raise ConfigError(f"device must be auto, cpu, cuda or cuda:N, not {name!r}")
    device = torch.device(name)
    if device.type == "cuda":
        _check_cuda(device)
    return device


def resolve_dtype(name: str, device: torch.device, model: str | Path, rows: int | None = None) -> torch.dtype:
    """A torch dtype. "auto" is the checkpoint's 16-bit type on CUDA, and on a CPU what is fastest there.

    `rows`: how many tokens a step multiplies, for which products are timed where the CPU multiplies bfloat16
    natively. None for what is not decoding: native bfloat16 is then taken without timing.
    """
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]
    if device.type == "cuda":
        stored = _stored_dtype(model)
        return stored if stored in (torch.float16, torch.bfloat16) else torch.bfloat16
    if not cpu_has_native_bfloat16():
        return torch.float32
    measured = None if rows is None else fastest_cpu_dtype(model, rows)
    return measured or torch.bfloat16


def cpu_has_native_bfloat16() -> bool:
    """Whether the kernel says that this CPU multiplies bfloat16; False if unknown."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return any(flag in flags for flag in NATIVE_BF16_FLAGS)


def unused_gpu(root: Path = ROOT) -> str | None:
    """Why torch uses no CUDA device although an NVIDIA GPU seems to be there; None if there is none."""
    if torch.cuda.is_available():
        return None
    driver, node = root / "proc/driver/nvidia/version", root / "dev/nvidia0"
    if not driver.exists() and not node.exists():
        return None
    if torch.version.cuda is None:
        return "this torch is a build for CPUs only: install one with CUDA, or use the image for GPUs"
    if not node.exists():
        return "the driver is loaded, but /dev/nvidia0 is missing: a container must be given the GPU (--gpus)"
    return f"CUDA_VISIBLE_DEVICES may hide it, or its driver be too old for CUDA {torch.version.cuda}"


def _check_cuda(device: torch.device) -> None:
    if not torch.cuda.is_available():
        raise ConfigError(f"device {device} was asked for, but this machine has no usable CUDA device")
    if (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {device} was asked for, but there are only {torch.cuda.device_count()}")


def _warn_of_unused(*, is_one_of_several: bool) -> None:
    """Log which GPUs "auto" leaves idle."""
    reason = unused_gpu()
    if reason is not None:
        logger.warning("there seems to be an NVIDIA GPU, but everything runs on the CPU: %s", reason)
    count = torch.cuda.device_count()
    if count > 1 and not is_one_of_several:
        logger.warning("only one of %d CUDA devices is used; MEDUSA_WORKERS=%d uses them all", count, count)


def _stored_dtype(model: str | Path) -> torch.dtype | None:
    try:
        dtype = AutoConfig.from_pretrained(str(model), trust_remote_code=False).dtype
    except LOADING_FAILURES:
        return None  # loading the model reports what is wrong
    return dtype if isinstance(dtype, torch.dtype) else None
