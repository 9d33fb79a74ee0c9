"""Self-prediction: an FFN's own coarse copy says which of its neurons will matter."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lte.nn.router import CopyForm, RouterCost, ScoreRouter
from lte.ops.lowbit import FFNCopy, quantize, round_inputs, round_to
from lte.ops.reference import ACTIVATIONS
from lte.ops.weights import FFNWeights

KEPT_SCALES = 32
"""Steps for which scales are kept while weights are trained: searching for them takes ten times as long as rounding."""


class CopyRouter(ScoreRouter):
    """Score of a neuron: ``|act(g x) u x| * norm(down row)`` with g and u of few bits.

    The copy is made of the weights as they are when it is first asked for, and again when they change.

    Args:
        n_experts, threshold, device: as for :class:`ScoreRouter`.
        bits: of the copy's weights, 1 to 4.
        group: weights that share a scale.
    """

    def __init__(
        self, n_experts: int, *, bits: int, group: int, threshold: float = 0.5, device: torch.device | None = None
    ) -> None:
        super().__init__(n_experts, threshold=threshold, device=device)
        self.bits, self.group = bits, group
        self._made: tuple[list[tuple[int, int]], Copy] | None = None

    def __getstate__(self) -> dict[str, object]:
        return {**super().__getstate__(), "_made": None}

    def copy(self) -> Copy:
        """The copy of the weights as they are.

        While they are trained, scales are kept for some steps and only the rounding is made anew.
        """
        weights = self.ffn.weights()
        state = [(w.data_ptr(), w._version) for w in (weights.gate, weights.up, weights.down) if w is not None]
        if self._made is None or self._made[0] != state:
            old = self._made[1] if self._made is not None and self.training else None
            fresh = old is None or old.age >= KEPT_SCALES
            self._made = state, Copy(weights, self.bits, self.group, None if fresh else old)
        elif not self.training and self._made[1].age:
            self._made = state, Copy(weights, self.bits, self.group)
        return self._made[1]

    def form(self) -> CopyForm:
        """See :meth:`Router.form`."""
        log_cut = math.log(self.threshold / (1 - self.threshold)) - float(self.offset)
        return CopyForm(self.copy().packed_ffn(), math.exp(min(log_cut, 80.0)))

    def cost(self) -> RouterCost:
        """Of the low-bit products; a copy is held beside the weights, but it is no parameter."""
        weights = self.ffn.weights()
        size = weights.up.numel() * (1 if weights.gate is None else 2)
        per_row = -(-weights.d_model // self.group) * (self.group * self.bits // 8 + 2)
        read = per_row * (size // weights.d_model) + 4 * weights.d_ff
        return RouterCost(multiplies=size, bytes=read, parameters=self.offset.numel())

    def scores(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., F]; the gradient passes to the weights as if nothing had been rounded."""
        return self.copy().scores(x)


class Copy:
    """The matrices before the activation in few bits, and the norms of the rows behind it.

    Args:
        weights: of the FFN.
        bits, group: of the copy.
        like: a copy of earlier weights whose scales to keep; None to search for them.
    """

    def __init__(self, weights: FFNWeights, bits: int, group: int, like: Copy | None = None) -> None:
        self.weights, self.bits, self.group = weights, bits, group
        self.age: int = 0 if like is None else like.age + 1
        """How many changes of the weights the scales are behind."""
        if like is None:
            self.packed = {
                name: quantize(matrix, bits, group)
                for name, matrix in (("gate", weights.gate), ("up", weights.up))
                if matrix is not None
            }
        else:
            self.packed = like.packed
        self._norms = weights.down.detach().float().norm(dim=1)
        self._rounded: dict[str, Tensor] = {}

    def packed_ffn(self) -> FFNCopy:
        """What kernels read."""
        return FFNCopy(self.packed["up"], self._norms, self.packed.get("gate"))

    def _round(self, name: str) -> Tensor:
        if self.age:
            return round_to(getattr(self.weights, name), self.packed[name].scales, self.bits, self.group)
        return self.packed[name].dequantize()

    def scores(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., F], float32."""
        weights, act = self.weights, ACTIVATIONS[self.weights.activation]
        x = _as_rounded(x, round_inputs(x.detach(), self.group))
        hidden = F.linear(x, self._matrix("up"), _float(weights.up_bias))
        if weights.gate is None:
            hidden = act(hidden)
        else:
            hidden = act(F.linear(x, self._matrix("gate"), _float(weights.gate_bias))) * hidden
        return hidden.abs() * self._norms

    def _matrix(self, name: str) -> Tensor:
        if name not in self._rounded:  # kernels read the packed form, and this one is ten times as large
            self._rounded[name] = self._round(name)
        return _as_rounded(getattr(self.weights, name), self._rounded[name])


def _as_rounded(exact: Tensor, rounded: Tensor) -> Tensor:
    """The rounded values, with the gradient of the exact ones."""
    if not (torch.is_grad_enabled() and exact.requires_grad):
        return rounded
    return exact.float() + (rounded - exact.detach().float())


def _float(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float()
