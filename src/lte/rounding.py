"""Rounding a matrix to few bits with an eye to its inputs: what one weight's error does, later ones make up for."""

from __future__ import annotations

import torch
from torch import Tensor

from lte.ops.lowbit import LowBitMatrix, best_scales, group_scales, pack

DAMPING = 0.01
"""Share of the mean square of the inputs that is added to each, so that those that hardly vary do no harm."""

TOGETHER = 64
"""Columns whose errors are passed on to all others at once, where scales do not say how many belong together."""


def round_compensated(
    matrix_ND: Tensor, squares_DD: Tensor, bits: int, group: int, *, by_columns: bool = False
) -> LowBitMatrix:
    """A matrix by :func:`compensated_codes`.

    Args:
        matrix_ND, squares_DD, bits, group: as there.
        by_columns: as of :func:`lte.ops.lowbit.quantize`.
    """
    codes_ND, scales_NG = compensated_codes(matrix_ND, squares_DD, bits, group)
    return pack(codes_ND, scales_NG, bits, matrix_ND.shape[1], by_columns=by_columns)


@torch.no_grad()
def compensated_codes(
    matrix_ND: Tensor, squares_DD: Tensor, bits: int, group: int, *, upper: int | None = None
) -> tuple[Tensor, Tensor]:
    """GPTQ (Frantar et al., 2023): column by column, the error of the outputs is moved to the columns still to come.

    A group's scales are found when its first column is reached, on the weights as they then are.

    Args:
        matrix_ND: [N, D].
        squares_DD: sum of ``x x^T`` over the inputs, float32 or wider.
        bits, group: as of :func:`lte.ops.lowbit.quantize`.
        upper: see :func:`lte.ops.lowbit.best_scales`.

    Returns:
        Codes [N, whole groups], float32, and scales [N, G].
    """
    columns = matrix_ND.shape[1]
    factor_DD, weights_D = _factor(squares_DD.to(matrix_ND.device))
    # Columns lie one after the other here: nearly all of the time goes into walking along them.
    left_DN = torch.nn.functional.pad(matrix_ND.detach().float().T, (0, 0, 0, -columns % group)).contiguous()
    codes_DN, scales = torch.zeros_like(left_DN), []
    middle = (2**bits - 1) / 2
    for first in range(0, columns, group):
        last = min(first + group, columns)
        part_kN = left_DN[first : first + group]
        scale_N = group_scales(part_kN.T.contiguous(), _padded(weights_D[first:last], group), bits, upper)
        scales.append(scale_N)
        errors_kN = torch.empty_like(part_kN[: last - first])
        for column in range(last - first):
            level_N = (part_kN[column] / scale_N).add_(middle).round_().clamp_(0, 2 * middle)
            codes_DN[first + column] = level_N
            factors_k = factor_DD[first + column, first + column : last]
            torch.sub(part_kN[column], level_N.sub_(middle).mul_(scale_N), out=errors_kN[column]).div_(factors_k[0])
            part_kN[column : last - first].addr_(factors_k, errors_kN[column], alpha=-1)
        left_DN[last:columns] -= factor_DD[first:last, last:].T @ errors_kN
    return codes_DN.T, torch.stack(scales, 1)


@torch.no_grad()
def compensated_columns(
    matrix_ND: Tensor, squares_DD: Tensor, bits: int, group: int, *, upper: int | None = None
) -> tuple[Tensor, Tensor]:
    """The same, where scales are those of one column, for groups of neighbouring rows: of single neurons' outputs.

    Scales are found for :data:`TOGETHER` columns at a time.

    Args:
        matrix_ND, squares_DD, bits, upper: as of :func:`compensated_codes`.
        group: rows that share a scale.

    Returns:
        Of the transposed matrix: codes [D, whole groups], float32, and scales [D, G].
    """
    rows, columns = matrix_ND.shape
    factor_DD, _ = _factor(squares_DD.to(matrix_ND.device))
    left_DN = matrix_ND.detach().float().T.contiguous()
    codes, scales, middle = [], [], (2**bits - 1) / 2
    equal_Gk = torch.nn.functional.pad(torch.ones(rows, device=matrix_ND.device), (0, -rows % group)).view(-1, group)
    for first in range(0, columns, TOGETHER):
        last = min(first + TOGETHER, columns)
        part_kN = torch.nn.functional.pad(left_DN[first:last], (0, -rows % group))
        scales_kG = best_scales(part_kN.unflatten(1, (-1, group)), equal_Gk, bits, upper)
        spread_kN = scales_kG.repeat_interleave(group, 1)
        codes_kN, errors_kN = torch.empty_like(part_kN), torch.empty_like(part_kN)
        for column in range(last - first):
            level_N = (part_kN[column] / spread_kN[column] + middle).round().clamp(0, 2 * middle) - middle
            codes_kN[column] = level_N + middle
            factors_k = factor_DD[first + column, first + column : last]
            errors_kN[column] = (part_kN[column] - level_N * spread_kN[column]) / factors_k[0]
            part_kN[column:] -= factors_k[:, None] * errors_kN[column]
        left_DN[last:] -= factor_DD[first:last, last:].T @ errors_kN[:, :rows]
        codes.append(codes_kN)
        scales.append(scales_kG)
    return torch.cat(codes), torch.cat(scales)


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
