"""Matrices of a few bits per weight: what a coarse copy of a layer is made of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BITS = (1, 2, 3, 4)
"""Widths there are."""

SHRINKS = 13
"""Scales tried for every group, from that of its largest weight down to less than half of it."""

CHUNK = 1 << 22
"""Weights whose scales are searched at a time."""


@dataclass(frozen=True)
class LowBitMatrix:
    """[N, D] numbers ``scale * (code - (2 ** bits - 1) / 2)``, a scale for every group of neighbours in a row.

    The levels are symmetric and leave zero out: with two bits they are -1.5, -0.5, 0.5 and 1.5 scales. Bit b of the
    codes of a group is a bit plane of its own, of group / 8 bytes, lowest bit first.

    Attributes:
        planes: [N, G, bits, group / 8] uint8.
        scales: [N, G] bfloat16.
        columns: D; the last group is filled up with codes that no input meets.
    """

    planes: Tensor
    scales: Tensor
    columns: int

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return self.planes.shape[2]

    @property
    def group(self) -> int:
        """Weights that share a scale."""
        return 8 * self.planes.shape[3]

    @property
    def nbytes(self) -> int:
        """Of codes and scales."""
        return self.planes.nbytes + self.scales.nbytes

    @property
    def bits_per_weight(self) -> float:
        """Scales included."""
        return 8 * self.nbytes / (self.planes.shape[0] * self.columns)

    def codes(self) -> Tensor:
        """[N, G, group] uint8."""
        places = torch.arange(8, device=self.planes.device, dtype=torch.uint8)
        found = (self.planes.unsqueeze(-1) >> places) & 1
        weights = 2 ** torch.arange(self.bits, device=self.planes.device, dtype=torch.uint8)
        return (found.flatten(-2) * weights[:, None]).sum(-2, dtype=torch.uint8)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[N, D]."""
        levels = self.codes().float() - _middle(self.bits)
        return (levels * self.scales.float().unsqueeze(-1)).flatten(1)[:, : self.columns].to(dtype)


@dataclass(frozen=True)
class FFNCopy:
    """What an FFN's coarse copy consists of, for the kernels.

    Attributes:
        up: [F, D], of the up matrix.
        norms: [F] float32, of the rows of the down projection.
        gate: [F, D], or None for a plain FFN.
    """

    up: LowBitMatrix
    norms: Tensor
    gate: LowBitMatrix | None = None

    def tensors(self) -> list[Tensor]:
        """All that it points to."""
        matrices = [matrix for matrix in (self.gate, self.up) if matrix is not None]
        return [self.norms, *(t for matrix in matrices for t in (matrix.planes, matrix.scales))]


@torch.no_grad()
def quantize(matrix_ND: Tensor, bits: int, group: int = 64, importance_D: Tensor | None = None) -> LowBitMatrix:
    """Round a matrix to few bits; every group's scale is the one, of some, with the smallest squared error.

    Args:
        matrix_ND: [N, D].
        bits: 1 to 4.
        group: neighbours in a row that share a scale; a multiple of 8.
        importance_D: [D], weights of the errors, for instance the mean squares of the inputs; None for equal ones.

    Raises:
        ValueError: the width or the group is none there is.
    """
    if bits not in BITS or group < 8 or group % 8:
        raise ValueError(f"bits={bits}, group={group}: bits must be one of {BITS}, and group a multiple of 8")
    matrix_ND = matrix_ND.detach()
    if _kernels_take(matrix_ND):
        return _quantize_fast(matrix_ND, bits, group, importance_D)
    columns = matrix_ND.shape[1]
    weights_D = torch.ones(columns, device=matrix_ND.device) if importance_D is None else importance_D.float()
    weights_Gk = _grouped(weights_D[None], group)[0]
    planes, scales = [], []
    rows = max(1, CHUNK // columns)
    for part in matrix_ND.split(rows):
        codes, scale = _round(_grouped(part.float(), group), weights_Gk, bits)
        planes.append(_planes(codes, bits))
        scales.append(scale.bfloat16())
    return LowBitMatrix(torch.cat(planes), torch.cat(scales), columns)


def _kernels_take(matrix_ND: Tensor) -> bool:
    from lte.ops import cpu  # it describes these matrices to the kernels, and so comes after them

    plain = matrix_ND.device.type == "cpu" and matrix_ND.dtype in cpu.DTYPES and matrix_ND.stride(1) == 1
    return plain and not cpu.unavailable()


def _quantize_fast(matrix_ND: Tensor, bits: int, group: int, importance_D: Tensor | None) -> LowBitMatrix:
    from lte.ops import cpu

    rows, columns = matrix_ND.shape
    groups = -(-columns // group)
    planes = torch.empty(rows, groups, bits, group // 8, dtype=torch.uint8)
    made = LowBitMatrix(planes, torch.empty(rows, groups, dtype=torch.bfloat16), columns)
    cpu.quantize(matrix_ND, made, None if importance_D is None else importance_D.float().contiguous(), SHRINKS)
    return made


def round_to(matrix_ND: Tensor, scales_NG: Tensor, bits: int, group: int) -> Tensor:
    """The numbers a matrix is rounded to with scales that are given; [N, D], float32."""
    grouped, scales = _grouped(matrix_ND.detach().float(), group), scales_NG.float()
    rounded = _levels(grouped, scales, _middle(bits)) * scales.unsqueeze(-1)
    return rounded.flatten(1)[:, : matrix_ND.shape[1]]


def round_inputs(x_TD: Tensor, group: int) -> Tensor:
    """Inputs as integer dot products see them: to 8 bits, symmetric, a scale for every group; [..., D], float32."""
    grouped = _grouped(x_TD.float().flatten(0, -2), group)
    scales = (grouped.abs().amax(-1, keepdim=True) / 127).clamp_min(1e-30)
    rounded = (grouped / scales).round() * scales
    return rounded.flatten(1)[:, : x_TD.shape[-1]].view(x_TD.shape)


def _middle(bits: int) -> float:
    return (2**bits - 1) / 2


def _grouped(matrix_ND: Tensor, group: int) -> Tensor:
    """[N, G, group], filled up with zeros."""
    missing = -matrix_ND.shape[1] % group
    return torch.nn.functional.pad(matrix_ND, (0, missing)).unflatten(1, (-1, group))


def _round(grouped_NGk: Tensor, weights_Gk: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes and scales with the smallest weighted squared error of some."""
    middle = _middle(bits)
    largest = grouped_NGk.abs().amax(-1)
    best_error = torch.full_like(largest, torch.inf)
    best_scale = torch.ones_like(largest)
    for step in range(SHRINKS):
        scale = (largest * (1 - 0.05 * step) / middle).bfloat16().float().clamp_min(2**-64)
        levels = _levels(grouped_NGk, scale, middle)
        error = ((levels * scale.unsqueeze(-1) - grouped_NGk).square() * weights_Gk).sum(-1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
    return (_levels(grouped_NGk, best_scale, middle) + middle).to(torch.uint8), best_scale


def _levels(grouped_NGk: Tensor, scale_NG: Tensor, middle: float) -> Tensor:
    return ((grouped_NGk / scale_NG.unsqueeze(-1) + middle).round().clamp(0, 2 * middle)) - middle


def _planes(codes_NGk: Tensor, bits: int) -> Tensor:
    """[N, G, bits, group / 8]."""
    places = 2 ** torch.arange(8, device=codes_NGk.device, dtype=torch.uint8)
    return torch.stack(
        [(((codes_NGk >> bit) & 1).unflatten(-1, (-1, 8)) * places).sum(-1, dtype=torch.uint8) for bit in range(bits)],
        dim=2,
    )
