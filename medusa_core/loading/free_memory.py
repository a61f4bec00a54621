"""Free memory of a device: CUDA's own figure, or what Linux and its control groups leave on the host."""

from collections.abc import Iterator
from pathlib import Path

import torch

ROOT = Path("/")
CGROUP_1, CGROUP_2 = "sys/fs/cgroup/memory", "sys/fs/cgroup"
# A control group counts file pages as used, but gives them up when memory is needed.
RECLAIMABLE = ("active_file", "inactive_file", "slab_reclaimable")
UNLIMITED = 1 << 60  # version 1 says "no limit" with a number near 2**63


def free_memory(device: torch.device) -> int | None:
    """Bytes that can be allocated on the device; None if unknown."""
    if device.type == "cuda":
        free = int(torch.cuda.mem_get_info(device)[0])
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free_host_memory()


def free_host_memory(root: Path = ROOT) -> int | None:
    """Bytes available on the system, within the limits of this process's control groups; Linux only."""
    known = [free for free in (_available(root), *_allowed(root)) if free is not None]
    return max(0, min(known)) if known else None


def _available(root: Path) -> int | None:
    for line in _read(root / "proc/meminfo").splitlines():
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            return int(rest.split()[0]) * 1024
    return None


def _allowed(root: Path) -> Iterator[int]:
    """Bytes each control group (version 1 or 2) still allows, from this process's own up to the root."""
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
