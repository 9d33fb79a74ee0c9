"""Feed-forward networks and linear layers whose weights are of few bits, and what their kernels compute."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from lte.errors import ConfigError
from lte.ops.lowbit import LowBitMatrix, as_taken, quantize
from lte.ops.reference import ACTIVATIONS, scale_experts
from lte.ops.weights import FFNWeights


@dataclass(frozen=True)
class QuantizedFFN:
    """What :class:`FFNWeights` is, of few bits.

    Gate and up lie row by row, down column by column: in each, the weights of a group of neurons lie together.

    Attributes:
        up, gate: [F, D]; no gate for a plain FFN.
        down: [D, F], by columns.
        up_bias, gate_bias: [F] or None.  down_bias: [D] or None.
        activation: one of :data:`lte.ops.ACTIVATIONS`.
    """

    up: LowBitMatrix
    down: LowBitMatrix
    gate: LowBitMatrix | None = None
    up_bias: Tensor | None = None
    gate_bias: Tensor | None = None
    down_bias: Tensor | None = None
    activation: str = "silu"

    @classmethod
    def of(cls, weights: FFNWeights, bits: int, group: int = 32) -> QuantizedFFN:
        """Round every matrix of an FFN, each group's scale with the smallest squared error.

        Args:
            weights: of the FFN.
            bits: 1 to 8.
            group: weights that share a scale, a multiple of 32; of the down projection those of neighbouring neurons.
        """
        return cls(
            up=quantize(weights.up, bits, group),
            down=quantize(weights.down.T.contiguous(), bits, group, by_columns=True),
            gate=None if weights.gate is None else quantize(weights.gate, bits, group),
            up_bias=weights.up_bias,
            gate_bias=weights.gate_bias,
            down_bias=weights.down_bias,
            activation=weights.activation,
        )

    @property
    def bits(self) -> int:
        """Of a weight."""
        return self.up.bits

    @property
    def d_ff(self) -> int:
        """Number of neurons F."""
        return self.up.rows

    @property
    def d_model(self) -> int:
        """Width D of the residual stream."""
        return self.up.columns

    def dequantize(self, dtype: torch.dtype = torch.float32) -> FFNWeights:
        """The numbers that are meant, one by one."""
        return FFNWeights(
            up=self.up.dequantize(dtype),
            down=self.down.dequantize(dtype).T,
            gate=None if self.gate is None else self.gate.dequantize(dtype),
            up_bias=self.up_bias,
            gate_bias=self.gate_bias,
            down_bias=self.down_bias,
            activation=self.activation,
        )

    def check_experts(self, n_experts: int) -> None:
        """Raise ConfigError where experts do not begin and end with groups of the down projection."""
        if n_experts < 1 or self.d_ff % n_experts or (n_experts > 1 and self.d_ff // n_experts % self.down.group):
            raise ConfigError(
                f"{n_experts} experts of {self.d_ff} neurons cannot run on weights of few bits: an expert must have "
                f"whole groups of the down projection, which are of {self.down.group} neurons"
            )


def quantized_linear_reference(x: Tensor, weight: LowBitMatrix, bias: Tensor | None = None) -> Tensor:
    """[..., D] by [N, D] to [..., N], in the dtype of ``x``; on the CPU inputs are rounded to 8 bits, as kernels do."""
    y = F.linear(as_taken(x, weight.group), weight.dequantize())
    return (y if bias is None else y + bias.float()).to(x.dtype)


def quantized_ffn_reference(x_TD: Tensor, weights: QuantizedFFN, expert_weights_TE: Tensor | None = None) -> Tensor:
    """What kernels compute, in plain PyTorch: on the CPU with inputs, and what enters the down projection, in 8 bits.

    Args:
        x_TD: [T, D] inputs.
        weights: the FFN.
        expert_weights_TE: [T, E], bool mask or weights of the experts; None for the dense FFN.

    Returns:
        [T, D], in the dtype of ``x_TD``.
    """
    plain = replace(weights.dequantize(), down_bias=None)
    x = as_taken(x_TD, weights.up.group)
    act = ACTIVATIONS[weights.activation]

    def product(matrix: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, matrix, None if bias is None else bias.float())

    if plain.gate is None:
        hidden_TF = act(product(plain.up, plain.up_bias))
    else:
        hidden_TF = act(product(plain.gate, plain.gate_bias)) * product(plain.up, plain.up_bias)
    if expert_weights_TE is not None:
        hidden_TF = scale_experts(hidden_TF, expert_weights_TE)
    y_TD = as_taken(hidden_TF, weights.down.group) @ plain.down
    return (y_TD if weights.down_bias is None else y_TD + weights.down_bias.float()).to(x_TD.dtype)
