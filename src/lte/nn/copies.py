"""Self-prediction: an FFN's own coarse copy says which of its neurons will matter."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lte.nn.router import ROUTER_DTYPE, Router, RouterCost, Routing
from lte.ops.lowbit import quantize, round_inputs
from lte.ops.reference import ACTIVATIONS
from lte.ops.weights import FFNWeights

if TYPE_CHECKING:
    from lte.nn.ffn import SparseFFN

NOTHING = 1e-20
"""Smallest score: a ReLU leaves many at nothing, and they have no logarithm."""


class CopyRouter(Router):
    """Score of a neuron: ``|act(g x) u x| * norm(down row)`` with g and u of few bits, times the layer's sensitivity.

    ``logit = log(score) + offset``; of experts of several neurons, the score is the root of the sum of the squares.
    The copy is made of the weights as they are when it is first asked for, and again when they change.

    Args:
        n_experts: number of experts E.
        bits: of the copy's weights, 1 to 4.
        group: weights that share a scale.
        threshold, device: as for :class:`Router` and its parameters.
    """

    def __init__(
        self,
        n_experts: int,
        *,
        bits: int,
        group: int,
        threshold: float = 0.5,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(n_experts, threshold=threshold)
        self.bits, self.group = bits, group
        self.offset = nn.Parameter(torch.zeros(1, device=device, dtype=ROUTER_DTYPE), requires_grad=False)
        self._ffn: list[SparseFFN] = []
        self._made: tuple[list[tuple[int, int]], Copy] | None = None

    def __getstate__(self) -> dict[str, object]:
        return {**super().__getstate__(), "_made": None}

    def attach(self, ffn: SparseFFN) -> None:
        """See :meth:`Router.attach`."""
        self._ffn = [ffn]  # in a list it is no child of its own child

    def copy(self) -> Copy:
        """The copy of the weights as they are."""
        (ffn,) = self._ffn
        weights = ffn.weights()
        state = [(w.data_ptr(), w._version) for w in (weights.gate, weights.up, weights.down) if w is not None]
        if self._made is None or self._made[0] != state:
            self._made = state, Copy(weights, self.bits, self.group)
        return self._made[1]

    def cost(self) -> RouterCost:
        """Of the low-bit products; a copy is held beside the weights, but it is no parameter."""
        (ffn,) = self._ffn
        weights = ffn.weights()
        size = weights.up.numel() * (1 if weights.gate is None else 2)
        per_row = -(-weights.d_model // self.group) * (self.group * self.bits // 8 + 2)
        read = per_row * (size // weights.d_model) + 4 * weights.d_ff
        return RouterCost(multiplies=size, bytes=read, parameters=self.offset.numel())

    def forward(self, x: Tensor) -> Routing:
        """Decide for inputs of shape [..., D]."""
        with torch.autocast(device_type=x.device.type, enabled=False):
            scores = self.copy().scores(x)
            if self.n_experts != scores.shape[-1]:
                scores = scores.unflatten(-1, (self.n_experts, -1)).square().sum(-1).sqrt()
            return self.decide(scores.clamp_min(NOTHING).log() + self.offset)


class Copy:
    """The matrices before the activation in few bits, and the norms of the rows behind it.

    Args:
        weights: of the FFN.
        bits, group: of the copy.
    """

    def __init__(self, weights: FFNWeights, bits: int, group: int) -> None:
        self.up = quantize(weights.up, bits, group)
        self.gate = None if weights.gate is None else quantize(weights.gate, bits, group)
        self.biases = weights.gate_bias, weights.up_bias
        self.norms = weights.down.detach().float().norm(dim=1)
        self.activation = weights.activation
        self.group = group
        # What the reference multiplies with; kernels read the packed form.
        self._up_FD = self.up.dequantize()
        self._gate_FD = None if self.gate is None else self.gate.dequantize()

    def scores(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., F], float32."""
        x, act = round_inputs(x, self.group), ACTIVATIONS[self.activation]
        gate_bias, up_bias = (None if bias is None else bias.float() for bias in self.biases)
        hidden = F.linear(x, self._up_FD, up_bias)
        hidden = act(hidden) if self._gate_FD is None else act(F.linear(x, self._gate_FD, gate_bias)) * hidden
        return hidden.abs() * self.norms
