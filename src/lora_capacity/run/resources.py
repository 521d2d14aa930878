"""Cores and memory that this process may use: its CPU affinity and what its control groups (cgroups) leave it.

In a container the machine's own cores and memory say nothing: a program that counts on them is slowed down or killed.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path

from lora_capacity.errors import InputError
from lora_capacity.words import duration, gibibytes

_ROOT = Path("/")

_MEMORY_SHARE = 0.5
"""Share of the free memory that configurations may take: others need some, and estimates are rough."""


def available_cores(root: Path = _ROOT) -> int:
    """Return the cores that this process may keep busy, at least 1: of its affinity, within every cgroup's quota.

    Args:
        root: Where ``proc`` and ``sys`` are found.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for folder in _cgroups(root, "cpu"):
        v2 = _words(folder / "cpu.max")
        quota, period = v2 or (*_words(folder / "cpu.cfs_quota_us"), *_words(folder / "cpu.cfs_period_us")) or ("", "")
        if quota.isdigit() and int(period) > 0:  # "max" and -1 mean no quota
            cores = min(cores, math.ceil(int(quota) / int(period)))  # part of a core is worth a thread
    return max(1, cores)


def available_memory_bytes(root: Path = _ROOT) -> int:
    """Return the memory that this process can still take: what the machine has left, within every cgroup's limit.

    Args:
        root: As in `available_cores`.
    """
    left = [_machine_bytes(root)]
    for folder in _cgroups(root, "memory"):
        for limit, usage in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            allowed, used = _words(folder / limit), _words(folder / usage)
            if allowed and used and allowed[0].isdigit():
                left.append(int(allowed[0]) - int(used[0]) + _reclaimable_bytes(folder))
    return max(0, min(left))


def check_affordable(field: str, count: float, bytes_each: float, seconds_each: float, remedy: str) -> None:
    """Refuse more configurations than fit into half of the memory at hand, before anything is allocated.

    Args:
        field: What makes them so many.
        count: Their number.
        bytes_each: What one takes until all are answered.
        seconds_each: About how long one takes.
        remedy: What to do about it.

    Raises:
        InputError: Tells time and memory that they would take, and how many there may be.
    """
    most = int(_MEMORY_SHARE * available_memory_bytes() / bytes_each)
    if count > most:
        takes = f"about {duration(count * seconds_each)} and {gibibytes(count * bytes_each)}"
        raise InputError(field, f"{count:.3g} configurations: {takes}", f"at most {most:,} here", remedy)


def _machine_bytes(root: Path) -> int:
    words = _words(root / "proc/meminfo")
    if "MemAvailable:" in words:
        return int(words[words.index("MemAvailable:") + 1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # no Linux, or one before 3.14


def _reclaimable_bytes(folder: Path) -> int:
    """Return the file cache that a cgroup counts as used but gives up for the asking."""
    words = _words(folder / "memory.stat")
    found = [int(words[words.index(name) + 1]) for name in ("total_inactive_file", "inactive_file") if name in words]
    return found[0] if found else 0


def _cgroups(root: Path, controller: str) -> Iterator[Path]:
    """Yield the folders of the process's cgroups and of those above them: the limits of all of them hold.

    A container may see paths of its host in ``/proc/self/cgroup`` but only its own group mounted: as that is the
    mount itself, the walk up finds it.
    """
    mounts = root / "sys/fs/cgroup"
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if not controllers:
            roots = [mounts, mounts / "unified"]  # version 2; the latter where version 1 has the controllers
        elif controller in controllers.split(","):
            roots = [mounts / controller, mounts / controllers]
        else:
            continue
        for mount in roots:
            folder = mount / path.lstrip("/")
            yield from (each for each in (folder, *folder.parents) if each.is_relative_to(mount))


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []


def _words(path: Path) -> list[str]:
    return " ".join(_lines(path)).split()
