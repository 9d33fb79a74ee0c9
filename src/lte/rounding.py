"""Rounding a matrix to few bits with an eye to its inputs: what one weight's error does, later ones make up for."""

from __future__ import annotations

import torch
from torch import Tensor

from lte.ops.lowbit import LowBitMatrix, best_scales, levels_of, pack

DAMPING = 0.01
"""Share of the mean square of the inputs that is added to each, so that those that hardly vary do no harm."""


@torch.no_grad()
def round_compensated(
    matrix_ND: Tensor, squares_DD: Tensor, bits: int, group: int, *, by_columns: bool = False
) -> LowBitMatrix:
    """GPTQ (Frantar et al., 2023): column by column, the error of the outputs is moved to the columns still to come.

    A group's scales are found when its first column is reached, on the weights as they then are.

    Args:
        matrix_ND: [N, D].
        squares_DD: sum of ``x x^T`` over the inputs, float32 or wider.
        bits, group, by_columns: as of :func:`lte.ops.lowbit.quantize`.
    """
    columns = matrix_ND.shape[1]
    factor_DD, weights_D = _factor(squares_DD.to(matrix_ND.device))
    left_ND = torch.nn.functional.pad(matrix_ND.detach().float(), (0, -columns % group))
    levels_ND, scales = torch.empty_like(left_ND), []
    middle = (2**bits - 1) / 2
    for first in range(0, columns, group):
        last = min(first + group, columns)
        part_Nk = left_ND[:, first : first + group]
        scale_N = best_scales(part_Nk.unsqueeze(1), _padded(weights_D[first:last], group)[None], bits)[:, 0]
        scales.append(scale_N)
        errors_Nk = torch.zeros_like(part_Nk)
        for column in range(last - first):
            values_N = part_Nk[:, column]
            level_N = levels_of(values_N[:, None], scale_N, middle)[:, 0]
            levels_ND[:, first + column] = level_N
            factors_k = factor_DD[first + column, first + column : last]
            errors_Nk[:, column] = (values_N - level_N * scale_N) / factors_k[0]
            part_Nk[:, column : last - first] -= errors_Nk[:, column, None] * factors_k
        levels_ND[:, last : first + group] = -middle
        left_ND[:, last:columns] -= errors_Nk[:, : last - first] @ factor_DD[first:last, last:]
    return pack(levels_ND + middle, torch.stack(scales, 1), bits, columns, by_columns=by_columns)


def _factor(squares_DD: Tensor) -> tuple[Tensor, Tensor]:
    """Upper triangular factor of the inverse, and how much errors of each column count that nothing makes up for."""
    exact = squares_DD.device.type == "cpu" and len(squares_DD) <= 2048
    squares_DD = squares_DD.double() if exact else squares_DD.float()
    diagonal_D = squares_DD.diagonal()
    mean = diagonal_D.mean().clamp_min(1e-30)
    damped_DD = squares_DD + torch.diag(torch.full_like(diagonal_D, float(DAMPING * mean)))
    inverse_DD = torch.cholesky_inverse(torch.linalg.cholesky(damped_DD))
    factor_DD = torch.linalg.cholesky(inverse_DD, upper=True)
    return factor_DD.float(), factor_DD.diagonal().pow(-2).float()


def _padded(values_k: Tensor, group: int) -> Tensor:
    return torch.nn.functional.pad(values_k, (0, group - len(values_k)))
