"""The limit a memory-bound kernel is measured against: how fast this machine reads, or copies, plain memory."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from lte.ops import cpu


def read_gbytes_per_s(tensors: list[Tensor]) -> float:
    """One pass over the bytes of tensors on the CPU, with torch's number of threads: GB/s."""
    n_bytes = sum(t.numel() * t.element_size() for t in tensors)
    if cpu.unavailable():
        started = time.perf_counter()
        for t in tensors:
            t.view(torch.int16 if t.element_size() == 2 else torch.int32).max()
        return n_bytes / (time.perf_counter() - started) / 1e9
    return n_bytes / sum(cpu.read_seconds(t) for t in tensors) / 1e9


def copy_gbytes_per_s(device: torch.device, megabytes: int = 1024, repeats: int = 10) -> float:
    """Bytes read plus bytes written per second by a plain copy on a GPU: GB/s, the best of several."""
    source = torch.empty(megabytes << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = 0.0
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        target.copy_(source)
        end.record()
        torch.cuda.synchronize(device)
        best = max(best, 2 * source.numel() / begin.elapsed_time(end) / 1e6)
    return best
