"""The oracle: a sparse FFN in plain PyTorch, on any device, written to be read rather than to be fast."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lte.ops.lowbit import FFNCopy, round_inputs
from lte.ops.weights import FFNWeights

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "identity": lambda x: x,
}
"""Of hidden values. ``identity`` is left of a gated FFN whose gate is known: the gate's values weight its neurons."""

MULTIPLIES_TRANSPOSED = torch.backends.cpu.get_cpu_capability() == "AVX512"
"""Whether torch's product of a bf16 matrix stored transposed is about as fast as of one that is not."""


def sparse_ffn_reference(x_TD: Tensor, weights: FFNWeights, expert_weights_TE: Tensor | None = None) -> Tensor:
    """``sum_e w[t, e] * E_e(x[t]) + down_bias``: the FFN with every expert's output scaled.

    Args:
        x_TD: [T, D] inputs.
        weights: the FFN, its neurons ordered so that experts are contiguous.
        expert_weights_TE: [T, E]. A boolean mask gives hard mode (LTE, section 4.2), sigmoid scores give soft
            mode (section 4.1), None the dense FFN.

    Returns:
        [T, D], in the dtype of ``x_TD``.
    """
    act = ACTIVATIONS[weights.activation]
    hidden_TF = F.linear(x_TD, weights.up, weights.up_bias)
    if weights.gate is None:
        hidden_TF = act(hidden_TF)
    else:
        hidden_TF = act(F.linear(x_TD, weights.gate, weights.gate_bias)) * hidden_TF
    if expert_weights_TE is not None:
        hidden_TF = scale_experts(hidden_TF, expert_weights_TE)
    return project_down(hidden_TF, weights.down.T, weights.down_bias)


def copy_scores_reference(x_TD: Tensor, copy: FFNCopy, n_experts: int, weights: FFNWeights) -> Tensor:
    """Norms of the experts' outputs, as a coarse copy of the FFN has them.

    Args:
        x_TD: [T, D] inputs; they are rounded to 8 bits.
        copy: of the FFN.
        n_experts: number of experts E.
        weights: of the FFN, for its biases and its activation.

    Returns:
        [T, E], float32. Neurons of an expert are taken for orthogonal.
    """
    x_TD = round_inputs(x_TD, copy.up.group)
    gate_TF = None if copy.gate is None else F.linear(x_TD, copy.gate.dequantize())
    scores_TF = neuron_scores(F.linear(x_TD, copy.up.dequantize()), gate_TF, copy.norms, weights)
    return expert_scores(scores_TF, n_experts)


def neuron_scores(up: Tensor, gate: Tensor | None, norms_F: Tensor, weights: FFNWeights) -> Tensor:
    """``|act(gate + b) (up + b)| * norm``, of two float32 products of the inputs, [..., F].

    Args:
        up, gate: whatever stands for those of the FFN; no gate for a plain one.
        norms_F: of the rows of the down projection.
        weights: of the FFN, for its biases and its activation.
    """
    act = ACTIVATIONS[weights.activation]
    hidden = up if weights.up_bias is None else up + weights.up_bias.float()
    if gate is None:
        return act(hidden).abs() * norms_F
    return (act(gate if weights.gate_bias is None else gate + weights.gate_bias.float()) * hidden).abs() * norms_F


def expert_scores(scores: Tensor, n_experts: int) -> Tensor:
    """Of neurons' scores, [..., F], the norm over each expert's, [..., E]."""
    if n_experts == scores.shape[-1]:
        return scores
    return scores.unflatten(-1, (n_experts, -1)).square().sum(-1).sqrt()


def project_down(hidden: Tensor, weight_DF: Tensor, bias_D: Tensor | None) -> Tensor:
    """``F.linear``, for a weight that may be packed, which is to say stored transposed.

    For bf16 on processors without AVX-512, torch multiplies with a transposed weight tens of times slower than it
    copies it; with AVX-512 it multiplies as it lies, which is several times faster than the copy.
    """
    if weight_DF.dtype == torch.bfloat16 and weight_DF.device.type == "cpu" and not MULTIPLIES_TRANSPOSED:
        weight_DF = weight_DF.contiguous()
    return F.linear(hidden, weight_DF, bias_D)


def scale_experts(hidden: Tensor, expert_weights: Tensor) -> Tensor:
    """Scale every expert's neurons by that expert's weight: [..., F] by [..., E] to [..., F].

    A masked expert contributes exact zeros even where its activation overflowed.
    """
    grouped = hidden.unflatten(-1, (expert_weights.shape[-1], -1))
    if expert_weights.dtype == torch.bool:
        return grouped.where(expert_weights.unsqueeze(-1), 0.0).flatten(-2)
    return (grouped * expert_weights.unsqueeze(-1).to(hidden.dtype)).flatten(-2)
