"""Memory of this process: what it took at most, and freed parts of it handed back."""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def trim_heap(device: torch.device) -> None:
    """Hand freed memory back: among what is kept of every layer, glibc leaves holes as large as the layer's hiddens."""
    trim = _malloc_trim()
    if trim is not None and device.type == "cpu":
        trim(0)


def peak_memory() -> dict[str, float]:
    """The most that this process held at a time so far, in GB (1e9 bytes).

    Returns:
        ``host``, resident memory, where Linux or macOS tells; ``gpu``, allocated by torch, where a GPU was used.
    """
    peaks = {"host": _peak_resident()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        peaks["gpu"] = torch.cuda.max_memory_allocated()
    return {name: round(size / 1e9, 2) for name, size in peaks.items() if size is not None}


def _peak_resident() -> int | None:
    if sys.platform == "linux":
        # Unlike getrusage, it does not begin with the peak of the process that started this one.
        found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
        return int(found[1]) * 1024 if found else None
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return None
