"""Tensors in, tensors out: the kernels' calling side. What they cannot take is refused in ``lte.ops.backends``."""

from __future__ import annotations

import ctypes
import time
from functools import lru_cache

import torch
from torch import Tensor

from lte.ops.cpu.library import ACTIVATION_CODES, DTYPES, FFN, Copy, LowBit, Matrix, Nested, Rows, kernels, matrix
from lte.ops.lowbit import FFNCopy, LowBitMatrix
from lte.ops.nested import NestedFFN, RowCodes
from lte.ops.quantized import QuantizedFFN
from lte.ops.weights import FFNWeights


def describe_ffn(
    weights: FFNWeights,
    n_experts: int,
    router_weight: Tensor | None = None,
    router_bias: Tensor | None = None,
    threshold: float = 0.5,
) -> FFN:
    """The C struct of an FFN. It holds pointers: keep the tensors alive."""
    matrices = (
        (weights.gate, weights.gate_bias),
        (weights.up, weights.up_bias),
        (weights.down, weights.down_bias),
        (router_weight, router_bias),
    )
    return _ffn_struct(
        tuple(_matrix_key(*pair) for pair in matrices),
        weights.d_model,
        weights.d_ff,
        n_experts,
        threshold,
        DTYPES[weights.up.dtype],
        ACTIVATION_CODES[weights.activation],
    )


MatrixKey = tuple[int | None, int | None, int, int, int]


def _matrix_key(weight: Tensor | None, bias: Tensor | None) -> MatrixKey:
    pointer = None if bias is None else bias.data_ptr()
    if weight is None:
        return (None, pointer, 0, 0, 0)
    return (weight.data_ptr(), pointer, *weight.shape, weight.stride(0))


@lru_cache(maxsize=4096)
def _ffn_struct(
    matrices: tuple[MatrixKey, ...],
    d_model: int,
    d_ff: int,
    n_experts: int,
    threshold: float,
    dtype: int,
    activation: int,
) -> FFN:
    """Building the struct costs more than a small FFN; a decode loop asks for the same ones again and again."""
    gate, up, down, router = (Matrix(*key) for key in matrices)
    return FFN(gate, up, down, router, Copy(), Nested(), d_model, d_ff, n_experts, threshold, dtype, activation)


def describe_copied_ffn(weights: FFNWeights, n_experts: int, copy: FFNCopy, cut: float = 0.0) -> FFN:
    """The same of an FFN whose copy decides."""
    described = FFN.from_buffer_copy(describe_ffn(weights, n_experts))  # the other is shared by all that ask for it
    described.copy = Copy(_lowbit(copy.gate), _lowbit(copy.up), copy.norms.data_ptr(), cut)
    return described


def _lowbit(made: LowBitMatrix | None) -> LowBit:
    if made is None:
        return LowBit()
    pointers = made.planes.data_ptr(), made.scales.data_ptr()
    sizes = made.rows, made.columns, made.groups, made.group
    return LowBit(*pointers, *sizes, made.bits, made.by_columns)


def describe_quantized_ffn(
    weights: QuantizedFFN, n_experts: int, dtype: torch.dtype, router: tuple[Tensor, Tensor | None, float] | None = None
) -> FFN:
    """The C struct of an FFN of few bits, for inputs of a dtype."""
    gate, up, down = (
        lowbit_matrix(matrix, bias)
        for matrix, bias in (
            (weights.gate, weights.gate_bias),
            (weights.up, weights.up_bias),
            (weights.down, weights.down_bias),
        )
    )
    decide = matrix(None) if router is None else matrix(*router[:2])
    sizes = weights.d_model, weights.d_ff, n_experts, 0.5 if router is None else router[2]
    return FFN(gate, up, down, decide, Copy(), Nested(), *sizes, DTYPES[dtype], ACTIVATION_CODES[weights.activation])


def describe_nested_ffn(weights: NestedFFN, cut: float, fine_cut: float, dtype: torch.dtype) -> FFN:
    """The C struct of an FFN in two planes, for inputs of a dtype."""
    gate, up, down = (matrix(None, bias) for bias in (weights.gate_bias, weights.up_bias, weights.down_bias))
    copy, rows = weights.copy, weights.down
    nested = Nested(
        *(_rows(codes) for codes in (weights.gate_lower, weights.up_lower, rows.upper, rows.lower)),
        rows.scales.data_ptr(),
        rows.scales.shape[1],
        rows.group,
        rows.exact.data_ptr(),
        rows.exact_rows.data_ptr(),
        len(rows.exact),
        fine_cut,
    )
    its = Copy(_lowbit(copy.gate), _lowbit(copy.up), copy.norms.data_ptr(), cut)
    sizes = weights.d_model, weights.d_ff, weights.d_ff, 0.5
    return FFN(gate, up, down, matrix(None), its, nested, *sizes, DTYPES[dtype], ACTIVATION_CODES[weights.activation])


def _rows(codes: RowCodes | None) -> Rows:
    return Rows() if codes is None else Rows(codes.data.data_ptr(), codes.bits)


def nested_ffn(x_TD: Tensor, weights: NestedFFN, cut: float, fine_cut: float) -> Tensor:
    """An FFN in two planes; see :func:`lte.ops.nested.nested_ffn_reference`."""
    return _run_ffn(describe_nested_ffn(weights, cut, fine_cut, x_TD.dtype), x_TD)


def lowbit_matrix(weight: LowBitMatrix | None, bias: Tensor | None = None) -> Matrix:
    """The C struct of a matrix of few bits, and its bias."""
    if weight is None:
        return matrix(None)
    described = Matrix(None, None if bias is None else bias.data_ptr(), weight.rows, weight.columns, 0)
    described.low = _lowbit(weight)
    return described


def quantized_ffn(
    x_TD: Tensor,
    weights: QuantizedFFN,
    expert_weights_TE: Tensor | None = None,
    router: tuple[Tensor, Tensor | None, float] | None = None,
) -> Tensor:
    """An FFN of few bits over the experts of a mask, of float weights, or of a router (weight, bias, threshold)."""
    n_experts = 1 if router is None else len(router[0])
    if expert_weights_TE is not None:
        n_experts = expert_weights_TE.shape[1]
    given = None if expert_weights_TE is None else expert_weights_TE.float().contiguous()
    return _run_ffn(describe_quantized_ffn(weights, n_experts, x_TD.dtype, router), x_TD, scale=given)


def quantized_linear(x_TD: Tensor, weight: LowBitMatrix, bias: Tensor | None) -> Tensor:
    """[T, D] by [N, D] of few bits to [T, N]."""
    return _run_linear(lowbit_matrix(weight, bias), x_TD)


def quantize(weight: Tensor, made: LowBitMatrix, importance: Tensor | None, tries: int) -> None:
    """Fill the planes and scales of ``made`` with a [rows, columns] weight whose rows are contiguous."""
    kernels().lte_quantize(
        ctypes.byref(matrix(weight)),
        DTYPES[weight.dtype],
        ctypes.byref(_lowbit(made)),
        None if importance is None else importance.data_ptr(),
        tries,
        torch.get_num_threads(),
    )


def dequantize(weight: LowBitMatrix, dtype: torch.dtype) -> Tensor:
    """[N, D] in one of :data:`DTYPES`: the numbers a matrix of few bits means."""
    out_ND = torch.empty(weight.rows, weight.columns, dtype=dtype)
    kernels().lte_dequantize(ctypes.byref(_lowbit(weight)), DTYPES[dtype], out_ND.data_ptr(), torch.get_num_threads())
    return out_ND


def copied_ffn(x_TD: Tensor, copy: FFNCopy, cut: float, n_experts: int, weights: FFNWeights) -> Tensor:
    """The FFN over the experts that its copy picks."""
    return _run_ffn(describe_copied_ffn(weights, n_experts, copy, cut), x_TD)


def copy_scores(x_TD: Tensor, copy: FFNCopy, n_experts: int, weights: FFNWeights) -> Tensor:
    """The norms that the copy says the experts' outputs have: [T, E], float32."""
    ffn = describe_copied_ffn(weights, n_experts, copy)
    x_TD = x_TD.contiguous()
    scores_TE = torch.empty(len(x_TD), n_experts)
    if len(x_TD):
        kernels().lte_copy_scores(
            ctypes.byref(ffn), x_TD.data_ptr(), len(x_TD), scores_TE.data_ptr(), torch.get_num_threads()
        )
    return scores_TE


def sparse_ffn(
    x_TD: Tensor,
    weights: FFNWeights,
    expert_weights_TE: Tensor | None = None,
    router: tuple[Tensor, Tensor | None, float] | None = None,
) -> Tensor:
    """The FFN over the experts of a mask, of float weights, or of a router (weight, bias, threshold)."""
    n_experts = 1
    if expert_weights_TE is not None:
        n_experts = expert_weights_TE.shape[1]
    elif router is not None:
        n_experts = router[0].shape[0]
    mask = scale = None
    if expert_weights_TE is not None and expert_weights_TE.dtype == torch.bool:
        mask = expert_weights_TE.contiguous()
    elif expert_weights_TE is not None:
        scale = expert_weights_TE.float().contiguous()
    return _run_ffn(describe_ffn(weights, n_experts, *(router or ())), x_TD, mask, scale)


def _run_ffn(ffn: FFN, x_TD: Tensor, mask: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    x_TD = x_TD.contiguous()
    y_TD = torch.empty_like(x_TD)
    if len(x_TD):
        kernels().lte_sparse_ffn(
            ctypes.byref(ffn),
            x_TD.data_ptr(),
            len(x_TD),
            None if mask is None else mask.data_ptr(),
            None if scale is None else scale.data_ptr(),
            y_TD.data_ptr(),
            torch.get_num_threads(),
        )
    return y_TD


class PreparedCall:
    """A routed FFN that was checked and described once, for calls that follow.

    Between two tokens the caches are full of weights, and every line of Python is fetched from memory: checking and
    describing a call anew then takes a tenth of a millisecond, a fifth of what a small sparse FFN does.

    Args:
        weights, router_weight, router_bias, threshold: of the call that was made the long way.
    """

    def __init__(
        self, weights: FFNWeights, router_weight: Tensor, router_bias: Tensor | None, threshold: float
    ) -> None:
        self._struct = describe_ffn(weights, router_weight.shape[0], router_weight, router_bias, threshold)
        self._reference = ctypes.byref(self._struct)
        self._router = router_weight, router_bias, threshold
        self._tensors = [t for t in vars(weights).values() if isinstance(t, Tensor)]
        self._tensors += [t for t in (router_weight, router_bias) if t is not None]
        self._pointers = [t.data_ptr() for t in self._tensors]
        self._dtype, self._d_model = weights.up.dtype, weights.d_model
        self._run = kernels().lte_sparse_ffn

    def fits(self, x_TD: Tensor, router_weight: Tensor, router_bias: Tensor | None, threshold: float) -> bool:
        """Whether a call is the one prepared, on the memory it was prepared for."""
        weight, bias, limit = self._router
        if weight is not router_weight or bias is not router_bias or limit != threshold or x_TD.dtype != self._dtype:
            return False
        if x_TD.dim() != 2 or not x_TD.is_contiguous() or x_TD.shape[1] != self._d_model:
            return False
        return [t.data_ptr() for t in self._tensors] == self._pointers

    def __call__(self, x_TD: Tensor) -> Tensor:
        """[T, D] -> [T, D]; only where :meth:`fits`."""
        y_TD = torch.empty_like(x_TD)
        tokens = x_TD.shape[0]
        if tokens:
            self._run(self._reference, x_TD.data_ptr(), tokens, None, None, y_TD.data_ptr(), torch.get_num_threads())
        return y_TD


def linear(x_TD: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[T, D] by [N, D] to [T, N]."""
    return _run_linear(matrix(weight, bias), x_TD)


def _run_linear(described: Matrix, x_TD: Tensor) -> Tensor:
    x_TD = x_TD.contiguous()
    y_TN = x_TD.new_empty(len(x_TD), described.rows)
    if len(x_TD):
        kernels().lte_linear(
            ctypes.byref(described),
            DTYPES[x_TD.dtype],
            x_TD.data_ptr(),
            len(x_TD),
            y_TN.data_ptr(),
            torch.get_num_threads(),
        )
    return y_TN


def read_seconds(tensor: Tensor) -> float:
    """Seconds a plain read of the tensor's bytes takes, with torch's number of threads: the limit of this machine."""
    started = time.perf_counter()
    kernels().lte_read(tensor.data_ptr(), tensor.numel() * tensor.element_size(), torch.get_num_threads())
    return time.perf_counter() - started
