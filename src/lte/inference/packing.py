"""Laying weights out for the kernels, in memory that is fast to stream."""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor, nn

HUGE_PAGE = 2 << 20


def streaming_copy(tensor: Tensor) -> Tensor:
    """A contiguous copy; on the CPU in huge pages, where the system gives them.

    Decoding reads gigabytes per token, and with 4 KiB pages the processor spends part of that time on page tables.
    The memory is mapped for the tensor alone: what malloc hands out may have been touched, in small pages, before.
    """
    n_bytes = tensor.numel() * tensor.element_size()
    if tensor.device.type != "cpu" or n_bytes < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return tensor.clone(memory_format=torch.contiguous_format)
    memory = mmap.mmap(-1, n_bytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    offset = -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % HUGE_PAGE
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
    return copy.view(tensor.shape).copy_(tensor)


@torch.no_grad()
def pack_linears(model: nn.Module, skip: set[int]) -> list[nn.Linear]:
    """Move the weights of the plain linear layers into streaming memory; modules with an id in ``skip`` are left.

    Returns:
        The linear layers, each once.
    """
    found = []
    moved: set[int] = set()  # addresses, before and after: tied weights are moved once
    for module in model.modules():
        if type(module) is not nn.Linear or id(module) in skip or type(module.weight) is not nn.Parameter:
            continue
        weight = module.weight
        if weight.data_ptr() not in moved:
            moved.add(weight.data_ptr())
            weight.data = streaming_copy(weight.data)
            moved.add(weight.data_ptr())
        found.append(module)
    return found
