"""A linear layer that goes through the operator for few tokens."""

from __future__ import annotations

from torch import Tensor, nn

from lte.ops import fast_linear


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
        return fast_linear(x, self.weight, self.bias, self.max_tokens)
