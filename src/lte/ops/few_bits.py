"""The operators for weights of few bits, and which implementation runs them: C++ on the CPU, Triton on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from lte.ops import backends, cpu
from lte.ops.lowbit import FFNCopy, LowBitMatrix
from lte.ops.nested import NestedFFN, NestedRows, RowCodes, nested_ffn_reference
from lte.ops.operator import route
from lte.ops.quantized import QuantizedFFN, quantized_ffn_reference, quantized_linear_reference

_library = torch.library.Library("lte", "FRAGMENT")
_library.define("quantized_linear(Tensor x, Tensor codes, Tensor scales, int rows, Tensor? bias) -> Tensor")
_library.define(
    "quantized_ffn(Tensor x, Tensor[] up, Tensor[] down, Tensor[] gate, int d_ff, Tensor? up_bias, Tensor? gate_bias, "
    "Tensor? down_bias, str activation, Tensor? expert_weights, Tensor? router, Tensor? router_bias, float threshold) "
    "-> Tensor"
)
_library.define(
    "nested_ffn(Tensor x, Tensor norms, Tensor[] up, Tensor[] gate, Tensor[] down, int group, Tensor? up_bias, "
    "Tensor? gate_bias, Tensor? down_bias, str activation, float cut, float fine_cut) -> Tensor"
)


def quantized_linear(x_TD: Tensor, weight: LowBitMatrix, bias_N: Tensor | None = None) -> Tensor:
    """``x W^T + b``, [T, D] to [T, N], with weights of few bits; by kernels where they run.

    On the CPU inputs are rounded to 8 bits, on a GPU they are taken as they are.
    """
    if x_TD.device.type == "cuda" and not weight.by_columns:
        return torch.ops.lte.quantized_linear(x_TD, weight.planes, weight.scales, weight.rows, bias_N)
    if backends.choose_for_codes(x_TD) == "cpu":
        return cpu.quantized_linear(x_TD, weight, None if bias_N is None else bias_N.to(x_TD.dtype))
    return quantized_linear_reference(x_TD, weight, bias_N)


def quantized_ffn(
    x_TD: Tensor,
    weights: QuantizedFFN,
    expert_weights_TE: Tensor | None = None,
    router: tuple[Tensor, Tensor | None, float] | None = None,
) -> Tensor:
    """An FFN of few bits over some experts, by kernels where they can run.

    On the CPU inputs and hidden values are rounded to 8 bits, on a GPU they are taken as they are.

    Args:
        x_TD: [T, D] inputs.
        weights: the FFN.
        expert_weights_TE: [T, E], a bool mask or weights of the experts.
        router: instead, weight, bias and threshold as :func:`lte.ops.routed_ffn` takes them; neither runs all.

    Raises:
        ConfigError: experts that do not have whole groups of the down projection.
    """
    if expert_weights_TE is not None:
        weights.check_experts(expert_weights_TE.shape[1])
    elif router is not None:
        weights.check_experts(len(router[0]))
    if x_TD.device.type == "cuda":
        return torch.ops.lte.quantized_ffn(x_TD, *_flat(weights), expert_weights_TE, *(router or (None, None, 0.0)))
    if backends.choose_for_codes(x_TD) == "cpu":
        return cpu.quantized_ffn(x_TD, weights, expert_weights_TE, router)
    return _reference(x_TD, weights, expert_weights_TE, router)


def nested_ffn(x_TD: Tensor, weights: NestedFFN, cut: float, fine_cut: float) -> Tensor:
    """An FFN in two planes of bits, by kernels where they can run; see :func:`nested_ffn_reference`."""
    if x_TD.device.type == "cuda":
        return torch.ops.lte.nested_ffn(x_TD, *_flat_planes(weights), cut, fine_cut)
    if backends.choose_for_codes(x_TD) != "cpu":
        return nested_ffn_reference(x_TD, weights, cut, fine_cut)
    if len(x_TD) <= backends.SMALL_BATCH:
        return cpu.nested_ffn(x_TD, weights, cut, fine_cut)
    return torch.cat([cpu.nested_ffn(part, weights, cut, fine_cut) for part in x_TD.split(backends.SMALL_BATCH)])


def _reference(
    x_TD: Tensor,
    weights: QuantizedFFN,
    expert_weights_TE: Tensor | None,
    router: tuple[Tensor, Tensor | None, float] | None,
) -> Tensor:
    if router is not None:
        expert_weights_TE = route(x_TD, *router[:2]) > router[2]
    return quantized_ffn_reference(x_TD, weights, expert_weights_TE)


def _flat(weights: QuantizedFFN) -> tuple[object, ...]:
    gate = [] if weights.gate is None else [weights.gate.planes, weights.gate.scales]
    return (
        *([weights.up.planes, weights.up.scales], [weights.down.planes, weights.down.scales], gate, weights.d_ff),
        *(weights.up_bias, weights.gate_bias, weights.down_bias, weights.activation),
    )


def _flat_planes(weights: NestedFFN) -> tuple[object, ...]:
    copy, down = weights.copy, weights.down
    up, gate = (
        [] if upper is None else [upper.planes, upper.scales, *([] if lower is None else [lower.data])]
        for upper, lower in ((copy.up, weights.up_lower), (copy.gate, weights.gate_lower))
    )
    rows = [
        down.upper.data,
        down.scales,
        down.exact,
        down.exact_rows,
        *([] if down.lower is None else [down.lower.data]),
    ]
    return (
        *(copy.norms, up, gate, rows, down.group, weights.up_bias, weights.gate_bias, weights.down_bias),
        weights.activation,
    )


def _on_gpu_linear(x: Tensor, codes: Tensor, scales: Tensor, rows: int, bias: Tensor | None) -> Tensor:
    weight = LowBitMatrix(codes, scales, rows, x.shape[1])
    if backends.choose_for_codes(x) == "reference":
        return quantized_linear_reference(x, weight, bias)
    from lte.ops import triton

    return triton.quantized_linear(x, weight, bias)


def _on_gpu_ffn(
    x: Tensor,
    up: list[Tensor],
    down: list[Tensor],
    gate: list[Tensor],
    d_ff: int,
    up_bias: Tensor | None,
    gate_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    expert_weights: Tensor | None,
    router: Tensor | None,
    router_bias: Tensor | None,
    threshold: float,
) -> Tensor:
    d_model = x.shape[1]
    weights = QuantizedFFN(
        up=LowBitMatrix(up[0], up[1], d_ff, d_model),
        down=LowBitMatrix(down[0], down[1], d_model, d_ff, by_columns=True),
        gate=LowBitMatrix(gate[0], gate[1], d_ff, d_model) if gate else None,
        up_bias=up_bias,
        gate_bias=gate_bias,
        down_bias=down_bias,
        activation=activation,
    )
    decides = None if router is None else (router, router_bias, threshold)
    if backends.choose_for_codes(x) == "reference":
        return _reference(x, weights, expert_weights, decides)
    from lte.ops import triton

    return triton.quantized_ffn(x, weights, expert_weights, decides)


def _on_gpu_nested(
    x: Tensor,
    norms: Tensor,
    up: list[Tensor],
    gate: list[Tensor],
    down: list[Tensor],
    group: int,
    up_bias: Tensor | None,
    gate_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    cut: float,
    fine_cut: float,
) -> Tensor:
    d_ff, d_model = len(norms), x.shape[1]
    codes, scales, exact, exact_rows, *lower = down

    def in_tiles(stored: list[Tensor]) -> LowBitMatrix:
        return LowBitMatrix(stored[0], stored[1], d_ff, d_model)

    def in_rows(stored: list[Tensor]) -> RowCodes | None:
        return RowCodes.of(stored[0], d_model) if stored else None

    weights = NestedFFN(
        copy=FFNCopy(in_tiles(up), norms, in_tiles(gate) if gate else None),
        down=NestedRows(RowCodes.of(codes, d_model), in_rows(lower), scales, group, exact, exact_rows),
        up_lower=in_rows(up[2:]),
        gate_lower=in_rows(gate[2:]),
        up_bias=up_bias,
        gate_bias=gate_bias,
        down_bias=down_bias,
        activation=activation,
    )
    if backends.choose_for_codes(x) == "reference":
        return nested_ffn_reference(x, weights, cut, fine_cut)
    from lte.ops import triton

    return triton.nested_ffn(x, weights, cut, fine_cut)


_library.impl("quantized_linear", _on_gpu_linear, "CUDA")
_library.impl("nested_ffn", _on_gpu_nested, "CUDA")
_library.impl("quantized_ffn", _on_gpu_ffn, "CUDA")


@torch.library.register_fake("lte::quantized_linear")
def _(x: Tensor, codes: Tensor, scales: Tensor, rows: int, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], rows)


@torch.library.register_fake("lte::nested_ffn")
@torch.library.register_fake("lte::quantized_ffn")
def _(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
