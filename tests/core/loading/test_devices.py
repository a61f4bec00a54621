"""Free memory from the kernel's files, and warnings of unused GPUs."""

import logging
from pathlib import Path

import pytest
import torch

from medusa_core.loading import devices
from medusa_core.loading.devices import resolve_device, unused_gpu
from medusa_core.loading.free_memory import free_host_memory, free_memory

MIB = 2**20


def system(root: Path, *, available_mib: int, cgroup: str = "0::/\n") -> Path:
    """A root folder with what /proc says of memory and of the process's control groups."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(
        f"MemTotal:  99999999 kB\nMemFree: 1 kB\nMemAvailable: {available_mib * 1024} kB\n"
    )
    (root / "proc/self/cgroup").write_text(cgroup)
    return root


def group(folder: Path, limit_file: str, limit: object, usage_file: str, usage: int, stat: str = "") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / limit_file).write_text(f"{limit}\n")
    (folder / usage_file).write_text(f"{usage}\n")
    (folder / "memory.stat").write_text(stat)


def version_2(folder: Path, limit: object, usage: int, stat: str = "") -> None:
    group(folder, "memory.max", limit, "memory.current", usage, stat)


def test_this_machine_says_what_is_free() -> None:
    free = free_memory(torch.device("cpu"))
    assert free is not None
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    assert 0 < free <= total


def test_without_limits_it_is_what_the_system_has(tmp_path: Path) -> None:
    root = system(tmp_path, available_mib=500)
    version_2(root / "sys/fs/cgroup", "max", 300 * MIB)
    assert free_host_memory(root) == 500 * MIB


def test_a_containers_limit_counts_and_file_pages_are_no_use(tmp_path: Path) -> None:
    root = system(tmp_path, available_mib=5000)
    stat = f"anon 1\nactive_file {10 * MIB}\ninactive_file {20 * MIB}\nslab_reclaimable {MIB}\nshmem 7\n"
    version_2(root / "sys/fs/cgroup", 400 * MIB, 300 * MIB, stat)
    assert free_host_memory(root) == (400 - 300 + 10 + 20 + 1) * MIB


def test_the_tightest_group_on_the_way_up_counts(tmp_path: Path) -> None:
    root = system(tmp_path, available_mib=5000, cgroup="0::/user/app\n")
    version_2(root / "sys/fs/cgroup/user/app", 800 * MIB, 100 * MIB)
    version_2(root / "sys/fs/cgroup/user", 600 * MIB, 200 * MIB)
    assert free_host_memory(root) == 400 * MIB


def test_a_path_of_the_hosts_leads_to_the_containers_own_group(tmp_path: Path) -> None:
    root = system(tmp_path, available_mib=5000, cgroup="0::/docker/abc\n")
    version_2(root / "sys/fs/cgroup", 200 * MIB, 50 * MIB)
    assert free_host_memory(root) == 150 * MIB


@pytest.mark.parametrize(("limit", "expected"), [(300 * MIB, 110), (9223372036854771712, 5000)])
def test_version_1(tmp_path: Path, limit: int, expected: int) -> None:
    root = system(tmp_path, available_mib=5000, cgroup="4:cpu:/x\n3:memory,pids:/x\n")
    stat = f"inactive_file 5\ntotal_inactive_file {10 * MIB}\n"
    folder = root / "sys/fs/cgroup/memory/x"
    group(folder, "memory.limit_in_bytes", limit, "memory.usage_in_bytes", 200 * MIB, stat)
    assert free_host_memory(root) == expected * MIB


def test_more_used_than_allowed_is_nothing_free(tmp_path: Path) -> None:
    root = system(tmp_path, available_mib=5000)
    version_2(root / "sys/fs/cgroup", 100 * MIB, 150 * MIB)
    assert free_host_memory(root) == 0


def test_a_system_that_does_not_say(tmp_path: Path) -> None:
    assert free_host_memory(tmp_path) is None


@pytest.fixture
def cpu_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)


def driver(root: Path) -> None:
    (root / "proc/driver/nvidia").mkdir(parents=True)
    (root / "proc/driver/nvidia/version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module\n")


@pytest.mark.usefixtures("cpu_torch")
def test_why_a_gpu_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert unused_gpu(tmp_path) is None
    driver(tmp_path)
    assert "a build for CPUs only" in str(unused_gpu(tmp_path))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "--gpus" in str(unused_gpu(tmp_path))
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidia0").touch()
    assert "too old for CUDA 13.0" in str(unused_gpu(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert unused_gpu(tmp_path) is None


@pytest.mark.usefixtures("cpu_torch")
def test_auto_on_a_cpu_beside_a_gpu_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    driver(tmp_path)
    monkeypatch.setattr(devices, "unused_gpu", lambda: unused_gpu(tmp_path))
    assert resolve_device("auto") == torch.device("cpu")
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "everything runs on the CPU" in record.getMessage()
    caplog.clear()
    resolve_device("cpu")  # asked for
    assert not caplog.records


def test_auto_on_one_of_several_gpus_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert resolve_device("auto") == torch.device("cuda")
    assert "MEDUSA_WORKERS=4" in caplog.text
    caplog.clear()
    assert resolve_device("cuda:2") == resolve_device("auto:2")
    assert not caplog.records
