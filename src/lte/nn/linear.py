"""A linear layer that goes through the operator for few tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lte.ops import linear


class FastLinear(nn.Linear):
    """``nn.Linear`` whose product with few tokens, at inference, runs at the speed the weights can be read.

    An ``nn.Linear`` becomes one by :meth:`adopt`; parameters, names and results stay what they were.
    """

    max_tokens: int

    @classmethod
    def adopt(cls, module: nn.Linear, max_tokens: int) -> None:
        """Turn a plain linear layer into this class, in place; up to ``max_tokens`` go through the operator."""
        module.__class__ = cls
        assert isinstance(module, FastLinear)
        module.max_tokens = max_tokens

    def release(self) -> None:
        """Turn back into a plain ``nn.Linear``."""
        del self.max_tokens
        self.__class__ = nn.Linear  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., N]."""
        tokens = x.numel() // max(1, x.shape[-1])
        if (
            x.shape[-1] != self.weight.shape[1]
            or tokens > self.max_tokens
            or torch.is_grad_enabled()
            or torch.is_autocast_enabled(x.device.type)
        ):
            return super().forward(x)
        return linear(x.reshape(-1, x.shape[-1]), self.weight, self.bias).view(*x.shape[:-1], self.weight.shape[0])
