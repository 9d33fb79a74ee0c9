"""Launches of the kernels for FFNs in two planes of bits; inputs are not rounded to 8 bits as on the CPU."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
from torch import Tensor

from lte.errors import LTEError
from lte.ops.nested import PIECE, NestedFFN, RowCodes
from lte.ops.triton import planes
from lte.ops.triton.configs import token_bucket
from lte.ops.triton.launch import Launch, current_gpu, run, workspace
from lte.ops.triton.quantized import check_codes, parts_of, words_of


@dataclass(frozen=True)
class Tiles:
    """Of the rows kernel and the down kernel.

    Attributes:
        rows, words, warps, stages: neurons per program, words per step, warps, pipeline depth.
        neurons, pieces, down_warps, down_stages: neurons per step, 64 columns per program, and as above.
        down_programs_per_sm: into which the neurons are split.
    """

    rows: int
    words: int
    warps: int
    stages: int
    neurons: int
    pieces: int
    down_warps: int
    down_stages: int
    down_programs_per_sm: int


ONE = Tiles(16, 64, 4, 3, neurons=16, pieces=4, down_warps=4, down_stages=3, down_programs_per_sm=4)
SOME = Tiles(32, 16, 4, 2, neurons=16, pieces=1, down_warps=4, down_stages=2, down_programs_per_sm=2)


def tiles_for(n_tokens: int) -> Tiles:
    """What is launched: sums of many tokens take the registers that a pipeline would."""
    if n_tokens == 1:
        return ONE
    return SOME if n_tokens <= 32 else replace(SOME, rows=16, stages=1)


def nested_ffn(x_TD: Tensor, weights: NestedFFN, cut: float, fine_cut: float) -> Tensor:
    """``nested_ffn_reference`` in two launches, its inputs as they are. Inference only.

    Args:
        x_TD: [T, D] float32, bfloat16 or float16.
        weights: upper planes of 1 to 4 bits, lower ones of none to 4.
        cut, fine_cut: scores above which a neuron runs, and runs on all bits; below 0 all do.

    Returns:
        [T, D]. Deterministic: the same bits for the same input on the same GPU.

    Raises:
        LTEError: an input these kernels cannot take.
    """
    if not len(x_TD):
        return torch.empty_like(x_TD)
    for matrix in filter(None, (weights.copy.up, weights.copy.gate)):
        check_codes(x_TD, matrix)
        if matrix.group % PIECE:
            raise LTEError(f"groups of {matrix.group} weights; those of two planes are multiples of {PIECE}.")
    out_TD, launches = nested_launches(x_TD, weights, cut, fine_cut, current_gpu(x_TD.device).sms)
    run(x_TD.device, launches)
    return out_TD


def nested_launches(
    x_TD: Tensor, weights: NestedFFN, cut: float, fine_cut: float, sms: int
) -> tuple[Tensor, list[Launch]]:
    """The output and the two launches that fill it."""
    (n_tokens, d_model), d_ff, device = x_TD.shape, weights.d_ff, x_TD.device
    copy, down, block_t = weights.copy, weights.down, token_bucket(n_tokens)
    tiles = tiles_for(n_tokens)
    blocks, n_done = triton.cdiv(n_tokens, block_t), triton.cdiv(d_model, PIECE * tiles.pieces)
    wanted = tiles.down_programs_per_sm * sms // n_done
    splits = 1 if blocks > 1 else max(1, min(wanted, triton.cdiv(d_ff, tiles.neurons), 64))
    hidden_TF = workspace((n_tokens, d_ff), torch.float32 if n_tokens == 1 else x_TD.dtype, device)
    state_TF = workspace((n_tokens, d_ff), torch.uint8, device)
    done = workspace((blocks, n_done), torch.int32, device)
    partial = workspace((splits, *x_TD.shape), torch.float32, device) if splits > 1 else None
    out_TD = torch.empty(x_TD.shape, dtype=x_TD.dtype, device=device)
    common = {
        "D": d_model,
        "F": d_ff,
        "UPPER": down.upper.bits,
        "LOWER": 0 if down.lower is None else down.lower.bits,
        "BLOCK_T": block_t,
        "N_DONE": n_done,
    }
    up, gate = copy.up, copy.gate
    constants = common | {
        "GROUP": up.group,
        "ACT": weights.activation,
        "DONE_PAD": triton.next_power_of_2(n_done),
        "ROWS": tiles.rows,
        "WORDS": max(16, min(tiles.words, triton.next_power_of_2(d_model * parts_of(up.bits) // 32))),
        "STAGES": tiles.stages,
    }
    args = (
        *(x_TD.contiguous(), *words_of(up), _words(weights.up_lower)),
        *((None, None, None) if gate is None else (*words_of(gate), _words(weights.gate_lower))),
        *(weights.up_bias, weights.gate_bias, copy.norms, hidden_TF, state_TF, done, float(cut), float(fine_cut)),
    )
    rows = Launch(
        planes.nested_rows_kernel, (triton.cdiv(d_ff, tiles.rows), blocks), (*args, n_tokens), constants, tiles.warps
    )
    constants = common | {
        "GROUP": down.group,
        "NEURONS": tiles.neurons,
        "PIECES": tiles.pieces,
        "SPLITS": splits,
        "STAGES": tiles.down_stages,
    }
    args = (
        *(hidden_TF, state_TF, _words(down.upper), _words(down.lower), down.scales, down.exact, down.exact_rows),
        *(weights.down_bias, done, partial, out_TD, len(down.exact), n_tokens),
    )
    return out_TD, [
        rows,
        Launch(planes.nested_down_kernel, (n_done, splits, blocks), args, constants, tiles.down_warps),
    ]


def _words(codes: RowCodes | None) -> Tensor | None:
    return None if codes is None else codes.data.view(torch.int32)
