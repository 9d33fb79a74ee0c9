"""Linear layers outside the FFNs that leave out small inputs."""

from __future__ import annotations

import copy
import functools
from typing import Any, cast

import torch
from torch import Tensor, nn


class Thresholded(nn.Module):
    """A projection whose inputs count where they are larger than :attr:`tau`.

    :func:`threshold_inputs` makes them, of ``nn.Linear`` and transformers' ``Conv1D``; names of parameters stay.
    """

    weight: nn.Parameter
    settings: Tensor
    """[2], the bits of two float32 numbers that no cast of the model rounds: the threshold, and the share left out."""

    @property
    def tau(self) -> Tensor:
        """The threshold."""
        return self.settings.view(torch.float32)[0]

    @property
    def share(self) -> float:
        """The share of inputs left out on the text that the threshold was found on."""
        return float(self.settings.view(torch.float32)[1])

    def leave_out(self, tau: Tensor, share: float) -> None:
        """Set both."""
        self.settings.view(torch.float32).copy_(torch.stack([tau.float(), tau.new_tensor(share).float()]))

    def keeps(self, x: Tensor) -> Tensor:
        """Which entries of an input count: [..., D] bool."""
        return x.detach().abs() > self.tau

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class was made here, and has no name that another process could import.
        return _empty, (type(self).__mro__[2],), self.__dict__

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., N]."""
        out: Tensor = super().forward(x.where(self.keeps(x), 0.0))
        return out


def threshold_inputs(block: nn.Module, skip: set[int]) -> None:
    """Put :class:`Thresholded` projections, which leave out nothing yet, in the place of a block's plain ones.

    Args:
        block: of a transformer.
        skip: ids of modules that stay as they are.
    """
    for module in list(block.modules()):
        for name, child in module.named_children():
            if id(child) not in skip and (type(child) is nn.Linear or type(child).__name__ == "Conv1D"):
                setattr(module, name, _thresholded(child))


def _thresholded(plain: Any) -> nn.Module:
    made = copy.copy(plain)  # the parameters are the same ones
    made.__dict__["_buffers"] = dict(plain._buffers)
    kind: Any = type(plain)
    made.__class__ = _kind(kind)
    made.register_buffer("settings", torch.zeros(2, dtype=torch.int32, device=plain.weight.device))
    return cast(nn.Module, made)


def _empty(plain: Any) -> Any:
    kind = _kind(plain)
    return kind.__new__(kind)


@functools.cache
def _kind(plain: Any) -> Any:
    return type(f"Thresholded{plain.__name__}", (Thresholded, plain), {})
