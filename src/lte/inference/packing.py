"""Laying weights out for the kernels, in memory that is fast to stream."""

from __future__ import annotations

import ctypes
import logging
import mmap

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

HUGE_PAGE = 2 << 20


def streaming_copy(tensor: Tensor) -> Tensor:
    """A contiguous copy; on the CPU in huge pages, where the system gives them.

    Decoding reads gigabytes per token, and with 4 KiB pages the processor spends part of that time on page tables.
    """
    if tensor.device.type != "cpu" or tensor.numel() * tensor.element_size() < HUGE_PAGE or not _can_advise():
        return tensor.clone(memory_format=torch.contiguous_format)
    copy = torch.empty(tensor.shape, dtype=tensor.dtype)
    begin = -(-copy.data_ptr() // HUGE_PAGE) * HUGE_PAGE
    end = (copy.data_ptr() + copy.numel() * copy.element_size()) // HUGE_PAGE * HUGE_PAGE
    if end > begin:
        # Advice only: where it is not taken, the copy is an ordinary one.
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_HUGEPAGE)
    return copy.copy_(tensor)


def _can_advise() -> bool:
    return hasattr(mmap, "MADV_HUGEPAGE")


@torch.no_grad()
def pack_linears(model: nn.Module, skip: set[int]) -> list[nn.Linear]:
    """Move the weights of the plain linear layers into streaming memory; modules with an id in ``skip`` are left.

    Returns:
        The linear layers, each once.
    """
    found = []
    moved: dict[int, Tensor] = {}
    for module in model.modules():
        if type(module) is not nn.Linear or id(module) in skip or type(module.weight) is not nn.Parameter:
            continue
        weight = module.weight
        if weight.data_ptr() not in moved:
            old = weight.data_ptr()
            weight.data = streaming_copy(weight.data)
            moved[old] = moved[weight.data_ptr()] = weight
        found.append(module)
    return found
