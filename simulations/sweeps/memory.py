"""How many cells fit beside each other: in cores, and in memory by what a finished cell's process took at its peak."""

from __future__ import annotations

import os
import resource
import sys
from contextlib import suppress
from pathlib import Path

__all__ = ["available_bytes", "cores", "peak_bytes", "workers_within"]

#: Of the memory that is free, what cells may take: the rest is for whatever else runs, and for a cell above the peak.
_SHARE = 0.8


def workers_within(cores: int, available: int | None, peak: int) -> int:
    """The most processes of `peak` bytes each: a core each, within the memory; never less than one.

    Args:
        cores: Of this process.
        available: Bytes that were free before any of them ran; None where nobody can say.
        peak: Bytes that the largest of them took so far.
    """
    if available is None or peak <= 0:
        return max(1, cores)
    return max(1, min(cores, int(_SHARE * available) // peak))


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_bytes() -> int:
    """The most memory that this process has held."""
    with suppress(OSError, ValueError, IndexError):
        # Not `ru_maxrss`: on Linux that of a started program begins at the peak of the one that started it.
        lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
        return next(int(words[1]) * 1024 for words in lines if words[0] == "VmHWM:")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_bytes(meminfo: Path = Path("/proc/meminfo"), group: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Memory that is free: the machine's, or the control group's where that is less; None where nobody says."""
    found = []
    with suppress(OSError, ValueError, IndexError):
        lines = (line.split() for line in meminfo.read_text().splitlines())
        found += [int(words[1]) * 1024 for words in lines if words[0] == "MemAvailable:"]
    with suppress(OSError, ValueError):  # no control group, or one without a limit ("max")
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        found.append(max(0, limit - used + int(stat.get("inactive_file", 0))))  # a cache gives way
    return min(found, default=None)
