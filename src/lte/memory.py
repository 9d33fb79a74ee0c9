"""Memory of this process: what it took at most, and freed parts of it handed back."""

from __future__ import annotations

import ctypes
import math
import mmap
import re
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def is_shortage(error: BaseException) -> bool:
    """Whether an error says that there is too little memory."""
    said = ("not enough memory", "can't allocate memory", "out of memory")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(text in str(error) for text in said)


def trim_heap(device: torch.device) -> None:
    """Hand freed memory back: among what is kept of every layer, glibc leaves holes as large as the layer's hiddens."""
    trim = _malloc_trim()
    if trim is not None and device.type == "cpu":
        trim(0)


def empty_for_streaming(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A contiguous tensor of no particular values; on the CPU in huge pages, where the system gives them.

    The memory is mapped for the tensor alone: what malloc hands out may have been touched, in small pages, before.
    What does not fill a huge page at its end is in small ones, or some 350 matrices of a 7 B model take 0.2 GB more.
    """
    n_bytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or n_bytes < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, n_bytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    offset = -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % HUGE_PAGE
    memory.madvise(mmap.MADV_HUGEPAGE, offset, n_bytes - n_bytes % HUGE_PAGE)
    return torch.frombuffer(memory, dtype=dtype, count=math.prod(shape), offset=offset).view(tuple(shape))


def is_for_streaming(tensor: Tensor) -> bool:
    """Whether :func:`empty_for_streaming` made it, or it is too small to matter."""
    return tensor.device.type != "cpu" or tensor.nbytes < HUGE_PAGE or tensor.data_ptr() % HUGE_PAGE == 0


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
