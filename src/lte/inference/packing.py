"""Laying weights out for the kernels, in memory that is fast to stream."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lte.memory import empty_for_streaming, is_for_streaming, trim_heap
from lte.nn import QuantizedWeight


def streaming_copy(tensor: Tensor) -> Tensor:
    """A contiguous copy; on the CPU in huge pages, where the system gives them.

    Decoding reads gigabytes per token, and with 4 KiB pages the processor spends part of that time on page tables.
    """
    return empty_for_streaming(tensor.shape, tensor.dtype, tensor.device).copy_(tensor)


def pack_quantized(model: nn.Module) -> None:
    """Move the codes of weights of few bits into streaming memory, wherever a file's were loaded to."""
    for module in model.modules():
        if isinstance(module, QuantizedWeight):
            for name, buffer in module.named_buffers(recurse=False):
                if not is_for_streaming(buffer):
                    setattr(module, name, streaming_copy(buffer))
                    trim_heap(buffer.device)


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
