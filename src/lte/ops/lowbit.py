"""Matrices of a few bits per weight: what a coarse copy of a layer is made of, and a quantised layer."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lte.memory import empty_for_streaming

BITS = (1, 2, 3, 4, 5, 6, 7, 8)
"""Widths there are."""

AT_ONCE = 2**24
"""Numbers that one operation takes, where there are more and memory would grow with them."""

FEW_ROWS = 8
"""Rows that are written out with the blocks they lie in."""

SHRINKS = 13
"""Scales tried for every group, from that of its largest weight down to less than half of it."""

CHUNK = 1 << 22
"""Weights whose scales are searched at a time."""


ROWS, COLUMNS = 16, 32
"""Of a tile, the unit of storage: as many rows as the widest vectors have lanes, and eight times four columns."""

STEPS = COLUMNS // 4
"""Codes of a row that a byte of every plane holds."""


@dataclass(frozen=True)
class LowBitMatrix:
    """[N, D] numbers ``scale * (code - (2 ** bits - 1) / 2)``, a scale for every group of neighbours in a row.

    The levels are symmetric and leave zero out: with two bits they are -1.5, -0.5, 0.5 and 1.5 scales. A matrix is
    cut into tiles of 16 rows and 32 columns. The eight codes of a row r and of the columns c, 4 + c, 8 + c, ... of a
    tile have a byte in each of as many planes as there are bits, byte 4 r + c of 64. In every byte lie as many whole
    codes as it has room for, the first lowest; of three bits that is two in each, and bit b of codes 6 and 7 is bit 6
    and 7 of plane b. A kernel takes one code of all bytes at a time, and has four columns of every row, each row in a
    lane.

    Attributes:
        planes: [N / 16, G, group / 32, bits, 64] uint8; rows and columns that N and D lack are filled up.
        scales: [N / 16, G, 16] bfloat16.
        rows: N.
        columns: D.
        by_columns: whether the blocks of rows come behind the groups of columns and the chunks of these,
            [G, group / 32, N / 16, bits, 64] and [G, N / 16, 16]: the weights of a group of columns lie together.
    """

    planes: Tensor
    scales: Tensor
    rows: int
    columns: int
    by_columns: bool = False

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return self.planes.shape[3]

    @property
    def group(self) -> int:
        """Weights that share a scale."""
        return COLUMNS * self.planes.shape[1 if self.by_columns else 2]

    @property
    def groups(self) -> int:
        """Of a row."""
        return self.planes.shape[0 if self.by_columns else 1]

    def numel(self) -> int:
        """Number of weights."""
        return self.rows * self.columns

    @property
    def nbytes(self) -> int:
        """Of codes and scales."""
        return self.planes.nbytes + self.scales.nbytes

    @property
    def bits_per_weight(self) -> float:
        """Scales included."""
        return 8 * self.nbytes / (self.rows * self.columns)

    def codes(self) -> Tensor:
        """[N, G, group] uint8."""
        return self.codes_of_blocks().flatten(0, 1)[: self.rows]

    def codes_of_blocks(self) -> Tensor:
        """[N / 16, 16, G, group] uint8."""
        planes = self.planes.permute(2, 0, 1, 3, 4) if self.by_columns else self.planes
        codes = torch.cat([_codes_of(part, self.bits) for part in planes.split(_at_once(planes))])
        return codes.unflatten(-1, (ROWS, 4)).permute(0, 4, 1, 2, 3, 5).flatten(3)

    def halves(self) -> tuple[LowBitMatrix, LowBitMatrix]:
        """The upper and the lower half of the rows, of a matrix that lies row by row and has whole blocks in each."""
        assert not self.by_columns
        assert self.rows % (2 * ROWS) == 0
        pairs = zip(self.planes.chunk(2), self.scales.chunk(2), strict=True)
        upper, lower = (replace(self, planes=planes, scales=scales, rows=self.rows // 2) for planes, scales in pairs)
        return upper, lower

    def scales_of_rows(self) -> Tensor:
        """[N, G] bfloat16."""
        scales = self.scales.transpose(0, 1) if self.by_columns else self.scales
        return scales.transpose(1, 2).flatten(0, 1)[: self.rows]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[N, D]."""
        stored = self.planes, self.scales
        if all(t.device.type == "cpu" and t.is_contiguous() for t in stored) and _kernels_take(dtype):
            from lte.ops import cpu

            return cpu.dequantize(self, dtype)
        return self.dequantize_reference(dtype)

    def dequantize_reference(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The same by its definition, in plain PyTorch."""
        levels = self.codes().float() - _middle(self.bits)
        return _numbers(levels, self.scales_of_rows(), self.columns).to(dtype)


@dataclass(frozen=True)
class FFNCopy:
    """What an FFN's coarse copy consists of, for the kernels.

    Attributes:
        up: [F, D], of the up matrix.
        norms: [F] float32, of the rows of the down projection, or whatever the neurons' activations count.
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
def quantize(
    matrix_ND: Tensor,
    bits: int,
    group: int = 64,
    importance_D: Tensor | None = None,
    *,
    by_columns: bool = False,
) -> LowBitMatrix:
    """Round a matrix to few bits; every group's scale is the one, of some, with the smallest squared error.

    Args:
        matrix_ND: [N, D].
        bits: 1 to 8.
        group: neighbours in a row that share a scale; a multiple of 32.
        importance_D: [D], weights of the errors, for instance the mean squares of the inputs; None for equal ones.
        by_columns: see :class:`LowBitMatrix`.

    Raises:
        ValueError: the width or the group is none there is.
    """
    if bits not in BITS or group < COLUMNS or group % COLUMNS:
        raise ValueError(f"bits={bits}, group={group}: bits must be one of {BITS}, and group a multiple of {COLUMNS}")
    matrix_ND = matrix_ND.detach()
    if quantizes_fast(matrix_ND):
        return _quantize_fast(matrix_ND, bits, group, importance_D, by_columns)
    codes, scales = nearest_codes(matrix_ND, bits, group, importance_D)
    return pack(codes, scales, bits, matrix_ND.shape[1], by_columns=by_columns)


@torch.no_grad()
def nearest(matrix_ND: Tensor, bits: int, group: int, importance_D: Tensor | None = None) -> Tensor:
    """The numbers that :func:`quantize` rounds a matrix to, [N, D] float32, without any being packed."""
    codes, scales = nearest_codes(matrix_ND, bits, group, importance_D)
    levels = codes.unflatten(1, (-1, group)).float() - _middle(bits)
    return _numbers(levels, scales, matrix_ND.shape[1])


@torch.no_grad()
def nearest_codes(
    matrix_ND: Tensor, bits: int, group: int, importance_D: Tensor | None = None, *, upper: int | None = None
) -> tuple[Tensor, Tensor]:
    """What :func:`quantize` packs: codes [N, whole groups] uint8 and scales [N, G].

    Args:
        matrix_ND, bits, group, importance_D: as there.
        upper: see :func:`best_scales`.
    """
    columns = matrix_ND.shape[1]
    weights_D = torch.ones(columns, device=matrix_ND.device) if importance_D is None else importance_D.float()
    weights_Gk = _grouped(weights_D[None], group)[0]
    made = []
    for part in matrix_ND.detach().split(max(1, CHUNK // columns // ROWS) * ROWS):
        grouped = _grouped(part.float(), group)
        scale = best_scales(grouped, weights_Gk, bits, upper)
        codes = levels_of(grouped, scale, _middle(bits)) + _middle(bits)
        made.append((codes.flatten(1).to(torch.uint8), scale))
    codes, scales = (torch.cat(each) for each in zip(*made, strict=True))
    return codes, scales


def pack(codes_ND: Tensor, scales_NG: Tensor, bits: int, columns: int, *, by_columns: bool = False) -> LowBitMatrix:
    """A matrix from its codes and scales.

    Args:
        codes_ND: [N, whole groups], from 0 to ``2 ** bits - 1``.
        scales_NG: [N, G].
        bits: of a code.
        columns: D.
        by_columns: see :class:`LowBitMatrix`.
    """
    rows, group = len(codes_ND), codes_ND.shape[1] // scales_NG.shape[1]
    planes = _planes(_whole_blocks(codes_ND.to(torch.uint8)), bits, group)
    if by_columns:
        planes = planes.permute(1, 2, 0, 3, 4)
    scales = scales_in_blocks(scales_NG, by_columns=by_columns)
    return LowBitMatrix(planes.contiguous(), scales, rows, columns, by_columns)


def scales_in_blocks(scales_NG: Tensor, *, by_columns: bool) -> Tensor:
    """As :class:`LowBitMatrix` has them, in bfloat16."""
    scales = _whole_blocks(scales_NG).bfloat16().unflatten(0, (-1, ROWS)).mT
    return (scales.transpose(0, 1) if by_columns else scales).contiguous()


def _whole_blocks(matrix_ND: Tensor) -> Tensor:
    return torch.nn.functional.pad(matrix_ND, (0, 0, 0, -len(matrix_ND) % ROWS))


def quantizes_fast(matrix_ND: Tensor) -> bool:
    """Whether kernels would round it in :func:`quantize`."""
    return matrix_ND.device.type == "cpu" and matrix_ND.stride(1) == 1 and _kernels_take(matrix_ND.dtype)


def _kernels_take(dtype: torch.dtype) -> bool:
    from lte.ops import cpu  # it describes these matrices to the kernels, and so comes after them

    return dtype in cpu.DTYPES and not cpu.unavailable()


def _quantize_fast(
    matrix_ND: Tensor, bits: int, group: int, importance_D: Tensor | None, by_columns: bool
) -> LowBitMatrix:
    from lte.ops import cpu

    rows, columns = matrix_ND.shape
    blocks, groups = -(-rows // ROWS), -(-columns // group)
    chunks = group // COLUMNS
    order = (groups, chunks, blocks) if by_columns else (blocks, groups, chunks)
    planes = empty_for_streaming((*order, bits, 4 * ROWS), torch.uint8, matrix_ND.device)
    scales = torch.empty((groups, blocks, ROWS) if by_columns else (blocks, groups, ROWS), dtype=torch.bfloat16)
    made = LowBitMatrix(planes, scales, rows, columns, by_columns)
    cpu.quantize(matrix_ND, made, None if importance_D is None else importance_D.float().contiguous(), SHRINKS)
    return made


def dequantize_rows(matrix: LowBitMatrix, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Some rows of a matrix that lies row by row: [...] long to [..., D]."""
    index = rows.flatten()
    if 0 < len(index) <= FEW_ROWS and index.device.type == matrix.planes.device.type == "cpu":
        found = [_block(matrix, row // ROWS).dequantize(dtype)[row % ROWS] for row in index.tolist()]
        return torch.stack(found).view(*rows.shape, matrix.columns)
    planes = matrix.planes.unflatten(-1, (ROWS, 4))[index // ROWS, :, :, :, index % ROWS]  # [T, G, chunks, bits, 4]
    codes = torch.cat([_codes_of(part, matrix.bits) for part in planes.split(_at_once(planes))])
    scales_TG = matrix.scales[index // ROWS, :, index % ROWS]
    values = _numbers(codes.flatten(2).float() - _middle(matrix.bits), scales_TG, matrix.columns)
    return values.to(dtype).view(*rows.shape, matrix.columns)


def _block(matrix: LowBitMatrix, block: int) -> LowBitMatrix:
    """Sixteen rows."""
    planes, scales = matrix.planes.narrow(0, block, 1), matrix.scales.narrow(0, block, 1)
    return LowBitMatrix(planes, scales, ROWS, matrix.columns)


def round_like(matrix_ND: Tensor, like: LowBitMatrix) -> Tensor:
    """The numbers a matrix is rounded to with the scales of another; [N, D], float32."""
    scales = like.scales_of_rows().float()
    levels = levels_of(_grouped(matrix_ND.detach().float(), like.group), scales, _middle(like.bits))
    return _numbers(levels, scales, matrix_ND.shape[1])


def _numbers(levels_NGk: Tensor, scales_NG: Tensor, columns: int) -> Tensor:
    """What levels mean, [N, D] float32."""
    return (levels_NGk * scales_NG.float().unsqueeze(-1)).flatten(1)[:, :columns]


def round_inputs(x_TD: Tensor, group: int) -> Tensor:
    """Inputs as integer dot products see them: to 8 bits, symmetric, a scale for every group; [..., D], float32."""
    grouped = _grouped(x_TD.float().flatten(0, -2), group)
    scales = (grouped.abs().amax(-1, keepdim=True) / 127).clamp_min(1e-30)
    rounded = (grouped / scales).round() * scales
    return rounded.flatten(1)[:, : x_TD.shape[-1]].view(x_TD.shape)


def as_taken(x: Tensor, group: int) -> Tensor:
    """[..., D] float32, as kernels for few bits take their inputs: rounded on the CPU, on a GPU as they are."""
    return round_inputs(x, group) if x.device.type == "cpu" else x.float()


def _middle(bits: int) -> float:
    return (2**bits - 1) / 2


def _grouped(matrix_ND: Tensor, group: int) -> Tensor:
    """[N, G, group], filled up with zeros."""
    missing = -matrix_ND.shape[1] % group
    return torch.nn.functional.pad(matrix_ND, (0, missing)).unflatten(1, (-1, group))


def group_scales(matrix_Nk: Tensor, weights_k: Tensor, bits: int, upper: int | None = None) -> Tensor:
    """:func:`best_scales` where every row is one group, [N]; by kernels where they do it."""
    if upper is None and quantizes_fast(matrix_Nk):
        return quantize(matrix_Nk, bits, matrix_Nk.shape[1], weights_k).scales_of_rows()[:, 0].float()
    return best_scales(matrix_Nk.unsqueeze(1), weights_k[None], bits, upper)[:, 0]


def best_scales(grouped_NGk: Tensor, weights_Gk: Tensor, bits: int, upper: int | None = None) -> Tensor:
    """Of some scales, those with the smallest weighted squared error of each group; [N, G], as bfloat16 has them.

    Args:
        grouped_NGk: numbers.
        weights_Gk: of their errors.
        bits: of a code.
        upper: bits of a code that also serve alone; the error of what they mean then counts as much.
    """
    middle, lower = _middle(bits), bits - (upper or bits)
    largest = grouped_NGk.abs().amax(-1)
    best_error = torch.full_like(largest, torch.inf)
    best_scale = torch.ones_like(largest)
    shrunk_S = torch.tensor([1 - 0.05 * step for step in range(SHRINKS)], device=largest.device)
    # Several at once where a matrix is small: on a GPU each operation takes the time of its launch.
    for shrunk_s in shrunk_S.split(max(1, AT_ONCE // max(grouped_NGk.numel(), 1))):
        scale_s = (largest * shrunk_s.view(-1, 1, 1) / middle).bfloat16().float().clamp_min(2**-64)
        levels = levels_of(grouped_NGk, scale_s, middle)
        error_s = ((levels * scale_s.unsqueeze(-1) - grouped_NGk).square() * weights_Gk).sum(-1)
        if lower:
            coarse = (((levels + middle) / 2**lower).floor() - _middle(bits - lower)) * 2**lower
            error_s += ((coarse * scale_s.unsqueeze(-1) - grouped_NGk).square() * weights_Gk).sum(-1)
        error, chosen = error_s.min(0)
        scale = scale_s.gather(0, chosen[None])[0]
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
    return best_scale


def levels_of(grouped_NGk: Tensor, scale_NG: Tensor, middle: float) -> Tensor:
    """What numbers are rounded to, in scales: from ``-middle`` to ``middle``."""
    return ((grouped_NGk / scale_NG.unsqueeze(-1) + middle).round().clamp(0, 2 * middle)) - middle


@functools.cache
def _order(bits: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """For every place of every plane, the bit there, as ``bits * step + bit``; and the inverse."""
    places = torch.empty(8 * bits, dtype=torch.long)
    for step, bit, plane, place in _places(bits):
        places[8 * plane + place] = bits * step + bit
    return places.to(device), places.argsort().to(device)


def _range(count: int, like: Tensor) -> Tensor:
    return torch.arange(count, dtype=torch.uint8, device=like.device)


def _places(bits: int) -> Iterator[tuple[int, int, int, int]]:
    """Of eight codes: number, bit of it, the plane that has that bit, and where in its byte."""
    fields = 8 // bits
    for step, bit in itertools.product(range(STEPS), range(bits)):
        whole = step < fields * bits
        yield step, bit, step // fields if whole else bit, step % fields * bits + bit if whole else step


def _planes(codes_ND: Tensor, bits: int, group: int) -> Tensor:
    """[N / 16, G, group / 32, bits, 64]."""
    tiles = codes_ND.unflatten(1, (-1, group // COLUMNS, STEPS, 4)).unflatten(0, (-1, ROWS))
    tiles = tiles.permute(4, 0, 2, 3, 1, 5).flatten(4)  # [steps, blocks, G, chunks, 64]
    planes = torch.cat([_planes_of(part, bits) for part in tiles.split(_at_once(tiles[0]), dim=1)], 1)
    return planes.permute(1, 2, 3, 0, 4).contiguous()


def _planes_of(tiles: Tensor, bits: int) -> Tensor:
    """Of codes [steps, blocks, G, chunks, 64], [bits, blocks, G, chunks, 64]."""
    places, _ = _order(bits, tiles.device)
    single = (tiles.unsqueeze(1) >> _range(bits, places).view(bits, 1, 1, 1, 1)) & 1  # [steps, bits, ...]
    single = single.flatten(0, 1).index_select(0, places).unflatten(0, (bits, 8))
    return (single << _range(8, places).view(8, 1, 1, 1, 1)).sum(1, dtype=torch.uint8)


def _codes_of(planes: Tensor, bits: int) -> Tensor:
    """Of planes [blocks, G, chunks, bits, W], the codes, [blocks, G, chunks, steps, W]."""
    _, of_codes = _order(bits, planes.device)
    single = (planes.unsqueeze(4) >> _range(8, of_codes).view(8, 1)) & 1
    single = single.flatten(3, 4).index_select(3, of_codes).unflatten(3, (STEPS, bits))
    return (single << _range(bits, of_codes).view(bits, 1)).sum(4, dtype=torch.uint8)


def _at_once(blocks: Tensor) -> int:
    """Of a tensor's blocks, so many that a byte for each of their bits is no large tensor."""
    return max(1, AT_ONCE * len(blocks) // max(8 * blocks.numel(), 1))
