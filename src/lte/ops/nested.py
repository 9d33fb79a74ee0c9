"""Feed-forward networks in two planes of bits: upper ones serve all neurons, lower ones those in need."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lte.ops.lowbit import FFNCopy, LowBitMatrix, as_taken, pack
from lte.ops.reference import ACTIVATIONS

PIECE = 64
"""Columns of a piece of a row of codes."""

PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,)}
"""Bits of a code -> of the planes it is stored in, lowest first."""


@dataclass(frozen=True)
class RowCodes:
    """[N, D] codes of 1 to 4 bits, a row being one stretch of memory.

    A row is cut into pieces of 64 columns, of 8 bytes for every bit. Of codes of w = 1, 2 or 4 bits byte j of 8 w has
    columns j, j + 8 w, j + 16 w, ..., lowest bits first; of three bits the two lower ones come first, so stored, and
    then the third. A kernel takes all of a piece by one shift of each of its words.

    Attributes:
        data: [N, pieces * 8 * bits] uint8.
        columns: D; those that the last piece lacks are filled up.
        bits: of a code.
    """

    data: Tensor
    columns: int
    bits: int

    @classmethod
    def of(cls, data: Tensor, columns: int) -> RowCodes:
        """What is stored of rows of so many columns."""
        return cls(data, columns, data.shape[1] // (8 * -(-columns // PIECE)))

    @classmethod
    def pack(cls, codes_ND: Tensor, bits: int) -> RowCodes:
        """Of codes from 0 to ``2 ** bits - 1``."""
        columns, low, parts = codes_ND.shape[1], 0, []
        pieces = F.pad(codes_ND.int(), (0, -columns % PIECE)).unflatten(1, (-1, PIECE))
        for wide in PLANES[bits]:
            plane = (pieces >> low & (2**wide - 1)).unflatten(2, (8 // wide, 8 * wide))
            places = wide * torch.arange(8 // wide, device=codes_ND.device)
            parts.append((plane << places[:, None]).sum(2).to(torch.uint8))
            low += wide
        return cls(torch.cat(parts, 2).flatten(1).contiguous(), columns, bits)

    def codes(self) -> Tensor:
        """[N, D] uint8."""
        pieces, low = self.data.unflatten(1, (-1, 8 * self.bits)), 0
        codes = torch.zeros((*pieces.shape[:2], PIECE), dtype=torch.uint8, device=self.data.device)
        for wide in PLANES[self.bits]:
            plane = pieces[:, :, 8 * low : 8 * (low + wide)].unsqueeze(2)
            places = wide * torch.arange(8 // wide, dtype=torch.uint8, device=self.data.device)
            codes |= (plane >> places[:, None] & (2**wide - 1)).flatten(2) << low
            low += wide
        return codes.flatten(1)[:, : self.columns]

    def levels(self) -> Tensor:
        """[N, D] float32: codes counted from the middle of their range."""
        return self.codes().float() - (2**self.bits - 1) / 2


@dataclass(frozen=True)
class NestedMatrix:
    """[N, D] numbers of ``upper.bits + lower.bits`` bits; the upper plane alone has the nearest of as many bits less.

    Attributes:
        upper: in tiles, all rows of which are read.
        lower: of single rows, whose scales are the upper plane's by ``2 ** -lower.bits``; None where there is none.
    """

    upper: LowBitMatrix
    lower: RowCodes | None

    @classmethod
    def of(cls, codes_ND: Tensor, scales_NG: Tensor, bits: int, coarse: int, columns: int) -> NestedMatrix:
        """Cut codes of some bits, in whole groups, into the ``coarse`` upper ones and the others; D is ``columns``."""
        low = bits - coarse
        upper = pack(codes_ND.int() >> low, scales_NG.float() * 2**low, coarse, columns)
        return cls(upper, _lower(codes_ND[:, :columns], low))

    def correction(self) -> Tensor:
        """[N, D] float32, by how much the exact numbers differ from the upper plane's; 0 without a lower one."""
        return _correction(self.lower, self.upper.scales_of_rows(), self.upper.group, self.upper.columns)

    def dequantize(self) -> Tensor:
        """[N, D] float32."""
        return self.upper.dequantize() + self.correction()


@dataclass(frozen=True)
class NestedRows:
    """The same, any row of which may be left out: of a down projection, [F, D], one row per neuron.

    Attributes:
        upper, lower: codes; no lower ones where all bits are upper.
        scales: [F, G] bfloat16, of the upper plane.
        group: neighbours in a row that share a scale, a multiple of 64.
        exact: [K] int32, ascending: of rows that count much and round badly, those of the few neurons with massive
            activations; their scales are 0, and ``exact_rows`` has them.
        exact_rows: [K, D] bfloat16.
    """

    upper: RowCodes
    lower: RowCodes | None
    scales: Tensor
    group: int
    exact: Tensor
    exact_rows: Tensor

    @classmethod
    def of(
        cls,
        codes_FD: Tensor,
        scales_FG: Tensor,
        bits: int,
        coarse: int,
        columns: int,
        exact: Tensor | None = None,
        exact_rows: Tensor | None = None,
    ) -> NestedRows:
        """As :meth:`NestedMatrix.of`, of whole groups in every row; with no exact rows, or some."""
        low, group = bits - coarse, codes_FD.shape[1] // scales_FG.shape[1]
        scales = (scales_FG.float() * 2**low).bfloat16().contiguous()
        upper, lower = RowCodes.pack(codes_FD[:, :columns].int() >> low, coarse), _lower(codes_FD[:, :columns], low)
        if exact is None or exact_rows is None:
            exact, exact_rows = codes_FD.new_empty(0, dtype=torch.int32), codes_FD.new_empty(0, columns)
        scales[exact.long()] = 0
        return cls(upper, lower, scales, group, exact.int(), exact_rows.bfloat16())

    def coarse(self) -> Tensor:
        """[F, D] float32, the upper plane's numbers, or the exact ones."""
        numbers = self.upper.levels() * _spread(self.scales, self.group, self.upper.columns)
        numbers[self.exact.long()] = self.exact_rows.float()
        return numbers

    def correction(self) -> Tensor:
        """As :meth:`NestedMatrix.correction`."""
        return _correction(self.lower, self.scales, self.group, self.upper.columns)

    def dequantize(self) -> Tensor:
        """[F, D] float32."""
        return self.coarse() + self.correction()


@dataclass(frozen=True)
class NestedFFN:
    """An FFN of which every neuron, for every token, is left out, computed from its upper bits, or from all.

    Attributes:
        copy: gate and up of the upper bits, and what a neuron's activation counts: as for self-prediction, they say
            which neurons are needed.
        gate_lower, up_lower: the other bits of gate and up; None where there are none, or no gate.
        down: one row per neuron.
        up_bias, gate_bias, down_bias: of the FFN, or None.
        activation: one of :data:`lte.ops.ACTIVATIONS`.
    """

    copy: FFNCopy
    down: NestedRows
    up_lower: RowCodes | None = None
    gate_lower: RowCodes | None = None
    up_bias: Tensor | None = None
    gate_bias: Tensor | None = None
    down_bias: Tensor | None = None
    activation: str = "silu"

    @property
    def d_ff(self) -> int:
        """Number of neurons F."""
        return self.copy.up.rows

    @property
    def d_model(self) -> int:
        """Width D of the residual stream."""
        return self.copy.up.columns

    @property
    def bits(self) -> int:
        """Of a weight, in both planes."""
        return self.down.upper.bits + (0 if self.down.lower is None else self.down.lower.bits)

    def bits_read(self, on: float, fine: float) -> float:
        """Bits of a weight that a token reads in the mean, scales included, where shares of the neurons run.

        Args:
            on: share of neurons that run.
            fine: share that runs on all bits.
        """
        matrices = [matrix for matrix in (self.copy.gate, self.copy.up) if matrix is not None]
        more = self.down.scales.nbytes + self.down.exact_rows.nbytes
        down = self.down.upper.bits + 8 * more / (self.d_ff * self.d_model)
        low = self.bits - self.down.upper.bits
        read = sum(matrix.bits_per_weight for matrix in matrices) + on * down + fine * low * (len(matrices) + 1)
        return read / (len(matrices) + 1)


def nested_ffn_reference(x_TD: Tensor, weights: NestedFFN, cut: float, fine_cut: float) -> Tensor:
    """What kernels compute, in plain PyTorch: on the CPU gate and up see inputs in 8 bits.

    Args:
        x_TD: [T, D] inputs.
        weights: the FFN.
        cut: score above which a neuron runs; below 0 all do.
        fine_cut: score above which one that runs does so on all bits.

    Returns:
        [T, D], in the dtype of ``x_TD``.
    """
    copy, act = weights.copy, ACTIVATIONS[weights.activation]
    rounded = as_taken(x_TD, copy.up.group)

    def product(upper: LowBitMatrix, bias: Tensor | None) -> Tensor:
        return F.linear(rounded, upper.dequantize(), None if bias is None else bias.float())

    def correction(upper: LowBitMatrix, lower: RowCodes | None) -> Tensor:
        return F.linear(rounded, NestedMatrix(upper, lower).correction())

    up = product(copy.up, weights.up_bias)
    gate = None if copy.gate is None else product(copy.gate, weights.gate_bias)
    hidden = act(up) if gate is None else act(gate) * up
    scores = hidden.abs() * copy.norms
    on = (scores > cut) | (cut < 0)
    fine = on & ((scores > fine_cut) | (fine_cut < 0))
    up = up + correction(copy.up, weights.up_lower)
    if copy.gate is not None and gate is not None:
        exact = act(gate + correction(copy.gate, weights.gate_lower)) * up
    else:
        exact = act(up)
    hidden = torch.where(fine, exact, hidden) * on
    y_TD = hidden @ weights.down.coarse() + (hidden * fine) @ weights.down.correction()
    return (y_TD if weights.down_bias is None else y_TD + weights.down_bias.float()).to(x_TD.dtype)


def _lower(codes_ND: Tensor, low: int) -> RowCodes | None:
    return RowCodes.pack(codes_ND.int() & (2**low - 1), low) if low else None


def _spread(scales_NG: Tensor, group: int, columns: int) -> Tensor:
    return scales_NG.float().repeat_interleave(group, 1)[:, :columns]


def _correction(lower: RowCodes | None, scales_NG: Tensor, group: int, columns: int) -> Tensor:
    if lower is None:
        return torch.zeros(len(scales_NG), columns, device=scales_NG.device)
    return lower.levels() * _spread(scales_NG, group, columns) * 2.0**-lower.bits
