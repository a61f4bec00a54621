"""What the machine has: memory that is free for an engine, and GPUs that it does not use."""

import logging
from collections.abc import Iterator
from pathlib import Path

import torch

log = logging.getLogger(__name__)

ROOT = Path("/")
CGROUP_1, CGROUP_2 = "sys/fs/cgroup/memory", "sys/fs/cgroup"
# File pages are counted as used by a control group, but given up when memory is wanted.
RECLAIMABLE = ("active_file", "inactive_file", "slab_reclaimable")
UNLIMITED = 1 << 60  # version 1 says "no limit" with a number near 2**63


def free_memory(device: torch.device) -> int | None:
    """Bytes that can be allocated on the device; None where nobody says."""
    if device.type == "cuda":
        free = int(torch.cuda.mem_get_info(device)[0])
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free_host_memory()


def free_host_memory(root: Path = ROOT) -> int | None:
    """What the system has available and the control groups this process is in still allow; Linux only."""
    known = [free for free in (_available(root), *_allowed(root)) if free is not None]
    return max(0, min(known)) if known else None


def unused_gpu(root: Path = ROOT) -> str | None:
    """Why torch uses no CUDA device although an NVIDIA GPU seems to be there; None where none is."""
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


def _available(root: Path) -> int | None:
    for line in _read(root / "proc/meminfo").splitlines():
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            return int(rest.split()[0]) * 1024
    return None


def _allowed(root: Path) -> Iterator[int]:
    """What each control group from this process's own up to the root leaves, of either version."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            yield from _left(root / CGROUP_2, path, "memory.max", "memory.current", "")
        elif "memory" in controllers.split(","):
            yield from _left(
                root / CGROUP_1, path, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"
            )


def _left(mount: Path, path: str, limit_file: str, usage_file: str, prefix: str) -> Iterator[int]:
    # In a container the path may be the host's, while only the container's own group is mounted, at the top.
    group = mount / path.strip("/")
    for folder in (group, *group.parents):
        limit, usage = _read(folder / limit_file).strip(), _read(folder / usage_file).strip()
        if limit.isdigit() and usage.isdigit() and int(limit) < UNLIMITED:
            yield int(limit) - int(usage) + _reclaimable(folder / "memory.stat", prefix)
        if folder == mount:
            return


def _reclaimable(stat: Path, prefix: str) -> int:
    counts = dict(line.split(" ", 1) for line in _read(stat).splitlines() if " " in line)
    return sum(int(counts.get(prefix + name, 0)) for name in RECLAIMABLE)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
