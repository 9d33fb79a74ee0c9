"""The tensors of one feed-forward network, in one layout whatever the family stores."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class FFNWeights:
    """Weights of one FFN: ``down(act(gate x) * up x)``, or ``down(act(up x))`` where there is no gate.

    Every matrix has one row per neuron, so that a neuron is one row in each of them.

    Attributes:
        up: [F, D], the input projection (``W_1``, or ``V`` of a gated FFN).
        down: [F, D], the *transposed* output projection.
        gate: [F, D], or None for a plain FFN.
        up_bias, gate_bias: [F] or None.  down_bias: [D] or None.
        activation: one of :data:`lte.ops.ACTIVATIONS`.
        format: how the matrices are stored; ``plain`` is one floating-point number per weight, and the only one so far.
    """

    up: Tensor
    down: Tensor
    gate: Tensor | None = None
    up_bias: Tensor | None = None
    gate_bias: Tensor | None = None
    down_bias: Tensor | None = None
    activation: str = "silu"
    format: str = "plain"
    prepared: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    """What backends remember of these weights between calls; see ``lte.ops.cpu.calls.PreparedCall``."""

    def __getstate__(self) -> dict[str, Any]:
        # Prepared calls point to the memory of these tensors, a copy has its own.
        return {**self.__dict__, "prepared": {}}

    @property
    def d_ff(self) -> int:
        """Number of neurons F."""
        return self.up.shape[0]

    @property
    def d_model(self) -> int:
        """Width D of the residual stream."""
        return self.up.shape[1]

    @property
    def input_matrix(self) -> Tensor:
        """The matrix under the activation function: the gate of a gated FFN, ``W_1`` of a plain one; [F, D]."""
        return self.up if self.gate is None else self.gate

    def without(self, known: str) -> FFNWeights:
        """What is left to compute where the ``gate``'s activations, or the ``up`` projection's values, are known.

        A plain FFN: what is known weights its neurons.
        """
        if known == "gate":
            return replace(self, gate=None, gate_bias=None, activation="identity")
        assert self.gate is not None
        return replace(self, up=self.gate, up_bias=self.gate_bias, gate=None, gate_bias=None)

    def float(self) -> FFNWeights:
        """The same in float32, for the oracle."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        return replace(self, **{name: tensor.float() for name, tensor in tensors.items()})

    @torch.no_grad()
    def permute_(self, permutation: Tensor) -> None:
        """Reorder the neurons in place: neuron ``permutation[i]`` moves to position ``i``. [F] long."""
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, Tensor) and each.name != "down_bias":
                value.copy_(value[permutation.to(value.device)])
