"""Self-prediction: an FFN's own coarse copy says which of its neurons will matter."""

from __future__ import annotations

import math
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lte.nn.nested import NestedDown, NestedLinear
from lte.nn.router import ROUTER_DTYPE, ScoreRouter
from lte.nn.routing import CopyForm, NestedForm, RouterCost
from lte.ops import FFNCopy, FFNWeights, copy_scores, copy_scores_reference, copy_scores_run
from lte.ops.lowbit import nearest, quantize, quantizes_fast, round_inputs, round_like
from lte.ops.reference import neuron_scores

SAMPLED = 64
"""Rows, and columns, of a matrix that are looked at for changes."""


class CopyRouter(ScoreRouter):
    """Guesses a neuron's output as ``|act(g x) u x| * norm(down row)`` with g and u of few bits.

    The copy is made of the weights as they are when it is first asked for, and again when they change. What it is
    fitted to, the mean squares of the FFN's inputs, is kept with the model; the copy itself is not.

    Args:
        d_model, n_experts: of the FFN.
        bits: of the copy's weights, 1 to 4.
        group: weights that share a scale.
        learned: whether gradients pass to the weights through the scores.
        threshold, device: as for :class:`ScoreRouter`.
    """

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        *,
        bits: int,
        group: int,
        learned: bool = True,
        threshold: float = 0.5,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(n_experts, threshold=threshold, device=device)
        self.bits, self.group, self.learned = bits, group, learned
        self.importance = nn.Parameter(torch.ones(d_model, device=device, dtype=ROUTER_DTYPE), requires_grad=False)
        self._made: tuple[list[tuple[int, int]], Copy] | None = None

    def __getstate__(self) -> dict[str, object]:
        return {**super().__getstate__(), "_made": None}

    @property
    def held(self) -> FFNCopy | None:
        """The copy as last made, of whatever weights."""
        return None if self._made is None else self._made[1].packed

    def copy(self) -> Copy:
        """The copy of the weights as they are: made anew after every step of a training, and of nothing else."""
        if self._made is not None and torch.compiler.is_compiling():  # a graph is made of weights that stay
            return self._made[1]
        if self.ffn.is_nested:
            return self._upper_planes()
        weights = self.ffn.weights()
        of = [t for t in (weights.gate, weights.up, weights.down, self.importance, self.sensitivity) if t is not None]
        state = [(tensor.data_ptr(), tensor._version) for tensor in of]
        if self._made is None or self._made[0] != state or (self.training and self._made[1].may_be_behind()):
            copy = Copy(weights, self.bits, self.group, self.importance.detach(), self.unit_scores())
            self._made = state, copy
        return self._made[1]

    def _upper_planes(self) -> Copy:
        """The weights' own upper bits."""
        parts = [*self.ffn.projections(), self]
        held = [t for part in parts for t in (*part._buffers.values(), *part._parameters.values()) if t is not None]
        state = [(tensor.data_ptr(), tensor._version) for tensor in held]
        if self._made is None or self._made[0] != state:
            modules = {role: getattr(self.ffn, name) for role, name in self.ffn.roles.items()}
            self._made = state, UpperPlanes(modules, self.ffn.activation, self.sensitivity.detach())
        return self._made[1]

    def train(self, mode: bool = True) -> CopyRouter:
        """Forget the copy where training begins and ends: fused optimizers change weights and do not say so."""
        if mode or self.training:
            self._made = None
        return super().train(mode)

    def form(self) -> CopyForm | NestedForm:
        """See :meth:`Router.form`."""
        cut = -1.0 if self.runs_all else math.exp(self.cut)
        if self.ffn.is_nested:
            fine_cut = -1.0 if self.fine is None else math.exp(self.fine)
            return NestedForm(self.ffn.nested(self.copy().packed), cut, fine_cut)
        return CopyForm(self.copy().packed, cut)

    def cost(self) -> RouterCost:
        """Of the low-bit products; a copy is held beside the weights, but it is no parameter, or is a part of them."""
        own = self.sensitivity.numel() + self.importance.numel()
        if self.ffn.is_nested:
            first = [part for part in self.ffn.projections() if isinstance(part, NestedLinear)]
            read = sum(part.nbytes - part.spared for part in first) + 4 * self.n_experts
            return RouterCost(sum(part.numel() for part in first), read, own, of_ffn=True)
        weights = self.ffn.weights()
        size = weights.up.numel() * (1 if weights.gate is None else 2)
        per_row = -(-weights.d_model // self.group) * (self.group * self.bits // 8 + 2)
        read = per_row * (size // weights.d_model) + 4 * weights.d_ff
        return RouterCost(multiplies=size, bytes=read, parameters=own)

    def scores(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., E], or of every neuron, [..., F].

        The gradient passes to the weights as if nothing had been rounded.
        """
        copy = self.copy()
        if self.learned and torch.is_grad_enabled() and (x.requires_grad or copy.trained):
            return copy.scores(x)
        x_TD = x.detach().reshape(-1, x.shape[-1]).to(copy.weights.up.dtype)
        with torch.no_grad():
            if copy_scores_run(x_TD, copy.weights):
                return copy_scores(x_TD, copy.packed, self.n_experts, copy.weights).view(*x.shape[:-1], self.n_experts)
            return copy.scores(x)


class Copy:
    """The matrices before the activation in few bits, and what an activation of each neuron counts.

    Args:
        weights: of the FFN.
        bits, group: of the copy.
        importance_D: how much errors count, by column.
        unit_scores_F: the score of every neuron whose activation is 1.
    """

    def __init__(self, weights: FFNWeights, bits: int, group: int, importance_D: Tensor, unit_scores_F: Tensor) -> None:
        self.weights, self._norms = weights, unit_scores_F
        self._rounding = bits, group, importance_D
        self._exact = {name: w for name, w in (("gate", weights.gate), ("up", weights.up)) if w is not None}
        self.trained = any(matrix.requires_grad for matrix in self._exact.values())
        """Whether the weights may have gradients."""
        self._rounded: dict[str, Tensor] = {}
        self._sampled = (
            [_sample(w) for w in (*self._exact.values(), weights.down)] if weights.up.device.type == "cpu" else None
        )

    @cached_property
    def packed(self) -> FFNCopy:
        """What kernels read; training where there are none goes without."""
        made = {name: quantize(matrix, *self._rounding) for name, matrix in self._exact.items()}
        return FFNCopy(made["up"], self._norms, made.get("gate"))

    def may_be_behind(self) -> bool:
        """Whether a step was made since: of every matrix some thousand entries are looked at.

        Not on a GPU, where looking would wait for it, which takes longer than making the copy anew.
        """
        if self._sampled is None:
            return True
        now = (*self._exact.values(), self.weights.down)
        return not all(torch.equal(_sample(w), then) for w, then in zip(now, self._sampled, strict=True))

    def scores(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., F], float32."""
        x = _as_rounded(x, round_inputs(x.detach(), self._rounding[1]))
        products = {name: F.linear(x, self._rounded_matrix(name)) for name in self._exact}
        return neuron_scores(products["up"], products.get("gate"), self._norms, self.weights)

    def _rounded_matrix(self, name: str) -> Tensor:
        exact = self._exact[name]
        if name not in self._rounded:  # kernels read the packed form, and this one is ten times as large
            fast = quantizes_fast(exact)
            rounded = round_like(exact, getattr(self.packed, name)) if fast else nearest(exact, *self._rounding)
            self._rounded[name] = rounded
        return _as_rounded(exact, self._rounded[name])


class UpperPlanes(Copy):
    """The upper bits of weights that lie in two planes: no copy is made.

    Args:
        parts: role -> projection.
        activation: of the FFN.
        sensitivity_F: how much the loss minds each neuron.
    """

    trained = False

    def __init__(self, parts: dict[str, nn.Module], activation: str, sensitivity_F: Tensor) -> None:
        up, down, gate = parts["up"], parts["down"], parts.get("gate")
        assert isinstance(up, NestedLinear)
        assert isinstance(down, NestedDown)
        assert gate is None or isinstance(gate, NestedLinear)
        norms = down.planes.dequantize().norm(dim=1) * sensitivity_F
        self.packed = FFNCopy(up.planes.upper, norms, None if gate is None else gate.planes.upper)
        # Kernels look at biases, and at what the others are like.
        dtype = torch.float32 if up.bias is None else up.bias.dtype
        every = torch.zeros(1, up.columns, device=norms.device, dtype=dtype).expand(up.rows, -1)
        gate_bias = None if gate is None else gate.bias
        of_gate = None if gate is None else every
        self.weights = FFNWeights(every, every, of_gate, up.bias, gate_bias, activation=activation)

    def may_be_behind(self) -> bool:
        """Never: it is the weights."""
        return False

    def scores(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., F], float32; no gradient passes."""
        x_TD = x.detach().reshape(-1, x.shape[-1])
        return copy_scores_reference(x_TD, self.packed, self.weights.d_ff, self.weights).view(*x.shape[:-1], -1)


def _sample(matrix_ND: Tensor) -> Tensor:
    rows, columns = (max(1, size // SAMPLED) for size in matrix_ND.shape)
    return matrix_ND.detach()[::rows, ::columns].clone()


def _as_rounded(exact: Tensor, rounded: Tensor) -> Tensor:
    """The rounded values, with the gradient of the exact ones."""
    if not (torch.is_grad_enabled() and exact.requires_grad):
        return rounded
    return exact.float() + (rounded - exact.detach().float())
