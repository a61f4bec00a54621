"""What measured times depend on beside the code: processor or GPU, threads, versions of the libraries."""

import os
import platform
from pathlib import Path
from typing import Any

import torch
import transformers


def machine_facts(device: torch.device | None = None) -> dict[str, Any]:
    """The machine and versions of a measurement, for reports and cache keys. `device`: a GPU to name too."""
    facts = {
        "machine": _cpu_name(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    if device is not None and device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
    return facts


def _cpu_name() -> str:
    """The processor's name on Linux, else the architecture."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
