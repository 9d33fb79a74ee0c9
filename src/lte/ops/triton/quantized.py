"""Launches of the kernels for weights of few bits; inputs are not rounded to 8 bits as on the CPU."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
from torch import Tensor

from lte.errors import LTEError
from lte.ops.lowbit import ROWS, LowBitMatrix
from lte.ops.quantized import QuantizedFFN
from lte.ops.triton import lowbit
from lte.ops.triton.configs import token_bucket
from lte.ops.triton.launch import (
    LIST_EXPERTS,
    LIST_TOKENS,
    Launch,
    current_gpu,
    kernel_mask,
    router_launch,
    run,
    workspace,
)


@dataclass(frozen=True)
class Tiles:
    """Of the rows kernel and the down kernel: rows per program, words or chunks per step, warps, pipeline depth."""

    rows: int
    words: int
    warps: int
    stages: int
    down_rows: int
    down_chunks: int
    down_warps: int
    down_stages: int
    down_programs_per_sm: int


ONE = Tiles(16, 64, 4, 3, down_rows=32, down_chunks=8, down_warps=4, down_stages=3, down_programs_per_sm=4)
"""The fastest of 83 for four bits on an H100."""

SOME = Tiles(32, 16, 4, 2, down_rows=64, down_chunks=4, down_warps=4, down_stages=2, down_programs_per_sm=2)


def tiles_for(n_tokens: int, bits: int) -> Tiles:
    """What is launched; a step of the down kernel has at least 16 words, which the matrix units want."""
    # Of widths that do not fill a byte several planes are in flight for a word, and take the place of a pipeline.
    if n_tokens == 1:
        return ONE if 8 % bits == 0 else replace(ONE, stages=1, down_stages=1)
    warps = 4 if n_tokens <= 32 else 8
    tiles = replace(SOME, down_chunks=max(SOME.down_chunks * 4, 16) // parts_of(bits), warps=warps, down_warps=warps)
    return tiles if 8 % bits == 0 else replace(tiles, warps=8, stages=1, down_warps=8, down_stages=1)


def parts_of(bits: int) -> int:
    """Words that 32 codes of a row come in, each of four bytes with as many codes as have room there."""
    return 8 // (8 // bits)


def quantized_linear(x_TD: Tensor, weight: LowBitMatrix, bias_N: Tensor | None = None) -> Tensor:
    """``x W^T + b``, [T, D] to [T, N], in one launch. Inference only.

    Args:
        x_TD: [T, D] float32, bfloat16 or float16.
        weight: [N, D] of 1 to 8 bits, row by row.
        bias_N: [N] or None.

    Raises:
        LTEError: an input these kernels cannot take.
    """
    out_TN = torch.empty(len(x_TD), weight.rows, dtype=x_TD.dtype, device=x_TD.device)
    if len(x_TD):
        check_codes(x_TD, weight)
        run(x_TD.device, [rows_launch(x_TD, weight, None, bias_N, None, None, out_TN, None)])
    return out_TN


def quantized_ffn(
    x_TD: Tensor,
    weights: QuantizedFFN,
    expert_weights_TE: Tensor | None = None,
    router: tuple[Tensor, Tensor | None, float] | None = None,
) -> Tensor:
    """An FFN of few bits over some experts, in two launches, or three with a router. Inference only.

    Args:
        x_TD: [T, D] float32, bfloat16 or float16.
        weights: of 1 to 8 bits.
        expert_weights_TE: [T, E] bool or floating; see :func:`lte.ops.triton.sparse_ffn`.
        router: weight, bias and threshold instead.

    Raises:
        LTEError: an input these kernels cannot take.
    """
    if not len(x_TD):
        return torch.empty_like(x_TD)
    for matrix in filter(None, (weights.up, weights.gate)):
        check_codes(x_TD, matrix)
    if router is not None:
        expert_weights_TE = workspace((len(x_TD), len(router[0])), torch.uint8, x_TD.device)
        run(x_TD.device, [router_launch(x_TD, *router, expert_weights_TE, pdl=False)])
    elif expert_weights_TE is not None:
        expert_weights_TE = kernel_mask(x_TD, expert_weights_TE)
    out_TD, launches = ffn_launches(x_TD, weights, expert_weights_TE, current_gpu(x_TD.device).sms)
    run(x_TD.device, launches)
    return out_TD


Lists = tuple[Tensor | None, Tensor | None, Tensor]
"""Active experts of every block of tokens, their number, and the counters of finished programs."""


def ffn_launches(
    x_TD: Tensor, weights: QuantizedFFN, expert_weights_TE: Tensor | None, sms: int, tiles: Tiles | None = None
) -> tuple[Tensor, list[Launch]]:
    """The output and the two launches that fill it."""
    n_tokens, device = len(x_TD), x_TD.device
    tiles = tiles or tiles_for(n_tokens, weights.bits)
    n_experts = 1 if expert_weights_TE is None else expert_weights_TE.shape[1]
    blocks = triton.cdiv(n_tokens, token_bucket(n_tokens))
    n_done = triton.cdiv(weights.d_model, tiles.down_rows)
    wanted = tiles.down_programs_per_sm * sms // n_done
    splits = 1 if blocks > 1 else max(1, min(wanted, triton.cdiv(weights.d_ff, 32 * tiles.down_chunks), 64))
    done = workspace((blocks, n_done), torch.int32, device)
    lists: Lists = (None, None, done)
    if expert_weights_TE is not None:
        active = workspace((blocks, n_experts), torch.int32, device)
        lists = active, workspace((blocks,), torch.int32, device), done
    hidden_TF = workspace((n_tokens, weights.d_ff), torch.float32 if n_tokens == 1 else x_TD.dtype, device)
    rows = rows_launch(
        *(x_TD, weights.up, weights.gate, weights.up_bias, weights.gate_bias, expert_weights_TE, hidden_TF, lists),
        activation=weights.activation,
        tiles=tiles,
    )
    out_TD = torch.empty(x_TD.shape, dtype=x_TD.dtype, device=device)
    partial = workspace((splits, *x_TD.shape), torch.float32, device) if splits > 1 else None
    constants = {
        **_common(n_tokens, weights.down, n_experts, weights.d_ff, weights.d_model),
        "ROWS": tiles.down_rows,
        "CHUNKS": tiles.down_chunks,
        "SPLITS": splits,
        "STAGES": tiles.down_stages,
        "N_DONE": n_done,
    }
    codes, scales = words_of(weights.down)
    args = (hidden_TF, codes, scales, weights.down_bias, *lists, partial, out_TD, n_tokens)
    down = Launch(lowbit.lowbit_down_kernel, (n_done, splits, blocks), args, constants, tiles.down_warps)
    return out_TD, [rows, down]


def rows_launch(
    x_TD: Tensor,
    up: LowBitMatrix,
    gate: LowBitMatrix | None,
    up_bias: Tensor | None,
    gate_bias: Tensor | None,
    expert_weights_TE: Tensor | None,
    out_TF: Tensor,
    lists: Lists | None,
    *,
    activation: str = "identity",
    tiles: Tiles | None = None,
) -> Launch:
    """The launch that fills ``out_TF``; without ``lists`` no list of active experts is written."""
    n_tokens = len(x_TD)
    tiles = tiles or tiles_for(n_tokens, up.bits)
    n_experts = 1 if expert_weights_TE is None else expert_weights_TE.shape[1]
    n_done = 1 if lists is None else lists[2].shape[1]
    constants: dict[str, Any] = {
        **_common(n_tokens, up, n_experts, up.rows, up.columns),
        "ACT": activation,
        "LIST_T": 1 if n_tokens == 1 else LIST_TOKENS,
        "LIST_E": min(LIST_EXPERTS, triton.next_power_of_2(n_experts)),
        "N_DONE": n_done,
        "DONE_PAD": triton.next_power_of_2(n_done),
        "ROWS": tiles.rows,
        "WORDS": max(16, min(tiles.words, triton.next_power_of_2(up.columns * parts_of(up.bits) // 32))),
        "STAGES": tiles.stages,
    }
    args = (
        *(x_TD.contiguous(), *words_of(up), *((None, None) if gate is None else words_of(gate)), up_bias, gate_bias),
        *(expert_weights_TE, out_TF, *(lists or (None, None, None)), n_tokens),
    )
    grid = (triton.cdiv(up.rows, tiles.rows) + (lists is not None), triton.cdiv(n_tokens, token_bucket(n_tokens)))
    return Launch(lowbit.lowbit_rows_kernel, grid, args, constants, tiles.warps)


def _common(n_tokens: int, matrix: LowBitMatrix, n_experts: int, d_ff: int, d_model: int) -> dict[str, Any]:
    sizes = {"D": d_model, "F": d_ff, "E": n_experts, "EXPERT": d_ff // n_experts}
    return {**sizes, "GROUP": matrix.group, "BITS": matrix.bits, "BLOCK_T": token_bucket(n_tokens)}


def words_of(matrix: LowBitMatrix) -> tuple[Tensor, Tensor]:
    """Its codes, four bytes to a number, and its scales."""
    return matrix.planes.view(torch.int32), matrix.scales


def check_codes(x_TD: Tensor, matrix: LowBitMatrix) -> None:
    """LTEError where a matrix does not go with its inputs."""
    if x_TD.ndim != 2 or x_TD.shape[1] != matrix.columns:
        raise LTEError(f"x_TD has shape {list(x_TD.shape)}; give [tokens, {matrix.columns}], the width of the weights.")
    if matrix.planes.device != x_TD.device:
        raise LTEError(f"the codes are on {matrix.planes.device} and x_TD on {x_TD.device}; move one of them.")
    assert len(matrix.planes) * ROWS >= matrix.rows
