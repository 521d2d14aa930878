"""Cores and memory by affinity and control groups, read from files of machines made up."""

import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from lora_capacity.run.resources import available_cores, available_memory_bytes

GIB = 1024**3
MEMINFO = "MemTotal: 67108864 kB\nMemFree: 1024 kB\nMemAvailable: 33554432 kB\n"


def machine(root: Path, files: Mapping[str, str]) -> Path:
    """A machine's files; its own memory is 32 GiB left of 64."""
    for name, content in {"proc/meminfo": MEMINFO, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content, encoding="utf-8")
    return root


@pytest.fixture(autouse=True)
def _eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(os, "cpu_count", lambda: 64)


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 8),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, 8),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "250000 100000\n"}, 3),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "1600000 100000\n"}, 8),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "50000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2),
        (
            {
                "proc/self/cgroup": "5:cpu,cpuacct:/docker/f00\n0::/\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "400000\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            },
            4,
        ),
        (
            {
                "proc/self/cgroup": "5:cpu:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            8,
        ),
    ],
)
def test_cores(tmp_path: Path, files: Mapping[str, str], cores: int) -> None:
    assert available_cores(machine(tmp_path, files)) == cores


@pytest.mark.parametrize(
    ("files", "memory_bytes"),
    [
        ({}, 32 * GIB),
        (
            {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max\n", "sys/fs/cgroup/memory.current": "1"},
            32 * GIB,
        ),
        (
            {
                "proc/self/cgroup": "0::/pod/box\n",
                "sys/fs/cgroup/pod/memory.max": str(8 * GIB),
                "sys/fs/cgroup/pod/memory.current": str(3 * GIB),
                "sys/fs/cgroup/pod/memory.stat": f"anon 1\ninactive_file {GIB}\n",
                "sys/fs/cgroup/pod/box/memory.max": "max",
                "sys/fs/cgroup/pod/box/memory.current": "7",
            },
            6 * GIB,
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/docker/f00\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": str(4 * GIB),
                "sys/fs/cgroup/memory/memory.usage_in_bytes": str(GIB),
                "sys/fs/cgroup/memory/memory.stat": f"inactive_file 5\ntotal_inactive_file {GIB // 2}\n",
            },
            3 * GIB + GIB // 2,
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": str(GIB),
            },
            32 * GIB,
        ),
        (
            {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "5", "sys/fs/cgroup/memory.current": "9"},
            0,
        ),
    ],
)
def test_memory(tmp_path: Path, files: Mapping[str, str], memory_bytes: int) -> None:
    assert available_memory_bytes(machine(tmp_path, files)) == memory_bytes


def test_this_machine() -> None:
    assert available_cores() >= 1
    assert available_memory_bytes() > 0
